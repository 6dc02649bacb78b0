"""Warm: the namespaces that exist, who is in them, and how they nest. Outside.

namespaces(7), ioctl_ns(2), lsns(8). A namespace is known by its inode's number. The kernel has no list of them. They
are found through the processes in them (those that the caller may look at), through the descriptors by which a
sandbox's parent holds its own, and through one another: a user namespace without a process may own some that have one.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rootless import spec, state, syscalls
from rootless.errors import SbxError
from rootless.namespaces import FLAGS

KINDS = list(FLAGS)
#: Kinds that nest in one of their own, besides being owned by a user namespace.
NESTING = ("user", "pid")


@dataclass
class Namespace:
    """One namespace: `number` and `kind` as in /proc/PID/ns, the processes in it, and its place among the others.

    `owner` is the user namespace that rules over it, `parent` the one of its kind that it was made in; 0 where that is
    out of our sight, as for the namespaces of the host. `sandbox` is the name of the sandbox that it belongs to.
    """

    number: int
    kind: str
    pids: list[int] = field(default_factory=list)
    owner: int = 0
    parent: int = 0
    sandbox: str = ""

    def summary(self) -> dict[str, Any]:
        """Return what there is to know, for JSON; names as lsns(8) has them where it has one."""
        process = _first(self)
        return {
            "ns": self.number, "type": self.kind, "nprocs": len(self.pids), "pid": process.pid, "user": process.user,
            "command": process.command, "owner": self.owner, "parent": self.parent, "pids": self.pids,
            "sandbox": self.sandbox,
        }  # fmt: skip


@dataclass(frozen=True)
class _Process:
    """The process that stands for those in a namespace: the first of them."""

    pid: int
    user: str
    command: str


def survey() -> list[Namespace]:
    """Return all namespaces that can be found."""
    found: dict[int, Namespace] = {}
    for pid in _pids():
        for kind in KINDS:
            if (namespace := _note(found, kind, f"/proc/{pid}/ns/{kind}")) is not None:
                namespace.pids.append(pid)
    for record in state.running():
        _note_sandbox(found, record)
    return list(found.values())


def of_process(pid: int) -> list[Namespace]:
    """Return the namespaces of the process `pid`. Raises SbxError ``process-unknown`` or ``process-hidden``."""
    own = [namespace for namespace in survey() if pid in namespace.pids]
    if own:
        return sorted(own, key=lambda namespace: KINDS.index(namespace.kind))
    if os.path.exists(f"/proc/{pid}"):
        raise SbxError("process-hidden", f"look at process {pid}: it is not yours to look at")
    raise SbxError("process-unknown", f"look at process {pid}: there is none")


def of_sandbox(name: str) -> list[Namespace]:
    """Return the namespaces of the sandbox `name`, the outer user namespace among them."""
    known = state.find(name)["name"]
    return [namespace for namespace in survey() if namespace.sandbox == known]


def rows(namespaces: Iterable[Namespace]) -> list[tuple[str, ...]]:
    """Return lines for a table: each namespace below the user namespace that owns it, drawn as a tree."""
    shown = {namespace.number: namespace for namespace in namespaces}
    below: dict[int, list[Namespace]] = {}
    for namespace in sorted(shown.values(), key=_place):
        below.setdefault(namespace.owner if namespace.owner in shown else 0, []).append(namespace)
    lines: list[tuple[str, ...]] = []

    def draw(namespace: Namespace, first: str, rest: str) -> None:
        lines.append(_row(namespace, first))
        for child in (children := below.get(namespace.number, [])):
            last = child is children[-1]
            draw(child, rest + ("└─" if last else "├─"), rest + ("  " if last else "│ "))

    for namespace in below.get(0, []):
        draw(namespace, "", "")
    return lines


def fit(head: tuple[str, ...], lines: list[tuple[str, ...]], columns: int) -> list[tuple[str, ...]]:
    """Return `lines` with the last cell, the command, cut to what a terminal of `columns` has left for it.

    A line that wraps would break the tree.
    """
    taken = sum(max(map(len, column)) + 3 for column in list(zip(head, *lines, strict=True))[:-1])
    left = max(8, columns - taken - 2)
    return [(*cells, last if len(last) <= left else last[: left - 1] + "…") for *cells, last in lines]


def _place(namespace: Namespace) -> tuple[bool, int, int]:
    """Sort user namespaces last, since much hangs below them; the others in the order of KINDS."""
    return namespace.kind == "user", KINDS.index(namespace.kind), namespace.number


def _row(namespace: Namespace, branch: str) -> tuple[str, ...]:
    process = _first(namespace)
    return (
        f"{branch}{namespace.number}", namespace.kind, str(len(namespace.pids)), str(process.pid or ""), process.user,
        namespace.sandbox, process.command,
    )  # fmt: skip


# ── finding them ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def _note(found: dict[int, Namespace], kind: str, path: str) -> Namespace | None:
    """Return the namespace behind `path`, added to `found` with those above it; None for one that is not ours to see.

    A process may end, or change its namespaces, at any moment: what is gone is left out.
    """
    try:
        number = os.stat(path).st_ino
        if number not in found:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                number = _place_in(found, kind, fd)
            finally:
                os.close(fd)
    except OSError:
        return None
    return found[number]


def _place_in(found: dict[int, Namespace], kind: str, fd: int) -> int:
    """Add the namespace behind `fd` to `found`, with those above it, and return its number."""
    number = os.fstat(fd).st_ino
    if number not in found:
        found[number] = Namespace(number, kind)
        found[number].owner = _above(found, "user", syscalls.owning_namespace, fd)
        found[number].parent = _above(found, kind, syscalls.parent_namespace, fd) if kind in NESTING else 0
    return number


def _above(found: dict[int, Namespace], kind: str, ask: Callable[[int], int], fd: int) -> int:
    """Return the number of the namespace that `ask` gives for `fd`, or 0: the kernel refuses what is above our own."""
    try:
        upper = ask(fd)
    except OSError:
        return 0
    try:
        return _place_in(found, kind, upper)
    finally:
        os.close(upper)


def _note_sandbox(found: dict[int, Namespace], record: dict[str, Any]) -> None:
    """Name the namespaces of a sandbox. Its pid 1 is hidden, so they are taken from its parent, which holds them."""
    wanted = spec.unpack(record["spec"])
    for kind, path in state.held_namespaces(record).items():
        namespace = _note(found, kind, path)
        if namespace is None or namespace.kind != kind:
            continue
        if record["pid"] not in namespace.pids:
            namespace.pids = sorted([*namespace.pids, record["pid"]])
        if kind in ("user", *wanted.namespaces):
            namespace.sandbox = record["name"]
        if kind == "user" and wanted.nested_users and namespace.owner in found:
            found[namespace.owner].sandbox = record["name"]


# ── who is in them ────────────────────────────────────────────────────────────────────────────────────────────────────


def _first(namespace: Namespace) -> _Process:
    if not namespace.pids:
        return _Process(0, "", "")
    pid = namespace.pids[0]
    return _Process(pid, _user(pid), _command(pid))


def _user(pid: int) -> str:
    """Return the name of the process's user, its number where it has none: a subordinate id has none."""
    for line in _read(f"/proc/{pid}/status").split(b"\n"):
        if line.startswith(b"Uid:"):
            uid = int(line.split()[1])
            try:
                return pwd.getpwuid(uid).pw_name
            except KeyError:
                return str(uid)
    return ""


def _command(pid: int) -> str:
    """Return the command line, or the name in brackets of a process that shows none."""
    words = _read(f"/proc/{pid}/cmdline").strip(b"\0").replace(b"\0", b" ")
    name = _read(f"/proc/{pid}/comm").strip()
    return (words or (b"[%s]" % name if name else b"")).decode("utf-8", "surrogateescape")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(65536)
    except OSError:
        return b""
