"""A terminal for tests: runs a command on a pseudo-terminal and reads what it shows.

`expect` waits for bytes to come, never for time to pass; what does not come within the deadline fails the test with
all that did.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence

DEADLINE = 20.0  #: seconds that anything may take


class Terminal:
    """A command on a terminal of its own, in a session of its own."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], size: tuple[int, int] = (24, 80)) -> None:
        self._master, slave = pty.openpty()
        self.output = b""  #: everything shown so far
        self._seen = 0
        self.resize(*size)
        self.before = termios.tcgetattr(slave)
        # start_new_session runs before preexec_fn: the new session takes the terminal.
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self._slave = slave  # kept open: its settings can be looked at after the command has ended

    def send(self, keys: str | bytes) -> None:
        """Type `keys`; \\x03 is Ctrl-C, \\x1a Ctrl-Z, \\x04 Ctrl-D."""
        os.write(self._master, keys.encode() if isinstance(keys, str) else keys)

    def line(self, text: str) -> None:
        """Type `text` and Return."""
        self.send(text + "\r")

    def expect(self, pattern: str, seconds: float = DEADLINE) -> re.Match[bytes]:
        """Read until `pattern` comes after what was expected last, and return the match."""
        compiled = re.compile(pattern.encode(), re.DOTALL)
        deadline = time.monotonic() + seconds
        while not (match := compiled.search(self.output, self._seen)):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} did not come; shown after it was asked for: {self.rest!r}")
        self._seen = match.end()
        return match

    @property
    def rest(self) -> bytes:
        """What has been shown since the last match."""
        return self.output[self._seen :]

    @property
    def settings(self) -> list[object]:
        """The terminal's settings as tcgetattr(3) returns them now."""
        return termios.tcgetattr(self._slave)

    def resize(self, rows: int, columns: int) -> None:
        """Change the window's size: the kernel sends SIGWINCH to the foreground job."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, seconds: float = DEADLINE) -> int:
        """Read on until the command ends, and return its exit status as a shell gives it."""
        pidfd = os.pidfd_open(self.process.pid)
        deadline = time.monotonic() + seconds
        try:
            while not select.select([pidfd], [], [], 0)[0]:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise AssertionError(f"still running after {seconds} s; shown: {self.rest!r}")
                select.select([pidfd, self._master], [], [], left)
                self._read(0)
        finally:
            os.close(pidfd)
        while self._read(0):
            pass
        status = self.process.wait()
        return status if status >= 0 else 128 - status

    def hang_up(self) -> None:
        """Close the terminal, as a closed window does: the kernel sends SIGHUP to the session's leader."""
        for descriptor in (self._slave, self._master):
            os.close(descriptor)
        self._master = self._slave = -1

    def close(self) -> None:
        """End the command if it has not ended, and let go of the terminal."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._master >= 0:
            self.hang_up()

    def _read(self, seconds: float) -> bool:
        """Add what is there within `seconds` to the output; False when there is nothing."""
        if not select.select([self._master], [], [], max(0.0, seconds))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self.output += data
        return bool(data)
