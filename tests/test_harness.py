"""The tests' own machinery: what it would let through, nothing else would notice."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import nothing_left
from terminals import Terminal


def test_a_process_left_behind_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.END", 0.1)
    # The shell ends; its orphan comes to us.
    with pytest.raises(AssertionError, match=r"left behind: process [0-9]+ sleep 1000"), nothing_left(tmp_path):
        subprocess.run(["sh", "-c", "sleep 1000 >/dev/null 2>&1 &"], check=True)
    with nothing_left(tmp_path):
        pass  # it was killed


def test_a_process_that_ends_in_time_is_not_left_behind(tmp_path: Path) -> None:
    with nothing_left(tmp_path):
        subprocess.run(["sh", "-c", "sleep 0.1 >/dev/null 2>&1 &"], check=True)


def test_a_folder_left_behind_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="left behind: folder x"), nothing_left(tmp_path):
        (tmp_path / "sandboxes" / "x").mkdir(parents=True)


def test_the_failure_of_the_test_itself_comes_first(tmp_path: Path) -> None:
    def fails() -> None:
        with nothing_left(tmp_path):
            (tmp_path / "sandboxes" / "x").mkdir(parents=True)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fails()


def test_what_the_host_cannot_do_is_skipped_or_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SBX_MUST_RUN", raising=False)
    needs.enforce("")
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        needs.enforce("no such thing")
    monkeypatch.setenv("SBX_MUST_RUN", "1")
    needs.enforce("")
    with pytest.raises(pytest.fail.Exception, match="no such thing"):
        needs.enforce("no such thing")


def test_probes() -> None:
    assert needs.program("sh").args[0]() == ""
    assert needs.program("sh", "no-such-program").args[0]() == "no no-such-program"
    assert needs.kernel(2, 6, "anything").args[0]() == ""
    assert "needs Linux 99.0" in needs.kernel(99, 0, "tomorrow").args[0]()


def test_the_terminal(tty: Callable[..., Terminal]) -> None:
    terminal = tty(["sh", "-c", 'stty size; read line; echo "<$line>"; stty size; exit 7'], env=dict(os.environ))
    terminal.expect("24 80")
    terminal.resize(10, 20)
    terminal.line("typed")
    terminal.expect("<typed>\r\n10 20")
    assert terminal.wait() == 7
    assert terminal.settings == terminal.before


def test_the_terminal_is_the_controlling_one(tty: Callable[..., Terminal]) -> None:
    terminal = tty(["sh", "-c", "echo ready >/dev/tty; exec cat"], env=dict(os.environ))
    terminal.expect("ready")
    terminal.send("\x03")
    assert terminal.wait() == 128 + 2


def test_what_does_not_come_fails(tty: Callable[..., Terminal]) -> None:
    terminal = tty(["echo", "something else"], env=dict(os.environ))
    with pytest.raises(AssertionError, match=r"did not come.*something else"):
        terminal.expect("expected", seconds=0.5)
