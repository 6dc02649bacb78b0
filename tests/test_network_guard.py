"""--net-allow, --net-log, --net-learn: what gets through, what doesn't, what is said, in a small internet."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import needs
import network_world
import pytest
from conftest import COMMAND, Sbx, nothing_left
from hypothesis import given
from hypothesis import strategies as st
from test_network import USER_MODE, helpers, running

from rootless.errors import SbxError
from rootless.network import dns, rules

pytestmark = [needs.userns, needs.busybox]
in_world = [needs.program("slirp4netns", "nft", "ip"), needs.tun]
#: pasta does not start without a default route; nothing is at its other end
OUTWARD = "ip link add out type veth peer out2 && ip addr add 192.0.2.9/24 dev out && ip link set out up && \
ip link set out2 up && ip route add default via 192.0.2.1"
GET = "timeout 5 nc {0} {1} 2>&1; "


class Done(NamedTuple):
    """What a command in the world gave; `asked` are the names that its resolver was asked for."""

    stdout: str
    stderr: str
    asked: list[str]


class World:
    """Runs sandboxes in network_world.py's namespaces."""

    def __init__(self, folder: Path, rootfs: Path) -> None:
        self.folder, self.rootfs = folder, rootfs
        self.home = folder / "home"
        self.home.mkdir()

    def __call__(
        self, *options: str | Path, command: str, status: int = 0, before: str = ":", backend: str = "slirp4netns"
    ) -> Done:
        sbx = Sbx(self.home)
        resolv = self.folder / "resolv.conf"
        world = ["unshare", "-Urnm", sys.executable, network_world.__file__, resolv]
        before += f"; {OUTWARD}" if backend == "pasta" else ""
        prepared = [
            "sh",
            "-c",
            before + '; exec "$@"',
            "sh",
            *COMMAND,
            "run",
            "--net",
            backend,
            "--idmap",
            "single",
        ]
        words = [*world, *prepared, *options, "--rootfs", str(self.rootfs), "sh", "-c", command]
        with nothing_left(self.home):
            done = subprocess.run(
                [str(word) for word in words], capture_output=True, text=True, timeout=60, env=sbx.env
            )
        assert done.returncode == status, done
        return Done(done.stdout, done.stderr, json.loads((self.folder / "resolv.conf.asked").read_text()))


@pytest.fixture
def world(tmp_path: Path, rootfs: Path) -> World:
    for mark in in_world:
        needs.enforce(mark.args[0]())
    return World(tmp_path, rootfs)


def test_the_world_itself(world: World) -> None:
    """Without rules everything is reached: what the other tests see refused is refused by the rules."""
    done = world(command="".join(GET.format(name, 80) for name in ("good.example", "other.example", "203.0.113.9")))
    assert done.stdout == "198.51.100.1 80\n203.0.113.9 80\n203.0.113.9 80\n"


def test_an_allowed_name(world: World) -> None:
    done = world("--net-allow", "good.example:80", command=GET.format("good.example", 80))
    assert (done.stdout, done.stderr) == ("198.51.100.1 80\n", "")


@pytest.mark.parametrize("target", ["good.example 443", "198.51.100.2 80", "203.0.113.9 80"])
def test_everything_else_is_refused_at_once(world: World, target: str) -> None:
    """Another port, another address; and the one that a lying resolver slips in beside the one asked for."""
    done = world(
        "--net-allow", "good.example:80", command=GET.format("good.example", 80) + f"time -f %e nc -w4 {target}; true"
    )
    assert done.stdout == "198.51.100.1 80\n"
    assert "onnection refused" in done.stderr or "can't connect" in done.stderr, done
    host, port = target.split()
    assert f"sbx: refused {host}:{port}: not in --net-allow" in done.stderr


def test_an_address_is_not_allowed_before_its_name_was_asked_for(world: World) -> None:
    done = world("--net-allow", "good.example:80", command=GET.format("198.51.100.1", 80) + "true")
    assert "198.51.100.1 80" not in done.stdout


def test_a_name_that_is_not_allowed_is_asked_of_nobody(world: World) -> None:
    done = world("--net-allow", "good.example", command="nslookup secret-data.other.example; nslookup good.example >&2")
    assert "NXDOMAIN" in done.stdout
    assert set(done.asked) == {"good.example"}
    assert "sbx: refused secret-data.other.example" in done.stderr


