"""A launch from where people and programs launch: any words, any limits, any state of the caller."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from launching import NONE, is_root, running

pytestmark = [needs.userns, needs.busybox]

SHOW_ARGUMENTS = ["printf", "<%s>"]


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arguments_pass_byte_for_byte(sbx: Sbx, image: str) -> None:
    words = [
        b"",
        b" ",
        b"a\nb",
        b"\xff\xfe",
        b"-x",
        b"--",
        b"--net",
        b"\\",
        b"'\"$(id)`",
        b"*",
        "é中".encode(),
        b"\x1b[31m",
    ]
    result = sbx("run", *NONE, image, *SHOW_ARGUMENTS, *words)
    assert result.status == 0
    assert os.fsencode(result.stdout) == b"".join(b"<" + word + b">" for word in words)


@pytest.mark.parametrize("length", [1, 4095, 4096, 65536, 130_000])
def test_long_arguments(sbx: Sbx, image: str, length: int) -> None:
    assert sbx.ok("run", *NONE, image, "sh", "-c", 'echo "${#1}"', "sh", "x" * length) == str(length)


def test_many_arguments(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "sh", "-c", 'echo "$#"', "sh", *["word"] * 5000) == "5000"


def test_two_hundred_variables(sbx: Sbx, image: str) -> None:
    words = [word for n in range(200) for word in ("-e", f"V{n}={n}")]
    assert sbx.ok("run", *NONE, *words, image, "sh", "-c", "env | grep -c ^V; echo $V199") == "200\n199"
    assert sbx.ok("run", *NONE, image, "true", env={f"V{n}": "x" * 1000 for n in range(200)}) == ""


def test_variables_in_bytes(sbx: Sbx, image: str, tmp_path: Path) -> None:
    (tmp_path / "env").write_bytes(
        b"# a comment\n\nONE=1\nTWO=a b \\ '\"\r\nBYTES=\xff\nEMPTY=\n  SPACED=x\nCALLER\nONE=2\n"
    )
    words: list[str | bytes] = ["--env-file", str(tmp_path / "env"), "-e", "THREE=é\n3", "-e", b"RAW=\xfe"]
    script = 'printf "%s|" "$ONE" "$TWO" "$BYTES" "$THREE" "$RAW" "$SPACED" "$CALLER"'
    result = sbx("run", *NONE, *words, image, "sh", "-c", script, env={"CALLER": "mine"})
    assert os.fsencode(result.stdout) == b"2|a b \\ '\"|\xff|" + "é\n3".encode() + b"|\xfe|x|mine|"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["--env-file", "/no/such"], "read environment file /no/such: No such file or directory"),
        (["-e", "=x"], "set variable '=x': it has no name"),
        (["--hostname", "a b"], "set host name 'a b': "),
        (["--hostname", "x" * 65], "set host name "),
        (["--name", "a/b"], "bad name 'a/b': "),
        (["--share", "mnt"], "share namespace 'mnt': there are "),
        (["--unshare", "nope"], "unshare namespace 'nope': "),
        (["--sysctl", "../../x=1"], "set sysctl '../../x=1': it is NAME=VALUE"),
        (["--ulimit", "nope=1"], "set limit 'nope=1': it is NAME=SOFT[:HARD]"),
        (["--umask", "9"], "set umask '9': it is octal"),
        (["--cap-add", "NOPE"], "read capability NOPE: no such capability"),
        (["--setgroups", "maybe"], "read --setgroups 'maybe': "),
        (["--seccomp", "/no/such"], "read seccomp profile /no/such: No such file or directory"),
        (["--shm-size", "lots"], "read size 'lots' of --shm-size: "),
        (["--clock-offset", "realtime=5"], "shift clock 'realtime=5': "),
        (["--net", "nope"], "choose network nope: "),
        (["--add-host", "x"], "add host 'x': it is NAME:ADDRESS"),
        (["--idmap", "nope"], "choose id map 'nope': "),
        (["--ulimit", "nofile=99999999:99999999"], "set limit nofile to "),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes(sbx: Sbx, image: str, words: list[str], cause: str) -> None:
    net = [] if "--net" in words else [*NONE]
    result = sbx("run", *net, *words, image, "echo", "ran")
    assert (result.status, result.stdout) == (125, "")
    assert result.stderr.startswith(f"sbx: {cause}")


def test_the_images_words(sbx: Sbx, image: str, rootfs: Path) -> None:
    assert sbx.ok("run", *NONE, "--entrypoint", "echo", image, "a", "b") == "a b"
    assert sbx.ok("run", *NONE, "--rootfs", rootfs, "sh", "-c", "echo $0") == "sh"
    result = sbx("run", *NONE, "no-such-image-here:0", "true", env={"SBX_OFFLINE": "1"})
    assert (result.status, result.stdout) == (125, "")


def test_working_directories(sbx: Sbx, image: str, tmp_path: Path) -> None:
    assert sbx.ok("run", *NONE, image, "pwd") == "/"
    assert sbx.ok("run", *NONE, "-w", "/a/b/../c", image, "pwd") == "/a/c"
    (tmp_path / "file").write_text("here\n")
    assert sbx.ok("run", *NONE, "--here", image, "sh", "-c", "pwd; cat file", cwd=tmp_path) == f"{tmp_path}\nhere"
    assert sbx.ok("run", *NONE, "--here", "-w", "/", image, "pwd", cwd=tmp_path) == "/"


# ── the state of the caller ───────────────────────────────────────────────────────────────────────────────────────────


def test_from_a_folder_that_is_gone(sbx: Sbx, image: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def leave() -> None:
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    for words, status in (([], 0), (["--here"], 125), (["-v", "./x:/x"], 125)):
        with sbx.start("run", *NONE, *words, image, "pwd", preexec_fn=leave) as process:
            stdout, stderr = process.communicate()
        assert process.returncode == status, stderr
        assert (stdout == b"/\n", stderr.startswith(b"sbx: ")) == (status == 0, status != 0)


def test_from_a_folder_that_the_sandbox_cannot_see(sbx: Sbx, image: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o700)
    assert sbx.ok("run", *NONE, image, "pwd", cwd=closed) == "/"


@pytest.mark.parametrize("mask", [0o777, 0o000, 0o077])
def test_umask_of_the_caller(sbx: Sbx, image: str, mask: int) -> None:
    script = "umask; stat -c %a / /dev /dev/shm /etc/hosts /work; touch /tmp/x; stat -c %a /tmp/x"
    with sbx.start(
        "run", *NONE, "-w", "/work", image, "sh", "-c", script, preexec_fn=lambda: os.umask(mask) and None
    ) as process:
        stdout, _ = process.communicate()
    assert stdout.split() == [b"0022", b"755", b"755", b"1777", b"644", b"755", b"644"]
    assert (sbx.home / "sandboxes").stat().st_mode & 0o777 == 0o700


def limited(limit: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(limit, (value, value))


def test_few_descriptors(sbx: Sbx, image: str) -> None:
    with sbx.start("run", *NONE, image, "echo", "ran", preexec_fn=limited(resource.RLIMIT_NOFILE, 24)) as process:
        assert process.communicate()[0] == b"ran\n"
    # and where they are too few, one clear line
    words = [word for n in range(30) for word in ("-v", f"/etc:/mnt/{n}")]
    with sbx.start("run", *NONE, *words, image, "true", preexec_fn=limited(resource.RLIMIT_NOFILE, 24)) as process:
        _, stderr = process.communicate()
    assert process.returncode == 125
    assert stderr.startswith(b"sbx: open /etc")
    assert b"Too many open files" in stderr


def test_a_small_address_space(sbx: Sbx, image: str) -> None:
    with sbx.start("run", *NONE, image, "echo", "ran", preexec_fn=limited(resource.RLIMIT_AS, 100 << 20)) as process:
        assert process.communicate()[0] == b"ran\n"


@pytest.mark.parametrize("command", [["run", *NONE, "{image}", "echo", "ran"], ["ps", "--json"]], ids=["run", "ps"])
def test_too_small_an_address_space_is_told_in_one_line(sbx: Sbx, image: str, command: list[str]) -> None:
    """Wherever the memory ends, once the interpreter itself is up."""
    seen = set()
    for size in range(12, 40, 1 if command[0] == "run" else 3):
        words = [word.format(image=image) for word in command]
        with sbx.start(*words, preexec_fn=limited(resource.RLIMIT_AS, size << 20)) as process:
            said, errors = process.communicate(timeout=30)
        if process.returncode == 0:
            assert (said, errors) == (b"ran\n" if command[0] == "run" else b"[]\n", b"")
        elif not errors.startswith(b"sbx: "):  # the loader's words, or the interpreter's before our first line
            assert b", in " not in errors
            continue
        else:
            assert (process.returncode, said) == (125, b""), errors
            assert re.fullmatch(rb"sbx: [^\n]*memory\n(hint: [^\n]*\n)?", errors), errors
        seen.add(process.returncode)
    assert seen == {0, 125}


def test_a_small_stack_and_file_size(sbx: Sbx, image: str) -> None:
    with sbx.start("run", *NONE, image, "echo", "ran", preexec_fn=limited(resource.RLIMIT_STACK, 1 << 20)) as process:
        assert process.communicate()[0] == b"ran\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2), (0, 2)], ids=str)
def test_closed_streams(sbx: Sbx, image: str, tmp_path: Path, closed: tuple[int, ...]) -> None:
    """A descriptor of ours never lands at a closed one's number."""
    script = "cat; echo out; echo err >&2; echo ran >/mnt/ran; ls /proc/self/fd >/mnt/fds"
    closing = " ".join(f"{fd}{'<' if fd == 0 else '>'}&-" for fd in closed)
    line = f'"$@" {closing}'
    words = [*COMMAND, "run", *NONE, "-v", f"{tmp_path}:/mnt", image, "sh", "-c", script]
    done = subprocess.run(
        ["sh", "-c", line, "sh", *words], env=sbx.env, capture_output=True, text=True, input="in\n", timeout=60
    )
    assert done.returncode == 0, done
    assert (tmp_path / "ran").read_text() == "ran\n"
    assert (tmp_path / "fds").read_text().split() == ["0", "1", "2", "3"]
    assert done.stdout == ("" if 1 in closed else "out\n" if 0 in closed else "in\nout\n")
    assert done.stderr == ("" if 2 in closed else "err\n")


