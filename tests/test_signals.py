"""Signals, stdio and the end of a command: what reaches it, what its end is called, and that it takes all along."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from launching import NONE, as_ordinary, children, eventually, is_gone, running, shell_status, state_of, tree
from terminals import Terminal

pytestmark = [needs.userns, needs.busybox]

FORWARDED = ["TERM", "INT", "HUP", "USR1", "USR2", "QUIT"]
INIT = pytest.mark.parametrize("init", [[], ["--no-init"]], ids=["init", "no-init"])


def number(name: str) -> int:
    return int(signal.Signals["SIG" + name])


# ── signals ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@INIT
@pytest.mark.parametrize("name", FORWARDED)
def test_a_signal_reaches_the_handler(sbx: Sbx, image: str, name: str, init: list[str]) -> None:
    script = f"trap 'echo got {name}; exit 7' {name}; echo up; sleep 1000 & wait"
    with running(sbx, "run", *NONE, *init, image, "sh", "-c", script, preexec_fn=as_ordinary(number(name))) as process:
        process.send_signal(number(name))
        assert process.stdout
        assert process.stdout.read() == f"got {name}\n".encode()
        assert process.wait() == 7


@INIT
@pytest.mark.parametrize("name", FORWARDED)
def test_without_a_handler_the_signal_ends_the_command(sbx: Sbx, image: str, name: str, init: list[str]) -> None:
    words = ["run", *NONE, *init, image, "sh", "-c", "echo up; exec sleep 1000"]
    with running(sbx, *words, preexec_fn=as_ordinary(number(name))) as process:
        command = tree(process.pid)[-1]
        eventually(lambda: Path(f"/proc/{command}/comm").read_text() == "sleep\n", "the shell has become sleep")
        process.send_signal(number(name))
        assert shell_status(process.wait()) == 128 + number(name)


#: A launch whose last step takes its time.
SLOW = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
from rootless import entry, plan
from rootless.steps import Call
whole = plan.for_sandbox
def slow(*arguments):
    made = whole(*arguments)
    made.inside.insert(len(made.inside) - 1, Call("sleep", lambda: (print("here", flush=True), time.sleep({seconds}))))
    return made
plan.for_sandbox = slow
sys.exit(entry.main())
"""


@pytest.mark.parametrize(("seconds", "said"), [(0.3, b""), (30, b"sbx: start the sandbox: interrupted\n")])
def test_a_signal_during_the_last_steps_waits_for_the_command_a_second(
    sbx: Sbx, image: str, seconds: float, said: bytes
) -> None:
    words = [sys.executable, "-c", SLOW.format(seconds=seconds), str(needs.CHECKOUT), "run", *NONE, image]
    with subprocess.Popen(
        [*words, "sleep", "20"], env=sbx.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"here\n"
        process.terminate()
        _, stderr = process.communicate(timeout=10)
    assert (shell_status(process.returncode), stderr) == (143, said)


@needs.subids
def test_a_signal_during_the_start_is_for_the_command(sbx: Sbx, image: str, tmp_path: Path) -> None:
    helper = tmp_path / "newuidmap"
    helper.write_text(f'#!/bin/sh\nkill -USR2 $PPID\nexec {shutil.which("newuidmap")} "$@"\n')
    helper.chmod(0o755)
    result = sbx("run", *NONE, image, "sleep", "5", env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (result.status, result.stderr) == (128 + number("USR2"), "")


@INIT
def test_a_signal_that_the_command_ignores_does_not_end_it(sbx: Sbx, image: str, init: list[str]) -> None:
    with running(sbx, "run", *NONE, *init, image, "sh", "-c", "trap '' TERM; echo up; cat; exit 3") as process:
        process.send_signal(signal.SIGTERM)
        stdout, _ = process.communicate(b"still here\n")
        assert (stdout, process.returncode) == (b"still here\n", 3)


def test_what_the_caller_ignores_stays_ignored(sbx: Sbx, image: str) -> None:
    """nohup(1) starts its program with SIGHUP ignored."""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN) and None  # noqa: E731
    with running(sbx, "run", *NONE, image, "sh", "-c", "echo up; cat", preexec_fn=ignore) as process:
        process.send_signal(signal.SIGHUP)
        stdout, _ = process.communicate(b"still here\n")
        assert (stdout, process.returncode) == (b"still here\n", 0)


def test_the_command_begins_with_ordinary_signals(sbx: Sbx, image: str) -> None:
    def unusual() -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2})

    with sbx.start("run", *NONE, image, "grep", "Sig[IB]", "/proc/self/status", preexec_fn=unusual) as process:
        stdout, _ = process.communicate()
    masks = dict(line.split(b":\t") for line in stdout.splitlines())
    assert {name: int(mask, 16) for name, mask in masks.items()} == {b"SigBlk": 0, b"SigIgn": 0}


