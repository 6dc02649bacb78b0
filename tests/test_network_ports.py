"""Published ports: at the start, on a running sandbox, and what is said where that cannot be."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from test_network import running, until

from rootless.errors import SbxError
from rootless.network import ports

pytestmark = [needs.userns, needs.busybox]
SLIRP = pytest.param("slirp4netns", marks=[needs.program("slirp4netns"), needs.tun])
PASTA = pytest.param("pasta", marks=[needs.program("pasta"), needs.tun])
BACKENDS = [SLIRP, PASTA, "none"]
#: A server of the sandbox's, on every address, that answers each connection with a line
SERVER = "echo up; nc -ll -p 80 -e echo inside 2>/dev/null & cat"


def answer(address: str, port: int) -> bytes:
    try:
        with socket.create_connection((address, port), 5) as client:
            return client.makefile("rb").readline()
    except OSError:
        return b""


def unused() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_published_port(sbx: Sbx, rootfs: Path, backend: str) -> None:
    port = unused()
    with running(sbx, rootfs, "--net", backend, "-p", f"{port}:80", command=SERVER):
        assert until(lambda: answer("127.0.0.1", port) == b"inside\n")
        assert answer("127.0.0.2", port) == b""  # 127.0.0.1 alone, where no address was given
    assert answer("127.0.0.1", port) == b""


@pytest.mark.parametrize("backend", BACKENDS)
def test_port_0_is_chosen_and_told(sbx: Sbx, rootfs: Path, backend: str) -> None:
    with running(sbx, rootfs, "--net", backend, "--name", "zero", "-p", "0:80", command=SERVER) as process:
        assert process.stderr
        said = re.fullmatch(rb"sbx: published 80/tcp -> 127\.0\.0\.1:([0-9]+)\n", process.stderr.readline())
        assert said
        assert until(lambda: answer("127.0.0.1", int(said[1])) == b"inside\n")
        assert sbx.ok("port", "zero") == f"80/tcp -> 127.0.0.1:{int(said[1])}"
        assert sbx.ok("port", "zero", "80") == f"127.0.0.1:{int(said[1])}"
        assert json.loads(sbx.ok("port", "zero", "--json"))[0]["host"] == int(said[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ports_of_a_running_sandbox(sbx: Sbx, rootfs: Path, backend: str) -> None:
    port = unused()
    with running(sbx, rootfs, "--net", backend, "--name", "later", command=SERVER):
        assert sbx.ok("port", "later") == ""
        sbx.ok("port", "later", "--add", f"{port}:80")
        assert until(lambda: answer("127.0.0.1", port) == b"inside\n")
        sbx.ok("port", "later", "--remove", str(port))
        assert until(lambda: answer("127.0.0.1", port) == b"")
        assert sbx.ok("port", "later") == ""
        sbx.ok("port", "later", "--add", f"{port}:80")
        assert until(lambda: answer("127.0.0.1", port) == b"inside\n")


#: A UDP server in Python, for a sandbox that shows the host's programs
ECHO = """
import socket, sys, threading
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 53))
def serve():
    while True:
        server.sendto(*server.recvfrom(2000))