def test_the_resolver_of_the_stack_is_out_of_reach(world: World) -> None:
    done = world(
        "--net-allow",
        "good.example",
        command="nslookup other.example 10.0.2.3 2>&1; nslookup other.example 127.0.0.1 2>&1; true",
    )
    assert "203.0.113.9" not in done.stdout
    assert set(done.asked) == {"good.example"}  # before the start


def test_wildcards_addresses_and_blocks(world: World) -> None:
    options = ["--net-allow", "*.good.example", "--net-allow", "203.0.113.0/24:443"]
    targets = [
        ("www.good.example", 80),
        ("www.good.example", 443),
        ("203.0.113.9", 443),
        ("203.0.113.9", 80),
        ("good.example", 80),
    ]
    done = world(*options, command="".join(GET.format(*target) for target in targets) + "true")
    answers = [line for line in done.stdout.splitlines() if line[0].isdigit()]
    assert answers == ["198.51.100.2 80", "198.51.100.2 443", "203.0.113.9 443"]


def test_a_name_of_etc_hosts(world: World) -> None:
    done = world(
        "--net-allow", "db.internal:80", "--add-host", "db.internal:198.51.100.2", command=GET.format("db.internal", 80)
    )
    assert done.stdout == "198.51.100.2 80\n"


def test_the_command_cannot_change_the_rules(world: World) -> None:
    script = "exec 2>/dev/null; ip link set tap0 down; ip route flush table main; ip addr add 203.0.113.9/32 dev lo; "
    done = world("--net-allow", "good.example", command=script + "ip route; " + GET.format("203.0.113.9", 80) + "true")
    assert "default via 10.0.2.2" in done.stdout
    assert "203.0.113.9 80" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nonesuch.example"], "allow nonesuch.example: no such name"),
        (["nonesuch.example:443", "good.example", "other-nonesuch:22/tcp"],
         "allow nonesuch.example, other-nonesuch: no such name"),
        (["good.example", "bare.example"], "allow bare.example: no address of that name"),
        (["broken.example"], "allow broken.example: no resolver has an answer (127.0.0.1)"),
    ],
)  # fmt: skip
def test_a_name_that_does_not_resolve(world: World, options: list[str], message: str) -> None:
    words = [word for text in options for word in ("--net-allow", text)]
    done = world(*words, command="echo it ran", status=125)
    assert done.stdout == ""
    assert done.stderr.startswith(f"sbx: {message}\nhint: ")


@pytest.mark.parametrize("server", ["127.0.0.9", network_world.MUTE])
def test_no_resolver_answers(world: World, server: str) -> None:
    """Nobody is there, or somebody who says nothing: no name is known to be wrong, and nobody waits for long."""
    words = ["--net-allow", "good.example", "--dns", server]
    start = time.monotonic()
    refused = world(*words, command="echo it ran", status=125)
    assert time.monotonic() - start < 10
    assert refused.stdout == ""
    assert refused.stderr.startswith(f"sbx: allow good.example: no resolver has an answer ({server})\nhint: ")
    assert "--best-effort" in refused.stderr
    done = world(*words, "--best-effort", command="echo it ran")
    assert done.stdout == "it ran\n"
    assert done.stderr == f"sbx: allow good.example: no resolver has an answer ({server})\n"


@pytest.mark.parametrize(
    "options",
    [["--net-learn", "--net-allow", "nonesuch.example"], ["--net-allow", "*.nonesuch.example"],
     ["--net-allow", "192.0.2.0/24"], ["--net-allow", "2001:db8::1"],
     ["--net-allow", "Db.internal", "--add-host", "db.Internal:192.0.2.1"]],
)  # fmt: skip
def test_what_is_not_looked_up(world: World, options: list[str]) -> None:
    done = world(*options, command="echo it ran")
    assert (done.stdout, done.asked) == ("it ran\n", [])


@pytest.mark.parametrize("option", ["--privileged", "--cap-add=NET_ADMIN", "--cap-add=NET_RAW"])
def test_no_capability_over_the_rules(sbx: Sbx, rootfs: Path, option: str) -> None:
    needs.enforce(in_world[0].args[0]())
    done = sbx("run", "--net-allow", "good.example", option, "--rootfs", rootfs, "true")
    assert done.status == 125
    assert "would let it around the rules" in done.stderr