@INIT
def test_stop_and_continue(sbx: Sbx, image: str, init: list[str]) -> None:
    """What a shell does at ^Z and fg: we stop with everything inside, and go on with it."""
    words = ["run", *NONE, *init, image, "sh", "-c", "trap 'echo on' USR1; echo up; while :; do sleep 0.01; done"]
    with running(sbx, *words, preexec_fn=as_ordinary(signal.SIGTSTP, signal.SIGUSR1)) as process:
        process.send_signal(signal.SIGTSTP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        pid_1 = children(children(process.pid)[0])[0]
        command = pid_1 if init else children(pid_1)[0]
        eventually(lambda: state_of(command) == "T", "the command has stopped")
        process.send_signal(signal.SIGCONT)
        eventually(lambda: state_of(command) in "SR", "the command goes on")
        process.send_signal(signal.SIGUSR1)
        assert process.stdout
        assert process.stdout.readline() == b"on\n"


def test_killing_pid_1_from_inside_does_nothing(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "sh", "-c", "kill -KILL 1; kill -STOP 1; sleep 0.05; echo here") == "here"


def test_a_signal_to_pid_1_from_inside_is_for_the_command(sbx: Sbx, image: str) -> None:
    script = "trap 'echo reload; exit 4' HUP; kill -HUP 1; sleep 1000 & wait"
    result = sbx("run", *NONE, image, "sh", "-c", script)
    assert (result.status, result.stdout) == (4, "reload\n")


def test_orphans_are_reaped(sbx: Sbx, image: str) -> None:
    script = """
        for i in 1 2 3 4 5 6 7 8; do (true & true &) ; done
        while ps -o stat | grep -q Z; do sleep 0.01; done
        echo none"""
    assert sbx.ok("run", *NONE, image, "sh", "-c", script) == "none"


@needs.program("bash")
def test_from_the_background_to_the_foreground(sbx: Sbx, image: str, tty: Callable[..., Terminal]) -> None:
    """Taking the terminal over stops us there, and SIGCONT interrupts that."""
    terminal = tty(["/bin/bash", "--norc", "--noediting", "-i"], {**sbx.env, "PS1": "outer> "})
    terminal.expect("outer> ")
    terminal.line(shlex.join([*COMMAND, "run", "-t", *NONE, image, "sh", "-c", 'echo he""re; exit 7']) + " &")
    terminal.line("until jobs | grep -q Stopped; do sleep 0.05; done; fg")
    terminal.expect("here.*outer> ")
    terminal.line("echo status=$?")
    terminal.expect("status=7\r")


@needs.program("bash")
def test_in_the_background(sbx: Sbx, image: str, tty: Callable[..., Terminal]) -> None:
    """Unasked it takes nothing over there: it goes on, and its stdin is empty."""
    terminal = tty(["/bin/bash", "--norc", "--noediting", "-i"], {**sbx.env, "PS1": "outer> "})
    terminal.expect("outer> ")
    terminal.line(shlex.join([*COMMAND, "run", *NONE, image, "sh", "-c", "cat; test -t 0 || exit 7"]) + " &")
    terminal.line("wait $!; echo status=$?")
    terminal.expect("status=7\r")


# ── ends ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@INIT
@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["true"], 0),
        (["false"], 1),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "exit 255"], 255),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else str(value),
)
def test_statuses(sbx: Sbx, image: str, words: list[str], status: int, init: list[str]) -> None:
    result = sbx("run", *NONE, *init, image, *words)
    assert (result.status, result.stdout, result.stderr) == (status, "", "")


@pytest.mark.parametrize("name", ["KILL", "SEGV", "TERM", "PIPE"])
def test_status_of_a_command_that_ends_itself(sbx: Sbx, image: str, name: str) -> None:
    result = sbx("run", *NONE, image, "sh", "-c", f"kill -{name} $$; exec sleep 1000")
    assert (result.status, result.stdout, result.stderr) == (128 + number(name), "", "")


