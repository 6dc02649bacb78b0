"""The caller's terminal beside the sandbox's: raw mode, and the bytes between the two. Outside.

termios(3), tty_ioctl(4). Loaded by launches that have a terminal.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import termios

from rootless.terminal import copy_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CHUNK = 65536


class SavedMode:
    """The mode of the caller's terminal as it was; a descriptor of its own, so that it outlives stdin.

    The process that makes it restores it; the supervisor does in its place, if it `is_orphaned`.
    """

    __slots__ = ("_owner", "attributes", "fd")

    def __init__(self, fd: int) -> None:
        self._owner = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
        self.attributes = termios.tcgetattr(fd)

    def is_orphaned(self) -> bool:
        """Whether the process that made this has ended, or is about to: proc_pid_stat(5), PF_EXITING.

        A killed parent's descriptors are closed one by one: the sandbox may have ended of the terminal's hang-up before
        there is any other sign.
        """
        try:
            return bool(int(os.pread(self._owner, 4096, 0).rpartition(b")")[2].split()[6]) & 4)
        except OSError:
            return True

    def restore(self) -> None:
        """Put it back; does nothing when the terminal is gone."""
        try:
            self._set(self.attributes)
        except termios.error:
            pass

    def set_raw(self) -> None:
        """Pass every byte on as it comes: cfmakeraw(3). Leaves what `restore` needs alone."""
        mode = termios.tcgetattr(self.fd)
        mode[0] &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR | termios.IGNCR
                     | termios.ICRNL | termios.IXON)  # fmt: skip
        mode[1] &= ~termios.OPOST
        mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        self._set(mode)

    def _set(self, attributes: list[Any]) -> None:
        """tcsetattr(3), again after a signal: from the background it stops us, and SIGCONT interrupts it."""
        while True:
            try:
                return termios.tcsetattr(self.fd, termios.TCSADRAIN, attributes)
            except termios.error as error:
                if error.args[0] != errno.EINTR:
                    raise


class Relay:
    """Carries bytes between the caller's terminal and the sandbox's, both ways at once, with bounded buffers.

    `poll` is the parent's own; `serve` is called with what it reports.
    """

    __slots__ = ("_at_end", "_from_inside", "_from_outside", "_poll", "master", "mode", "taken")

    def __init__(self, master: int, mode: SavedMode | None, poll: select.poll) -> None:
        self.master = master
        self.mode = mode
        self._poll = poll
        self._at_end = False
        self._from_inside = b""
        self._from_outside = b""
        self.taken = 0  # bytes that the sandbox has said so far
        os.set_blocking(master, False)
        self.enter()
        self._watch()

    def enter(self) -> None:
        """Take the caller's terminal over, at the start and after a stop."""
        self.resize()
        if self.mode:
            self.mode.set_raw()

    def leave(self) -> None:
        """Give the caller's terminal back as it was."""
        if self.mode:
            self.mode.restore()

    def resize(self) -> None:
        """Give the sandbox's terminal the size of the caller's; the kernel signals SIGWINCH inside."""
        if self.master >= 0:
            copy_size(self.master)

    def serve(self, fd: int) -> None:
        """Move the bytes that `fd`, one of ours, is ready for."""
        if fd == self.master:
            self._write_inside()
            self._read_inside()
        elif fd == 0:
            self._read_outside()
        elif fd == 1:
            self._write_outside()
        self._watch()

    def finish(self) -> None:
        """Show what the sandbox still said, and restore the caller's terminal. Idempotent."""
        while (self.master >= 0 and self._read_inside()) or self._from_inside:
            self._write_outside()
        self._close()
        self.leave()

    def _watch(self) -> None:
        """Ask for what there is room and need for."""
        if self.master >= 0:
            room = select.POLLIN if len(self._from_inside) < _CHUNK else 0
            self._poll.register(self.master, room | (select.POLLOUT if self._from_outside else 0))
        if len(self._from_outside) < _CHUNK and self.master >= 0 and not self._at_end:
            self._poll.register(0, select.POLLIN)
        else:
            self._forget(0)
        if self._from_inside:
            self._poll.register(1, select.POLLOUT)
        else:
            self._forget(1)

    def _forget(self, fd: int) -> None:
        try:
            self._poll.unregister(fd)
        except KeyError:
            pass

    def _close(self) -> None:
        if self.master >= 0:
            self._forget(self.master)
            os.close(self.master)
            self.master = -1

    def _read_inside(self) -> bool:
        """Take what the sandbox says; return whether there was anything."""
        try:
            data = os.read(self.master, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""  # EIO: nobody inside has the slave side open any more
        if not data:
            self._close()
            return False
        self._from_inside += data
        self.taken += len(data)
        return True

    def _write_inside(self) -> None:
        try:
            self._from_outside = self._from_outside[os.write(self.master, self._from_outside) :]
        except BlockingIOError:
            pass
        except OSError:
            self._from_outside = b""

    def _read_outside(self) -> None:
        try:
            data = os.read(0, _CHUNK)
        except OSError:
            data = b""
        if not data:
            self._at_end = True
            data = b"\4"  # a pipe that ends is told as a person would: by ^D
        self._from_outside += data

    def _write_outside(self) -> None:
        try:
            # no more than what a pipe that is ready takes at once: we must not sleep here, deaf to signals
            self._from_inside = self._from_inside[os.write(1, self._from_inside[: select.PIPE_BUF]) :]
        except BlockingIOError:
            select.select([], [1], [])
        except OSError:
            # Nobody reads any more: the sandbox's terminal hangs up (SIGHUP), or it would write for ever.
            self._from_inside = b""
            self._close()
