"""Back ends: what a sandbox reaches, what it is told about names, and that the helper program goes when it goes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx

from rootless import network
from rootless.network import names
from rootless.spec import Network

pytestmark = [needs.userns, needs.busybox]
USER_MODE = [
    pytest.param("slirp4netns", marks=[needs.program("slirp4netns"), needs.tun]),
    pytest.param("pasta", marks=[needs.program("pasta"), needs.tun]),
]
slirp = [needs.program("slirp4netns"), needs.tun]


@contextmanager
def server(family: socket.AddressFamily, address: str) -> Iterator[int]:
    """Answer each connection to a free port of a loopback address with `hello`; give the port."""
    with socket.socket(family) as listener:
        listener.bind((address, 0))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.sendall(b"hello\n")
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def helpers(name: str) -> set[int]:
    """Return the ids of the programs `name` (or of interpreters that run it) that this test's sandboxes started."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")[:5]
        except OSError:
            continue
        if any(word.endswith(name.encode()) for word in words) and is_ours(int(path.parent.name)):
            found.add(int(path.parent.name))
    return found


def is_ours(pid: int) -> bool:
    """Whether a process descends from this one; orphans do, since they come to us."""
    while pid > 1 and pid != os.getpid():
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return pid > 1


@contextmanager
def running(sbx: Sbx, rootfs: Path, *options: str, command: str = "echo up; cat") -> Iterator[subprocess.Popen[bytes]]:
    """A sandbox that runs until its stdin ends."""
    with sbx.start("run", *options, "--rootfs", rootfs, "sh", "-c", command) as process:
        assert process.stdout
        line = process.stdout.readline()
        assert line == b"up\n", (line, process.stderr and process.stderr.read())
        try:
            yield process
        finally:
            if process.poll() is None:
                process.communicate(timeout=20)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", USER_MODE)
def test_addresses_are_there_before_the_command(sbx: Sbx, rootfs: Path, backend: str) -> None:
    said = sbx.ok("run", "--net", backend, "--rootfs", rootfs, "sh", "-c", "ip addr show tap0; ip route; ip -6 route")
    assert "mtu 65520" in said
    assert "inet 10.0.2.100/24" in said
    assert "default via 10.0.2.2" in said
    if any(line.split()[3] == "00" for line in Path("/proc/net/if_inet6").read_text().splitlines()):
        assert "inet6 fd00::100/64" in said
        assert not [line for line in said.splitlines() if "fd00::100" in line and "tentative" in line]
        assert "default via fd00::2" in said


def test_none_has_loopback_alone(sbx: Sbx, rootfs: Path) -> None:
    said = sbx.ok(
        "run",
        "--net",
        "none",
        "--rootfs",
        rootfs,
        "sh",
        "-c",
        "ip -o link; cat /etc/resolv.conf; echo hi | nc -l -p 1 & sleep 0.2; nc 127.0.0.1 1",
    )
    assert [line.split()[1] for line in said.splitlines() if "link/" in line] == ["lo:"]
    assert "nameserver" not in said
    assert said.endswith("hi")


def test_host_is_no_namespace_of_its_own(sbx: Sbx, rootfs: Path) -> None:
    assert sbx.ok("run", "--net", "host", "--rootfs", rootfs, "readlink", "/proc/self/ns/net") == os.readlink(
        "/proc/self/ns/net"
    )


@pytest.mark.parametrize("backend", USER_MODE)
@pytest.mark.parametrize(("family", "host", "gateway"), [
    (socket.AF_INET, "127.0.0.1", names.GATEWAY),
    (socket.AF_INET6, "::1", names.GATEWAY6),
])  # fmt: skip
def test_the_hosts_loopback_when_asked_for(
    sbx: Sbx, rootfs: Path, backend: str, family: socket.AddressFamily, host: str, gateway: str
) -> None:
    if family == socket.AF_INET6 and not any(
        line.split()[3] == "00" for line in Path("/proc/net/if_inet6").read_text().splitlines()
    ):
        pytest.skip("this host has no IPv6 address besides ::1")
    with server(family, host) as port:
        said = sbx.ok(
            "run",
            "--net",
            backend,
            "--host-loopback",
            "--rootfs",
            rootfs,
            "sh",
            "-c",
            f"timeout 5 nc {gateway} {port}; true",
        )
    assert said.splitlines()[0] == "hello"  # pasta of 2023 repeats what was sent before the end