@pytest.mark.parametrize(
    ("words", "status", "cause"),
    [
        (["no-such-command"], 127, "not found in PATH"),
        (["/no/such"], 127, "No such file or directory"),
        ([""], 127, "the command has no name"),
        (["/etc/passwd"], 126, "Permission denied"),
        (["/etc"], 126, "Permission denied"),
        (["/bin/sh/x"], 126, "Not a directory"),
        (["/loop"], 126, "Too many levels of symbolic links"),
        (["/text"], 126, "Exec format error"),
        (["x" * 300], 126, "File name too long"),
    ],
    ids=lambda value: value[0][:20] if isinstance(value, list) else str(value),
)
def test_commands_that_cannot_be_executed(
    sbx: Sbx, rootfs: os.PathLike[str], words: list[str], status: int, cause: str
) -> None:
    loop, text = os.path.join(rootfs, "loop"), os.path.join(rootfs, "text")
    if not os.path.islink(loop):
        os.symlink("loop", loop)
        with open(text, "w", opener=lambda path, flags: os.open(path, flags, 0o755)) as stream:
            stream.write("no interpreter is named here\n")
    result = sbx("run", *NONE, "--rootfs", str(rootfs), *words)
    assert (result.status, result.stdout) == (status, "")
    assert result.stderr.splitlines()[0] == f"sbx: execute {words[0]}: {cause}"


@INIT
def test_timeout(sbx: Sbx, image: str, init: list[str]) -> None:
    result = sbx("run", *NONE, *init, "--timeout", "0.2", image, "sleep", "1000")
    assert result.status == 124


def test_timeout_whatever_the_command_makes_of_it(sbx: Sbx, image: str) -> None:
    script = "trap 'echo end; exit 0' TERM; sleep 1000 & wait"
    result = sbx("run", *NONE, "--timeout", "0.2", image, "sh", "-c", script)
    assert (result.status, result.stdout) == (124, "end\n")


@INIT
def test_timeout_of_a_command_that_does_not_listen(sbx: Sbx, image: str, init: list[str]) -> None:
    begun = time.monotonic()
    words = [*init, "--timeout", "0.1", "--stop-timeout", "0.1", image, "sh", "-c", "trap '' TERM; sleep 1000"]
    assert sbx("run", *NONE, *words).status == 124
    assert time.monotonic() - begun < 5


def test_in_time(sbx: Sbx, image: str) -> None:
    assert sbx("run", *NONE, "--timeout", "100", image, "sh", "-c", "exit 5").status == 5


@INIT
def test_stop(sbx: Sbx, image: str, init: list[str]) -> None:
    """Also a command that is pid 1 and has no handler ends at once, not when the time is up."""
    with running(
        sbx, "run", *NONE, *init, "--name", "stopped", image, "sh", "-c", "echo up; exec sleep 1000"
    ) as process:
        begun = time.monotonic()
        assert sbx.ok("stop", "--time", "60", "stopped") == "stopped"
        assert process.wait() == 143
        assert time.monotonic() - begun < 10


def test_stop_ends_what_does_not_listen(sbx: Sbx, image: str) -> None:
    words = ["run", *NONE, "--name", "deaf", image, "sh", "-c", "trap '' TERM; echo up; sleep 1000; sleep 1000"]
    with running(sbx, *words) as process:
        assert sbx.ok("stop", "--time", "0.1", "deaf") == "deaf"
        assert process.wait() == 137


STOPPED_BY = """
for name in TERM INT USR1 WINCH RTMIN+3; do trap "echo $name; exit 0" $name; done
echo up
sleep 1000 & wait
"""


@pytest.fixture(scope="module")
def stoppable(home: Path) -> str:
    """An image whose stop signal is SIGINT."""
    Sbx(home).ok("import", "stoppable", "bin:/bin/bash,sleep", "--change", "STOPSIGNAL SIGINT")
    return "stoppable"


@INIT
@pytest.mark.parametrize(
    ("run", "stop", "name"),
    [
        ([], [], b"INT"),
        (["--stop-signal", "SIGUSR1"], [], b"USR1"),
        (["--stop-signal", "28"], [], b"WINCH"),
        (["--stop-signal", "rtmin+3"], [], b"RTMIN+3"),
        (["--stop-signal", "USR1"], ["--signal", "TERM"], b"TERM"),
    ],
    ids=["image", "run", "number", "real-time", "stop"],
)
def test_what_stop_sends(
    sbx: Sbx, stoppable: str, init: list[str], run: list[str], stop: list[str], name: bytes
) -> None:
    words = ["run", *NONE, *init, *run, "--name", "box", stoppable, "/bin/bash", "-c", STOPPED_BY]
    with running(sbx, *words) as process:
        sbx.ok("stop", "-t", "60", *stop, "box")
        assert process.stdout
        assert process.stdout.read() == name + b"\n"
        assert process.wait() == 0


def test_the_stop_signal_comes_at_a_timeout_too(sbx: Sbx, stoppable: str) -> None:
    result = sbx("run", *NONE, "--timeout", "0.3", stoppable, "/bin/bash", "-c", STOPPED_BY)
    assert (result.status, result.stdout) == (124, "up\nINT\n")


