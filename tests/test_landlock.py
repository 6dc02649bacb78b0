"""Landlock around the command: its own tree, what was handed over, TCP ports, and what must not leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Sbx
from launching import running

from rootless import syscalls

BOX = ("--net", "none", "--rootfs")
PYTHON = "/usr/bin/python3"
python = pytest.mark.skipif(not Path(PYTHON).exists(), reason=f"the host has no {PYTHON}")

landlock = pytest.mark.skipif(syscalls.landlock_version() < 2, reason="this kernel has no Landlock of version 2")
scoped = pytest.mark.skipif(syscalls.landlock_version() < 6, reason="this kernel's Landlock has no scopes")


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


# ── commands that come in ─────────────────────────────────────────────────────────────────────────────────────────────


@landlock
def test_a_command_that_comes_in_is_held_to_the_tree_too(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("told\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "g").write_text("handed over\n")
    script = "cat /proc/self/fd/$1/g; mkdir -p /a /b && echo x >/a/f && mv /a/f /b/g && cat /b/g /proc/self/comm"
    with running(sbx, "run", "--name", "box", *BOX, rootfs, "sh", "-c", "echo up; cat"):
        fd = os.open(tmp_path / "sub", os.O_RDONLY)
        try:
            words = ["exec", "--pass-fd", str(fd), "box", "sh", "-c"]
            process = sbx.start(*words, script, "sh", str(fd), pass_fds=[fd])
            assert process.communicate(timeout=20) == (b"handed over\nx\ncat\n", b"")
            process = sbx.start(*words, "cat /proc/self/fd/$1/../f", "sh", str(fd), pass_fds=[fd])
            assert b"Permission denied" in process.communicate(timeout=20)[1]
        finally:
            os.close(fd)


@landlock
@pytest.mark.parametrize(
    ("options", "seen"), [([], False), (["--cap-add", "SYS_PTRACE"], True)], ids=["usual", "trace"]
)
def test_what_a_command_that_comes_in_sees_of_the_others(
    sbx: Sbx, rootfs: Path, options: tuple[str, ...], seen: bool
) -> None:
    """Their names and states always, so that they can be listed and signalled; their memory and files by choice."""
    first = "sleep 1000 & echo $! >/pid; echo up; wait; cat"
    with running(sbx, "run", "--name", "box", *options, *BOX, rootfs, "sh", "-c", first):
        assert "sleep 1000" in sbx.ok("exec", "box", "ps")
        look = "readlink /proc/$(cat /pid)/exe && ls /proc/$(cat /pid)/fd >/dev/null"
        done = sbx("exec", "box", "sh", "-c", look)
        assert (done.status == 0) == seen, done
        # What it starts itself it sees.
        assert sbx.ok("exec", "box", "sh", "-c", "sleep 1000 & readlink /proc/$!/exe; kill $!") == "/bin/busybox"
        inside = json.loads(sbx.ok("inspect", "box"))[0]["receipt"]["rows"]
        assert (inside["landlock"]["in_force"], inside["landlock-exec"]["in_force"]) == (True, not seen)
        sbx.ok("exec", "box", "sh", "-c", "kill $(cat /pid)")


# ── mounts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [[], ["--seccomp", "unconfined"]], ids=["filtered", "unconfined"])
@pytest.mark.parametrize("words", [["run"], ["exec"]], ids=["run", "exec"])
def test_who_may_mount_can(sbx: Sbx, rootfs: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    """CAP_SYS_ADMIN is asked for in order to mount; what else it was that held the command still does."""
    script = (
        "mkdir /a /b && mount -t tmpfs none /a && touch /a/f && mount -o bind /a /b && ls /b && umount /b /a"
        " && ls /b && grep NoNewPrivs /proc/self/status"
    )
    run = ["run", "--cap-add", "SYS_ADMIN", *options]
    if words == ["run"]:
        receipt = tmp_path / "receipt"
        said = sbx.ok(*run, "--receipt", receipt, *BOX, rootfs, "sh", "-c", script)
        rows = json.loads(receipt.read_text())["rows"]
        assert not rows["landlock"]["in_force"]
        assert rows["landlock"]["actual"].endswith(": nothing")
        assert all(rows[name]["in_force"] for name in ("user", "mnt", "masked", "no_new_privs", "capabilities"))
        assert sbx(*run, "--require", "landlock", *BOX, rootfs, "true").status == 125
    else:
        with running(sbx, *run, "--name", "box", *BOX, rootfs, "sh", "-c", "echo up; cat"):
            said = sbx.ok("exec", "box", "sh", "-c", script)
    assert said.splitlines() == ["f", "NoNewPrivs:\t1"]


@scoped
def test_who_may_mount_still_signals_nobody_outside(sbx: Sbx, rootfs: Path) -> None:
    victim = subprocess.Popen(["sleep", "100"])
    try:
        run = ("run", "--cap-add", "SYS_ADMIN", "--share", "pid", *BOX, rootfs, "sh", "-c")
        done = sbx(*run, f"mount -t tmpfs none /mnt && echo mounted; kill {victim.pid}")
        assert done.stdout == "mounted\n"
        assert "Operation not permitted" in done.stderr
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


# ── what is shared with the host ──────────────────────────────────────────────────────────────────────────────────────


@scoped
def test_with_the_hosts_processes_in_sight_none_can_be_signalled(sbx: Sbx, rootfs: Path) -> None:
    # Root of the sandbox is the caller, so the kernel's own rules would allow it.
    victim = subprocess.Popen(["sleep", "100"])
    script = f"kill {victim.pid}; sleep 0 & kill $! && wait"
    try:
        done = sbx("run", "--share", "pid", *BOX, rootfs, "sh", "-c", script)
        assert "Operation not permitted" in done.stderr
        with running(sbx, "run", "--name", "box", "--share", "pid", *BOX, rootfs, "sh", "-c", "echo up; cat"):
            assert "Operation not permitted" in sbx("exec", "box", "sh", "-c", script).stderr
            rows = json.loads(sbx.ok("inspect", "box"))[0]["receipt"]["rows"]
            assert rows["landlock-exec"]["actual"].endswith(": files, signals")
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
