"""Joining another sandbox's namespaces: with --net sandbox:NAME, with --join NAME, and with `exec`. Outside.

The namespaces are the other one's user namespace's, so that is joined first, and the ids are the other one's too.
"""

from __future__ import annotations

import os

from rootless import capabilities, spec, state, syscalls
from rootless.errors import SbxError, printable
from rootless.namespaces import SHAREABLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rootless.options import Request
    from rootless.spec import SandboxSpec
    from rootless.steps import OutsideStep

SANDBOX = "sandbox:"
POD = ("net", "ipc", "uts")  #: what --join shares unless --share says


class Peer:
    """The sandbox that is joined: its record's spec, the `names` of what is shared, and descriptors of it.

    `outer` is that of the user namespace in which its own was made, or -1; `fds` are those of its own, user among them.
    """

    __slots__ = ("fds", "name", "names", "outer", "spec")

    def __init__(self, name: str, names: list[str]) -> None:
        record = state.find(name)
        self.name = str(record["name"])
        self.spec: SandboxSpec = spec.unpack(record["spec"])
        missing = [kind for kind in names if kind not in (*self.spec.namespaces, *self.spec.joined)]
        if missing:
            raise SbxError(
                "namespace-missing", f"join the {missing[0]} namespace of sandbox {self.name}: it has none of its own"
            )
        self.names = names
        self.outer, self.fds = open_namespaces(record, ["user", *names])

    def steps(self, wanted: SandboxSpec) -> list[OutsideStep]:
        """Return what the parent does to attach the network: nothing, it is."""
        return []

    def close(self) -> None:
        """Let its namespaces go."""
        for fd in (self.outer, *self.fds.values()):
            if fd >= 0:
                os.close(fd)


def peer(request: Request) -> Peer | None:
    """Return the sandbox that `request` joins, or None. Raises SbxError ``sandbox-unknown``, ``join-conflict``."""
    names: dict[str, str] = {}
    if request.join:
        shared = [kind for words in request.share for kind in words.split(",")] or list(POD)
        for kind in shared:
            if kind not in SHAREABLE:
                raise SbxError(
                    "namespace-unknown", f"share namespace {printable(kind)!r}: there are {', '.join(SHAREABLE)}"
                )
        names = dict.fromkeys(shared, request.join)
    if request.net.startswith(SANDBOX):
        if names and request.net[len(SANDBOX) :] != request.join:
            other = printable(request.net[len(SANDBOX) :])
            raise SbxError("join-conflict", f"join sandboxes {printable(request.join)} and {other}: "
                           "one sandbox has one user namespace", "join one")  # fmt: skip
        names["net"] = request.net[len(SANDBOX) :]
    if not names:
        return None
    found = Peer(next(iter(names.values())), state.namespaces_in_order(list(names)))
    if request.idmap not in ("", found.spec.idmap.mode):
        raise SbxError("join-conflict", f"join sandbox {found.name} with --idmap {printable(request.idmap)}: "
                       f"its ids are mapped by {found.spec.idmap.mode}, and they are shared",
                       "leave --idmap out")  # fmt: skip
    try:
        _check_tracers(found)
    except SbxError:
        found.close()
        raise
    return found


_PTRACE = 1 << capabilities.NUMBERS["CAP_SYS_PTRACE"]


def _check_tracers(peer: Peer) -> None:
    """Raise SbxError ``join-unsafe`` where a sandbox could trace the process that sets the new one up.

    That process is in their user namespace while it still sees the host, so whoever sees it there and has
    CAP_SYS_PTRACE could make it do anything.
    """
    user = os.fstat(peer.fds["user"]).st_ino
    seen = [os.stat("/proc/self/ns/pid").st_ino] + ([os.fstat(peer.fds["pid"]).st_ino] if "pid" in peer.fds else [])
    for record in state.running():
        if not spec.unpack(record["spec"]).capabilities & _PTRACE:
            continue
        if _inode(record, "user") == user and _inode(record, "pid") in seen:
            raise SbxError(
                "join-unsafe",
                f"join sandbox {peer.name}: {record['name']} may trace processes there, and could take over "
                "the one that sets up the new sandbox",
                f"share less than pid, or run the command in it: sbx exec {peer.name} …",
            )


def _inode(record: dict[str, Any], name: str) -> int:
    """Return the number of a running sandbox's namespace, 0 where it has ended."""
    try:
        return os.stat(state.held_namespaces(record)[name]).st_ino
    except (OSError, KeyError):
        return 0


def open_namespaces(record: dict[str, Any], names: list[str]) -> tuple[int, dict[str, int]]:
    """Return the sandbox's outer user namespace (-1 where there is none) and those of `names`, as open descriptors.

    They are reached through its parent, which holds them: pid 1 is hidden, even from us.
    """
    wanted = spec.unpack(record["spec"])
    held = state.held_namespaces(record)
    joined: dict[str, int] = {}
    try:
        for name in state.namespaces_in_order(names):
            joined[name] = os.open(held[name], os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, KeyError):
        raise SbxError("sandbox-gone", f"join sandbox {record['name']}: it has just ended") from None
    # Both still run, so what was opened are this sandbox's namespaces and not those of whoever got its number.
    os.close(state.open_process(record))
    if state.start_time(record["parent"]) != record["parent_start_time"]:
        raise SbxError("sandbox-gone", f"join sandbox {record['name']}: it has just ended")
    return (syscalls.parent_namespace(joined["user"]) if wanted.nested_users else -1), joined