def test_the_runs_stop_timeout_holds_unless_stop_says_otherwise(sbx: Sbx, image: str) -> None:
    script = "trap '' TERM; echo up; sleep 1000; sleep 1000"
    for run, stop in ((["--stop-timeout", "0.1"], []), (["--stop-timeout", "60"], ["-t", "0"])):
        with running(sbx, "run", *NONE, *run, "--name", "deaf", image, "sh", "-c", script) as process:
            begun = time.monotonic()
            sbx.ok("stop", *stop, "deaf")
            assert time.monotonic() - begun < 8
            assert process.wait() == 137


def test_stop_waits_for_several_at_once(sbx: Sbx, image: str) -> None:
    script = "trap '' TERM; echo up; sleep 1000; sleep 1000"
    with (
        running(sbx, "run", *NONE, "--name", "one", image, "sh", "-c", script),
        running(sbx, "run", *NONE, "--name", "two", image, "sh", "-c", script),
    ):
        begun = time.monotonic()
        sbx.ok("stop", "-t", "2", "one", "two")
        assert 2 <= time.monotonic() - begun < 3.9


def test_a_stop_signal_that_is_none(sbx: Sbx, image: str) -> None:
    for text in ("NOPE", "0", "65", "TERM+1", "RTMIN+99", "_DFL", ""):
        result = sbx("run", *NONE, "--stop-signal", text or "SIG", image, "true")
        assert (result.status, result.stderr.splitlines()[0]) == (
            125,
            f"sbx: read signal {text or 'SIG'!r}: no such signal",
        )
    sbx.ok("import", "odd", "bin:/bin/sh", "--change", "STOPSIGNAL nonsense")
    result = sbx("run", *NONE, "odd", "/bin/sh", "-c", ":")
    assert (result.status, result.stderr) == (0, "sbx: the image's stop signal 'nonsense' is none, so it is SIGTERM\n")
    assert sbx("run", *NONE, "-q", "odd", "/bin/sh", "-c", ":").stderr == ""
    sbx.ok("rmi", "odd")


@INIT
def test_kill(sbx: Sbx, image: str, init: list[str]) -> None:
    script = "trap 'echo got' USR1; echo up; while :; do sleep 0.01; done"
    with running(sbx, "run", *NONE, *init, "--name", "killed", image, "sh", "-c", script) as process:
        sbx.ok("kill", "--signal", "USR1", "killed")
        assert process.stdout
        assert process.stdout.readline() == b"got\n"
        sbx.ok("kill", "killed")
        assert process.wait() == 137


def test_kill_says_what_is_wrong(sbx: Sbx) -> None:
    result = sbx("kill", "--signal", "NOPE", "x")
    assert (result.status, result.stderr.splitlines()[0]) == (125, "sbx: read signal 'NOPE': no such signal")
    result = sbx("kill", "\x1b[31m")
    assert (result.status, "\x1b" in result.stderr) == (125, False)


# ── what a command leaves ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_second_signal_while_we_clear_up(sbx: Sbx, image: str, name: str) -> None:
    """As an impatient user or a shutting-down system sends them: all that was written is deleted nevertheless."""
    number = getattr(signal, f"SIG{name}")
    script = "mkdir /many; cd /many; seq 1 20000 | xargs touch; echo up; exec sleep 1000"
    process = sbx.start("run", "--net", "none", image, "sh", "-c", script)
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    process.send_signal(number)
    while not (begun := list((sbx.home / "sandboxes").glob(".dead-*"))) and process.poll() is None:
        os.sched_yield()
    assert begun, "it was deleted before it could be seen"
    sent = 0
    while process.poll() is None and begun[0].exists():
        process.send_signal(number)
        os.sched_yield()
        sent += 1
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors, bool(sent)) == (128 + number, b"", True)
    assert not list((sbx.home / "sandboxes").iterdir())


