"""The checks that read the code: ruff, its formatter, mypy --strict, and the shell scripts' syntax."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootless-test"
SCRIPTS = [
    path
    for folder in ("helpers", "images", ".ci", "tests/vm")
    for path in sorted((needs.CHECKOUT / folder).iterdir())
    if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/bin/sh"))
]


def check(*command: str | Path) -> None:
    """Run a checker in the checkout; what it prints is the failure."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=needs.CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


def test_ruff() -> None:
    check("ruff", "check", "--quiet", "--cache-dir", CACHE / "ruff", ".")


def test_ruff_format() -> None:
    check("ruff", "format", "--check", "--diff", "--quiet", "--cache-dir", CACHE / "ruff", ".")


def test_mypy() -> None:
    check("mypy", "--cache-dir", os.devnull, "rootless", "tests")  # a cache of an older tree has been wrong before


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script: Path) -> None:
    done = subprocess.run(["sh", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs.program("shellcheck")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    done = subprocess.run(
        ["shellcheck", "-x", "--severity", "warning", script], cwd=needs.CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
