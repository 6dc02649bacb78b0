"""Processes that part without a copy of the interpreter: the machine code, its lists, what is told when one fails."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import NONE, running, tree

from rootless import handover

MACHINE = platform.machine()
known = pytest.mark.skipif(MACHINE not in handover.CODE, reason=f"no machine code for {MACHINE}")

HEAD = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from rootless import handover as h, syscalls
EXIT_GROUP = 231
"""
SPLIT = (
    HEAD
    + """
hand = h.Handover(syscalls.CLONE_VM | syscalls.SIGCHLD, 2, b"lost X\\n")
hand.call(h.WRITE, 1, hand.put(b"stays\\n"), 6)
hand.call(*{call})
hand.call(EXIT_GROUP, 7)
before = list(range(1000))
if os.fork() == 0:
    hand.split()
    assert sum(before) == 499500
    os.write(1, b"goes on\\n" if os.getppid() else b"")
    os._exit(9)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
)
MEET = (
    HEAD
    + """
status, told = os.pipe()
go, say = os.pipe()
hand = h.Handover(syscalls.SIGCHLD, told, b"lost X\\n")
hand.call_first(h.CLOSE, say)
hand.call_first(h.READ, go, hand.put(b" "), 1)
hand.call_first(*{first})
hand.pidfd = hand.argument(2)
hand.call(h.WRITE, 1, hand.path, 16)
hand.call(h.WRITE, 1, hand.put(b"\\n"), 1)
hand.call(h.FCNTL, 0, 1)  # F_GETFD: fails unless it is a descriptor
hand.call(h.PWRITE, os.memfd_create("seen"), hand.process, 4, 0)
hand.call(*{second})
hand.call(h.WRITE, told, hand.put(b"."), 1)
hand.call(EXIT_GROUP, 5)
mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
begun = hand.begin(0, say, status)
signal.pthread_sigmask(signal.SIG_SETMASK, mask)
os.close(told)
if {killed}:
    os.kill(begun, 9)
try:
    new = hand.meet()
except OSError as error:
    print(error.errno, hand.failed_call(), os.waitstatus_to_exitcode(os.waitpid(begun, 0)[1]))
    sys.exit()
if new == 0:
    os.read(go, 1)
    os._exit(os.getppid() != begun and begun != 1)
os.write(say, b".")
print(new, os.waitstatus_to_exitcode(os.waitpid(begun, 0)[1]), flush=True)
"""
)
NOTHING = "(h.SETSID,) if os.getsid(0) != os.getpid() else (h.FCNTL, 0, 1)"


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(needs.CHECKOUT)],
        capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return sorted((done.stdout + done.stderr).splitlines())


@pytest.mark.parametrize("machine", handover.CODE)
def test_the_bytes_are_what_the_source_says(machine: str, tmp_path: Path) -> None:
    prefix = "" if machine == MACHINE else f"{machine}-linux-gnu-"
    needs.enforce("" if shutil.which(f"{prefix}as") else f"no assembler for {machine}")
    source = str(needs.CHECKOUT / "helpers" / f"handover-{machine}.s")
    assembled, binary = str(tmp_path / "it.o"), str(tmp_path / "it")
    subprocess.run([f"{prefix}as", "-o", assembled, source], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", assembled, binary], check=True)
    assert Path(binary).read_bytes() == handover.CODE[machine]


@known
def test_split() -> None:
    assert run(SPLIT.format(call="(h.FCNTL, 0, 1)")) == ["7", "goes on", "stays"]


@known
def test_a_call_that_fails_after_the_split_is_told() -> None:
    # EBADF is 9, and 32 more is a closing bracket
    assert run(SPLIT.format(call="(h.FCNTL, 999, 1)")) == ["125", "goes on", "lost )", "stays"]


@known
def test_meet() -> None:
    path, line = run(MEET.format(first="(h.FCNTL, 0, 1)", second="(h.FCNTL, 0, 1)", killed=False))
    pid, status = line.split()
    assert path.startswith("/proc/")
    assert path.rpartition("/")[2] == pid
    assert status == "5"


@known
@pytest.mark.parametrize(
    ("first", "second", "killed", "told"),
    [
        ("(h.FCNTL, 999, 1)", "(h.FCNTL, 0, 1)", False, ["9 2 125"]),
        ("(h.FCNTL, 0, 1)", "(h.FCNTL, 999, 1)", False, ["9 7 125"]),
        ("(h.FCNTL, 0, 1)", "(h.FCNTL, 0, 1)", True, ["10 -1 -9"]),
    ],
    ids=["before", "after", "killed"],
)
def test_meet_tells_what_failed(first: str, second: str, killed: bool, told: list[str]) -> None:
    assert [line for line in run(MEET.format(first=first, second=second, killed=killed)) if line[0] != "/"] == told


@known
def test_a_list_that_is_too_long_is_refused() -> None:
    hand = handover.Handover(0, 2, b"lost X\n")
    for _ in range(60):
        hand.call(handover.CLOSE, 999)
    with pytest.raises(OSError, match="too long"):
        hand.split()
    hand = handover.Handover(0, 2, b"lost X\n")
    hand.put(b"x" * 9000)
    with pytest.raises(OSError, match="too long"):
        hand.split()


# ── a launch ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LAUNCH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from rootless import entry, handover, idmap, init, processes, supervisor, syscalls
{change}
sys.exit(entry.main())
"""
REFUSED = """
import os
whole = init.in_memory
def refused(name, *rest):
    fd = whole(name, *rest)
    if name == "{name}":
        os.fchmod(fd, 0)
    return fd
init.in_memory = refused
"""
NO_ROOT = """
class Map(idmap.WriteMaps):
    def execute(self, pid):
        for mapping in (*self.idmap.uids, *self.idmap.gids):
            mapping.container_id += 1
        return super().execute(pid)
from rootless import plan
plan.WriteMaps = Map
"""


def launch(sbx: Sbx, change: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    code = LAUNCH.format(change=change)
    return subprocess.run(
        [sys.executable, "-c", code, str(needs.CHECKOUT), "run", *NONE, *words],
        env=sbx.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (REFUSED.format(name="init"), "become a small program: Permission denied"),
        (REFUSED.format(name="supervisor"), "become a small program: Permission denied"),
        ('processes.text = lambda ids: "0 0 x"', "start pid 1: write the inner id map: Invalid argument"),
        (NO_ROOT, "become root and drop supplementary groups: Invalid argument"),
    ],
    ids=["init", "supervisor", "maps", "root"],
)
def test_a_launch_that_fails_there(sbx: Sbx, image: str, change: str, said: str) -> None:
    done = launch(sbx, change, image, "sleep", "10")
    assert done.stderr.startswith(f"sbx: {said}"), done
    assert (done.returncode, done.stdout) == (125, "")
    # and the fixture has looked for processes, mounts and folders


@needs.userns
@needs.busybox
@pytest.mark.parametrize(
    "change",
    [
        "handover.CODE.clear()",
        "def forbidden(*words): raise PermissionError(13, '')\ninit.in_memory = forbidden",
        "def forbidden(code): raise PermissionError(13, '')\nsyscalls.load_code = forbidden",
    ],
    ids=["no code", "no files in memory", "no executable memory"],
)
def test_where_it_cannot_be_processes_are_forked(sbx: Sbx, image: str, change: str) -> None:
    script = "cat /proc/self/setgroups; id -u; cat /proc/1/comm; exit 7"
    done = launch(sbx, change, image, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines() == ["deny", "0", "sbx-init"]


@known
@needs.userns
@needs.busybox
def test_who_is_left(sbx: Sbx, image: str) -> None:
    """Neither supervisor nor init has anything of the interpreter's, nor any file but what it waits for."""
    with running(sbx, "run", *NONE, image, "sh", "-c", "echo up; exec sleep 1000") as process:
        _, supervisor, init, _ = tree(process.pid)
        for pid, name in ((supervisor, "sbx-supervisor"), (init, "sbx-init")):
            status = dict(
                line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
            )
            assert status["Name"].strip() == name
            assert int(status["VmRSS"].split()[0]) < 100
            if pid == supervisor:
                assert int(status["SigBlk"], 16) & 0x7FFFFFFF == 0x7FFFFFFF & ~(1 << 8 | 1 << 18)
