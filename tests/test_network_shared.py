"""Networks of several sandboxes: they find each other, and the network lives from the first to the last of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import needs
import network_world
import pytest
from conftest import COMMAND, Sbx, nothing_left
from test_network import helpers, running, server, until
from test_network_guard import OUTWARD
from test_network_ports import SERVER, answer, unused

pytest.importorskip("pyroute2")
pytestmark = [needs.userns, needs.busybox, needs.program("slirp4netns"), needs.tun]


HELPERS = ("slirp4netns", "pasta", "serve.py")


def at_work(name: str) -> set[int]:
    return helpers(name) if name != "all" else set().union(*map(helpers, HELPERS))


@pytest.fixture(params=["slirp4netns", pytest.param("pasta", marks=needs.program("pasta", "nft"))])
def way_out(request: pytest.FixtureRequest) -> str:
    """Each back end that leads out of a network."""
    return str(request.param)


@pytest.fixture
def network(sbx: Sbx, way_out: str) -> Iterator[str]:
    """A network with IPv6, of which nothing may be left but its config."""
    before = at_work("all")
    sbx.ok("network", "create", "shared", "--ipv6", "--net", way_out)
    yield "shared"
    assert until(lambda: not at_work("all") - before)
    sbx.ok("network", "rm", "shared")


def test_members_find_each_other_by_name(sbx: Sbx, rootfs: Path, network: str, way_out: str) -> None:
    with running(sbx, rootfs, "--net", network, "--name", "web", command=SERVER):
        for address in ("web", "fd00::4" if way_out == "slirp4netns" else "fd00:0:0:1::4"):
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


def test_the_bridge_stays_who_it_is(sbx: Sbx, rootfs: Path, network: str) -> None:
    """Whoever joins: a bridge takes its lowest port's address, and members would go on sending to the old one."""
    look = "nslookup nobody >/dev/null 2>&1; ip neigh | grep '\\.1 dev eth0' | cut -d' ' -f5"
    seen = []
    with ExitStack() as stack:
        for name in (f"member{number}" for number in range(12)):
            stack.enter_context(running(sbx, rootfs, "--net", network, "--name", name))
            seen.append(sbx.ok("exec", name, "sh", "-c", look))
    assert seen[0].count(":") == 5
    assert set(seen) == {seen[0]}


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


def test_the_network_outlives_its_first_and_vanishes_with_its_last(
    sbx: Sbx, rootfs: Path, network: str, way_out: str
) -> None:
    before = helpers(way_out)
    with (
        running(sbx, rootfs, "--net", network, "--name", "first") as first,
        running(sbx, rootfs, "--net", network, "--name", "second"),
    ):
        assert len(helpers(way_out) - before) == 1
        first.communicate(timeout=20)
        assert len(helpers(way_out) - before) == 1
        with running(
            sbx, rootfs, "--net", network, "--name", "third", command="echo up; nc -ll -p 80 -e echo third & cat"
        ):
            assert sbx.ok("exec", "second", "nc", "-w5", "third", "80") == "third"
    assert until(lambda: not helpers(way_out) - before)
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


def get(where: str) -> str:
    """Return the command that prints the line said by whoever is at `where`.

    It does not wait for the end of the connection: pasta of 2023 does not always pass that on.
    """
    return f"(timeout 60 nc -w30 {where} </dev/null 2>/dev/null &) | head -n1"