@pytest.mark.parametrize("backend", USER_MODE)
def test_the_hosts_loopback_has_a_name_when_asked_for(sbx: Sbx, rootfs: Path, backend: str) -> None:
    with server(socket.AF_INET, "127.0.0.1") as port:
        command = f"timeout 5 nc $(grep host.containers.internal /etc/hosts | cut -d' ' -f1) {port}; true"
        assert (
            sbx.ok("run", "--net", backend, "--host-loopback", "--rootfs", rootfs, "sh", "-c", command).splitlines()[0]
            == "hello"
        )
    assert "host.containers.internal" not in sbx.ok("run", "--net", backend, "--rootfs", rootfs, "cat", "/etc/hosts")


@pytest.mark.parametrize("mark", [pytest.param("", marks=slirp)])
def test_the_hosts_loopback_is_refused_otherwise(sbx: Sbx, rootfs: Path, mark: str) -> None:
    with server(socket.AF_INET, "127.0.0.1") as port:
        done = sbx("run", "--net", "slirp4netns", "--rootfs", rootfs, "nc", "-w3", "10.0.2.2", str(port))
    assert (done.status, done.stdout) == (1, "")


# ── the helper program's life ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("backend", USER_MODE)
def test_the_helper_is_gone_afterwards(sbx: Sbx, rootfs: Path, backend: str) -> None:
    before = helpers(backend)
    with running(sbx, rootfs, "--net", backend):
        assert len(helpers(backend) - before) == 1
    assert until(lambda: not helpers(backend) - before)


@pytest.mark.parametrize("backend", USER_MODE)
@pytest.mark.parametrize("victim", ["parent", "supervisor", "pid 1"])
def test_the_helper_is_gone_after_kill_9(sbx: Sbx, rootfs: Path, backend: str, victim: str) -> None:
    before = helpers(backend)
    with running(sbx, rootfs, "--net", backend) as process:
        assert helpers(backend) - before
        chain = [process.pid]
        for _ in range(2):
            children = Path(f"/proc/{chain[-1]}/task/{chain[-1]}/children").read_text().split()
            chain.append(next(int(pid) for pid in children if int(pid) not in helpers(backend)))
        os.kill(dict(zip(("parent", "supervisor", "pid 1"), chain, strict=True))[victim], signal.SIGKILL)
        process.wait(10)
        assert until(lambda: not helpers(backend) - before)


@pytest.mark.parametrize("backend", USER_MODE)
@pytest.mark.parametrize("option", [[], ["--dns", "192.0.2.53"], ["--net-learn"]], ids=["plain", "dns", "guarded"])
def test_the_helper_is_gone_after_kill_9_of_all_that_would_end_it(
    sbx: Sbx, rootfs: Path, backend: str, option: list[str]
) -> None:
    """The parent and the supervisor at once: neither sees the other's end."""
    if "--net-learn" in option:
        needs.enforce(needs.program("nft").args[0]())
    before = helpers(backend) | helpers("serve.py")
    with running(sbx, rootfs, "--net", backend, *option) as process:
        assert helpers(backend) - before
        both = [process.pid, int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])]
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        for pid in both:
            os.kill(pid, signal.SIGKILL)
        process.wait(10)
        assert until(lambda: not (helpers(backend) | helpers("serve.py")) - before)
    sbx.ok("run", "--net", "none", "--rootfs", rootfs, "true")  # whose supervisor clears what was left
    assert until(lambda: not os.listdir(sbx.home / "sandboxes"))


@pytest.mark.parametrize("backend", USER_MODE)
def test_the_user_is_told_when_the_helper_dies_first(sbx: Sbx, rootfs: Path, backend: str) -> None:
    before = helpers(backend)
    with running(sbx, rootfs, "--net", backend) as process:
        os.kill((helpers(backend) - before).pop(), signal.SIGKILL)
        assert process.stderr
        line = process.stderr.readline().decode()
        out, rest = process.communicate(b"still there\n", timeout=20)
    assert line.startswith(f"sbx: the network is gone: {backend} ended before the sandbox")
    assert (out, rest, process.returncode) == (b"still there\n", b"", 0)


