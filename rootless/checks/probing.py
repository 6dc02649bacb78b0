"""Warm: what a check and its finding are, and how a probe tries things: in a throw-away child. Outside."""

from __future__ import annotations

import errno as e
import os
import select
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from rootless import idmap, syscalls
from rootless.errors import SbxError

OK = "ok"
DEGRADED = "degraded"  #: sandboxes work, and something of them does not
MISSING = "missing"  #: no sandbox can be started

WAIT = 5.0  #: seconds that a probe may take; one that hangs, on a dead server's filesystem, is a finding


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Finding:
    """What a probe found: `mark`, what is there or fails (`found`), why (`cause`), and the cure (`fix`)."""

    mark: str
    found: str
    fix: str = ""
    cause: str = ""
    blocked: bool = False  #: not tried, since something else fails

    @property
    def hint(self) -> str:
        """The cause and its cure, in one line."""
        return "; ".join(filter(None, (self.cause or self.found, self.fix)))


@dataclass(frozen=True)
class Check:
    """One need: its `name`, what it is called, what depends on it, and the probe that looks."""

    name: str
    title: str
    meaning: str
    probe: Callable[[], Finding]

    def run(self) -> Finding:
        """Probe; never raises."""
        return run(self.probe)

    def summary(self, finding: Finding) -> dict[str, str | bool]:
        """Return the check with its `finding`, for JSON."""
        return {"name": self.name, "title": self.title, "meaning": self.meaning, **asdict(finding)}


def run(probe: Callable[[], Finding]) -> Finding:
    """Return what `probe` finds; never raises."""
    try:
        return probe()
    except SbxError as error:
        return Finding(MISSING, error.message, error.hint)
    except Exception as error:  # a probe that breaks on a strange host must not end the others
        return Finding(DEGRADED, f"cannot be checked: {type(error).__name__}: {error}", blocked=True)


def not_tried(mark: str, reason: object, see: str) -> Finding:
    """Return the finding of a probe that needs what check `see` says is not there."""
    return Finding(mark, f"not tried: {reason}", f"see: {see}", blocked=True)


class Failure(NamedTuple):
    """The act of a probe that failed, and how."""

    act: str
    errno: int

    def __str__(self) -> str:
        return f"cannot {self.act} ({os.strerror(self.errno)})"


# ── acts in a throw-away child ────────────────────────────────────────────────────────────────────────────────────────

Acts = list[tuple[str, Callable[[], object]]]


def attempt(acts: Acts) -> Failure | None:
    """Do `acts` in a forked child, one after the other; return the first that failed, None when all worked.

    An act may go on in a child of its own (`fork_on`). ETIMEDOUT stands for an act that hangs, EPERM for one that
    ended the child, as a seccomp filter may.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _do(acts, writer)
    os.close(writer)
    said, hangs = _read_all(reader)
    os.close(reader)
    if hangs:
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    words = said.decode().split()
    if words[-1:] == ["done"]:
        return None
    errno = int(words.pop()[1:]) if words[-1:] and words[-1].startswith("!") else e.ETIMEDOUT if hangs else e.EPERM
    return Failure(acts[int(words[-1]) if words else 0][0], errno)


def _do(acts: Acts, writer: int) -> None:
    """Do `acts` and tell of each before it begins, and how it ended; never returns."""
    try:
        for index, (_, function) in enumerate(acts):
            os.write(writer, b"%d " % index)
            function()
        os.write(writer, b"done")
    except BaseException as error:
        os.write(writer, b"!%d" % (getattr(error, "errno", None) or e.EIO))
    finally:
        os._exit(0)


def _read_all(reader: int) -> tuple[bytes, bool]:
    """Return what comes until the end of file, and whether that did not come in time."""
    said = b""
    while select.select([reader], [], [], WAIT)[0]:
        data = os.read(reader, 4096)
        if not data:
            return said, False
        said += data
    return said, True


def fork_on() -> None:
    """Go on in a new process, the first of a new pid namespace; the old one waits for it and ends."""
    pid = os.fork()
    if pid:
        os.waitpid(pid, 0)
        os._exit(0)


def write_map(uid: int, gid: int) -> None:
    """Map the writer's own ids of the outer namespace to root: no help is needed for that."""
    for file, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        idmap.write(f"/proc/self/{file}", text)


def user_namespace() -> Acts:
    """Return the acts that make a user namespace and its mount namespace, and become root there."""
    uid, gid = os.geteuid(), os.getegid()
    return [
        ("create a user namespace", lambda: syscalls.unshare(syscalls.CLONE_NEWUSER)),
        ("write its id map", lambda: write_map(uid, gid)),
        ("create a mount namespace in it", lambda: syscalls.unshare(syscalls.CLONE_NEWNS)),
        ("change mounts in it", lambda: syscalls.mount("", "/", "", syscalls.MS_SLAVE | syscalls.MS_REC)),
    ]