class World:
    """Runs scripts of `sbx` in network_world.py's namespaces."""

    def __init__(self, folder: Path, rootfs: Path) -> None:
        self.folder, self.rootfs = folder, rootfs
        self.home = folder / "home"
        self.home.mkdir()

    def __call__(self, script: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """Run `script`, in which run is `sbx run --net`, and $image the test image, and return what came of it."""
        head = f"""
            sbx() {{ {" ".join(COMMAND)} "$@"; }}
            run() {{ name=$1; shift; sbx run --net $name "$@"; }}
            image='--rootfs {self.rootfs}'
            {OUTWARD}
        """
        resolv = self.folder / "resolv.conf"
        words = ["unshare", "-Urnm", sys.executable, network_world.__file__, resolv, "sh", "-c", head + script]
        with nothing_left(self.home):
            done = subprocess.run(
                [str(word) for word in words], capture_output=True, text=True, timeout=120, env=Sbx(self.home).env
            )
        assert done.returncode == status, done
        return done

    def told(self, done: subprocess.CompletedProcess[str]) -> str:
        """Return what was said on stderr, besides that one id alone is mapped there."""
        return "".join(
            line for line in done.stderr.splitlines(True) if "subordinate" not in line and "hint" not in line
        )


@pytest.fixture
def world(tmp_path: Path, rootfs: Path) -> World:
    needs.enforce(needs.program("ip").args[0]())
    return World(tmp_path, rootfs)


def test_the_way_out_and_the_hosts_resolver(world: World, way_out: str) -> None:
    inside = f"{get('good.example 80')}; {get('203.0.113.9 443')}; cat /proc/self/setgroups"
    done = world(f"sbx network create out --net {way_out}; run out $image sh -c '{inside}'")
    assert done.stdout == "out\n198.51.100.1 80\n203.0.113.9 443\ndeny\n", done


def test_all_members_go_out_at_once(world: World, way_out: str) -> None:
    """pasta has one guest: the members' addresses are translated."""
    script = f"sbx network create out --net {way_out} >/dev/null; for n in 1 2 3 4; do "
    script += f"run out $image sh -c 'for i in 1 2 3; do {get('good.example 80')}; done' & done; wait"
    assert world(script).stdout == "198.51.100.1 80\n" * 12


def test_names_follow_the_host(world: World, way_out: str) -> None:
    resolv = world.folder / "resolv.conf"
    found = "nslookup -type=a lan.vpn.example 2>&1 | grep -c 192.0.2.77"
    shown = f"i=0; until [ $({found}) = $want ] || [ $i = 20 ]; do i=$((i+1)); sleep 0.3; done; {found}"
    script = f"sbx network create out --net {way_out} >/dev/null; "
    script += f"run out -v {world.folder}:{world.folder} $image sh -c '"
    for address, want in (("127.0.0.1", 0), (network_world.VPN, 1), ("127.0.0.1", 0)):
        script += f"echo nameserver {address} >{resolv}; want={want}; {shown}; "
    assert world(script + "true'").stdout.split() == ["0", "1", "0"]


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


@pytest.mark.parametrize("victim", ["keeper", "keeper and its helpers"])
def test_after_a_killed_keeper_the_network_works_again(sbx: Sbx, rootfs: Path, network: str, victim: str) -> None:
    before = at_work("all")
    with running(sbx, rootfs, "--net", network, "--name", "left") as process:
        for pid in [keeper(sbx.home / "networks" / network)] + list(at_work("all") - before) * ("helpers" in victim):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=20)
    with running(sbx, rootfs, "--net", network, "--name", "web", command=SERVER):
        assert sbx.ok("run", "--net", network, "--rootfs", rootfs, "nc", "-w5", "web", "80") == "inside"


# ── the host's loopback ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hosts_loopback_is_for_all_or_none(sbx: Sbx, rootfs: Path, way_out: str) -> None:
    before = at_work("all")
    ask = get("$(grep host.containers.internal /etc/hosts | cut -d' ' -f1) {}")
    sbx.ok("network", "create", "open", "--net", way_out, "--host-loopback")
    sbx.ok("network", "create", "closed", "--net", way_out)
    with server(socket.AF_INET, "127.0.0.1") as port:
        for options in ([], ["--host-loopback"]):
            said = sbx.ok("run", "--net", "open", *options, "--rootfs", rootfs, "sh", "-c", ask.format(port))
            assert said.splitlines()[0] == "hello"
        done = sbx("run", "--net", "closed", "--host-loopback", "--rootfs", rootfs, "true")
        assert (done.status, "everybody's, so all in it do or none" in done.stderr) == (125, True), done
        # (To pasta its gateway's address is then somebody's in the world, whom no test may ask)
        host = json.loads(sbx.ok("network", "inspect", "open"))[0]["host"]
        gateways = ["$(ip route | cut -d' ' -f3 | head -1)", *([host] if way_out == "slirp4netns" else [])]
        for gateway in gateways:
            command = f"grep -c containers /etc/hosts; {get(f'{gateway} {port}')}"
            assert sbx.ok("run", "--net", "closed", "--rootfs", rootfs, "sh", "-c", command) == "0"
    assert until(lambda: not at_work("all") - before)
    sbx.ok("network", "rm", "open", "closed")


# ── only what is allowed ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_guarded_member(world: World, way_out: str) -> None:
    """It reaches what is allowed, members by name among that, and nothing else; others are as free as ever."""
    log = world.folder / "log"
    every = "; ".join(map(get, ("good.example 80", "203.0.113.9 443", "db 80", "web 80")))
    # nor is anybody asked but by the guard
    around = "; ".join(f"nslookup other.example {server}" for server in ("10.93.0.1", "10.93.0.3", "127.0.0.1"))
    script = f"""
        sbx network create out --net {way_out} --subnet 10.93.0.0/24 >/dev/null
        mkfifo {world.folder}/up
        for name in db web; do
            run out --name $name -v {world.folder}:/f $image sh -c \\
                "nc -ll -p 80 -e echo $name & nc -ll -p 81 -e echo $name & echo up >/f/up; exec sleep 60" &
            read line <{world.folder}/up
        done
        run out --net-allow good.example:80 --net-allow db:80 --net-log {log} $image sh -c \\
            '{every}; {get("db 81")}; nslookup web >&2; {{ {around}; }} >&2; true'
        run out $image sh -c '{every}'
        sbx stop db web >/dev/null; wait
    """
    done = world(script)
    assert done.stdout.splitlines() == [
        "198.51.100.1 80", "db",
        "198.51.100.1 80", "203.0.113.9 443", "db", "web",
    ], done  # fmt: skip
    for refused in ("203.0.113.9:443", "db:81", "web"):
        assert f"sbx: refused {refused}" in done.stderr
    assert "Address: 203.0.113.9" not in done.stderr
    records = [json.loads(line) for line in log.read_text().splitlines()]
    asked = {record["name"]: record["allowed"] for record in records if record["event"] == "ask"}
    assert asked == {"good.example": True, "db": True, "web": False}


