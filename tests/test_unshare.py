"""`sbx unshare`: the command is the very process that was started, on the caller's terminal."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from terminals import Terminal

pytestmark = needs.userns

Tty = Callable[..., Terminal]


def test_it_is_root_without_the_callers_groups(sbx: Sbx) -> None:
    assert sbx.ok("unshare", "sh", "-c", "id -u; id -G") == "0\n0"


@needs.subids
def test_all_ids_are_mapped(sbx: Sbx) -> None:
    first, *others = (line.split() for line in sbx.ok("unshare", "cat", "/proc/self/uid_map").splitlines())
    assert first == ["0", str(os.getuid()), "1"]
    assert others[0][0] == "1"


@needs.subids
def test_keep_maps_the_callers_id_to_itself(sbx: Sbx) -> None:
    lines = sbx.ok("unshare", "--idmap", "keep", "cat", "/proc/self/uid_map").splitlines()
    assert [str(os.getuid()), str(os.getuid()), "1"] in [line.split() for line in lines]


def test_single_maps_one_id_without_help(sbx: Sbx) -> None:
    # under no_new_privs newuidmap has no power
    done = subprocess.run(
        ["setpriv", "--no-new-privs", *COMMAND, "unshare", "--idmap", "single", "cat", "/proc/self/uid_map"],
        env=sbx.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["0", str(os.getuid()), "1"], done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [("exit 7", 7), ("kill -TERM $$", 143), ("kill -KILL $$", 137), ("exec /nothing", 127)],
)
def test_the_exit_status_is_the_commands(sbx: Sbx, command: str, status: int) -> None:
    assert sbx("unshare", "sh", "-c", command).status == status


def test_a_command_that_is_not_there(sbx: Sbx) -> None:
    done = sbx("unshare", "no-such-command", env={"PATH": "/usr/bin:/bin"})
    assert (done.status, done.stderr) == (127, "sbx: execute no-such-command: not found in PATH\n")


def test_a_command_that_cannot_be_executed(sbx: Sbx) -> None:
    done = sbx("unshare", "/etc/passwd")
    assert done.status == 126
    assert "execute /etc/passwd: Permission denied" in done.stderr


def test_an_unknown_map_is_an_error(sbx: Sbx) -> None:
    assert sbx("unshare", "--idmap", "many", "true").status == 125


def test_the_process_is_the_command_and_has_no_children(sbx: Sbx) -> None:
    # read is the shell's own: it starts no process
    script = 'read children < /proc/$$/task/$$/children; echo "$$ [$children]"'
    started = sbx.start("unshare", "sh", "-c", script)
    said, _ = started.communicate(timeout=30)
    assert said.decode() == f"{started.pid} []\n"


def test_bytes_folder_environment_and_descriptors_pass(sbx: Sbx, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    script = f"cat; pwd; echo $WORD; echo passed > /dev/fd/{writer}"
    started = sbx.start("unshare", "sh", "-c", script, env={"WORD": "a b"}, cwd=tmp_path, pass_fds=[writer])
    os.close(writer)
    said, _ = started.communicate(b"\0\xff\n", timeout=30)
    with open(reader, "rb") as stream:
        assert stream.read() == b"passed\n"
    assert said == b"\0\xff\n" + f"{tmp_path}\na b\n".encode()


def test_mounts_stay_inside(sbx: Sbx, tmp_path: Path) -> None:
    script = 'mount -t tmpfs none "$1" && touch "$1/file" && ls "$1"'
    assert sbx.ok("unshare", "sh", "-c", script, "sh", tmp_path) == "file"
    assert os.listdir(tmp_path) == []


@needs.subids
def test_files_of_subordinate_ids_can_be_seen_and_removed(sbx: Sbx, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    sbx.ok(
        "unshare", "sh", "-c", 'mkdir "$1" && touch "$1/file" && chown -R 1000:1000 "$1" && chmod 700 "$1"', "", folder
    )
    assert folder.stat().st_uid != os.getuid()
    with pytest.raises(PermissionError):
        os.listdir(folder)
    assert sbx.ok("unshare", "stat", "-c", "%u:%g", folder / "file") == "1000:1000"
    sbx.ok("unshare", "rm", "-r", folder)
    assert not folder.exists()


@needs.subids
def test_a_map_that_is_refused_is_told_once_and_nothing_runs(sbx: Sbx) -> None:
    # in a namespace with one id, newuidmap is not root's and has no power
    done = subprocess.run(
        ["unshare", "--user", "--map-current-user", *COMMAND, "unshare", "--idmap", "auto", "echo", "ran"],
        env=sbx.env, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (125, "")
    error, hint = done.stderr.splitlines()
    assert error.startswith("sbx: newuidmap: ")
    assert "is not root's in the user namespace" in hint


# ── on a terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────


def shell(sbx: Sbx, tty: Tty) -> Terminal:
    """A shell with job control, as a user has before she types sbx."""
    terminal = tty(["/bin/bash", "--norc", "--noediting", "-i"], {**sbx.env, "PS1": "outer> "})
    terminal.expect("outer> ")
    return terminal


def unshare(arguments: str) -> str:
    return f"{' '.join(COMMAND)} unshare {arguments}"


@needs.program("bash")
def test_a_shell_inside_has_job_control(sbx: Sbx, tty: Tty) -> None:
    terminal = shell(sbx, tty)
    terminal.line(unshare("env PS1='inner> ' bash --norc --noediting -i"))
    terminal.expect(r"\ninner> ")
    terminal.line("sh -c 'echo read\"\"y; read line; echo said $line'")
    terminal.expect("ready")
    terminal.send("\x1a")
    terminal.expect("Stopped")
    terminal.line("fg")
    terminal.line("hello")
    terminal.expect("said hello")
    terminal.line("exit 7")
    terminal.expect(r"\nouter> ")
    terminal.line("echo status=$?")
    terminal.expect("status=7\r")
    assert b"no job control" not in terminal.output


@needs.program("bash")
def test_the_callers_shell_stops_and_continues_it(sbx: Sbx, tty: Tty) -> None:
    terminal = shell(sbx, tty)
    terminal.line(unshare("sh -c 'echo read\"\"y; read line; echo said $line; exec sleep 100'"))
    terminal.expect("ready")
    terminal.send("\x1a")
    terminal.expect("Stopped")
    terminal.line("fg")
    terminal.line("hello")
    terminal.expect("said hello")
    terminal.send("\x03")
    terminal.expect(r"outer> ")
    terminal.line("echo status=$?")
    terminal.expect("status=130\r")


@needs.program("bash")
def test_an_interrupt_comes_once(sbx: Sbx, tty: Tty) -> None:
    script = "trap 'echo interrupted' INT; echo read\"\"y; read line; read line; exit 4"
    terminal = tty([*COMMAND, "unshare", "bash", "-c", script], sbx.env)
    terminal.expect("ready")
    # whether the shell is in its first read already or not: the trap runs when that ends
    terminal.send("\x03")
    terminal.send("\r\r")
    assert terminal.wait() == 4
    assert terminal.output.count(b"interrupted") == 1
