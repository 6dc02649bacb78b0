"""A pull's memory does not grow with the image: all its processes together stay under 150 MB."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from hostile_registry import HostileRegistry
from pulling import Puller
from real_registry import SmallImage
from test_pull_kill import family

pytestmark = needs.userns

LIMIT = 150_000  #: kB, all processes together, shared pages counted once


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    yield Puller(tmp_path)
    Sbx(tmp_path / "store")("unshare", "rm", "-rf", tmp_path / "store")


def proportional_set(pid: int) -> int:
    """Return the kB that a process has to itself, with its share of what it shares (proc_pid_smaps(5))."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has ended
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def test_memory(puller: Puller) -> None:
    noise = os.urandom(1 << 20)
    layers = [{f"file{n}-{k}": noise[n:] for k in range(24)} for n in range(4)]
    with HostileRegistry(SmallImage(*layers)) as server:
        process = subprocess.Popen(
            [*COMMAND, "pull", "-q", f"{server.host}/x"], env=puller.env, stdout=subprocess.DEVNULL
        )
        peak = together = 0
        while process.poll() is None:
            members = family(process.pid)
            together = max(together, len(members))
            peak = max(peak, sum(map(proportional_set, members)))
    assert process.returncode == 0
    assert together >= 5, "it was never seen at work"
    assert 20_000 < peak < LIMIT
