"""Landlock around the command: its own tree, what was handed over, TCP ports, and what must not leave."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Sbx

from rootless import syscalls

BOX = ("--net", "none", "--rootfs")
PYTHON = "/usr/bin/python3"
python = pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"the host has no {PYTHON}")

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
@python
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


@pytest.mark.skipif(syscalls.landlock_version() < 4, reason="this kernel's Landlock has no ports")
@python
def test_tcp_ports_of_the_hosts_network(sbx: Sbx) -> None:
    connect = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1]))).close()"
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        allowed, refused = one.getsockname()[1], other.getsockname()[1]
        run = ("run", "--net", "host", "--net-allow", f"*:{allowed}", "host", PYTHON, "-c", connect)
        sbx.ok(*run, str(allowed))
        done = sbx(*run, str(refused))
    assert done.status == 1
    assert "PermissionError" in done.stderr


@pytest.mark.parametrize("allowed", ["example.org:443", "*", "*:0", "*:65536", "*:9-8", "*:53/udp"])
def test_what_landlock_cannot_allow_is_refused(sbx: Sbx, allowed: str) -> None:
    done = sbx("run", "--net", "host", "--net-allow", allowed, "host", "true")
    assert (done.status, done.stderr.startswith(f"sbx: allow '{allowed}' with --net host: ")) == (125, True)


def test_ports_need_what_landlock_needs(sbx: Sbx) -> None:
    done = sbx("run", "--net", "host", "--net-allow", "*:443", "--nested", "host", "true")
    assert (done.status, "allow TCP ports with --net host" in done.stderr) == (125, True)