threading.Thread(target=serve, daemon=True).start()
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_udp(sbx: Sbx, backend: str) -> None:
    port = unused()
    # The resolver beside pasta leaves port 53 alone where somebody else is to be asked
    options = ["--net", backend, "--dns", "192.0.2.53", "-p", f"{port}:53/udp", "--name", "udp", "-u", "0"]
    with sbx.start("run", *options, "host", "/usr/bin/python3", "-c", ECHO) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(0.5)
            client.connect(("127.0.0.1", port))

            def echoed() -> bool:
                try:
                    client.send(b"hello\n")
                    return client.recv(100) == b"hello\n"
                except OSError:
                    return False

            assert until(echoed, 15)
        assert sbx.ok("port", "udp", "53/udp") == f"127.0.0.1:{port}"
        process.communicate(timeout=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ipv6_address(sbx: Sbx, rootfs: Path, backend: str) -> None:
    port = unused()
    with running(sbx, rootfs, "--net", backend, "-p", f"[::1]:{port}:80", command=SERVER):
        assert until(lambda: answer("::1", port) == b"inside\n")
        assert answer("127.0.0.1", port) == b""


def test_much_data_both_ways(sbx: Sbx, rootfs: Path) -> None:
    port, size = unused(), 20_000_000
    with running(sbx, rootfs, "--net", "none", "-p", f"{port}:80", command="echo up; nc -l -p 80 -e cat & cat"):

        def connect() -> socket.socket | None:
            try:
                client = socket.create_connection(("127.0.0.1", port), 5)
                client.sendall(b"x")
                return client if client.recv(1) else None
            except OSError:
                return None

        found: list[socket.socket] = []

        def connected() -> bool:
            if client := connect():
                found.append(client)
            return bool(found)

        assert until(connected)
        with found[0] as client:
            client.settimeout(30)
            sent = received = 0
            chunk = bytes(range(256)) * 256
            while received < size:
                if sent < size:
                    sent += client.send(chunk[sent % len(chunk) :])
                data = client.recv(1 << 16)
                assert data
                assert data[0] == received % 256
                received += len(data)


def test_a_taken_port(sbx: Sbx, rootfs: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for backend in ("none", "slirp4netns"):
            done = sbx("run", "--net", backend, "-p", f"{port}:80", "--rootfs", rootfs, "true")
            assert (done.status, done.stdout) == (125, "")
            assert (
                f"publish 80/tcp -> 127.0.0.1:{port}: the port is taken on the host\nhint: choose another"
                in done.stderr
            )


def test_a_privileged_port(sbx: Sbx, rootfs: Path) -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first < 20:
        pytest.skip("this host lets everybody bind low ports")
    done = sbx("run", "--net", "none", "-p", "19:80", "--rootfs", rootfs, "true")
    assert done.status == 125
    assert "sysctl net.ipv4.ip_unprivileged_port_start=19" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--net", "none", "-p", "192.0.2.77:0:80"], "the host has no such address"),
        (["--net", "host", "-p", "80"], "the command's ports are the host's already"),
        (["--net", "none", "-p", "80:"], "publish '80:': it is [[IP:]HOST:]SANDBOX[/tcp|udp]"),
    ],
)
def test_refusals(sbx: Sbx, rootfs: Path, options: list[str], message: str) -> None:
    done = sbx("run", *options, "--rootfs", rootfs, "true")
    assert (done.status, message in done.stderr) == (125, True), done


def test_unknown_ports(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, rootfs, "--net", "none", "--name", "bare"):
        assert sbx("port", "bare", "80").status == 1
        assert "it is not published" in sbx("port", "bare", "--remove", "8080").stderr
    assert "none of that name" in sbx("port", "bare").stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("80", ["80/tcp -> 127.0.0.1:0"]),
        ("8080:80", ["80/tcp -> 127.0.0.1:8080"]),
        ("0:80/udp", ["80/udp -> 127.0.0.1:0"]),
        ("0.0.0.0:8080:80", ["80/tcp -> 0.0.0.0:8080"]),
        ("127.0.0.1::80", ["80/tcp -> 127.0.0.1:0"]),
        ("[::1]:8080:80", ["80/tcp -> [::1]:8080"]),
        ("8000-8002:80-82", ["80/tcp -> 127.0.0.1:8000", "81/tcp -> 127.0.0.1:8001", "82/tcp -> 127.0.0.1:8002"]),
        ("80-81", ["80/tcp -> 127.0.0.1:0", "81/tcp -> 127.0.0.1:0"]),
    ],
)
def test_words_for_ports(text: str, shown: list[str]) -> None:
    assert [ports.show(port) for port in ports.parse(text)] == shown


@pytest.mark.parametrize("text", ["", ":", "0", "65536", "8080:0", "a:80", "-1:80", "8000-8002:80-81", "82-80",
                                  "1.2.3:1:80", "80/sctp", "80/", "¹:80", "1:2:3:4", "localhost:1:80", "8" * 5000,
                                  "80-", "[::1]]:80:80:80"])  # fmt: skip
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(SbxError, match="publish"):
        ports.parse(text)
