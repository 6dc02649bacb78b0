"""--net host with --net-allow '*:PORT': what reaches other ports all the same, and what is said of that."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import host_python
from test_network import server

from rootless import bpf, syscalls
from rootless.errors import SbxError
from rootless.network import host, sockets

pytestmark = [
    needs.userns,
    pytest.mark.skipif(syscalls.landlock_version() < 4, reason="this kernel's Landlock has no rules for TCP"),
]

#: Try to reach a server at the port argv[1] in the way argv[2]; print what it says, or the errno.
REACH = """
import socket, sys
where, way = ("127.0.0.1", int(sys.argv[1])), sys.argv[2]
MPTCP, FASTOPEN, FASTOPEN_CONNECT = 262, 0x20000000, 30
try:
    link = socket.socket(socket.AF_INET, socket.SOCK_STREAM, MPTCP if way == "mptcp" else 0)
    if way == "sendto":
        link.sendto(b"x", FASTOPEN, where)
    elif way == "sendmsg":
        link.sendmsg([b"x"], [], FASTOPEN, where)
    else:
        if way == "option":
            link.setsockopt(socket.IPPROTO_TCP, FASTOPEN_CONNECT, 1)
        link.connect(where)
        link.send(b"x")
    print(link.recv(100).decode(), end="")
except OSError as error:
    print(error.errno)
"""
EACCES, EPROTONOSUPPORT, EOPNOTSUPP, EAFNOSUPPORT = 13, 93, 95, 97
WAYS = {"connect": EACCES, "mptcp": EPROTONOSUPPORT, "sendto": EOPNOTSUPP, "sendmsg": EOPNOTSUPP, "option": EACCES}


@pytest.fixture
def port() -> Iterator[int]:
    with server(socket.AF_INET, "127.0.0.1") as found:
        yield found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [[], ["--seccomp", "unconfined"]], ids=["filtered", "unconfined"])
def test_no_way_around(sbx: Sbx, port: int, way: str, options: list[str]) -> None:
    def reach(allowed: int) -> str:
        words = ["run", "--net", "host", "--net-allow", f"*:{allowed}", *options]
        return sbx.ok(*words, *host_python(), REACH, str(port), way)

    assert reach(443) == str(WAYS[way])
    if way in ("connect", "option"):
        assert reach(port) == "hello"


def test_the_ways_lead_there_where_nothing_is_held(sbx: Sbx, port: int) -> None:
    """Or the test above would prove nothing. (Not every kernel has Multipath TCP.)"""
    for way in WAYS:
        said = sbx.ok("run", "--net", "host", *host_python(), REACH, str(port), way)
        assert said == "hello" or (way == "mptcp" and said == str(EPROTONOSUPPORT))


def test_a_command_that_comes_in_is_held_too(sbx: Sbx, port: int, rootfs: Path) -> None:
    words = ["--net", "host", "--net-allow", "*:443", "--name", "held", *host_python()]
    with sbx.start("run", *words, "import sys; print('up', flush=True); sys.stdin.read()") as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        for way, errno in WAYS.items():
            assert sbx.ok(
                "exec", "held", os.path.realpath(sys.executable), "-I", "-S", "-c", REACH, str(port), way
            ) == str(errno)
        process.communicate(timeout=20)


@pytest.mark.parametrize(
    ("words", "works"),
    [
        ("socket.AF_INET, socket.SOCK_DGRAM", True),
        ("socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP", True),
        ("socket.AF_UNIX, socket.SOCK_SEQPACKET", True),
        ("socket.AF_NETLINK, socket.SOCK_RAW", True),
        ("socket.AF_INET, socket.SOCK_DGRAM, 136", False),  # UDP-Lite
        ("socket.AF_INET, socket.SOCK_SEQPACKET, 132", False),  # SCTP
        ("socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 262", False),
        ("43, socket.SOCK_STREAM", False),  # SMC, which falls back to TCP
        ("21, socket.SOCK_SEQPACKET", False),  # RDS, over TCP
    ],
)
def test_which_sockets_there_are(sbx: Sbx, words: str, works: bool) -> None:
    options = ["run", "--net", "host", "--net-allow", "*:443"]
    done = sbx(*options, *host_python(), f"import socket; socket.socket({words}); print('made')")
    assert done.stdout == ("made\n" if works else ""), done
    assert works or f"[Errno {EPROTONOSUPPORT}]" in done.stderr or f"[Errno {EAFNOSUPPORT}]" in done.stderr


def test_the_user_is_told_that_udp_is_open(sbx: Sbx, tmp_path: Path) -> None:
    receipt = tmp_path / "receipt"
    done = sbx("run", "--net", "host", "--net-allow", "*:443", "--receipt", receipt, "host", "true", check=0)
    assert done.stderr == f"sbx: {host.OPEN}\n"
    assert "TCP ports (UDP is open)" in json.loads(receipt.read_text())["rows"]["landlock"]["actual"]
    assert sbx("run", "--net", "host", "host", "true", check=0).stderr == ""


# ── the filter ────────────────────────────────────────────────────────────────────────────────────────────────────────

ALLOW, REFUSE = 0x7FFF0000, 0x00050000


@pytest.mark.parametrize("machine", sockets._MACHINES)
def test_the_filter_on_each_machine(machine: str) -> None:
    architecture, number, sendto, sendmsg, sendmmsg = sockets._MACHINES[machine]
    program = bpf.decode(sockets.filter_program(machine))

    def verdict(call: int, *arguments: int) -> int:
        return bpf.verdict(program, architecture, call, arguments)

    assert verdict(number, socket.AF_INET, socket.SOCK_STREAM, 0) == ALLOW
    # only the low half of an int counts, and only the low bits of a type are one
    assert verdict(number, 1 << 32 | socket.AF_INET, 1 << 40 | socket.SOCK_STREAM, 1 << 33 | 262) == REFUSE | 93
    assert verdict(number, socket.AF_INET, 0x80000 | socket.SOCK_STREAM, 6) == ALLOW
    for call, place in ((sendto, 3), (sendmsg, 2), (sendmmsg, 3)):
        flags = [0] * place
        assert verdict(call, *flags, 0x4000) == ALLOW
        assert verdict(call, *flags, 0x20004000) == REFUSE | 95
        assert verdict(call | 0x40000000, *flags, 0x20000000) == REFUSE | 38  # x32
    assert verdict(425) == REFUSE | 38
    assert verdict(0) == verdict(424) == ALLOW
    assert bpf.verdict(program, 0x40000003, 102) == REFUSE | 38  # i386's socketcall


def test_the_filters_numbers_are_the_kernels() -> None:
    """As the compiler's headers have them."""
    needs.enforce("" if shutil.which("gcc") else "no gcc")
    text = "#include <sys/syscall.h>\nSYS_socket SYS_sendto SYS_sendmsg SYS_sendmmsg SYS_io_uring_setup\n"
    done = subprocess.run(["gcc", "-E", "-P", "-"], input=text, capture_output=True, text=True, check=True)
    assert list(map(int, done.stdout.split())) == [*sockets._MACHINES[syscalls.MACHINE][1:], sockets._IO_URING_SETUP]


def test_a_machine_that_is_not_known() -> None:
    with pytest.raises(SbxError, match="not on a pdp11"):
        sockets.filter_program("pdp11")
