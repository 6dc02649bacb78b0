"""kill -9 of any process of a sandbox at any moment: everything ends, and nothing is left. And very many at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import NONE, eventually, is_gone, tree

from rootless import state

pytestmark = [needs.userns, needs.busybox]

#: Long enough for the whole start; the random moments are spread over it.
START = 0.04


def sandboxes(sbx: Sbx) -> list[str]:
    folder = sbx.home / "sandboxes"
    return os.listdir(folder) if folder.is_dir() else []


def is_held(lock: Path) -> bool:
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def mounts() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "one that had ended"


def kill_one(sbx: Sbx, image: str, seed: int, *words: str) -> None:
    """Start a sandbox, kill one of its processes at a moment that `seed` chooses, and require that all ends."""
    chance = random.Random(seed)
    before = mounts()
    process = sbx.start(
        "run", *words, image, "sh", "-c", "echo x >/root/f; chown 5:5 /root/f; mkdir -m 0 /root/d; exec sleep 1000",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        time.sleep(chance.random() * START)  # the moment is meant to be any
        pids = tree(process.pid)
        victim = chance.choice(pids)
        name = name_of(victim)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            pass  # newuidmap was faster
        pids += tree(process.pid)
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            # What was killed was not needed (newuidmap, after its work). The whole is ended by its parent.
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                doing = [(name_of(pid), Path(f"/proc/{pid}/wchan").read_text()) for pid in tree(process.pid)]
                process.kill()
                pytest.fail(f"seed {seed}: {name} was killed, and sbx does not end when it is told to: {doing}")
    for pid in {*pids} - {process.pid}:
        eventually(lambda pid=pid: is_gone(pid), f"process {pid} has ended (seed {seed})")  # type: ignore[misc]
    assert mounts() == before


def clear(sbx: Sbx, image: str) -> None:
    """Nothing is left but what the next launch, whose supervisor sweeps, clears, once all that was killed has ended.

    What has no lock yet, or none any more, is left alone for a moment: somebody may be at it.
    """
    eventually(lambda: not any(is_held(sbx.home / "sandboxes" / name / "lock") for name in sandboxes(sbx)), "the end")
    if any(not (sbx.home / "sandboxes" / name / "lock").exists() for name in sandboxes(sbx)):
        time.sleep(state._MOMENT)
    assert sbx("run", *NONE, image, "true").status == 0
    eventually(lambda: not sandboxes(sbx), "the debris is cleared")


@pytest.mark.parametrize(
    "words", [NONE, (*NONE, "--no-init"), (*NONE, "-u", "guest"), (*NONE, "--idmap", "single")], ids=" ".join
)
def test_kill_at_random_moments(sbx: Sbx, image: str, words: tuple[str, ...]) -> None:
    for seed in range(6):
        kill_one(sbx, image, seed + 100 * len(words), *words)
    clear(sbx, image)


@pytest.mark.slow
def test_kill_a_hundred_times(sbx: Sbx, image: str) -> None:
    seed = random.randrange(10**6)
    for turn in range(100):
        kill_one(sbx, image, seed + turn, *NONE)
    clear(sbx, image)


@needs.tun
@needs.program("slirp4netns")
def test_kill_with_a_network(sbx: Sbx, image: str) -> None:
    for seed in range(4):
        kill_one(sbx, image, seed, "--net", "slirp4netns")
    clear(sbx, image)


@pytest.mark.parametrize("victim", ["parent", "supervisor", "pid 1", "command"])
@pytest.mark.parametrize("init", [[], ["--no-init"]], ids=["init", "no-init"])
def test_kill_each_of_a_running_one(sbx: Sbx, image: str, victim: str, init: list[str]) -> None:
    with sbx.start("run", *NONE, *init, image, "sh", "-c", "echo up; exec sleep 1000") as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        pids = dict(zip(["parent", "supervisor", "pid 1", "command"], tree(process.pid), strict=False))
        pids.setdefault("command", pids["pid 1"])
        os.kill(pids[victim], signal.SIGKILL)
        assert process.wait(20) == (-9 if victim == "parent" else 137)
    for pid in pids.values():
        eventually(lambda pid=pid: is_gone(pid), "all have ended")  # type: ignore[misc]
    if victim in ("pid 1", "command"):
        assert sandboxes(sbx) == []
    if victim == "parent":
        eventually(lambda: not sandboxes(sbx), "the supervisor has cleared up")
    clear(sbx, image)


def test_kill_all_of_it_at_once(sbx: Sbx, image: str) -> None:
    with sbx.start("run", *NONE, image, "sh", "-c", "echo up; exec sleep 1000") as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        pids = tree(process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # the supervisor, before its turn came, was faster
                os.kill(pid, signal.SIGKILL)
        process.wait()
    for pid in pids:
        eventually(lambda pid=pid: is_gone(pid), "all have ended")  # type: ignore[misc]
    clear(sbx, image)


def launch(sbx: Sbx, image: str, count: int) -> None:
    processes = [
        sbx.start("run", *NONE, image, "sh", "-c", f"echo {n} >/root/f; cat /root/f", stdin=subprocess.DEVNULL)
        for n in range(count)
    ]
    for n, process in enumerate(processes):
        with process:
            stdout, stderr = process.communicate(timeout=120)
            assert (process.returncode, stdout, stderr) == (0, f"{n}\n".encode(), b"")
    assert sandboxes(sbx) == []


def test_thirty_launches_at_once(sbx: Sbx, image: str) -> None:
    launch(sbx, image, 30)


@pytest.mark.slow
def test_two_hundred_launches_at_once(sbx: Sbx, image: str) -> None:
    launch(sbx, image, 200)
