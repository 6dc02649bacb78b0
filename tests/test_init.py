"""The programs that pid 1 and its supervisor become: their bytes, and what they do, natively and (by qemu) emulated."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from conftest import Sbx

from rootless import init

MACHINES = ("x86_64", "aarch64")

#: Blocks all signals, starts a command (its standard input is ours) and becomes the program that waits for it.
PARENT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from rootless import init
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
command = os.fork()
if command == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.execvp("sh", ["sh", "-c", sys.argv[3]])
path = sys.argv[4]
with open(path, "wb") as stream:
    stream.write(init.program("init", sys.argv[2], [command]))
os.chmod(path, 0o755)
words = sys.argv[5:] + [path]
os.execvp(words[0], words)
"""


def emulator(machine: str) -> list[str]:
    """Return the words that run a program of `machine` here; skip where nothing does."""
    if machine == platform.machine():
        return []
    name = f"qemu-{machine}-static"
    needs.enforce("" if shutil.which(name) else f"no {name}")
    return [name]


def start(machine: str, script: str, folder: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", PARENT, str(needs.CHECKOUT), machine, script, str(folder / "init")]
    return subprocess.Popen([*words, *emulator(machine)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("program", init.CODE)
@pytest.mark.parametrize("machine", MACHINES)
def test_the_bytes_are_what_the_source_says(program: str, machine: str, tmp_path: Path) -> None:
    prefix = "" if machine == platform.machine() else f"{machine}-linux-gnu-"
    needs.enforce("" if shutil.which(f"{prefix}as") else f"no assembler for {machine}")
    source = str(needs.CHECKOUT / "helpers" / f"{program}-{machine}.s")
    assembled, binary = str(tmp_path / "it.o"), str(tmp_path / "it")
    subprocess.run([f"{prefix}as", "-o", assembled, source], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", assembled, binary], check=True)
    numbers = {"init": 1, "supervisor": 3, "start": 1}[program]
    filled_in = b"\x11" * 4 * numbers + f"sbx-{program}".encode() + b"\0"
    assert Path(binary).read_bytes() == init.CODE[program][machine] + filled_in


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("exit 255", 255), ("kill -9 $$", 137)])
def test_it_ends_with_the_commands_status(machine: str, script: str, status: int, tmp_path: Path) -> None:
    # Other children end before the command does, and are not taken for it.
    process = start(machine, f"true & true & wait; {script}", tmp_path)
    assert process.wait(timeout=20) == status


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGRTMIN + 3])
def test_it_forwards_signals(machine: str, number: int, tmp_path: Path) -> None:
    process = start(machine, f"trap 'exit 9' {int(number)}; echo ready; while :; do read line; done", tmp_path)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    with contextlib.suppress(BrokenPipeError):  # it may have ended already: some shells look at their traps at once
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert process.wait(timeout=20) == 9


SUPERVISOR = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from rootless import init
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
go, parent = os.pipe()
process = os.fork()
if process == 0:
    os.execvp("sh", ["sh", "-c", sys.argv[3]])
if sys.argv[4] == "alone":
    os.close(parent)
else:
    os.set_inheritable(parent, True)
for fd in (go, pidfd := os.pidfd_open(process)):
    os.set_inheritable(fd, True)
path = sys.argv[5]
with open(path, "wb") as stream:
    stream.write(init.program("supervisor", sys.argv[2], [process, go, pidfd]))
os.chmod(path, 0o755)
words = [*sys.argv[6:], path, "/bin/sh", "-c", "echo cleaned; exit 3"]
os.execvp(words[0], words)
"""


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("script", "parent", "status", "said"),
    [
        ("exit 7", "there", 7, b""),
        ("kill -9 $$", "there", 137, b""),
        ("exec sleep 1000", "alone", 3, b"cleaned\n"),
    ],
)
def test_the_supervisor(machine: str, script: str, parent: str, status: int, said: bytes, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SUPERVISOR, str(needs.CHECKOUT), machine, script, parent, str(tmp_path / "it")]
    done = subprocess.run([*words, *emulator(machine)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=20)
    assert (done.returncode, done.stdout) == (status, said)


def test_a_machine_without_code_stays_an_interpreter() -> None:
    init.become_init("pdp11", 2)  # returns
    reader, writer = os.pipe()
    init.become_supervisor("pdp11", os.getpid(), reader, [writer], [])
    os.close(reader)
    os.close(writer)


@needs.userns
def test_pid_1_is_it_and_tells_nothing(sbx: Sbx, rootfs: Path) -> None:
    if platform.machine() not in MACHINES:
        pytest.skip("no code for this machine")
    script = "grep -E 'Name|VmRSS' /proc/1/status; for f in exe cwd root fd/0; do readlink /proc/1/$f; done"
    script += "; cat /proc/1/environ /proc/1/maps /proc/1/mem; tr '\\0' . </proc/1/cmdline"
    done = sbx("run", "--net", "none", "--rootfs", rootfs, "sh", "-c", script)
    name, size, *rest = done.stdout.splitlines()
    assert name.split() == ["Name:", "sbx-init"]
    assert int(size.split()[1]) < 100
    assert rest == ["sbx-init."], done
    assert os.path.basename(sys.executable) not in done.stdout