def test_the_log(world: World, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = GET.format("good.example", 80) + GET.format("203.0.113.9", 443) + "nslookup other.example; true"
    world("--net-allow", "good.example:80", "--net-log", log, command=command)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(record.pop("time") > 1.6e9 for record in records)
    assert {"event": "ask", "name": "good.example", "allowed": True, "addresses": ["198.51.100.1"]} in records
    assert {"event": "ask", "name": "other.example", "allowed": False} in records
    tried = {
        "event": "connect",
        "name": "good.example",
        "allowed": True,
        "address": "198.51.100.1",
        "port": 80,
        "protocol": "tcp",
    }
    assert tried in records
    assert {"event": "connect", "allowed": False, "address": "203.0.113.9", "port": 443, "protocol": "tcp"} in records
    assert log.stat().st_mode & 0o077 == 0


def test_learning_gives_the_list_to_paste(world: World) -> None:
    command = GET.format("good.example", 80) + GET.format("203.0.113.9", 443)
    learnt = world("--net-learn", command=command)
    assert learnt.stdout == "198.51.100.1 80\n203.0.113.9 443\n"
    assert learnt.stderr == "sbx: the sandbox reached:\n  --net-allow good.example:80\n  --net-allow 203.0.113.9:443\n"
    pasted = [word for word in learnt.stderr.split() if word == "--net-allow" or ":" in word][1:]
    assert world(*[word for word in pasted if word != "reached:"], command=command).stdout == learnt.stdout


@pytest.mark.parametrize("backend", USER_MODE)
@pytest.mark.parametrize("option", [[], ["--net-allow", "*.example"]], ids=["plain", "guarded"])
def test_a_resolver_that_changes_is_followed(world: World, backend: str, option: list[str]) -> None:
    """As when a VPN comes: the host's resolv.conf names somebody else while the sandbox runs."""
    resolv = world.folder / "resolv.conf"
    # First whom nobody answers for; the sandbox changes it itself, through a folder that it was given
    change = f"nslookup good.example >/dev/null 2>&1 && exit 9; echo nameserver 127.0.0.1 >{resolv}; "
    wait = "i=0; until nslookup good.example 2>/dev/null || [ $i = 20 ]; do i=$((i+1)); sleep 0.3; done"
    words = [*option, "-v", f"{world.folder}:{world.folder}"]
    done = world(*words, command=change + wait, before=f"echo nameserver 127.0.0.9 >{resolv}", backend=backend)
    assert "198.51.100.1" in done.stdout


@pytest.mark.parametrize("backend", USER_MODE)
def test_a_vpn_that_comes_and_goes(world: World, backend: str) -> None:
    """A name that one resolver knows alone is found while the host asks that one; a resolver on loopback serves."""
    resolv = world.folder / "resolv.conf"
    # slirp4netns looks at resolv.conf once a second
    found = "nslookup -type=a lan.vpn.example 2>&1 | grep -c 192.0.2.77"
    shown = f"{{ i=0; until [ $({found}) = $1 ] || [ $i = 20 ]; do i=$((i+1)); sleep 0.3; done; {found}; }}"
    command = f"shown() {shown}\nshown 0"
    for server, count in ((network_world.VPN, 1), ("127.0.0.1", 0)):
        command += f"; echo nameserver {server} >{resolv}; shown {count}"
    done = world("-v", f"{world.folder}:{world.folder}", command=command + "; true", backend=backend)
    assert done.stdout.split() == ["0", "1", "0"]


def test_without_its_guard_a_sandbox_reaches_nothing_new(sbx: Sbx, rootfs: Path) -> None:
    """Whoever kills the guard does not open the door: the rules are the kernel's."""
    for mark in in_world:
        needs.enforce(mark.args[0]())
    command = "echo up; read line; nc -w2 192.0.2.1 80 2>&1; nslookup good.example; true"
    before = helpers("serve.py")
    with running(sbx, rootfs, "--net-allow", "*.example", command=command) as process:
        guards = helpers("serve.py") - before
        for guard in guards:
            os.kill(guard, signal.SIGKILL)
        assert process.stderr
        assert process.stderr.readline() == b"sbx: the network's guard ended before the sandbox\n"
        out, _ = process.communicate(b"go\n", timeout=30)
    assert b"onnection refused" in out
    assert b"Address: 1" not in out.replace(b"Address:\t127.0.0.53", b"")


def test_metadata_services_are_not_let_in_by_a_name(world: World, tmp_path: Path) -> None:
    log = tmp_path / "log"
    world("--net-allow", "metadata.example:80", "--net-log", log, command="nc -w2 metadata.example 80; true")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["allowed"] for record in records if record["event"] == "connect"] == [False]