@pytest.mark.parametrize("backend", USER_MODE)
def test_the_helper_holds_nothing_of_ours(sbx: Sbx, rootfs: Path, backend: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    before = helpers(backend)
    with secret.open() as stream:
        os.set_inheritable(stream.fileno(), True)
        with sbx.start("run", "--net", backend, "--rootfs", rootfs, "sh", "-c", "echo up; cat",
                       pass_fds=[stream.fileno()], env={"SECRET": "word"}) as process:  # fmt: skip
            assert process.stdout
            assert process.stdout.readline() == b"up\n"
            helper = (helpers(backend) - before).pop()
            tree = [helper, *(int(p) for p in Path(f"/proc/{helper}/task/{helper}/children").read_text().split())]
            for pid in tree:
                try:
                    files = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
                    environment = Path(f"/proc/{pid}/environ").read_bytes()
                except PermissionError:
                    continue  # it hides itself from us too
                assert str(secret) not in files
                assert b"SECRET" not in environment
            process.communicate(timeout=20)


@pytest.mark.parametrize("mark", [pytest.param("", marks=slirp)])
def test_interrupting_the_command_leaves_the_helper(sbx: Sbx, rootfs: Path, mark: str) -> None:
    """^C at a terminal goes to the whole process group; the network must outlive it for a command that handles it."""
    before = helpers("slirp4netns")
    with running(sbx, rootfs, "--net", "slirp4netns") as process:
        helper = (helpers("slirp4netns") - before).pop()
        assert os.getpgid(helper) != os.getpgid(process.pid)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("backend", "host", "servers", "expected"),
    [
        ("slirp4netns", "nameserver 127.0.0.53\n", [], "nameserver 10.0.2.3\n"),
        ("slirp4netns", "", [], "nameserver 10.0.2.3\n"),
        ("slirp4netns", "nameserver ::1\n", [], "nameserver fd00::3\n"),
        ("slirp4netns", "nameserver 9.9.9.9\nnameserver ::1\n", [], "nameserver 10.0.2.3\nnameserver fd00::3\n"),
        ("pasta", "nameserver 127.0.0.53\nsearch a.example b.example\noptions edns0\n", [],
         "search a.example b.example\noptions edns0\nnameserver 127.0.0.53\n"),
        ("slirp4netns", "nameserver 127.0.0.53\n", ["192.0.2.1"], "nameserver 192.0.2.1\n"),
        ("host", "nameserver 127.0.0.53\n", [], "nameserver 127.0.0.53\n"),
        ("none", "nameserver 127.0.0.53\n", ["192.0.2.1"], ""),
    ],
)  # fmt: skip
def test_resolv_conf(backend: str, host: str, servers: list[str], expected: str) -> None:
    assert names.resolv_conf(Network(backend=backend, ipv6=True), servers, [], host) == expected


def test_dns_options(sbx: Sbx, rootfs: Path) -> None:
    options = [
        "--net",
        "slirp4netns",
        "--dns",
        "192.0.2.53",
        "--dns-search",
        "lan.example",
        "--add-host",
        "db:192.0.2.7",
    ]
    said = sbx.ok("run", *options, "--rootfs", rootfs, "cat", "/etc/resolv.conf", "/etc/hosts")
    assert "nameserver 192.0.2.53\n" in said
    assert "search lan.example\n" in said
    assert said.endswith("192.0.2.7 db")


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        (
            ["--net", "nonesuch"],
            "choose network nonesuch: there is none of that name",
            "back ends are auto, slirp4netns, pasta",
        ),
        (["--net", "none", "--host-loopback"], "reach the host's loopback with --net none", "use --net slirp4netns"),
        (["--net", "none", "--dns", "one.one"], "set resolver 'one.one': it is no IP address", ""),
        (["--net", "none", "--add-host", "db=1"], "add host 'db=1': it is NAME:ADDRESS", ""),
        (
            ["--net", "none", "--add-host", "db:host-gateway"],
            "the host's loopback cannot be reached",
            "--host-loopback",
        ),
    ],
)
def test_bad_words(sbx: Sbx, rootfs: Path, options: list[str], message: str, hint: str) -> None:
    done = sbx("run", *options, "--rootfs", rootfs, "true")
    assert done.status == 125
    assert message in done.stderr
    assert hint in done.stderr


def fake(folder: Path, name: str, script: str) -> dict[str, str | None]:
    """Put a program in the way of the real one."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("backend", "script", "message", "hint"),
    [
        ("slirp4netns", "echo \"slirp4netns: unrecognized option '--enable-seccomp'\" >&2; echo usage >&2; exit 1",
         "unrecognized option '--enable-seccomp'", "too old"),
        ("slirp4netns", "echo 'child failed(1)' >&2; exit 1", "attach slirp4netns: child failed(1)", "--net none"),
        ("slirp4netns", "exit 0", "it ended without a word", ""),
        ("pasta", "echo \"pasta: unrecognized option '--config-net'\" >&2; exit 1", "unrecognized option", "too old"),
        ("pasta", "echo 'Failed to open() /dev/net/tun' >&2; exit 1", "Failed to open() /dev/net/tun", "use --net"),
    ],
)  # fmt: skip
def test_a_helper_that_fails(
    sbx: Sbx, rootfs: Path, tmp_path: Path, backend: str, script: str, message: str, hint: str
) -> None:
    done = sbx("run", "--net", backend, "--rootfs", rootfs, "true", env=fake(tmp_path, backend, script))
    assert done.status == 125
    assert message in done.stderr
    assert hint in done.stderr


def test_a_talkative_helper_is_not_stalled(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    """Nobody reads a helper's complaints while it runs; a full pipe must not stop it."""
    if network.has_ipv6():
        pytest.skip("this stand-in makes no interface, and with IPv6 there is something to be set on it")
    script = 'printf 1 >&3; i=0; while [ $i -lt 3000 ]; do echo "complaint $i, one of so many" >&2; i=$((i+1)); done\n'
    script += f"touch {tmp_path}/finished; cat <&4"
    env = fake(tmp_path, "slirp4netns", script)
    with sbx.start("run", "--net", "slirp4netns", "--rootfs", rootfs, "sh", "-c", "cat", env=env) as process:
        if not until((tmp_path / "finished").exists):
            process.kill()
            pytest.fail(str(process.communicate(timeout=20)))
        process.communicate(timeout=20)