def test_a_guarded_member_learns(world: World, way_out: str) -> None:
    script = f"""
        sbx network create out --net {way_out} >/dev/null
        run out --net-learn $image sh -c '{get("good.example 80")}; {get("nonesuch 80")}'
    """
    done = world(script)
    assert done.stdout == "198.51.100.1 80\n", done
    assert "sbx: the sandbox reached:\n  --net-allow good.example:80\n" in done.stderr


def test_a_name_leads_to_no_member_that_it_does_not_belong_to(world: World) -> None:
    """The world's resolver answers that it has a member's address, or the gateway's."""
    script = """
        sbx network create out --subnet 10.93.0.0/24 --host-loopback >/dev/null
        run out --net-allow liar.example --net-log LOG $image sh -c 'nc -w30 liar.example 80; true'
    """
    log = world.folder / "log"
    world(script.replace("LOG", str(log)))
    tried = [json.loads(line) for line in log.read_text().splitlines()]
    refused = {record["address"] for record in tried if record["event"] == "connect" and not record["allowed"]}
    assert refused <= {"10.93.0.2", "10.93.0.9"}
    assert refused
    assert not [record for record in tried if record["event"] == "connect" and record["allowed"]]


@pytest.mark.parametrize(("name", "status"), [("nonesuch.example", 125), ("not-there-yet", 0)])
def test_names_that_do_not_resolve(world: World, name: str, status: int) -> None:
    """A member may come later; what is asked of the world has to be there."""
    script = f"sbx network create out >/dev/null; run out --net-allow {name} $image echo it ran"
    done = world(script, status=status)
    assert done.stdout == ("" if status else "it ran\n")
    assert (f"sbx: allow {name}: no such name" in done.stderr) == bool(status)


def test_a_guarded_member_of_an_internal_network(world: World) -> None:
    script = f"""
        sbx network create inner --internal >/dev/null; mkfifo {world.folder}/up
        run inner --name db -v {world.folder}:/f $image sh -c \\
            "nc -ll -p 80 -e echo db & echo up >/f/up; exec sleep 60" &
        read line <{world.folder}/up
        run inner --net-allow db --net-allow good.example $image sh -c 'nc -w5 db 80; nslookup good.example 2>&1'
        sbx stop db >/dev/null; wait
    """
    done = world(script)
    assert done.stdout.startswith("db\n")
    assert "NXDOMAIN" in done.stdout


def test_no_capability_over_a_members_rules(sbx: Sbx, rootfs: Path) -> None:
    sbx.ok("network", "create", "held")
    done = sbx("run", "--net", "held", "--net-allow", "*.example", "--cap-add", "NET_ADMIN", "--rootfs", rootfs, "true")
    assert (done.status, "would let it around the rules" in done.stderr) == (125, True), done
    sbx.ok("network", "rm", "held")


def test_list_and_remove(sbx: Sbx, rootfs: Path) -> None:
    sbx.ok("network", "create", "a", "--subnet", "10.99.1.0/24")
    sbx.ok("network", "create", "b")
    assert sbx.ok("network", "ls", "-q") == "a\nb"
    listed = json.loads(sbx.ok("network", "ls", "--json"))
    assert listed[0] == {"name": "a", "subnet": "10.99.1.0/24", "ipv6": False, "internal": False, "net": "slirp4netns",
                         "host": "", "members": []}  # fmt: skip
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
        (["network", "create", "x", "--net", "carrier-pigeon"], "choose way out carrier-pigeon"),
        (["network", "create", "x", "--internal", "--host-loopback"], "nothing leads to the host's loopback"),
        (["network", "rm", "nonesuch"], "find network nonesuch: there is none of that name"),
        (["network", "inspect", "nonesuch"], "sbx network create nonesuch"),
    ],
)
def test_refusals(sbx: Sbx, arguments: list[str], message: str) -> None:
    done = sbx(*arguments)
    assert (done.status, message in done.stderr) == (125, True), done


def test_subnets_do_not_overlap(sbx: Sbx) -> None:
    sbx.ok("network", "create", "a", "--subnet", "10.99.0.0/16")
    assert "10.99.0.0/16 is in use here" in sbx("network", "create", "b", "--subnet", "10.99.3.0/24").stderr
    assert "there is one of that name" in sbx("network", "create", "a").stderr
    sbx.ok("network", "rm", "a")
