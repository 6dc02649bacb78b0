"""Sandboxes that share: --net sandbox:NAME, --join NAME --share …, and what stays apart."""

from __future__ import annotations

from pathlib import Path

import needs
import pytest
from conftest import Sbx
from test_network import running

pytestmark = [needs.userns, needs.busybox]
KINDS = ("net", "ipc", "uts", "pid", "mnt", "user", "cgroup")
SHOW = "for kind in net ipc uts pid mnt user cgroup; do readlink /proc/self/ns/$kind; done"


def namespaces(said: str) -> dict[str, str]:
    return dict(zip(KINDS, said.split(), strict=True))


def shared(sbx: Sbx, rootfs: Path, *options: str) -> set[str]:
    first = namespaces(sbx.ok("exec", "first", "sh", "-c", SHOW))
    second = namespaces(sbx.ok("run", *options, "--rootfs", rootfs, "sh", "-c", SHOW))
    return {kind for kind in KINDS if first[kind] == second[kind]}


@pytest.mark.parametrize("mode", ["auto", "single"])
def test_what_is_shared(sbx: Sbx, rootfs: Path, mode: str) -> None:
    if mode == "auto":
        needs.enforce(needs.subids.args[0]())
    with running(sbx, rootfs, "--net", "none", "--idmap", mode, "--name", "first"):
        assert shared(sbx, rootfs, "--net", "sandbox:first") == {"user", "net"}
        assert shared(sbx, rootfs, "--join", "first") == {"user", "net", "ipc", "uts"}
        assert shared(sbx, rootfs, "--join", "first", "--share", "pid,ipc", "--net", "none") == {"user", "pid", "ipc"}
        assert shared(sbx, rootfs, "--join", "first", "--share", "uts", "--net", "sandbox:first") == {
            "user",
            "net",
            "uts",
        }


def test_one_talks_to_the_other_on_loopback(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, rootfs, "--net", "none", "--name", "first", command="echo up; nc -ll -p 80 -e echo hello & cat"):
        assert sbx.ok("run", "--net", "sandbox:first", "--rootfs", rootfs, "nc", "-w3", "127.0.0.1", "80") == "hello"


def test_names_are_the_others(sbx: Sbx, rootfs: Path) -> None:
    options = ["--net", "none", "--name", "first", "--add-host", "db:192.0.2.5", "--hostname", "pod"]
    with running(sbx, rootfs, *options):
        said = sbx.ok("run", "--join", "first", "--rootfs", rootfs, "sh", "-c", "hostname; cat /etc/hosts")
    assert said.startswith("pod\n")
    assert "192.0.2.5 db" in said


def test_commands_go_into_the_one_that_joined(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, rootfs, "--net", "none", "--name", "first"):
        first = namespaces(sbx.ok("exec", "first", "sh", "-c", SHOW))
        with running(sbx, rootfs, "--join", "first", "--name", "second"):
            second = namespaces(sbx.ok("exec", "second", "sh", "-c", SHOW))
    assert first["net"] == second["net"]
    assert first["mnt"] != second["mnt"]


def test_groups_of_the_caller_stay_out(sbx: Sbx, rootfs: Path) -> None:
    needs.enforce(needs.subids.args[0]())
    with running(sbx, rootfs, "--net", "none", "--name", "first"):
        said = sbx.ok(
            "run",
            "--join",
            "first",
            "--rootfs",
            rootfs,
            "sh",
            "-c",
            "grep Groups /proc/self/status; cat /proc/self/setgroups",
        )
    assert said.split() == ["Groups:", "deny"]


def test_the_second_outlives_the_first(sbx: Sbx, rootfs: Path) -> None:
    with (
        running(sbx, rootfs, "--net", "none", "--name", "first") as first,
        running(
            sbx,
            rootfs,
            "--join",
            "first",
            "--name",
            "second",
            command="echo up; read line; ip -o addr show lo | grep -q 127.0.0.1 && echo $line",
        ) as second,
    ):
        first.communicate(timeout=20)
        out, _ = second.communicate(b"alive\n", timeout=20)
    assert (out, second.returncode) == (b"alive\n", 0)


def test_capabilities_over_a_guarded_network(sbx: Sbx, rootfs: Path) -> None:
    for mark in (needs.program("slirp4netns", "nft"), needs.tun):
        needs.enforce(mark.args[0]())
    with running(sbx, rootfs, "--net-allow", "*.example", "--name", "first"):
        done = sbx("run", "--net", "sandbox:first", "--cap-add", "NET_ADMIN", "--rootfs", rootfs, "true")
    assert done.status == 125
    assert "would let it around the rules" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", "sandbox:nobody"], "none of that name"),
        (["--join", "first", "--share", "mnt"], "share namespace 'mnt'"),
        (
            ["--join", "first", "--net", "sandbox:other"],
            "join sandboxes first and other: one sandbox has one user namespace",
        ),
        (["--join", "first", "--idmap", "keep"], "and they are shared"),
        (["--net", "sandbox:first", "-p", "80"], "that is for the one that it belongs to"),
        (["--join", "hosted", "--share", "net"], "join the net namespace of sandbox hosted: it has none of its own"),
    ],
)
def test_refusals(sbx: Sbx, rootfs: Path, options: list[str], message: str) -> None:
    with (
        running(sbx, rootfs, "--net", "none", "--name", "first"),
        running(sbx, rootfs, "--net", "host", "--name", "hosted"),
    ):
        done = sbx("run", *options, "--rootfs", rootfs, "true")
    assert (done.status, message in done.stderr) == (125, True), done
