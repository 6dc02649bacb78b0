"""The sandbox's terminal: a pty of its own. Inside, but for is_in_background().

pty(7), tty_ioctl(4). The sandbox never holds a descriptor of the caller's terminal, so nothing that it
does to its own (TIOCSTI, TIOCLINUX) reaches the caller's shell.
"""

from __future__ import annotations

import fcntl
import os
import sys

from rootless import syscalls
from rootless.errors import SbxError
from rootless.steps import Child, Step

TIOCGWINSZ, TIOCSWINSZ = 0x5413, 0x5414  # termios has them too, and costs 0.15 ms
_TIOCSCTTY = 0x540E
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441
_TIOCGPTN = 0x80045430
_PTMX = os.makedev(5, 2)


class OpenTerminal(Step):
    """Open a pty in the sandbox's own devpts, send its master side outside, and show its slave as /dev/console."""

    __slots__ = ("console", "slave")

    def __init__(self, console: bool = True) -> None:
        self.console = console
        self.slave = -1

    def describe(self) -> str:
        return "open a terminal" + (" and bind it on /dev/console" if self.console else "")

    def execute(self, child: Child) -> None:
        # It is our own devpts; but this step is also taken in a sandbox that has been running for a while.
        master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        if os.fstat(master).st_rdev != _PTMX:
            raise SbxError("device-wrong", "open a terminal: /dev/pts/ptmx is not the device of that name")
        fcntl.ioctl(master, _TIOCSPTLCK, bytes(4))
        # by descriptor, not by the name under /dev/pts: it is the other side of this master, whatever is mounted there
        self.slave = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        copy_size(master)  # before the command can ask for it; afterwards the parent follows changes
        if self.console:
            number = int.from_bytes(fcntl.ioctl(master, _TIOCGPTN, bytes(4)), sys.byteorder)
            console = os.open("/dev/console", os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o600)
            tree = syscalls.open_tree(f"/dev/pts/{number}", recursive=False)
            syscalls.move_mount(tree, console)
            os.close(tree)
            os.close(console)
        syscalls.send_fd(child.terminal, master)
        os.close(master)


def copy_size(master: int) -> None:
    """Give a terminal the window size of the one that is stdout."""
    try:
        fcntl.ioctl(master, TIOCSWINSZ, fcntl.ioctl(1, TIOCGWINSZ, bytes(8)))
    except OSError:
        pass  # stdout is none, or none any more


class NewSession(Step):
    """Start a session: without a terminal, or with the one that was opened as its controlling terminal and stdio.

    stderr stays what it is where the caller sent it elsewhere.
    """

    __slots__ = ("redirect_stderr", "terminal")

    def __init__(self, terminal: OpenTerminal | None, redirect_stderr: bool = True) -> None:
        self.terminal = terminal
        self.redirect_stderr = redirect_stderr

    def describe(self) -> str:
        return "start a session" + (" on the terminal" if self.terminal else "")

    def execute(self, child: Child) -> None:
        os.setsid()
        if self.terminal:
            fcntl.ioctl(self.terminal.slave, _TIOCSCTTY, 0)
            for fd in (0, 1, 2) if self.redirect_stderr else (0, 1):
                os.dup2(self.terminal.slave, fd)


def is_in_background(fd: int) -> bool:
    """Whether `fd` is our controlling terminal and a shell has put us into the background: tcgetpgrp(3)."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False  # not ours to be in the background of
