"""Where the milliseconds of a launch go: the command runs under bench_trace.py, which stamps each act with the time."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench_measure import median, table
from bench_peers import World

TRACE = Path(__file__).resolve().parent / "bench_trace.py"
WHO = {"1": "pid 1", "2": "command"}  #: by their own ids, as they see them
Row = tuple[str, str, int]  # who, what, the how-manieth time


def profile(checkout: Path, arguments: Sequence[str], world: World, rounds: int) -> str:
    """Return a table of the acts of ``sbx ARGUMENTS``: when each has ended, and how long it took its process.

    Medians over `rounds` launches. Acts of different processes overlap, so that the durations add up to more than the
    whole. `checkout` has compiled modules.
    """
    stamps: dict[Row, list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for row, ended, took in _one_launch(checkout, arguments, world.scratch / "trace", world.environment):
            stamps.setdefault(row, []).append((ended, took))
    rows = [
        (median([ended for ended, _ in seen]), median([took for _, took in seen]), row)
        for row, seen in stamps.items()
        if len(seen) * 2 > rounds
    ]
    return table(
        ("act", "process", "ended at ms", "took ms"),
        [(what, who, f"{ended:.2f}", f"{took:.2f}") for ended, took, (who, what, _) in sorted(rows)],
    )


def _one_launch(
    checkout: Path, arguments: Sequence[str], trace: Path, environment: dict[str, str]
) -> list[tuple[Row, float, float]]:
    trace.unlink(missing_ok=True)
    argv = [str(checkout / ".venv/bin/python3"), "-I", "-S", "-E", str(TRACE), str(checkout), str(trace), *arguments]
    started = time.monotonic_ns()
    subprocess.run(argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    ended = time.monotonic_ns()
    lines = [line.split(" ", 2) for line in trace.read_text().splitlines()]
    parent = ""
    before: dict[str, int] = {}
    last = started
    seen: Counter[tuple[str, str]] = Counter()
    acts = []
    for stamp, pid, what in sorted(lines, key=lambda line: int(line[0])):
        now = int(stamp)
        parent = parent or pid
        who = "parent" if pid == parent else WHO.get(pid, "supervisor")
        row = (who, what, seen[who, what])
        seen[who, what] += 1
        acts.append((row, (now - started) / 1e6, (now - before.get(pid, last)) / 1e6))
        before[pid] = last = now
    acts.append((("parent", "process ended", 0), (ended - started) / 1e6, (ended - last) / 1e6))
    return acts
