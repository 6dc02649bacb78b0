"""Programs of our own that serve a sandbox's network while it runs: how they are started and watched. Outside.

Each is a Python process that runs serve.py. It gets descriptors and nothing else: READY, on which it says "." and what
the user should know, or what went wrong; ALIVE, whose end tells it to end, whatever has ended us; the namespaces; and
its settings.
"""

from __future__ import annotations

import marshal
import os
import sys

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.steps import Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

READY, ALIVE, SETTINGS, USER, NET = 3, 4, 5, 6, 7
_SERVE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "serve.py")


def open_namespaces(pid: int) -> tuple[int, int]:
    """Return descriptors of the user and net namespace of a process that does not hide them yet."""
    user = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    return user, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def start(
    role: str, folder: str, settings: dict[str, Any], namespaces: tuple[int, int], while_lives: int = -1
) -> Resident:
    """Start the resident program `role` in the sandbox's folder and return it when it serves.

    `while_lives` is a pidfd: it ends with that process, and not with us. Raises the SbxError that it met.
    """
    resident = begin(role, folder, settings, namespaces, while_lives)
    resident.await_ready()
    return resident


def begin(
    role: str, folder: str, settings: dict[str, Any], namespaces: tuple[int, int], while_lives: int = -1
) -> Resident:
    """Start it as start() does, but don't wait: the caller has something else to wait for first."""
    ready, says_ready = os.pipe2(os.O_CLOEXEC)
    ends, alive = os.pipe2(os.O_CLOEXEC)
    settings_reader, settings_writer = os.pipe2(os.O_CLOEXEC)
    keep = {
        READY: says_ready,
        ALIVE: ends if while_lives < 0 else while_lives,
        SETTINGS: settings_reader,
        USER: namespaces[0],
        NET: namespaces[1],
    }
    try:
        os.set_blocking(settings_writer, False)
        if os.write(settings_writer, data := marshal.dumps(settings, 4)) != len(data):
            raise SbxError("settings-long", f"start {role}: too many rules for one sandbox")
        program = programs.spawn([sys.executable, "-I", "-S", "-E", _SERVE, role], keep, folder)
    except BaseException:
        os.close(ready)
        os.close(alive)
        raise
    finally:
        for fd in (says_ready, ends, settings_reader, settings_writer):
            os.close(fd)
    program.name = f"the network's {role}"  # not that of the interpreter
    return Resident(role, program, alive, ready)


class Resident(Watched):
    """A resident program at work; called, it ends it and tells the user what it has to say."""

    __slots__ = ("_alive", "_program", "_ready", "role")

    def __init__(self, role: str, program: programs.Running, alive: int, ready: int) -> None:
        super().__init__(os.pidfd_open(program.pid))
        self.role = role
        self._program: programs.Running | None = program
        self._alive = alive
        self._ready = ready

    def await_ready(self) -> None:
        """Wait until it serves, and tell the user what it has to say. Raises the SbxError that it met."""
        assert self._program
        try:
            said = b"".join(iter(lambda: self._program.await_ready(self._ready), b"")).decode("utf-8", "replace")  # type: ignore[union-attr]
        except BaseException:
            self._forget()
            raise
        if not said.startswith("."):
            output = self.finish()
            code, message, hint = [*said.split("\0"), "", "", ""][:3]
            raise SbxError(
                code or "network-failed",
                message or f"start {self.role}: {(output.strip().splitlines() or ['it ended'])[-1]}",
                hint,
            )
        os.close(self._ready)
        self._ready = -1
        if said != ".":
            os.write(2, f"sbx: {printable(said[1:])}\n".encode("utf-8", "replace"))

    def __call__(self) -> None:
        serves = self._ready < 0
        said = self.finish()
        if serves:  # otherwise it complains of us
            os.write(2, said.encode("utf-8", "replace"))

    def finish(self) -> str:
        """Tell it to end, wait until it has, and return what it said. Idempotent."""
        if self._program is None:
            return ""
        program = self._program
        self._forget()
        return program.stop(1 << 16)

    def _forget(self) -> None:
        for fd in (self._alive, self._ready, self.fd):
            if fd >= 0:
                os.close(fd)
        self._program = None

    def lost(self) -> str:
        said = self.finish().strip().splitlines()
        return f"the network's {self.role} ended before the sandbox" + (f" ({said[-1]})" if said else "")
