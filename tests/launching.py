"""What tests of running sandboxes share: start one, wait until its command runs, look at its processes from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

from conftest import Sbx

NONE = ("--net", "none")
DEADLINE = 20.0  #: seconds in which anything must happen


@contextmanager
def running(sbx: Sbx, *words: str | Path, **options: Any) -> Iterator[Popen[bytes]]:
    """Start `sbx` with `words`, whose command says "up" first, and give it when it has; end it afterwards."""
    with sbx.start(*words, **options) as process:
        try:
            assert process.stdout
            first = process.stdout.readline()
            assert first == b"up\n", (first, process.stderr and process.stderr.read())
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
            process.wait(DEADLINE)


def eventually(holds: Callable[[], object], what: str) -> None:
    """Wait until `holds`: for what the kernel reports to nobody, such as another's process state."""
    deadline = time.monotonic() + DEADLINE
    while not holds():
        assert time.monotonic() < deadline, f"did not come: {what}"
        time.sleep(0.005)


def children(pid: int) -> list[int]:
    """Return the children of `pid`."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def tree(pid: int) -> list[int]:
    """Return `pid` and all its descendants: sbx, its supervisor, the sandbox's pid 1, the command, and so on."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


def state_of(pid: int) -> str:
    """Return the state of `pid` as in proc_pid_stat(5); "X" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def is_gone(pid: int) -> bool:
    """Whether `pid` has ended; not for what Popen waits for.

    Orphans come to us here as to a host's init, and are reaped as by that: a sandbox ends only when all in it are.
    """
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    return state_of(pid) in "XZ"


def as_ordinary(*signals: int) -> Callable[[], None]:
    """Return a preexec_fn that gives `signals` their default actions, whatever the tests were started with."""
    import signal

    def restore() -> None:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)

    return restore


def shell_status(returncode: int) -> int:
    """Return what a shell would say of a finished Popen's `returncode`."""
    return returncode if returncode >= 0 else 128 - returncode


def is_root() -> bool:
    return os.geteuid() == 0


def host_python() -> list[str]:
    """Return the words that run Python code on the image `host`; what the home folder or /tmp would hide is mounted."""
    import sys

    program = os.path.realpath(sys.executable)
    prefix = sys.base_prefix
    volumes = [] if prefix.startswith("/usr") else ["-v", f"{prefix}:{prefix}:ro"]
    return [*volumes, "host", program, "-I", "-S", "-c"]
