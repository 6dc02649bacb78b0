"""The keeper of a network of several sandboxes: bridge, addresses, names, way out. Warm.

    keeper      root in the network's user namespace, in its net namespace: bridge sbx0 with tap0 of slirp4netns and an
                interface for each member; resolver on the bridge's address
    slirp4netns in the same user namespace and the host's net namespace; ends with the keeper

All is one Ethernet segment in slirp4netns's subnet, so nothing is routed or translated on the way to it. The keeper
ends, and all of it with it, when the last connection is closed.
"""

from __future__ import annotations

import ipaddress
import marshal
import os
import select
import socket
import struct
import sys
import threading
from typing import Any

from pyroute2 import IPRoute

from rootless import parent, programs, spec, syscalls
from rootless.errors import SbxError
from rootless.network import dns, names, records, slirp4netns
from rootless.spec import IdMap

BRIDGE, INTERFACE = "sbx0", "eth0"
#: Numbers in the subnet: our bridge's, slirp4netns's gateway and resolver, the first member's
OWN, GATEWAY, RESOLVER, FIRST = 1, 2, 3, 4
SUBNET6 = ipaddress.IPv6Network("fd00::/64")  #: slirp4netns has no other
_MTU = 65520
_NODAD = 2
_IDLE = 10_000  #: milliseconds to wait for the first to join


def start(name: str, ids: IdMap) -> None:
    """Start the keeper of the network `name` and return when it serves. Raises SbxError ``network-failed``."""
    config, folder = records.read(name), records.folder(name)
    if not config["internal"]:
        programs.require("slirp4netns")
    try:
        os.unlink(f"{folder}/{records.SOCKET}")
    except FileNotFoundError:
        pass
    parent.call_inside(ids, lambda: _begin(config, folder, ids))


def _begin(config: dict[str, Any], folder: str, ids: IdMap) -> None:
    """In the new user namespace: start keeper and slirp4netns; return when both are ready, and leave them."""
    there, says_there = os.pipe()
    attached, says_attached = os.pipe()
    ready, says_ready = os.pipe()
    ends, alive = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            # The pipes on which the parent of this launch waits for an end of file, among others
            _close_all_but(says_there, attached, says_ready, alive)
            _keep(config, folder, ids, says_there, attached, says_ready)
        except BaseException as error:  # to whoever waits for us, not to nobody
            try:
                os.write(says_ready, f"{error}".encode()[:2000])
            except OSError:
                pass
        finally:
            os._exit(0)
    for fd in (says_there, attached, says_ready, alive):
        os.close(fd)
    if os.read(there, 1) == b"." and not config["internal"]:
        _start_slirp4netns(config, folder, pid, ends)
    os.write(says_attached, b".")
    os.close(says_attached)
    said = b"".join(iter(lambda: os.read(ready, 4096), b""))
    if said != b".":
        raise SbxError("network-failed", f"set up the network: {said.decode('utf-8', 'replace') or 'its keeper ended'}")


def _close_all_but(*kept: int) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError:
                pass  # the one with which the list was read


def _start_slirp4netns(config: dict[str, Any], folder: str, pid: int, ends: int) -> None:
    """Attach slirp4netns to the keeper's net namespace; it ends when the keeper, which holds the other end, does."""
    ready, says_ready = os.pipe()
    network = spec.Network(backend="slirp4netns", ipv6=config["ipv6"])
    argv = slirp4netns.arguments(network, [f"--cidr={config['subnet']}", "--netns-type=path", f"/proc/{pid}/ns/net"])
    program = programs.spawn(argv, {3: says_ready, 4: ends}, folder)
    os.close(says_ready)
    if not os.read(ready, 1):
        raise slirp4netns.failure(program.finish())


def _keep(config: dict[str, Any], folder: str, ids: IdMap, says_there: int, attached: int, says_ready: int) -> None:
    """Be the keeper."""
    outer = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    syscalls.loopback_up()
    os.write(says_there, b".")
    os.close(says_there)
    os.read(attached, 1)
    keeper = Keeper(config, ids, outer)
    os.chdir(folder)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.umask(0)  # root here may not be the caller; the folder above is closed to everybody else
    control.bind(records.SOCKET)
    control.listen(64)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.write(says_ready, b".")
    os.close(says_ready)
    keeper.serve(control)


