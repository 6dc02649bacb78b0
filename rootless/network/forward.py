"""The forwarder: carries connections from ports of the host to a sandbox's loopback. Warm.

For back ends that cannot: none, pasta while it runs, IPv6 with slirp4netns. It speaks slirp4netns's control protocol
(slirp4netns(1), "API SOCKET"), so that whoever publishes a port need not know the difference. Bytes of TCP connections
are moved by splice(2) and never pass through this process's memory.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading
import time
from typing import Any

from rootless.network import ports, resident
from rootless.network.within import Within

_IDLE = 120.0  #: seconds after which a UDP client's socket inside is closed
_CLIENTS = 1024


def serve(settings: dict[str, Any]) -> None:
    """Serve requests on the control socket until ALIVE ends."""
    within = Within()
    control = socket.socket(socket.AF_UNIX)
    control.bind(ports.FORWARDER)  # in the sandbox's folder, where we were started
    control.listen(16)
    table = Table(within)
    os.write(resident.READY, b".")
    os.close(resident.READY)
    while True:
        ready = select.select([control.fileno(), resident.ALIVE], [], [])[0]
        if resident.ALIVE in ready:
            return
        client, _ = control.accept()
        with client:
            client.settimeout(5)
            try:
                request = _all(client)
                client.sendall(json.dumps(table.answer(json.loads(request))).encode() + b"\n")
            except (OSError, ValueError):
                continue


def _all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


class Table:
    """The forwarded ports."""

    def __init__(self, within: Within) -> None:
        self._within = within
        self._entries: dict[int, tuple[dict[str, Any], socket.socket]] = {}
        self._next = 1

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request and return its answer."""
        try:
            act = {"add_hostfwd": self._add, "list_hostfwd": self._list, "remove_hostfwd": self._remove}[
                request["execute"]
            ]
            return {"return": act(request.get("arguments", {}))}
        except (KeyError, TypeError, ValueError, OSError) as error:
            return {"error": {"desc": str(error)}}

    def _add(self, entry: dict[str, Any]) -> dict[str, Any]:
        address, port, protocol = entry["host_addr"], int(entry["host_port"]), entry["proto"]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if protocol == "tcp":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        if protocol == "tcp":
            listener.listen(128)
        work = _serve_tcp if protocol == "tcp" else _serve_udp
        threading.Thread(target=work, args=(listener, self._within, int(entry["guest_port"])), daemon=True).start()
        number, self._next = self._next, self._next + 1
        self._entries[number] = ({**entry, "id": number}, listener)
        return {"id": number}

    def _list(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entries": [entry for entry, _ in self._entries.values()]}

    def _remove(self, which: dict[str, Any]) -> dict[str, Any]:
        _, listener = self._entries.pop(int(which["id"]))
        try:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
        except OSError:
            pass  # ENOTCONN, always, for UDP; it is awake all the same
        return {}


def _serve_tcp(listener: socket.socket, within: Within, port: int) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except ConnectionAbortedError:
            continue
        except OSError as error:
            if error.errno not in (23, 24):  # ENFILE, EMFILE: others will be closed
                listener.close()
                return
            time.sleep(0.1)
            continue
        threading.Thread(target=_carry, args=(client, within, port), daemon=True).start()


def _carry(client: socket.socket, within: Within, port: int) -> None:
    """Carry one connection, both ways, until both are closed."""
    with client:
        try:
            server = within.connect("tcp", port)
        except OSError:
            # What the client would see if nobody listened here: a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            return
        with server:
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Move bytes until the source ends, and pass its end on."""
    reader, writer = os.pipe()
    try:
        while count := os.splice(source.fileno(), writer, 1 << 16):
            while count:
                count -= os.splice(reader, sink.fileno(), count)
    except OSError:
        pass
    finally:
        os.close(reader)
        os.close(writer)
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def _serve_udp(listener: socket.socket, within: Within, port: int) -> None:
    """Give each client a socket inside, and carry datagrams between them."""
    clients: dict[Any, socket.socket] = {}
    owners: dict[int, Any] = {}
    heard: dict[Any, float] = {}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        for fd, event in poll.poll(int(_IDLE * 500)):
            if fd == listener.fileno():
                if event & (select.POLLHUP | select.POLLNVAL):
                    return
                try:
                    data, client = listener.recvfrom(65536)
                    if client not in clients and len(clients) < _CLIENTS:
                        made = clients[client] = within.connect("udp", port)
                        owners[made.fileno()] = client
                        poll.register(made, select.POLLIN)
                    if client in clients:
                        heard[client] = time.monotonic()
                        clients[client].send(data)
                except OSError:
                    continue  # refused inside: as lost as any datagram
            else:
                client = owners[fd]
                heard[client] = time.monotonic()
                try:
                    listener.sendto(clients[client].recv(65536), client)
                except OSError:
                    continue
        for client in [client for client, when in heard.items() if when < time.monotonic() - _IDLE]:
            made = clients.pop(client)
            poll.unregister(made)
            del owners[made.fileno()], heard[client]
            made.close()
