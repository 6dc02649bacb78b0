"""A sandbox's membership in a network of several. Outside; loaded where such a network is asked for.

The network's keeper (keeper.py) is root in a user namespace of its own, with the net namespace that has the bridge.
Members make their user namespaces inside that one, which gives the keeper the right to put an interface into theirs.
A member is one as long as its connection to the keeper is open: whoever ends, however, has left.
"""

from __future__ import annotations

import marshal
import os

from rootless import idmap, programs, spec
from rootless.errors import SbxError, printable
from rootless.network import records
from rootless.steps import OutsideStep, Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket as Socket
    from typing import Any

    from rootless.spec import SandboxSpec
    from rootless.steps import Undo

_TRIES = 5


class Member:
    """A sandbox to be, with its connection to the keeper: to the plan a peer of whom `outer` alone is joined."""

    def __init__(self, name: str) -> None:
        self.config = records.read(name)
        self.network = name
        self.names: list[str] = []
        self.fds: dict[str, int] = {}
        self.link, self.outer = _connect(name)
        answer = _ask(self.link, {"act": "idmap"})
        self.spec = spec.SandboxSpec(idmap=spec.unpack(answer["idmap"]), nested_users=True)

    def steps(self, wanted: SandboxSpec) -> list[OutsideStep]:
        """Return what the parent does to join the sandbox's net namespace to the network."""
        return [Join(wanted.name, self)]

    def close(self) -> None:
        """Leave."""
        self.link.close()
        os.close(self.outer)


def _connect(name: str) -> tuple[Socket, int]:
    """Return a connection to the network's keeper, which is started if there is none, and its user namespace."""
    import socket  # the field's one place where its 6 ms do not count: a network takes longer

    for _ in range(_TRIES):
        with records.Lock(name):
            link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            link.settimeout(programs.PATIENCE)
            above = os.open(records.folder(name), os.O_PATH | os.O_CLOEXEC)
            try:
                link.connect(f"/proc/self/fd/{above}/{records.SOCKET}")
            except (FileNotFoundError, ConnectionRefusedError):
                _start(name)
                link.connect(f"/proc/self/fd/{above}/{records.SOCKET}")
            finally:
                os.close(above)
        try:
            link.send(marshal.dumps({"act": "outer"}, 4))
            data, fds, _, _ = socket.recv_fds(link, 4096, 1)
        except OSError:
            data, fds = b"", []
        if data and fds:
            return link, fds[0]
        link.close()  # it was just ending
    raise SbxError("network-failed", f"join network {name}: its keeper ends as fast as it is started")


def _start(name: str) -> None:
    from rootless import paths

    paths.allow_packages()
    from rootless.networks import keeper

    ids, _ = idmap.for_caller("")
    keeper.start(name, ids)


def _ask(link: Socket, request: dict[str, Any], fds: list[int] | None = None) -> dict[str, Any]:
    """Send a request to the keeper and return its answer. Raises the SbxError that it met."""
    import socket

    try:
        socket.send_fds(link, [marshal.dumps(request, 4)], fds or [])
        data = link.recv(1 << 16)
    except OSError:
        data = b""
    if not data:
        raise SbxError("network-failed", "join the network: its keeper has ended, or does not answer")
    answer = marshal.loads(data)
    if "error" in answer:
        raise SbxError("network-failed", f"join the network: {printable(answer['error'])}", answer.get("hint", ""))
    assert isinstance(answer, dict)
    return answer


class Join(OutsideStep):
    """Have the keeper put an interface into the sandbox's net namespace, with its address and routes."""

    __slots__ = ("member", "name")

    def __init__(self, name: str, member: Member) -> None:
        self.name = name
        self.member = member

    def describe(self) -> str:
        return f"join network {self.member.network}"

    def execute(self, pid: int) -> Undo:
        net = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _ask(self.member.link, {"act": "join", "name": self.name}, [net])
        finally:
            os.close(net)
        return Membership(self.member)


class Membership(Watched):
    """A membership; called, it ends it."""

    __slots__ = ("_member",)

    def __init__(self, member: Member) -> None:
        super().__init__(member.link.fileno())
        self._member = member

    def __call__(self) -> None:
        if self.fd >= 0:
            self.fd = -1
            self._member.close()

    def lost(self) -> str:
        self()
        return f"the network {self._member.network} is gone: its keeper ended before the sandbox"
