"""The keeper of a network of several sandboxes: bridge, addresses, names, way out. Warm.

    keeper      root in the network's user namespace, in its net namespace: bridge sbx0 with an interface for each
                member; resolver on the bridge's address
    way out     slirp4netns or pasta (wayout.py), in the same user namespace and the host's net namespace; ends with the
                keeper

All members are on one Ethernet segment. The keeper ends, and all of it with it, when the last connection is closed.
"""

from __future__ import annotations

import ipaddress
import marshal
import os
import select
import socket
import sys
import threading
from typing import Any

from pyroute2 import IPRoute

from rootless import parent, programs, spec, syscalls
from rootless.errors import SbxError
from rootless.network import dns, names, records
from rootless.networks import wayout
from rootless.spec import IdMap

BRIDGE, INTERFACE = "sbx0", "eth0"
FIRST = 4  #: number of the first member in the subnet; below are the bridge's and slirp4netns's
_MTU = 65520
_NODAD = 2
_IDLE = 10_000  #: milliseconds to wait for the first to join


def start(name: str, ids: IdMap) -> None:
    """Start the keeper of the network `name` and return when it serves. Raises SbxError ``network-failed``."""
    config, folder = records.read(name), records.folder(name)
    if config["net"]:
        programs.require(config["net"])
    try:
        os.unlink(f"{folder}/{records.SOCKET}")
    except FileNotFoundError:
        pass
    there, says_there = os.pipe()
    attached, says_attached = os.pipe()
    ready, says_ready = os.pipe()
    ends, alive = os.pipe()
    try:
        parent.call_inside(ids, lambda: _fork(config, folder, ids, (says_there, attached, says_ready, alive)))
    finally:
        for fd in (says_there, attached, says_ready, alive):
            os.close(fd)
    try:
        if pid := int(os.read(there, 16) or b"0"):
            wayout.start(config, folder, pid, ends)
            os.write(says_attached, b".")
    finally:
        for fd in (there, says_attached, ends):
            os.close(fd)
    said = _all(ready)
    if said != ".":
        raise SbxError("network-failed", f"set up the network: {said or 'its keeper ended'}")


def _all(pipe: int) -> str:
    """Return what is said on `pipe` up to its end, and close it."""
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    said = b""
    while poll.poll(int(programs.PATIENCE * 1000)) and (data := os.read(pipe, 4096)):
        said += data
    os.close(pipe)
    return said.decode("utf-8", "replace")


def _fork(config: dict[str, Any], folder: str, ids: IdMap, pipes: tuple[int, int, int, int]) -> None:
    """In the new user namespace: start the keeper, and leave it."""
    if os.fork():
        return
    says_there, attached, says_ready, alive = pipes
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


def _close_all_but(*kept: int) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in kept:
            try:
                os.close(fd)
            except OSError:
                pass  # the one with which the list was read


def _keep(config: dict[str, Any], folder: str, ids: IdMap, says_there: int, attached: int, says_ready: int) -> None:
    """Be the keeper."""
    outer = os.open("/proc/self/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    syscalls.loopback_up()
    _set_addresses_at_once()
    os.write(says_there, b"%d" % os.getpid())
    os.close(says_there)
    if os.read(attached, 1) != b".":
        return  # the way out failed, and that is told already
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


def _set_addresses_at_once() -> None:
    """Have the kernel ask nobody whether an IPv6 address is free: these are ours."""
    try:
        with open("/proc/sys/net/ipv6/conf/default/accept_dad", "w") as stream:
            stream.write("0")
    except FileNotFoundError:
        pass  # a kernel without IPv6


class Keeper:
    """The members of one network."""

    def __init__(self, config: dict[str, Any], ids: IdMap, outer: int) -> None:
        self._config = config
        self._ids = ids
        self._outer = outer
        self._subnet = ipaddress.IPv4Network(config["subnet"])
        self._subnet6 = wayout.subnet6(config)
        self._way_out = wayout.describe(config)
        self._members: dict[socket.socket, tuple[str, int]] = {}
        self._next = 0
        self._own = str(self._subnet[wayout.OWN])
        with IPRoute() as route:
            # An address that is set stays; the bridge's own would change with its ports, and nobody would be told
            route.link("add", ifname=BRIDGE, kind="bridge", address=f"02:{os.urandom(5).hex(':')}")
            self._bridge = route.link_lookup(ifname=BRIDGE)[0]
            route.link("set", index=self._bridge, state="up", mtu=_MTU)
            route.addr("add", index=self._bridge, address=self._own, prefixlen=self._subnet.prefixlen)
            if self._way_out and self._way_out.bridged:
                tap = route.link_lookup(ifname=names.INTERFACE)[0]
                route.link("set", index=tap, master=self._bridge, mtu=_MTU, state="up")
            elif config["ipv6"]:
                own6 = str(self._subnet6[wayout.OWN])
                route.addr("add", index=self._bridge, address=own6, prefixlen=64, flags=_NODAD)
        if self._way_out and not self._way_out.bridged:
            wayout.route(config)
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
        return [str(self._subnet[number]), *([str(self._subnet6[number])] if self._config["ipv6"] else [])]

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
                        route.addr("add", index=index, address=str(self._subnet6[number]), prefixlen=64, flags=_NODAD)
                    route.link("set", index=index, state="up")
                    if self._way_out:
                        route.route("add", dst="default", gateway=self._way_out.gateway)
                        if self._config["ipv6"]:
                            route.route("add", dst="default", gateway=self._way_out.gateway6, family=socket.AF_INET6)
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
            answer = dns.of_member(query, asked, self._addresses(number))
        elif not self._way_out or "." not in asked.name:
            answer = dns.reply(query, asked, dns.NAME_ERROR)
        else:
            answer = dns.ask(query, asked, [self._way_out.resolver]) or dns.reply(query, asked, dns.SERVER_FAILURE)
        try:
            self._resolver.sendto(answer, client)
        except OSError:
            sys.exit()  # this thread alone: the one who asked has gone
