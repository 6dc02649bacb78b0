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
    resident = Resident(role, program, alive)
    try:
        said = b"".join(iter(lambda: program.await_ready(ready), b"")).decode("utf-8", "replace")
    except BaseException:
        resident.forget()
        raise
    finally:
        os.close(ready)
    if not said.startswith("."):
        output = resident.finish()
        code, message, hint = [*said.split("\0"), "", "", ""][:3]
        raise SbxError(
            code or "network-failed",
            message or f"start {role}: {(output.strip().splitlines() or ['it ended'])[-1]}",
            hint,
        )
    if said != ".":
        os.write(2, f"sbx: {printable(said[1:])}\n".encode("utf-8", "replace"))
    return resident


class Resident(Watched):
    """A resident program at work; called, it ends it and tells the user what it has to say."""

    __slots__ = ("_alive", "_program", "role")

    def __init__(self, role: str, program: programs.Running, alive: int) -> None:
        super().__init__(os.pidfd_open(program.pid))
        self.role = role
        self._program: programs.Running | None = program
        self._alive = alive

    def __call__(self) -> None:
        os.write(2, self.finish().encode("utf-8", "replace"))

    def finish(self) -> str:
        """Tell it to end, wait until it has, and return what it said. Idempotent."""
        if self._program is None:
            return ""
        program = self._program
        self.forget()
        return program.stop(1 << 16)

    def forget(self) -> None:
        """Tell it to end, if it has not, and be done with it."""
        os.close(self._alive)
        os.close(self.fd)
        self._program = None

    def lost(self) -> str:
        said = self.finish().strip().splitlines()
        return f"the network's {self.role} ended before the sandbox" + (f" ({said[-1]})" if said else "")