@pytest.mark.parametrize("share", [[], ["--share", "pid"]], ids=["own-pids", "shared-pids"])
def test_a_daemon_neither_holds_the_pipe_nor_survives(sbx: Sbx, image: str, share: list[str]) -> None:
    # A number of its own, to be found among all processes of the host.
    seconds = str(10_000_000 + os.getpid())
    script = (
        f"(setsid sleep {seconds} & setsid sh -c 'sleep {seconds} & sleep {seconds}' &); sleep 0.05; echo done; exit 3"
    )
    result = sbx("run", *NONE, *share, image, "sh", "-c", script)
    assert (result.status, result.stdout) == (3, "done\n")
    found = subprocess.run(["pgrep", "-f", f"sleep {seconds}"], capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.parametrize("share", [[], ["--share", "pid"]], ids=["own-pids", "shared-pids"])
@pytest.mark.parametrize("victim", [0, 1, 2, 3], ids=["sbx", "supervisor", "init", "command"])
def test_a_daemon_survives_none_of_those_it_was_started_by(
    sbx: Sbx, image: str, share: list[str], victim: int, tmp_path: Path
) -> None:
    """Killed the hard way. In a pid namespace of its own the kernel sees to it, in a shared one we do."""
    (tmp_path / "shared").mkdir()
    seconds = 100_000 + os.getpid()
    daemon = f"(setsid sh -c 'sleep {seconds} & sleep {seconds} & wait' &) ; echo up; exec sleep 1000"
    with running(sbx, "run", *NONE, *share, "--name", "daemons", image, "sh", "-c", daemon) as process:
        joined = sbx.start("exec", "daemons", "sh", "-c", f"echo up; exec sleep {seconds}")
        assert joined.stdout
        assert joined.stdout.readline() == b"up\n"

        def alive() -> list[str]:
            return subprocess.run(["pgrep", "-f", f"sleep {seconds}"], capture_output=True, text=True).stdout.split()

        assert len(alive()) >= 4
        os.kill(tree(process.pid)[victim], signal.SIGKILL)
        eventually(lambda: not [pid for pid in alive() if not is_gone(int(pid))], "the daemons have ended")
        joined.communicate(timeout=20)
        process.wait(20)


@INIT
@pytest.mark.parametrize("user", ["root", "guest"])
def test_all_ends_with_the_supervisor(sbx: Sbx, image: str, user: str, init: list[str]) -> None:
    """A change of ids disarms the death signal: it must be armed again."""
    with running(sbx, "run", *NONE, *init, "-u", user, image, "sh", "-c", "echo up; exec sleep 1000") as process:
        _, supervisor, *inside = tree(process.pid)
        os.kill(supervisor, signal.SIGKILL)
        assert process.wait() == 137
        assert inside
        for pid in inside:
            eventually(lambda pid=pid: is_gone(pid), "the processes of the sandbox have ended")  # type: ignore[misc]


def test_yes_ends_when_nobody_reads(sbx: Sbx, image: str) -> None:
    for terminal in ([], ["-t"]):
        with sbx.start("run", *NONE, *terminal, image, "yes", stdin=subprocess.DEVNULL) as process:
            assert process.stdout
            assert process.stdout.readline().strip() == b"y"
            process.stdout.close()
            # SIGPIPE; on a terminal SIGHUP, for that is hung up
            assert process.wait(20) == (129 if terminal else 141)


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@INIT
def test_bytes_pass_untouched(sbx: Sbx, image: str, init: list[str]) -> None:
    data = os.urandom(1 << 20)
    with sbx.start("run", *NONE, *init, image, "cat") as process:
        stdout, stderr = process.communicate(data)
    assert (stdout == data, stderr, process.returncode) == (True, b"", 0)


def test_stdout_and_stderr_stay_apart(sbx: Sbx, image: str) -> None:
    result = sbx("run", *NONE, image, "sh", "-c", "echo out; echo err >&2")
    assert (result.stdout, result.stderr) == ("out\n", "err\n")


def test_the_end_of_stdin_arrives(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, image, "sh", "-c", "echo up; cat; echo end") as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"x\n")
        process.stdin.close()
        assert process.stdout.read() == b"x\nend\n"
        assert process.wait() == 0


def test_the_end_of_stdout_arrives_while_the_command_runs(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, image, "sh", "-c", "echo up; exec >&- 2>&-; cat; exit 6") as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.read() == b""  # nobody of ours holds it
        assert process.poll() is None
        process.stdin.close()
        assert process.wait() == 6


def test_a_stdin_that_nobody_reads_is_seen(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, image, "sh", "-c", "exec <&-; echo up; exec sleep 1000") as process:
        assert process.stdin
        pipe = process.stdin.fileno()
        # POLLERR: the last reader is gone. Ours let go of it when they know that the command runs.
        eventually(lambda: _is_broken(pipe), "nobody holds the pipe's other end")


def _is_broken(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


def test_the_shell_sees_a_pipeline_end(sbx: Sbx, image: str) -> None:
    command = " ".join([*COMMAND, "run", *NONE, image])
    done = subprocess.run(
        ["sh", "-c", f"{command} yes | head -1; {command} cat /etc/hostname | wc -l"],
        env=sbx.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["y", "1"]