def test_full_streams(sbx: Sbx, image: str) -> None:
    with (
        open("/dev/full", "w") as full,
        sbx.start("run", *NONE, image, "sh", "-c", "echo x || exit 9", stdout=full) as process,
    ):
        process.communicate()
    assert process.returncode == 9


def test_home_unset(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "echo", "ran", env={"HOME": None}) == "ran"
    result = sbx("run", *NONE, "host", "echo", "ran", env={"HOME": None})
    assert (result.status, result.stdout) == (0, "ran\n")


def test_a_home_that_cannot_be_written(sbx: Sbx, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("root may write everywhere")
    for home in (str(closed / "home"), "/proc/nowhere"):
        result = sbx("run", *NONE, "host", "true", env={"SBX_HOME": home})
        assert result.status == 125
        assert result.stderr.startswith("sbx: create folder ")
        assert "hint: set SBX_HOME to a folder on a local disk that you may write to\n" in result.stderr


def test_a_home_with_odd_characters(fresh_sbx: Sbx, tmp_path: Path, rootfs: Path) -> None:
    for name in ("with space", "co:lon", "com,ma", "back\\slash", "q'uo\"te", "new\nline", "ünicode"):
        result = fresh_sbx(
            "run", *NONE, "--rootfs", rootfs, "sh", "-c", "echo x >/f; cat /f", env={"SBX_HOME": str(tmp_path / name)}
        )
        assert (result.status, result.stdout) == (0, "x\n"), (name, result.stderr)


def test_tmpdir_is_not_needed(sbx: Sbx, image: str) -> None:
    assert (
        sbx.ok(
            "run", *NONE, image, "true", env={"TMPDIR": "/no/such", "XDG_RUNTIME_DIR": "/no/such", "PATH": "/no/such"}
        )
        == ""
    )


# ── saying what is done ───────────────────────────────────────────────────────────────────────────────────────────────


def test_dry_run_does_nothing(sbx: Sbx, image: str) -> None:
    before = sorted(os.listdir(sbx.home))
    lines = sbx.ok("run", *NONE, "--dry-run", image, "no-such-command").splitlines()
    assert lines[0] == "create namespaces user"
    assert lines[-1] == "execute no-such-command"
    assert sorted(os.listdir(sbx.home)) == before


def test_debug_prints_each_step(sbx: Sbx, image: str) -> None:
    plan = [
        line
        for line in sbx.ok("run", *NONE, "--dry-run", image, "true").splitlines()
        if not line.startswith("  outside")
    ]
    result = sbx("run", *NONE, "--debug", image, "true")
    shown = [
        line.partition(": step ")[2].partition(": ")[2] for line in result.stderr.splitlines() if ": step " in line
    ]
    assert result.status == 0
    assert len(shown) == len(plan)
    assert [line.split()[:2] for line in shown] == [line.split()[:2] for line in plan]


def test_a_secret_is_not_shown(sbx: Sbx, image: str) -> None:
    secret = "s3cr3t-value"
    for words in (["--dry-run"], ["--debug"]):
        result = sbx("run", *NONE, *words, "-e", f"TOKEN={secret}", image, "true")
        assert result.status == 0
        assert secret not in result.stdout + result.stderr


# ── inside another, as root, for real ─────────────────────────────────────────────────────────────────────────────────


def test_inside_another(sbx: Sbx) -> None:
    """A sandbox in a sandbox in a sandbox, each without anything of the one around it but the host's files."""
    inner = [*COMMAND, "run", *NONE, "host", "sh", "-c", "echo nested; ls /proc | grep -c '^[0-9]'"]
    checkout = [
        "-v",
        f"{needs.CHECKOUT}:{needs.CHECKOUT}:ro",
        "-v",
        f"{sys.prefix}:{sys.prefix}:ro",  # the interpreter may be in the home folder, which is hidden
        "--tmpfs",
        "/var/tmp/sbx:exec",
        "-e",
        "SBX_HOME=/var/tmp/sbx",
    ]
    middle = [*COMMAND, "run", *NONE, "--nested", *checkout, "host", *inner]
    for words in (inner,) if is_root() else (inner, middle):
        result = sbx("run", *NONE, "--nested", *checkout, "host", *words)
        assert result.status == 0, result
        assert result.stdout.splitlines()[0] == "nested"


@pytest.mark.skipif(not is_root(), reason="the tests do not run as root")
def test_as_root(sbx: Sbx, image: str) -> None:
    """Root gets a user namespace too: its root is not the host's."""
    assert sbx.ok("run", *NONE, image, "id", "-u") == "0"
    assert os.readlink("/proc/self/ns/user") != sbx.ok("run", *NONE, image, "readlink", "/proc/self/ns/user")
    assert sbx("run", *NONE, image, "sh", "-c", "echo 1 >/proc/sys/kernel/panic").status != 0


@needs.subids
@needs.alpine
def test_real_alpine(sbx: Sbx, alpine: str) -> None:
    assert "Alpine Linux" in sbx.ok("run", *NONE, alpine, "cat", "/etc/os-release")
    script = """
        apk info | grep -q musl && adduser -D someone && su someone -c 'id -un; touch ~/mine'
        stat -c %U ~someone/mine && tar -C /home -cf /tmp/t.tar someone && tar -tvf /tmp/t.tar | grep -c someone/someone
        apk del --no-network alpine-keys >/dev/null 2>&1; apk info -e alpine-keys || echo deleted"""
    stdout = sbx.ok("run", *NONE, alpine, "sh", "-c", script)
    assert stdout.splitlines()[:2] == ["someone", "someone"]
    assert stdout.splitlines()[-1] == "deleted"


def test_a_caller_with_threads_left_behind(sbx: Sbx, image: str) -> None:
    """From a program with many threads, processes and descriptors: nothing of it comes along."""
    code = f"""
import os, subprocess, sys, threading
for _ in range(50):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
descriptors = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
for fd in descriptors:
    os.set_inheritable(fd, True)
command = {[*COMMAND, "run", *NONE, image, "ls", "/proc/self/fd"]!r}
done = subprocess.run(command, close_fds=False, capture_output=True, text=True)
print(done.stdout.split(), done.stderr, flush=True)
os._exit(done.returncode)
"""
    done = subprocess.run([sys.executable, "-c", code], env=sbx.env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "['0', '1', '2', '3']")


def test_the_command_is_seen_from_outside(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, "--name", "seen", "--hostname", "box", image, "sh", "-c", "echo up; cat"):
        shown = sbx.ok("inspect", "seen")
        assert '"hostname": "box"' in shown
        assert '"CAP_CHOWN"' in shown
        assert "seen" in sbx.ok("ps")
