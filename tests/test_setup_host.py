"""helpers/setup-host, on a host that lacks things: a mount namespace in which they are hidden or different."""

from __future__ import annotations

import ast
import getpass
import os
import re
import subprocess
from pathlib import Path

import needs
import pytest

SCRIPT = needs.CHECKOUT / "helpers" / "setup-host"
ME = getpass.getuser()

pytestmark = [needs.userns, needs.program("unshare", "newuidmap", "slirp4netns", "apt-get")]


def setup(before: str, *arguments: str, fake: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run setup-host as root of a user namespace, after the commands `before`; `fake` becomes /usr/local/bin."""
    if fake:
        before += f"; mount --bind {fake} /usr/local/bin"
    command = f'set -e; {before}; exec sh {SCRIPT} "$@"'
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command, "sh", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def hide(*programs: str) -> str:
    """Return the command that makes `programs` look as if they were not installed."""
    return "; ".join(f"mount --bind /dev/null /usr/bin/{name}" for name in programs)


def lines(text: str) -> list[str]:
    """Return the commands of what setup-host printed, without the reasons."""
    return [line for line in text.splitlines() if not line.startswith("#")]


@needs.subids
def test_a_prepared_host_needs_nothing() -> None:
    done = subprocess.run([SCRIPT, "--print", "--user", ME, "--delegate"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_without_root_it_only_prints() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs root" in done.stderr


def test_an_unknown_option_is_an_error() -> None:
    assert subprocess.run([SCRIPT, "--prnt"], capture_output=True).returncode == 2


def test_it_installs_what_the_tests_ask_for() -> None:
    """A program that `needs.program` names and nobody installs would be a test that never runs."""
    asked = {
        argument.value
        for file in (needs.CHECKOUT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "needs.program"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }
    installed = set(re.findall(r"^ *package (\S+)", SCRIPT.read_text(), re.MULTILINE))
    with_every_system = {"sh", "bash", "tar", "gzip", "setpriv", "lsns", "apt-get"}
    together = {"newgidmap"}  # comes with newuidmap
    assert asked - installed - together - {"no-such-program"} <= with_every_system


@pytest.mark.parametrize(
    ("manager", "expected"),
    [
        ("dnf", ["dnf install -q -y shadow-utils slirp4netns"]),
        ("apk", ["apk add shadow-subids slirp4netns"]),
        ("pacman", ["pacman -Sy --needed --noconfirm shadow slirp4netns"]),
    ],
)
def test_each_distribution_has_its_package_names(tmp_path: Path, manager: str, expected: list[str]) -> None:
    (tmp_path / manager).symlink_to("/bin/true")
    done = setup(hide("newuidmap", "slirp4netns", "apt-get"), "--print", "--user", ME, fake=tmp_path)
    assert lines(done.stdout)[: len(expected)] == expected


def test_apt_is_told_what_is_missing_and_says_why() -> None:
    done = setup(hide("slirp4netns"), "--print", "--user", ME)
    assert "# slirp4netns gives a sandbox its network" in done.stdout
    assert "apt-get install -q -y --no-install-recommends slirp4netns" in lines(done.stdout)


def test_without_print_it_says_a_command_and_runs_it(tmp_path: Path) -> None:
    record = tmp_path / "record"
    (tmp_path / "dnf").write_text(f'#!/bin/sh\necho "$@" > {record}\n')
    (tmp_path / "dnf").chmod(0o755)
    done = setup(hide("slirp4netns", "apt-get"), "--user", ME, fake=tmp_path)
    assert "dnf install -q -y slirp4netns" in lines(done.stdout)
    assert record.read_text() == "install -q -y slirp4netns\n"


def test_a_command_that_fails_ends_it(tmp_path: Path) -> None:
    (tmp_path / "dnf").symlink_to("/bin/false")
    assert setup(hide("slirp4netns", "apt-get"), "--user", ME, fake=tmp_path).returncode != 0


@pytest.mark.parametrize(
    ("subuid", "subgid", "expected"),
    [
        ("", "", "--add-subuids 100000-165535 --add-subgids 100000-165535"),
        ("other:100000:65536\n", "", "--add-subuids 165536-231071 --add-subgids 165536-231071"),
        ("other:500000:1000\n", "other:100000:65536\n", "--add-subuids 501000-566535 --add-subgids 501000-566535"),
        ("{me}:100000:65536\n", "", "--add-subgids 165536-231071"),
        ("{me}:100000:0\n", "{uid}:100000:65536\n", "--add-subuids 165536-231071"),
        ("x{me}:100000:65536\n", "{uid}:200000:65536\n", "--add-subuids 265536-331071"),
        ("{uid}:100000:65536\n", "{me}:100000:65536\n", ""),
    ],
)
def test_missing_subordinate_ids_come_from_above_all_ranges(
    tmp_path: Path, subuid: str, subgid: str, expected: str
) -> None:
    bind = []
    for name, text in (("subuid", subuid), ("subgid", subgid)):
        (tmp_path / name).write_text(text.format(me=ME, uid=os.getuid()))
        bind.append(f"mount --bind {tmp_path / name} /etc/{name}")
    done = setup("; ".join(bind), "--print", "--user", ME)
    added = [line for line in lines(done.stdout) if line.startswith("usermod")]
    assert added == ([f"usermod {expected} {ME}"] if expected else [])


def test_user_namespaces_that_are_turned_off_are_turned_on(tmp_path: Path) -> None:
    (tmp_path / "max").write_text("0\n")
    done = setup(f"mount --bind {tmp_path / 'max'} /proc/sys/user/max_user_namespaces", "--print", "--user", ME)
    assert "sysctl -q -w user.max_user_namespaces=15000" in lines(done.stdout)


def test_apparmor_gets_a_profile_for_this_sbx_alone(tmp_path: Path) -> None:
    kernel, etc, bin_ = tmp_path / "kernel", tmp_path / "apparmor.d", tmp_path / "bin"
    for folder in (kernel, etc, bin_):
        folder.mkdir()
    (kernel / "apparmor_restrict_unprivileged_userns").write_text("1\n")
    (bin_ / "apparmor_parser").symlink_to("/bin/true")
    needs.enforce("" if Path("/etc/apparmor.d").is_dir() else "no /etc/apparmor.d to put a folder of ours over")
    bind = f"mount --bind {kernel} /proc/sys/kernel; mount --bind {etc} /etc/apparmor.d"
    arguments = ("--user", ME, "--sbx", "/home/a b/.venv/bin/sbx")
    assert setup(bind, *arguments, fake=bin_).returncode == 0
    profile = (etc / f"sbx-{ME}").read_text()
    assert f'profile sbx-{ME} "/home/a b/.venv/bin/sbx" flags=(unconfined) {{' in profile
    assert "@" not in profile.split("\nabi")[1].replace("@{", "")
    assert setup(bind, "--print", *arguments).stdout == ""
