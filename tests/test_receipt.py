"""The receipt: what is in force, read back from the kernel before the command begins."""

from __future__ import annotations

import json
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
    assert (found["network"]["asked"], found["network"]["actual"]) == ("none", ["lo"])
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