class Keeper:
    """The members of one network."""

    def __init__(self, config: dict[str, Any], ids: IdMap, outer: int) -> None:
        self._config = config
        self._ids = ids
        self._outer = outer
        self._subnet = ipaddress.IPv4Network(config["subnet"])
        self._members: dict[socket.socket, tuple[str, int]] = {}
        self._next = 0
        self._own = str(self._subnet[OWN])
        with IPRoute() as route:
            route.link("add", ifname=BRIDGE, kind="bridge")
            self._bridge = route.link_lookup(ifname=BRIDGE)[0]
            route.link("set", index=self._bridge, state="up", mtu=_MTU)
            route.addr("add", index=self._bridge, address=self._own, prefixlen=self._subnet.prefixlen)
            if not config["internal"]:
                tap = route.link_lookup(ifname=names.INTERFACE)[0]
                route.link("set", index=tap, master=self._bridge, mtu=_MTU, state="up")
        self._resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._resolver.bind((self._own, 53))

    def serve(self, control: socket.socket) -> None:
        """Serve until nobody is connected any longer."""
        links: dict[int, socket.socket] = {}
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(self._resolver, select.POLLIN)
        while ready := poll.poll(None if links else _IDLE):
            for fd, _ in ready:
                if fd == control.fileno():
                    link, _ = control.accept()
                    links[link.fileno()] = link
                    poll.register(link, select.POLLIN)
                elif fd == self._resolver.fileno():
                    query, client = self._resolver.recvfrom(4096)
                    threading.Thread(target=self._resolve, args=(query, client), daemon=True).start()
                elif not self._take(links[fd]):
                    poll.unregister(fd)
                    self._members.pop(links[fd], None)  # its interface goes with its net namespace
                    links.pop(fd).close()
            if not links:
                return

    def _take(self, link: socket.socket) -> bool:
        """Answer one request of a member's; tell whether it is still there."""
        try:
            data, fds, _, _ = socket.recv_fds(link, 4096, 1)
            if not data:
                return False
            request = marshal.loads(data)
            try:
                if request["act"] == "outer":
                    socket.send_fds(link, [b"."], [self._outer])
                    return True
                answer = self._answer(link, request, fds)
            except Exception as error:  # whatever netlink says is the asker's to hear, and no reason to end
                answer = {"error": str(error)}
            link.send(marshal.dumps(answer, 4))
        except OSError:
            return False
        finally:
            for fd in locals().get("fds", []):
                os.close(fd)
        return True

    def _answer(self, link: socket.socket, request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if request["act"] == "idmap":
            return {"idmap": spec.pack(self._ids)}
        if request["act"] == "join":
            return self._join(link, request["name"], fds[0])
        return {
            "members": [{"name": name, "addresses": self._addresses(number)} for name, number in self._members.values()]
        }

    def _join(self, link: socket.socket, name: str, net: int) -> dict[str, Any]:
        taken = {number for _, number in self._members.values()}
        number = next((number for number in range(FIRST, self._subnet.num_addresses - 1) if number not in taken), 0)
        if not number:
            return {
                "error": f"{self._subnet} has no address left",
                "hint": "make a larger network with: sbx network create --subnet",
            }
        self._next += 1
        outside = f"v{self._next}"
        with IPRoute() as route:
            route.link(
                "add", ifname=outside, kind="veth", mtu=_MTU, peer={"ifname": INTERFACE, "net_ns_fd": net, "mtu": _MTU}
            )
            index = route.link_lookup(ifname=outside)[0]
            route.link("set", index=index, master=self._bridge, state="up")
        self._configure(net, number)
        self._members[link] = (name, number)
        return {"addresses": self._addresses(number)}

    def _addresses(self, number: int) -> list[str]:
        return [str(self._subnet[number]), *([str(SUBNET6[number])] if self._config["ipv6"] else [])]

    def _configure(self, net: int, number: int) -> None:
        """Set the addresses and routes in the member's net namespace, in a thread that goes there: setns(2)."""
        failed: list[Exception] = []

        def work() -> None:
            try:
                syscalls.setns(net, syscalls.CLONE_NEWNET)
                with IPRoute() as route:
                    index = route.link_lookup(ifname=INTERFACE)[0]
                    route.addr("add", index=index, address=str(self._subnet[number]), prefixlen=self._subnet.prefixlen)
                    if self._config["ipv6"]:
                        route.addr("add", index=index, address=str(SUBNET6[number]), prefixlen=64, flags=_NODAD)
                    route.link("set", index=index, state="up")
                    if not self._config["internal"]:
                        route.route("add", dst="default", gateway=str(self._subnet[GATEWAY]))
                        if self._config["ipv6"]:
                            route.route("add", dst="default", gateway=str(SUBNET6[GATEWAY]), family=socket.AF_INET6)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def _resolve(self, query: bytes, client: Any) -> None:
        """Answer a question: members by name, everything else from outside, if there is a way."""
        try:
            asked = dns.question(query)
        except ValueError:
            return
        number = next((number for name, number in list(self._members.values()) if name.lower() == asked.name), 0)
        if number:
            texts = [
                text
                for text in self._addresses(number)
                if (":" in text) == (asked.kind == dns.AAAA) and asked.kind in (dns.A, dns.AAAA)
            ]
            packed = [ipaddress.ip_address(text).packed for text in texts]
            records_ = b"".join(
                b"\xc0\x0c" + struct.pack("!HHIH", asked.kind, 1, 5, len(data)) + data for data in packed
            )
            answer = query[:2] + struct.pack("!HHHHH", 0x8580, 1, len(packed), 0, 0) + asked.raw + records_
        elif self._config["internal"] or "." not in asked.name:
            answer = dns.reply(query, asked, dns.NAME_ERROR)
        else:
            answer = dns.ask(query, asked, [str(self._subnet[RESOLVER])]) or dns.reply(query, asked, dns.SERVER_FAILURE)
        try:
            self._resolver.sendto(answer, client)
        except OSError:
            sys.exit()  # this thread alone: the one who asked has gone