@pytest.mark.parametrize("backend", USER_MODE)
def test_no_tun_device(sbx: Sbx, rootfs: Path, backend: str) -> None:
    """In a mount namespace of the test's own, where something else lies over it."""
    words = ["run", "--net", backend, "--idmap", "single", "--rootfs", str(rootfs), "true"]
    script = 'mount --bind /dev/null /dev/net/tun && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", script, "sh", *COMMAND, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=sbx.env)
    assert done.returncode == 125, done
    assert f"sbx: attach {backend}: " in done.stderr
    assert "hint: /dev/net/tun is not the tun device" in done.stderr


# ── what auto means ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def without(sbx: Sbx, rootfs: Path, *missing: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sandbox with `--net auto` where helper programs are missing, in a mount namespace of the test's own."""
    hide = "".join(f"mount --bind /dev/null {shutil.which(name)}; " for name in missing)
    words = ["run", "--net", "auto", "--idmap", "single", "--rootfs", str(rootfs), "sh", "-c", "ip -o link; echo; cat"]
    command = ["unshare", "-Urm", "sh", "-ec", f'{hide}exec "$@"', "sh", *COMMAND, *words]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=sbx.env, **pipes) as process:  # type: ignore[call-overload]
        yield process
        process.communicate(timeout=20)
        assert process.returncode == 0


def interfaces(process: subprocess.Popen[bytes]) -> list[str]:
    """Return the names of the interfaces in a sandbox of `without`."""
    assert process.stdout
    return [line.split()[1].decode().rstrip(":") for line in iter(process.stdout.readline, b"\n")]


@pytest.mark.parametrize("mark", [pytest.param("", marks=[*slirp, needs.program("pasta")])])
def test_auto_is_slirp4netns_then_pasta_then_none(sbx: Sbx, rootfs: Path, mark: str) -> None:
    before = {name: helpers(name) for name in names.USER_MODE}

    def at_work() -> dict[str, int]:
        return {name: len(helpers(name) - before[name]) for name in names.USER_MODE}

    with without(sbx, rootfs) as process:
        assert interfaces(process) == ["lo", "tap0"]
        assert at_work() == {"slirp4netns": 1, "pasta": 0}
    with without(sbx, rootfs, "slirp4netns") as process:
        assert interfaces(process) == ["lo", "tap0"]
        assert at_work() == {"slirp4netns": 0, "pasta": 1}
    with without(sbx, rootfs, "slirp4netns", "pasta") as process:
        assert interfaces(process) == ["lo"]
        assert at_work() == {"slirp4netns": 0, "pasta": 0}
        assert process.stderr
        said = process.stderr.readline().decode()
    assert said == "sbx: no network: slirp4netns is not installed; install the package slirp4netns, or say --net none\n"
    assert until(lambda: at_work() == {"slirp4netns": 0, "pasta": 0})


@pytest.mark.parametrize("mark", [pytest.param("", marks=[*slirp, needs.program("pasta")])])
@pytest.mark.parametrize(("backend", "package"), [("slirp4netns", "slirp4netns"), ("pasta", "passt")])
def test_a_back_end_that_is_missing(sbx: Sbx, rootfs: Path, backend: str, package: str, mark: str) -> None:
    """Asked for by name it is an error, and nothing else is taken."""
    script = f'mount --bind /dev/null {shutil.which(backend)}; exec "$@"'
    words = ["run", "--net", backend, "--idmap", "single", "--rootfs", str(rootfs), "true"]
    command = ["unshare", "-Urm", "sh", "-ec", script, "sh", *COMMAND, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=sbx.env)
    assert done.returncode == 125
    assert done.stderr == f"sbx: find {backend}: not installed\nhint: install the package {package}\n"
