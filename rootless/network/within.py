"""A process of ours in a sandbox's net namespace, which makes sockets there and hands them out. Warm.

It is root in the sandbox's user namespace, but in no other namespace of it, so nothing in the sandbox sees it.
"""

from __future__ import annotations

import errno
import os
import socket
import threading
from typing import Any

from rootless import syscalls
from rootless.network import resident

_PATIENCE = 30.0  #: seconds for a program


class Within:
    """The process, made by fork: the caller must still have one thread."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._link = ours
        if os.fork() == 0:
            try:
                ours.close()
                os.close(resident.READY)
                _enter()
                _serve(theirs)
            finally:
                os._exit(1)
        theirs.close()
        os.close(resident.USER)
        os.close(resident.NET)
        self._ask("hello", "", "")

    def connect(self, protocol: str, port: int) -> socket.socket:
        """Return a socket connected to `port` on the sandbox's loopback. Raises OSError."""
        return self._socket("connect", protocol, str(port))

    def listen(self, protocol: str, address: str, port: int) -> socket.socket:
        """Return a socket bound to `address` and `port` there; one for TCP listens."""
        return self._socket("listen", protocol, f"{port} {address}")

    def netlink(self, family: int) -> socket.socket:
        """Return a netlink socket of that namespace."""
        return self._socket("netlink", "", str(family))

    def run(self, program: str, script: str) -> str:
        """Run `program` there with `script` as its stdin and return what it says on stderr if it fails, else ""."""
        return str(self._ask("run", program, script))

    def _socket(self, *request: str) -> socket.socket:
        made = self._ask(*request)
        assert isinstance(made, socket.socket)
        return made

    def _ask(self, act: str, *words: str) -> Any:
        with self._lock:
            self._link.send("\0".join((act, *words)).encode())
            data, fds, _, _ = socket.recv_fds(self._link, 65536, 1)
        if not data:
            raise OSError(errno.EPIPE, "the process in the sandbox's net namespace has ended")
        if fds:
            return socket.socket(fileno=fds[0])
        number, _, text = data.decode().partition("\0")
        if int(number):
            raise OSError(int(number), os.strerror(int(number)))
        return text


def _enter() -> None:
    syscalls.setns(resident.USER, syscalls.CLONE_NEWUSER)
    syscalls.setns(resident.NET, syscalls.CLONE_NEWNET)
    # What it runs keeps its capabilities over the namespace only as root, and the caller may be somebody else there.
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _serve(link: socket.socket) -> None:
    """Answer requests until the other end is closed."""
    while request := link.recv(1 << 20):
        act, first, second = request.decode().split("\0", 2)
        try:
            made = _ACTS[act](first, second)
        except OSError as error:
            link.send(str(error.errno or errno.EIO).encode())
            continue
        if isinstance(made, socket.socket):
            socket.send_fds(link, [b"."], [made.fileno()])
            made.close()
        else:
            link.send(f"0\0{made}".encode()[:60000])


def _connect(protocol: str, port: str) -> socket.socket:
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    made = socket.socket(socket.AF_INET, kind)
    try:
        made.connect(("127.0.0.1", int(port)))
        return made
    except ConnectionRefusedError:
        made.close()
    made = socket.socket(socket.AF_INET6, kind)
    made.connect(("::1", int(port)))
    return made


def _listen(protocol: str, where: str) -> socket.socket:
    port, address = where.split(" ")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
    if protocol == "tcp":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, int(port)))
    if protocol == "tcp":
        made.listen(64)
    return made


def _run(program: str, script: str) -> str:
    import subprocess  # the guard's alone: 1 ms that a resolver needs not pay for

    try:
        done = subprocess.run([program, "-f", "-"], input=script, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer in {_PATIENCE:.0f} seconds"
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"


_ACTS: dict[str, Any] = {
    "hello": lambda *_: "",
    "connect": _connect,
    "listen": _listen,
    "netlink": lambda _, family: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, int(family)),
    "run": _run,
}
