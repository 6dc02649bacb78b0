"""The memory of idle sandboxes: proportional set size (PSS) of everything but the command, by smaps_rollup."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence

#: Says that it runs, then waits; the shell becomes the sleep.
IDLE = ("sh", "-c", "echo running; exec sleep 1000")
SETTLE = 0.3  #: seconds for what follows the command's start; nothing tells when a process has done its last act


def idle(argv: Sequence[str], environment: Mapping[str, str], count: int, ids: Mapping[str, object]) -> list[list[int]]:
    """Run `count` sandboxes at once and return kilobytes for each: one number for each process, outermost first.

    The command, innermost, is left out. `ids` are the words of subprocess for the user who launches. Raises
    PermissionError where a process may not be looked at: a sandbox's pid 1 hides its memory from all but root.
    """
    running = [
        subprocess.Popen(argv, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, **ids)  # type: ignore[call-overload]
        for _ in range(count)
    ]
    try:
        for process in running:
            process.stdout.readline()
        time.sleep(SETTLE)
        return [[pss(pid) for pid in _chain(process.pid)[:-1]] for process in running]
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def _chain(pid: int) -> list[int]:
    """Return `pid` and all its descendants, parents before children."""
    with open(f"/proc/{pid}/task/{pid}/children") as stream:
        children = [int(word) for word in stream.read().split()]
    return [pid, *(each for child in children for each in _chain(child))]


def pss(pid: int) -> int:
    """Return the proportional set size of a process in kilobytes: shared pages count by how many share them."""
    with open(f"/proc/{pid}/smaps_rollup") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("Pss:"))


def may_look() -> str:
    """Return why this process may not look into all processes of a sandbox; empty if it may."""
    return "" if os.geteuid() == 0 else "pid 1 hides its memory from all but root: run this as root"
