"""Published ports: what -p means, and the conversation with whoever forwards them. Outside.

slirp4netns(1) forwards them itself and is told so through its control socket; our own forwarder (forward.py), for the
back ends that cannot, speaks the same protocol: one JSON request a connection, one JSON answer, in ASCII.
"""

from __future__ import annotations

import os

from rootless import syscalls
from rootless.errors import SbxError, printable
from rootless.spec import Port

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.spec import Network

FORWARDER = "forward"  #: our forwarder's control socket, in the sandbox's folder
_LAST = 65535
_ANSWER = 10.0  #: seconds for an answer, which takes a millisecond
EACCES, EADDRINUSE, EADDRNOTAVAIL = 13, 98, 99


def parse(text: str) -> list[Port]:
    """Return what ``[[IP:][HOST]:]SANDBOX[/tcp|udp]`` publishes; HOST and SANDBOX may be ranges of the same length.

    Without HOST, or with 0, a free port is chosen. Without IP it is 127.0.0.1. Raises SbxError ``port-invalid``.
    """
    body, slash, protocol = text.partition("/")
    protocol = protocol if slash else "tcp"
    rest, _, inside = body.rpartition(":")
    address, colon, host = rest.rpartition(":")
    address = address.removeprefix("[").removesuffix("]") if colon else "127.0.0.1"
    if protocol not in ("tcp", "udp") or not syscalls.packed_address(address):
        raise _invalid(text)
    first, last = _range(inside, text)
    host_first, host_last = _range(host, text) if host and host != "0" else (0, 0)
    if first == 0 or (host_first and host_last - host_first != last - first):
        raise _invalid(text)
    return [Port(address=address, host=host_first and host_first + place, inside=first + place, protocol=protocol)
            for place in range(last - first + 1)]  # fmt: skip


def _range(text: str, whole: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (low + high).isascii() or not low.isdecimal() or not (high.isdecimal() or not dash) or len(low + high) > 10:
        raise _invalid(whole)
    first, last = int(low), int(high) if dash else int(low)
    if last < first or last > _LAST:
        raise _invalid(whole)
    return first, last


def _invalid(text: str) -> SbxError:
    return SbxError(
        "port-invalid",
        f"publish {printable(text)!r}: it is [[IP:]HOST:]SANDBOX[/tcp|udp], ports or ranges of them from 1 to 65535",
        "as in 8080:80, 127.0.0.1:8000-8009:80-89/tcp, 0:80 (any free port)",
    )


def show(port: Port) -> str:
    """Return `port` as people read it."""
    address = f"[{port.address}]" if ":" in port.address else port.address
    return f"{port.inside}/{port.protocol} -> {address}:{port.host}"


def by_slirp4netns(network: Network, port: Port) -> bool:
    """Whether slirp4netns forwards `port`: it knows IPv4 alone, and answers to UDP are lost without --host-loopback."""
    return network.backend == "slirp4netns" and ":" not in port.address and port.protocol == "tcp"


def publish(folder: str, socket: str, port: Port, guest: str) -> Port:
    """Have the forwarder behind `socket` in the sandbox's folder publish `port`, and return it with its host port.

    Raises SbxError ``port-taken``, ``port-privileged``, ``address-unknown``.
    """
    for _ in range(8):
        chosen = Port(**{**port.fields(), "host": free(port)})
        where = f'"host_addr": "{chosen.address}", "host_port": {chosen.host}, "guest_addr": "{guest}"'
        where += f', "guest_port": {chosen.inside}'
        answer = ask(
            folder, socket, f'{{"execute": "add_hostfwd", "arguments": {{"proto": "{chosen.protocol}", {where}}}}}'
        )
        if '"error"' not in answer:
            return chosen
        if port.host:
            free(port)
            raise SbxError("port-failed", f"publish {show(port)}: the forwarder says {printable(answer.strip())}")
    raise SbxError("port-taken", f"publish {show(port)}: free ports are taken as fast as they are found")


def free(port: Port) -> int:
    """Return the host port that `port` can be bound to now, a free one for 0, and explain why if it cannot."""
    import _socket  # rare: only where ports are published

    six = ":" in port.address
    kind = _socket.SOCK_STREAM if port.protocol == "tcp" else _socket.SOCK_DGRAM
    probe = _socket.socket(_socket.AF_INET6 if six else _socket.AF_INET, kind | _socket.SOCK_CLOEXEC)
    try:
        if port.protocol == "tcp":
            probe.setsockopt(
                _socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1
            )  # as the forwarder will: old connections don't count
        probe.bind((port.address, port.host))
        return int(probe.getsockname()[1])
    except OSError as error:
        raise refusal(port, error.errno or 0) from None
    finally:
        probe.close()


def refusal(port: Port, errno: int) -> SbxError:
    """Return the error for a host port that could not be bound."""
    act = f"publish {show(port)}"
    if errno == EADDRINUSE:
        return SbxError(
            "port-taken", f"{act}: the port is taken on the host", "choose another one, or 0 for any that is free"
        )
    if errno == EACCES:
        cure = f"choose a higher one, or as root: sysctl net.ipv4.ip_unprivileged_port_start={port.host}"
        return SbxError("port-privileged", f"{act}: low ports are root's on this host", cure)
    if errno == EADDRNOTAVAIL:
        return SbxError("address-unknown", f"{act}: the host has no such address", "see: ip addr")
    return SbxError("port-failed", f"{act}: {os.strerror(errno)}")


def ask(folder: str, socket: str, request: str) -> str:
    """Send one request to the control socket in `folder` and return the answer.

    Raises OSError where nobody listens, and SbxError ``port-failed`` where nobody answers.
    """
    import _socket

    above = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    client.settimeout(_ANSWER)
    try:
        client.connect(f"/proc/self/fd/{above}/{socket}")  # the path itself may be longer than a socket's name may be
        client.send(request.encode())
        client.shutdown(_socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b"")).decode("utf-8", "replace")
    except TimeoutError:
        raise SbxError("port-failed", f"publish ports: {socket} does not answer", "is it stopped?") from None
    finally:
        client.close()
        os.close(above)


def tell(asked: Port, got: Port) -> None:
    """Tell the user which port was chosen, where it was left to us."""
    if not asked.host:
        os.write(2, f"sbx: published {show(got)}\n".encode())
