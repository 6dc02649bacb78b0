"""HideMemory by itself: where pid 1 stays an interpreter, nothing else hides it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from rootless import syscalls
from rootless.processes import HideMemory
from rootless.steps import Child


def test_memory_and_command_line_are_hidden() -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        HideMemory(b"hidden").execute(Child(-1, -1))
        os.write(writer, b"%d" % syscalls.prctl(syscalls.PR_GET_DUMPABLE))
        while True:
            signal.pause()
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"0"
        assert Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0") == b""
        assert Path(f"/proc/{pid}/comm").read_text() == "hidden\n"
        assert Path(f"/proc/{pid}/environ").stat().st_uid == 0  # the host's root's, no longer ours
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(reader)
