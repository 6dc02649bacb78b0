"""helpers/bench runs each of its parts, on counts too small to mean anything. Nothing here looks at a number."""

from __future__ import annotations

import glob
import os
import subprocess
import sys

import needs

FOLDERS = "/var/tmp/sbx-bench-*"


def bench(*words: str) -> str:
    """Run helpers/bench, require that it succeeds, and return what it printed."""
    done = subprocess.run(
        ["sh", needs.CHECKOUT / "helpers" / "bench", *words],
        env=os.environ | {"BENCH_PYTHON": sys.executable},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rows(printed: str, name: str) -> list[list[str]]:
    """Return the cells of the table rows that begin with `name`."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    return [row for row in cells if row[0] == name]


@needs.userns
@needs.program("bwrap", "tar", "gzip")
def test_launches() -> None:
    before = set(glob.glob(FOLDERS))
    printed = bench("launch", "parallel", "--rounds", "1", "--batch", "1", "--only", "bwrap")
    for name in ("sbx", "bwrap"):
        assert len(rows(printed, name)) == 3, printed  # one after the other, 8 at once, 32 at once
    assert all(row[-1] == "1.00" for row in rows(printed, "sbx"))
    assert set(glob.glob(FOLDERS)) == before


@needs.userns
@needs.program("tar", "gzip")
def test_import_profile_and_memory() -> None:
    printed = bench("import", "profile", "memory", "--rounds", "1", "--sandboxes", "1", "--only", "none")
    assert rows(printed, "tar xzf")
    assert rows(printed, "sbx import")
    acts = [row[0] for row in rows(printed, "interpreter") + rows(printed, "about to exec")]
    assert acts == ["interpreter", "about to exec"], printed
    # pid 1 hides its memory, so an ordinary user is told so
    assert rows(printed, "sbx") or "left out: memory: pid 1 hides its memory" in printed


def test_an_unknown_part_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, needs.CHECKOUT / "helpers" / "bench.py", "lunch"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "no such part: lunch" in done.stderr