def test_a_missing_nft(sbx: Sbx, rootfs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rootless import programs

    monkeypatch.setattr(programs, "STANDARD", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SbxError, match="find nft: not installed") as caught:
        programs.require("nft")
    assert caught.value.hint == "install the package nftables"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net-allow", "10.0.0.0/33"], "allow '10.0.0.0/33'"),
        (["--net-allow", "10.0.0.1/8"], "has host bits set"),
        (["--net-allow", "exa mple.com"], "it is HOST[:PORT[-PORT]][/tcp|udp]"),
        (["--net-allow", "example.com", "--net", "none"], "guard the network with --net none: there is none"),
        (["--net-log", "/nonexistent/log"], "write /nonexistent/log: No such file or directory"),
    ],
)
def test_bad_words(sbx: Sbx, rootfs: Path, options: list[str], message: str) -> None:
    for mark in in_world:
        needs.enforce(mark.args[0]())
    done = sbx("run", *options, "--rootfs", rootfs, "true")
    assert done.status == 125
    assert message in done.stderr


# ── words and messages ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("Example.COM.", ("example.com", "", (0, 0), "")),
        ("example.com:443", ("example.com", "", (443, 443), "")),
        ("*.example.com:80-90/tcp", ("*.example.com", "", (80, 90), "tcp")),
        ("10.0.0.0/8", ("", "10.0.0.0/8", (0, 0), "")),
        ("10.0.0.0/8:53/udp", ("", "10.0.0.0/8", (53, 53), "udp")),
        ("2001:db8::1", ("", "2001:db8::1/128", (0, 0), "")),
        ("[2001:db8::1]:22", ("", "2001:db8::1/128", (22, 22), "")),
        ("[2001:db8::/32]:22", ("", "2001:db8::/32", (22, 22), "")),
        ("bücher.example", ("xn--bcher-kva.example", "", (0, 0), "")),
    ],
)
def test_words_for_rules(text: str, rule: tuple[object, ...]) -> None:
    assert tuple(rules.parse(text)) == rule


@pytest.mark.parametrize("text", ["", ":80", "a:0", "a:65536", "a:b", "a..b", "-a", "a;accept", "a\n", "1.2.3",
                                  "1.2.3.4:x", "[::1", "[::1]80", "*", "a.*.b", "10.0.0.1/8", "a" * 64,
                                  "a:80:90", "a:¹"])  # fmt: skip
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(SbxError, match="allow"):
        rules.parse(text)


def test_a_wildcard_is_about_what_is_below() -> None:
    rule = rules.parse("*.good.example")
    assert rule.covers("a.b.good.example")
    assert not rule.covers("good.example")
    assert not rule.covers("evilgood.example")
    assert not rule.covers(".good.example")


@given(st.binary(max_size=200))
def test_no_message_breaks_the_resolver(data: bytes) -> None:
    for parse in (dns.question, lambda message: dns.answer(message, dns.Question("a", 1, b"\1a\0\0\1\0\1"))):
        try:
            parse(data)
        except (ValueError, struct.error):
            continue


def test_a_pointer_to_itself_ends() -> None:
    with pytest.raises(ValueError, match="loop"):
        dns.question(b"\0\1\1\0\0\1\0\0\0\0\0\0\xc0\x0c\0\1\0\1")


def test_a_refused_name_is_told_apart_where_the_client_understands() -> None:
    query = b"\0\7\1\0\0\1\0\0\0\0\0\1\1a\0\0\1\0\1" + b"\0\0\x29\4\xd0\0\0\0\0\0\0"
    answer = dns.reply(query, dns.question(query), dns.NAME_ERROR, dns.BLOCKED)
    assert answer.endswith(b"\0\x0f\0\2\0\x0f")
    assert answer[3] & 15 == 3
