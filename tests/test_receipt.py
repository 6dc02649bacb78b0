"""The receipt: what is in force, read back from the kernel before the command begins."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Sbx

from rootless import syscalls

BOX = ("--net", "none", "--rootfs")


def rows(sbx: Sbx, rootfs: Path, tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "receipt"
    sbx.ok("run", "--receipt", file, *options, *BOX, rootfs, "true")
    found: dict[str, Any] = json.loads(file.read_text())["rows"]
    return found


def test_the_default_has_everything(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    found = rows(sbx, rootfs, tmp_path)
    off = {name for name, row in found.items() if not row["in_force"]}
    assert off == {"time", "read-only-root"} | (set() if syscalls.landlock_version() >= 2 else {"landlock"})
    assert found["seccomp"]["actual"].startswith("mode 2")
    assert found["capabilities"]["actual"]["bounding"] == found["capabilities"]["asked"]
    assert found["network"]["actual"] == ["lo"]
    assert found["uids"]["actual"] == found["uids"]["asked"]


@pytest.mark.parametrize(
    ("option", "row"),
    [
        ("--seccomp unconfined", "seccomp"),
        ("--allow-new-privs", "no_new_privs"),
        ("--allow-new-privs", "landlock"),
        ("--share net", "net"),
        ("--share pid", "pid"),
        ("--share cgroup", "cgroup"),
        ("--setgroups allow", "setgroups"),
        ("--nested", "masked"),
        ("--nested", "landlock"),
        ("--unmask ALL", "masked"),
        ("--unmask ALL", "read-only"),
    ],
)
def test_what_is_widened_is_not_in_force(sbx: Sbx, rootfs: Path, tmp_path: Path, option: str, row: str) -> None:
    assert not rows(sbx, rootfs, tmp_path, *option.split())[row]["in_force"]
    done = sbx("run", *option.split(), "--require", row, *BOX, rootfs, "sh", "-c", "echo ran")
    assert (done.status, done.stdout) == (125, "")
    assert done.stderr.startswith(f"sbx: require {row}: it is not in force")


def test_what_is_narrowed_is_in_force(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    found = rows(
        sbx, rootfs, tmp_path, "--read-only", "--cap-drop", "ALL", "--ulimit", "nofile=64", "--oom-score-adj", "500"
    )
    assert found["read-only-root"]["in_force"]
    assert found["capabilities"]["actual"] == {"bounding": [], "effective": []}
    assert found["ulimit-nofile"] == {
        "asked": ["64", "64"], "actual": ["64", "64"], "in_force": True, "mechanism": "resource limit",
    }  # fmt: skip
    assert found["oom-score"]["actual"] == 500


def test_requirements_that_are_met(sbx: Sbx, rootfs: Path) -> None:
    names = "user,mnt,pid,net,uts,ipc,cgroup,seccomp,no_new_privs,capabilities,setgroups,masked,groups,uids"
    assert sbx.ok("run", "--require", names, "--require", "nosuid", *BOX, rootfs, "echo", "ran") == "ran"


def test_requirements_that_nobody_asked_for_or_knows(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--require", "memory", *BOX, rootfs, "true")
    assert (done.status, done.stderr) == (125, "sbx: require memory: no such limit was asked for\n")
    done = sbx("run", "--require", "magic", *BOX, rootfs, "true")
    assert (done.status, done.stderr.split("\n")[0]) == (
        125, "sbx: require magic: there is no such protection or limit",
    )  # fmt: skip
    assert "seccomp" in done.stderr


def test_without_init_the_command_is_pid_1(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    assert rows(sbx, rootfs, tmp_path, "--no-init")["seccomp"]["in_force"]


def test_on_stdout_it_comes_before_the_command(sbx: Sbx, rootfs: Path) -> None:
    receipt, said = sbx.ok("run", "--receipt", "-", *BOX, rootfs, "echo", "ran").split("\n")
    assert (json.loads(receipt)["version"], said) == (1, "ran")


def test_inspect_reads_it_again(sbx: Sbx, rootfs: Path) -> None:
    process = sbx.start("run", "--name", "seen", *BOX, rootfs, "sh", "-c", "echo up; exec sleep 100")
    assert process.stdout
    process.stdout.readline()
    found = json.loads(sbx.ok("inspect", "seen"))[0]["receipt"]["rows"]
    assert all(found[name]["in_force"] for name in ("user", "pid", "net", "seccomp", "no_new_privs", "masked", "uids"))
    process.terminate()
    process.communicate(timeout=20)


# ── Landlock ──────────────────────────────────────────────────────────────────────────────────────────────────────────

landlock = pytest.mark.skipif(syscalls.landlock_version() < 2, reason="this kernel has no Landlock of version 2")


@landlock
def test_what_was_handed_over_can_be_opened_again(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret\n")
    with (tmp_path / "secret").open() as stream:
        process = sbx.start("run", *BOX, rootfs, "sh", "-c", "cat /dev/stdin", stdin=stream)
        assert process.communicate(timeout=20)[0] == b"secret\n"
    # Files move between folders, links work, and the whole tree can be used.
    script = "mkdir /a /b && echo x >/a/f && mv /a/f /b/g && ln /b/g /a/h && cat /a/h /proc/self/comm >/dev/null"
    assert sbx("run", *BOX, rootfs, "sh", "-c", script).status == 0


@landlock
def test_a_descriptor_that_leads_out_opens_nothing(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("told\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "g").write_text("secret\n")
    # The descriptor passed is a folder's, so what is below it was handed over; what is above it was not.
    shell = "fd=$1; cat /proc/self/fd/$fd/g && ! cat /proc/self/fd/$fd/../f"
    fd = os.open(tmp_path / "sub", os.O_RDONLY)
    try:
        process = sbx.start("run", "--pass-fd", str(fd), *BOX, rootfs, "sh", "-c", shell, "sh", str(fd), pass_fds=[fd])
        said, errors = process.communicate(timeout=20)
    finally:
        os.close(fd)
    assert (process.returncode, said) == (0, b"secret\n"), errors
    assert b"Permission denied" in errors


scoped = pytest.mark.skipif(syscalls.landlock_version() < 6, reason="this kernel's Landlock has no scopes")


@scoped
def test_with_the_hosts_processes_in_sight_none_can_be_signalled(sbx: Sbx, rootfs: Path) -> None:
    # Root of the sandbox is the caller, so the kernel's own rules would allow it.
    victim = subprocess.Popen(["sleep", "100"])
    try:
        done = sbx("run", "--share", "pid", *BOX, rootfs, "sh", "-c", f"kill {victim.pid}; sleep 0 & kill $! && wait")
        assert "Operation not permitted" in done.stderr
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@scoped
@pytest.mark.skipif(not Path("/usr/bin/python3").exists(), reason="the host has no /usr/bin/python3")
def test_on_the_hosts_network_abstract_sockets_are_out_of_reach(sbx: Sbx) -> None:
    name = f"\0sbx-test-{os.getpid()}"
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(name)
        listener.listen()
        subprocess.run([sys.executable, "-c", connect], check=True)
        done = sbx("run", "--net", "host", "host", "/usr/bin/python3", "-c", connect)
    assert done.status == 1
    assert "PermissionError" in done.stderr
