"""Networks of several sandboxes: they find each other, and the network lives from the first to the last of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import needs
import network_world
import pytest
from conftest import COMMAND, Sbx, nothing_left
from test_network import helpers, running, until
from test_network_ports import SERVER, answer, unused

pytest.importorskip("pyroute2")
pytestmark = [needs.userns, needs.busybox, needs.program("slirp4netns"), needs.tun]


@pytest.fixture
def network(sbx: Sbx) -> Iterator[str]:
    """A network with IPv6, of which nothing may be left but its config."""
    before = helpers("slirp4netns")
    sbx.ok("network", "create", "shared", "--ipv6")
    yield "shared"
    assert until(lambda: not helpers("slirp4netns") - before)
    sbx.ok("network", "rm", "shared")


def test_members_find_each_other_by_name(sbx: Sbx, rootfs: Path, network: str) -> None:
    with running(sbx, rootfs, "--net", network, "--name", "web", command=SERVER):
        for address in ("web", "fd00::4"):
            assert sbx.ok("run", "--net", network, "--rootfs", rootfs, "nc", "-w5", address, "80") == "inside"
        said = sbx.ok(
            "run",
            "--net",
            network,
            "--rootfs",
            rootfs,
            "sh",
            "-c",
            "ip -o addr show eth0; ip route; nslookup nobody; true",
        )
    assert "default via 10.89." in said
    assert "mtu 65520" in sbx.ok("run", "--net", network, "--rootfs", rootfs, "ip", "link", "show", "eth0")
    assert "NXDOMAIN" in said


def test_addresses_do_not_collide_and_are_given_again(sbx: Sbx, rootfs: Path, network: str) -> None:
    def members() -> dict[str, str]:
        return {
            member["name"]: member["addresses"][0].rpartition(".")[2]
            for member in json.loads(sbx.ok("network", "inspect", network))[0]["members"]
        }

    with (
        running(sbx, rootfs, "--net", network, "--name", "one") as one,
        running(sbx, rootfs, "--net", network, "--name", "two"),
    ):
        assert members() == {"one": "4", "two": "5"}
        one.send_signal(signal.SIGKILL)  # whoever is killed has left, too
        one.wait(10)
        assert until(lambda: members() == {"two": "5"})
        with running(sbx, rootfs, "--net", network, "--name", "three"):
            assert members() == {"three": "4", "two": "5"}


def test_the_network_outlives_its_first_and_vanishes_with_its_last(sbx: Sbx, rootfs: Path, network: str) -> None:
    before = helpers("slirp4netns")
    with (
        running(sbx, rootfs, "--net", network, "--name", "first") as first,
        running(sbx, rootfs, "--net", network, "--name", "second"),
    ):
        assert len(helpers("slirp4netns") - before) == 1
        first.communicate(timeout=20)
        assert len(helpers("slirp4netns") - before) == 1
        with running(
            sbx, rootfs, "--net", network, "--name", "third", command="echo up; nc -ll -p 80 -e echo third & cat"
        ):
            assert sbx.ok("exec", "second", "nc", "-w5", "third", "80") == "third"
    assert until(lambda: not helpers("slirp4netns") - before)
    assert json.loads(sbx.ok("network", "inspect", network))[0]["members"] == []


def test_internal_has_no_way_out(sbx: Sbx, rootfs: Path) -> None:
    before = helpers("slirp4netns")
    sbx.ok("network", "create", "inner", "--internal")
    with running(sbx, rootfs, "--net", "inner", "--name", "web", command=SERVER):
        assert not helpers("slirp4netns") - before
        said = sbx.ok(
            "run", "--net", "inner", "--rootfs", rootfs, "sh", "-c", "ip route; nslookup outside.example; nc -w5 web 80"
        )
    assert "default" not in said
    assert "NXDOMAIN" in said
    assert said.endswith("inside")
    sbx.ok("network", "rm", "inner")


@pytest.mark.parametrize("kind", [[], ["--internal"]])
def test_published_ports(sbx: Sbx, rootfs: Path, kind: list[str]) -> None:
    sbx.ok("network", "create", "ports", *kind)
    port = unused()
    with running(sbx, rootfs, "--net", "ports", "--name", "web", "-p", f"{port}:80", command=SERVER):
        assert until(lambda: answer("127.0.0.1", port) == b"inside\n")
        assert sbx.ok("port", "web") == f"80/tcp -> 127.0.0.1:{port}"
    sbx.ok("network", "rm", "ports")


def test_the_way_out_and_the_hosts_resolver(tmp_path: Path, rootfs: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    sbx = Sbx(home)
    quiet = "2>/dev/null"  # one id alone is mapped there, as it says
    inside = "nc -w5 good.example 80; nc -w5 203.0.113.9 443; cat /proc/self/setgroups"
    script = f"""
        sbx() {{ {" ".join(COMMAND)} "$@"; }}
        sbx network create out
        sbx run --net out --rootfs {rootfs} sh -c '{inside}' {quiet}
    """
    words = [
        "unshare",
        "-Urnm",
        sys.executable,
        network_world.__file__,
        str(tmp_path / "resolv.conf"),
        "sh",
        "-c",
        script,
    ]
    with nothing_left(home):
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=sbx.env)
    assert done.stdout == "out\n198.51.100.1 80\n203.0.113.9 443\ndeny\n", done


def test_the_keeper_that_ends_first_is_told_of(sbx: Sbx, rootfs: Path, network: str) -> None:
    with running(sbx, rootfs, "--net", network, "--name", "left") as process:
        os.kill(keeper(sbx.home / "networks" / network), signal.SIGKILL)
        assert process.stderr
        assert (
            process.stderr.readline()
            == f"sbx: the network {network} is gone: its keeper ended before the sandbox\n".encode()
        )


def keeper(folder: Path) -> int:
    """Return the process at the other end of the network's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        above = os.open(folder, os.O_PATH)
        link.connect(f"/proc/self/fd/{above}/keeper")
        os.close(above)
        return int.from_bytes(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def test_list_and_remove(sbx: Sbx, rootfs: Path) -> None:
    sbx.ok("network", "create", "a", "--subnet", "10.99.1.0/24")
    sbx.ok("network", "create", "b")
    assert sbx.ok("network", "ls", "-q") == "a\nb"
    listed = json.loads(sbx.ok("network", "ls", "--json"))
    assert listed[0] == {"name": "a", "subnet": "10.99.1.0/24", "ipv6": False, "internal": False, "members": []}
    assert "10.99.1.0/24" in sbx.ok("network", "ls")
    with running(sbx, rootfs, "--net", "a", "--name", "inside"):
        assert "remove network a: inside is in it" in sbx("network", "rm", "a", check=125).stderr
    sbx.ok("network", "rm", "a", "b")
    assert sbx.ok("network", "ls", "-q") == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["network", "create", "host"], "bad network name 'host'"),
        (["network", "create", "../x"], "bad network name '../x'"),
        (["network", "create", "x", "--subnet", "10.0.0.0/99"], "read subnet '10.0.0.0/99'"),
        (["network", "create", "x", "--subnet", "10.99.2.128/25"], "ends in .0"),
        (["network", "create", "x", "--subnet", "10.99.2.0/30"], "16 to 25 bits"),
        (["network", "rm", "nonesuch"], "find network nonesuch: there is none of that name"),
        (["network", "inspect", "nonesuch"], "sbx network create nonesuch"),
    ],
)
def test_refusals(sbx: Sbx, arguments: list[str], message: str) -> None:
    done = sbx(*arguments)
    assert (done.status, message in done.stderr) == (125, True), done


def test_subnets_do_not_overlap(sbx: Sbx, rootfs: Path) -> None:
    sbx.ok("network", "create", "a", "--subnet", "10.99.0.0/16")
    assert "10.99.0.0/16 is in use here" in sbx("network", "create", "b", "--subnet", "10.99.3.0/24").stderr
    assert "there is one of that name" in sbx("network", "create", "a").stderr
    done = sbx("run", "--net", "a", "--net-allow", "x.example", "--rootfs", rootfs, "true")
    assert (done.status, "has no guard" in done.stderr) == (125, True)
    sbx.ok("network", "rm", "a")
