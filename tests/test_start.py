"""helpers/start, after its installation: what it runs, with and without arguments, a terminal and an image."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from terminals import Terminal

pytestmark = needs.subids  # else it says first what is missing


class Checkout:
    """A checkout whose environment is made already, with a command `sbx` that records how it is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(needs.CHECKOUT / "helpers", folder / "helpers")
        shutil.copy(needs.CHECKOUT / "pyproject.toml", folder)
        self.bin = folder / ".venv" / "bin"
        self.bin.mkdir(parents=True)
        (self.bin / "python3").symlink_to("/bin/true")
        checksum = subprocess.check_output(["cksum"], stdin=(folder / "pyproject.toml").open(), text=True).strip()
        (folder / ".venv" / "stamp").write_text(f"{folder} {checksum}\n")
        self.sbx("exit 0")

    def sbx(self, script: str) -> None:
        """Let the command `sbx` write its arguments, and do `script`."""
        (self.bin / "sbx").write_text(f'#!/bin/sh\necho "sbx $*"\n{script}\n')
        (self.bin / "sbx").chmod(0o755)

    def start(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["sh", str(self.folder / "helpers" / "start"), *arguments]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30)


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


def test_arguments_go_to_sbx(checkout: Checkout) -> None:
    checkout.sbx('printf "<%s>" "$@"; exit 7')
    done = checkout.start("ps", "a b", "")
    assert (done.returncode, done.stdout.splitlines()[1], done.stderr) == (7, "<ps><a b><>", "")


def test_without_a_terminal_it_shows_the_os_release_of_alpine(checkout: Checkout) -> None:
    done = checkout.start()
    assert done.stdout == "sbx run --net none alpine true\nsbx run alpine cat /etc/os-release\n"
    assert (done.returncode, done.stderr) == (0, "")


def test_without_alpine_it_says_so_and_takes_the_host(checkout: Checkout) -> None:
    checkout.sbx('case $* in *alpine*) echo "sbx: no such image" >&2; exit 125 ;; esac')
    done = checkout.start()
    assert done.stdout.splitlines()[-1] == "sbx run host cat /etc/os-release"
    assert "sbx: no such image" in done.stderr
    assert "opening the image host instead" in done.stderr


def test_on_a_terminal_it_opens_a_shell(checkout: Checkout, tty: Callable[..., Terminal]) -> None:
    terminal = tty(["sh", str(checkout.folder / "helpers" / "start")], env=dict(os.environ))
    terminal.expect("sbx shell alpine")
    assert terminal.wait() == 0


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_in_a_checkout_of_another_user_the_environment_is_the_callers(checkout: Checkout, tmp_path: Path) -> None:
    (checkout.folder / ".venv").rename(checkout.folder / "elsewhere")
    checkout.folder.chmod(0o555)
    data = tmp_path / "data"
    environment = data / "rootless" / "venv"
    environment.mkdir(parents=True)
    shutil.copytree(checkout.folder / "elsewhere", environment, symlinks=True, dirs_exist_ok=True)
    try:
        done = subprocess.run(
            ["sh", checkout.folder / "helpers" / "start", "ps"],
            env=os.environ | {"XDG_DATA_HOME": str(data)},
            capture_output=True,
            text=True,
        )
    finally:
        checkout.folder.chmod(0o755)
    assert (done.returncode, done.stdout) == (0, "sbx ps\n"), done.stderr
