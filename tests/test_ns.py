"""`sbx ns`: what it finds is what the kernel and lsns say, and it knows the sandboxes by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import Sbx

pytestmark = [needs.userns, needs.busybox]

KINDS = ("user", "cgroup", "ipc", "uts", "net", "pid", "mnt")
TELL = 'for kind in "$@"; do readlink /proc/self/ns/$kind; done; echo told; read line'


@contextmanager
def sandbox(sbx: Sbx, rootfs: Path, *options: str) -> Iterator[dict[str, int]]:
    """Run a sandbox called box; give its namespaces' numbers as a process in it reads them."""
    command = ("sh", "-c", TELL, "sh", *KINDS)
    arguments: tuple[str | Path, ...] = (
        "run",
        "--name",
        "box",
        "--net",
        "none",
        *options,
        "--rootfs",
        rootfs,
        *command,
    )
    process = sbx.start(*arguments)
    assert process.stdout
    lines = [process.stdout.readline().decode() for _ in [*KINDS, "told"]]
    try:
        assert lines[-1] == "told\n", process.stderr and process.stderr.read()
        yield {kind: int(number) for kind, number in (line.strip()[:-1].split(":[") for line in lines[:-1])}
    finally:
        process.communicate(b"\n", timeout=30)
    assert process.returncode == 0


def listed(sbx: Sbx, *arguments: str) -> dict[int, dict[str, Any]]:
    return {entry["ns"]: entry for entry in json.loads(sbx.ok("ns", "--json", *arguments))}


def lsns() -> dict[int, dict[str, Any]]:
    """What lsns(8) finds; it fails when a process of anybody's ends while it looks, so it is asked again."""
    for _ in range(20):
        done = subprocess.run(["lsns", "--json", "--output", "NS,TYPE,NPROCS,PNS,ONS"], capture_output=True)
        if done.returncode == 0:
            return {entry["ns"]: entry for entry in json.loads(done.stdout)["namespaces"]}
    pytest.skip(f"lsns fails: {done.stderr.decode()}")


def own(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino


def test_a_sandboxs_namespaces_are_known_by_its_name(sbx: Sbx, rootfs: Path) -> None:
    with sandbox(sbx, rootfs) as inside:
        found = listed(sbx)
        init = json.loads(sbx.ok("ps", "--json"))[0]["pid"]
    assert {found[number]["type"] for number in inside.values()} == set(KINDS)
    assert {found[number]["sandbox"] for number in inside.values()} == {"box"}
    # pid 1 of the sandbox may be hidden from us and is counted all the same: init and the shell
    assert all(init in found[number]["pids"] and found[number]["nprocs"] >= 2 for number in inside.values())
    assert found[inside["pid"]]["pid"] == init
    assert found[inside["pid"]]["command"]
    assert found[own("user")]["sandbox"] == ""


@needs.subids
def test_how_they_nest(sbx: Sbx, rootfs: Path) -> None:
    with sandbox(sbx, rootfs) as inside:
        found = listed(sbx)
    user = inside["user"]
    assert {found[inside[kind]]["owner"] for kind in KINDS if kind != "user"} == {user}
    outer = found[user]["owner"]
    assert found[outer]["type"] == "user"
    assert found[outer]["sandbox"] == "box"
    assert (found[user]["parent"], found[outer]["owner"]) == (outer, own("user"))
    assert found[inside["pid"]]["parent"] == own("pid")


def test_what_is_shared_with_the_host_is_not_the_sandboxs(sbx: Sbx, rootfs: Path) -> None:
    with sandbox(sbx, rootfs, "--share", "uts") as inside:
        found = listed(sbx)
    assert inside["uts"] == own("uts")
    assert found[inside["uts"]]["sandbox"] == ""
    assert found[inside["ipc"]]["sandbox"] == "box"


@needs.program("lsns")
def test_lsns_says_the_same(sbx: Sbx, rootfs: Path) -> None:
    with sandbox(sbx, rootfs) as inside:
        found = listed(sbx)
        theirs = lsns()
    for kind, number in inside.items():
        assert theirs[number]["type"] == found[number]["type"] == kind
        assert theirs[number]["ons"] == found[number]["owner"] or kind == "user"
        # lsns may not see pid 1
        assert 0 <= found[number]["nprocs"] - theirs[number]["nprocs"] <= 1
    assert theirs[inside["user"]]["pns"] == found[inside["user"]]["parent"]


def test_the_tree(sbx: Sbx, rootfs: Path) -> None:
    with sandbox(sbx, rootfs) as inside:
        found = listed(sbx)
        lines = sbx.ok("ns").splitlines()
    head, *rows = lines
    assert head.split() == ["NAMESPACE", "TYPE", "PROCESSES", "PID", "USER", "SANDBOX", "COMMAND"]
    above: list[int] = []
    for row in rows:
        branch, number = re.match(r"([│├└─ ]*)(\d+)", row).groups()  # type: ignore[union-attr]
        depth = len(branch) // 2
        above[depth:] = [int(number)]
        if int(number) in inside.values():
            assert above[depth - 1] == found[int(number)]["owner"]
            assert " box " in row
    assert set(inside.values()) <= {int(re.sub(r"\D*(\d+).*", r"\1", row)) for row in rows}


def test_of_one_sandbox(sbx: Sbx, rootfs: Path) -> None:
    with sandbox(sbx, rootfs) as inside:
        found = listed(sbx, "box")
        assert sbx("ns", "box").stdout.count("\n") == len(found) + 1
    assert set(inside.values()) <= set(found)
    assert {entry["sandbox"] for entry in found.values()} == {"box"}


def test_of_one_process(sbx: Sbx) -> None:
    found = listed(sbx, str(os.getpid()))
    expected = {os.stat(f"/proc/self/ns/{name}").st_ino for name in os.listdir("/proc/self/ns") if "_for_" not in name}
    assert set(found) == expected
    assert all(os.getpid() in entry["pids"] for entry in found.values())


def test_of_a_process_that_is_not_ours_or_not_there(sbx: Sbx) -> None:
    hidden = sbx("ns", "1")
    assert (hidden.status, hidden.stderr) == (125, "sbx: look at process 1: it is not yours to look at\n")
    gone = sbx("ns", "4194304")  # one more than the kernel's largest
    assert (gone.status, gone.stderr) == (125, "sbx: look at process 4194304: there is none\n")
    assert sbx("ns", "no-such-box").status == 125


@needs.program("unshare")
def test_a_namespace_without_processes_is_found_through_those_that_it_owns(sbx: Sbx) -> None:
    # the shell's child goes on into a nested user namespace and the shell ends: nobody is left in the outer one
    script = "unshare --user sh -c 'readlink /proc/self/ns/user; exec cat' <&3 & readlink /proc/self/ns/user"
    outer = subprocess.Popen(
        ["sh", "-c", f'exec 3<&0; exec unshare --user --map-root-user sh -c "{script}"'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert outer.stdin
    assert outer.stdout
    numbers = {int(outer.stdout.readline().decode()[6:-2]) for _ in range(2)}
    outer.wait(timeout=30)
    found = listed(sbx)
    outer.stdin.close()
    outer.stdout.read()
    assert numbers <= set(found)
    empty = [number for number in numbers if not found[number]["pids"]]
    assert len(empty) == 1
    assert {found[number]["owner"] for number in numbers} == {empty[0], own("user")}


@pytest.mark.parametrize("arguments", [("--jsn",), ("1", "2")])
def test_mistakes(sbx: Sbx, arguments: tuple[str, ...]) -> None:
    assert sbx("ns", *arguments).status == 125
