"""Terminals: a sandbox has one of its own, which works as any; the caller's is given back as it was, always."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from launching import NONE, children, eventually, host_python, is_gone, running, state_of, tree
from terminals import Terminal

pytestmark = [needs.userns, needs.busybox]

Start = Callable[..., Terminal]


@pytest.fixture
def shell(sbx: Sbx, image: str, tty: Start) -> Iterator[Terminal]:
    """An interactive shell of a sandbox on a terminal, at its prompt."""
    terminal = tty([*COMMAND, "run", *NONE, "-e", "PS1=ready> ", image, "sh", "-i"], env=sbx.env)
    terminal.expect("ready> ")
    yield terminal
    if terminal.process.poll() is None:
        terminal.line("exit 0")
        terminal.wait()


def asked(terminal: Terminal, line: str, answer: str) -> None:
    terminal.line(line)
    terminal.expect(answer)
    terminal.expect("ready> ")


# ── a terminal as any ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_shell(shell: Terminal) -> None:
    asked(shell, "test -t 0 && test -t 1 && test -t 2 && echo all three", "\r\nall three\r\n")
    asked(shell, "tty; stty size", "/dev/pts/0\r\n24 80\r\n")
    asked(shell, "echo seen >/dev/tty; echo seen >/dev/console", "seen\r\nseen\r\n")
    asked(shell, "echo $TERM", "\r\nxterm\r\n")
    shell.line("exit 7")
    assert shell.wait() == 7
    assert shell.settings == shell.before


def test_the_window_changes_its_size(sbx: Sbx, image: str, tty: Start) -> None:
    # The kernel sends SIGWINCH a moment before it sets the size.
    script = (
        "trap 'told=1' WINCH; stty size; until test \"$told $(stty size)\" = '1 10 200'; do sleep 0.01; done; exit 3"
    )
    terminal = tty([*COMMAND, "run", *NONE, image, "sh", "-c", script], env=sbx.env)
    terminal.expect("24 80\r\n")
    terminal.resize(10, 200)
    assert terminal.wait() == 3


def test_the_size_is_there_from_the_start(sbx: Sbx, image: str, tty: Start) -> None:
    for _ in range(10):
        terminal = tty([*COMMAND, "run", *NONE, image, "stty", "size"], env=sbx.env, size=(11, 22))
        terminal.expect("11 22\r\n")
        assert terminal.wait() == 0


def test_a_size_that_changes_all_the_time(sbx: Sbx, image: str, tty: Start) -> None:
    """Also while the sandbox starts and ends."""
    for _ in range(5):
        terminal = tty([*COMMAND, "run", *NONE, image, "sh", "-c", "exit 3"], env=sbx.env)
        rows = 10
        while terminal.process.poll() is None:
            rows += 1
            terminal.resize(rows % 100 + 1, 80)
            terminal._read(0.001)
        while terminal._read(0):
            pass
        assert (terminal.process.returncode, terminal.output) == (3, b"")


def in_foreground(top: int, name: str) -> bool:
    """Whether a process of that name, below `top`, sleeps and has its terminal: proc_pid_stat(5)."""
    for pid in tree(top):
        try:
            comm, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
        except OSError:
            continue
        state, _, group, _, _, foreground = rest.split()[:6]
        if comm == name and group == foreground and state == "S":
            return True
    return False


def test_interrupt(shell: Terminal) -> None:
    shell.line("sleep 1000")
    eventually(lambda: in_foreground(shell.process.pid, "sleep"), "it has the terminal")
    shell.send("\x03")
    shell.expect("ready> ")
    asked(shell, "echo status $?", "status 130")


def test_quit_and_end_of_file(shell: Terminal) -> None:
    shell.line("echo begun; cat; echo read $?")
    shell.expect("\r\nbegun\r\n")
    shell.send("typed\r")
    shell.expect("typed\r\ntyped\r\n")
    shell.send("\x04")
    shell.expect("read 0\r\n")
    shell.expect("ready> ")
    shell.send("\x04")
    assert shell.wait() == 0


def test_job_control(shell: Terminal) -> None:
    shell.line("sleep 1000")
    eventually(lambda: in_foreground(shell.process.pid, "sleep"), "it has the terminal")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.expect("ready> ")
    asked(shell, "jobs", r"Stopped +sleep 1000")
    shell.line("fg")
    shell.expect("sleep 1000\r\n")
    eventually(lambda: in_foreground(shell.process.pid, "sleep"), "it has the terminal again")
    shell.send("\x03")
    shell.expect("ready> ")
    asked(shell, "jobs; echo none", "\r\nnone\r\n")


def test_all_bytes_pass(sbx: Sbx, image: str, tty: Start) -> None:
    """Raw inside: control characters and high bytes arrive as they were typed."""
    typed = bytes(byte for byte in range(256))
    terminal = tty(
        [
            *COMMAND,
            "run",
            *NONE,
            image,
            "sh",
            "-c",
            "stty raw -echo; echo up; head -c 256 | od -An -v -tx1 | tr -d '\\n'; echo end",
        ],
        env=sbx.env,
    )
    terminal.expect("up")
    terminal.send(typed)
    shown = terminal.expect("((?: [0-9a-f]{2}){256})end").group(1)
    assert bytes.fromhex(shown.decode()) == typed
    assert terminal.wait() == 0


def test_much_output(sbx: Sbx, image: str, tty: Start) -> None:
    terminal = tty([*COMMAND, "run", *NONE, image, "sh", "-c", "seq 20000; echo last"], env=sbx.env)
    terminal.expect("last\r\n")
    assert terminal.wait() == 0
    assert [int(line) for line in terminal.output.split(b"\r\n") if line.isdigit()] == list(range(1, 20001))


def test_what_comes_last_is_shown(sbx: Sbx, image: str, tty: Start) -> None:
    for _ in range(5):
        terminal = tty(
            [*COMMAND, "run", *NONE, image, "sh", "-c", "head -c 5000 /dev/zero | tr '\\0' x; printf END"], env=sbx.env
        )
        assert terminal.wait() == 0
        assert terminal.output == b"x" * 5000 + b"END"


def test_exec_on_a_terminal(sbx: Sbx, image: str, tty: Start) -> None:
    with running(sbx, "run", *NONE, "--name", "shown", image, "sh", "-c", "echo up; cat"):
        terminal = tty([*COMMAND, "exec", "-it", "-e", "PS1=ready> ", "shown", "sh", "-i"], env=sbx.env)
        terminal.expect("ready> ")
        asked(terminal, "tty; stty size", "/dev/pts/[0-9]+\r\n24 80\r\n")
        terminal.line("exit 5")
        assert terminal.wait() == 5
        assert terminal.settings == terminal.before


@needs.subids
def test_another_users_terminal(sbx: Sbx, image: str, tty: Start) -> None:
    words = [
        "run",
        *NONE,
        "-u",
        "guest",
        image,
        "sh",
        "-c",
        "echo one >/dev/stdout; echo two >/dev/tty; cat /dev/null >$(tty); id -u",
    ]
    terminal = tty([*COMMAND, *words], env=sbx.env)
    terminal.expect("one\r\ntwo\r\n1000\r\n")
    assert terminal.wait() == 0


# ── with and without ──────────────────────────────────────────────────────────────────────────────────────────────────


def through_a_shell(sbx: Sbx, tty: Start, line: str) -> Terminal:
    """Run `line`, in which $SBX is the command, by a shell on a terminal."""
    return tty(["sh", "-c", line], env={**sbx.env, "SBX": shlex.join(COMMAND)})


def test_stderr_that_goes_elsewhere_stays_there(sbx: Sbx, image: str, tty: Start, tmp_path: Path) -> None:
    line = f"$SBX run --net none {image} sh -c 'echo out; echo err >&2; test -t 2 || echo apart' 2>{tmp_path}/err"
    terminal = through_a_shell(sbx, tty, line)
    terminal.expect("out\r\napart\r\n")
    assert terminal.wait() == 0
    assert (tmp_path / "err").read_text() == "err\n"


@pytest.mark.parametrize("line", ["| cat", "</dev/null"])
def test_half_a_terminal_is_none(sbx: Sbx, image: str, tty: Start, line: str) -> None:
    terminal = through_a_shell(
        sbx, tty, f"$SBX run --net none {image} sh -c 'tty; test -e /dev/console || echo none' {line}"
    )
    terminal.expect("not a tty\r\nnone\r\n")
    assert terminal.wait() == 0


def test_no_terminal_where_none_is_wanted(sbx: Sbx, image: str, tty: Start) -> None:
    terminal = through_a_shell(
        sbx, tty, f"$SBX run --net none --no-tty {image} sh -c 'test -e /dev/console || echo none'"
    )
    terminal.expect("none")
    assert terminal.wait() == 0


def test_a_terminal_without_one(sbx: Sbx, image: str) -> None:
    script = "test -t 0 && test -t 1 && test -t 2 && echo three; cat"
    result = sbx("run", *NONE, "-t", image, "sh", "-c", script, input=b"typed\n")
    assert result.status == 0
    # the terminal inside echoes, and ends lines as terminals do; the end of the pipe is ^D
    assert sorted(result.stdout.split()) == sorted(["three", "typed", "typed"])
    assert sbx("run", *NONE, "-t", image, "sh", "-c", "exit 3").status == 3


def test_interrupt_without_a_terminal_inside(sbx: Sbx, image: str, tty: Start) -> None:
    """^C comes to us as a signal then, and we pass it on."""
    script = "trap 'echo got; exit 3' INT; echo up; sleep 1000 & wait"
    terminal = tty([*COMMAND, "run", *NONE, "--no-tty", image, "sh", "-c", script], env=sbx.env)
    terminal.expect("up\r\n")
    terminal.send("\x03")
    terminal.expect("got\r\n")
    assert terminal.wait() == 3


# ── the caller's terminal ─────────────────────────────────────────────────────────────────────────────────────────────


def is_raw(terminal: Terminal) -> bool:
    return terminal.settings != terminal.before


@pytest.mark.parametrize("victim", ["parent", "supervisor", "pid 1", "command"])
def test_given_back_whatever_is_killed(shell: Terminal, victim: str) -> None:
    assert is_raw(shell)
    pids = tree(shell.process.pid)
    os.kill(pids[["parent", "supervisor", "pid 1", "command"].index(victim)], signal.SIGKILL)
    shell.process.wait(20)
    eventually(lambda: not is_raw(shell), "the terminal is as it was")
    for pid in pids[1:]:
        eventually(lambda pid=pid: is_gone(pid), "all have ended")  # type: ignore[misc]


@pytest.mark.parametrize("victim", ["parent", "supervisor", "command"])
def test_given_back_by_exec_whatever_is_killed(sbx: Sbx, image: str, tty: Start, victim: str) -> None:
    with running(sbx, "run", *NONE, "--name", "joined", image, "sh", "-c", "echo up; cat"):
        terminal = tty([*COMMAND, "exec", "-it", "-e", "PS1=ready> ", "joined", "sh", "-i"], env=sbx.env)
        terminal.expect("ready> ")
        assert is_raw(terminal)
        pids = tree(terminal.process.pid)
        os.kill(pids[["parent", "supervisor", "command"].index(victim)], signal.SIGKILL)
        terminal.process.wait(20)
        eventually(lambda: not is_raw(terminal), "the terminal is as it was")
        for pid in pids[1:]:
            eventually(lambda pid=pid: is_gone(pid), "all have ended")  # type: ignore[misc]


@pytest.mark.parametrize("name", ["TERM", "HUP"])
def test_given_back_after_a_signal(sbx: Sbx, image: str, tty: Start, name: str) -> None:
    terminal = tty([*COMMAND, "run", *NONE, image, "sh", "-c", "echo up; sleep 1000"], env=sbx.env)
    terminal.expect("up")
    terminal.process.send_signal(signal.Signals["SIG" + name])
    assert terminal.wait() == 128 + signal.Signals["SIG" + name]
    assert terminal.settings == terminal.before


def test_given_back_after_an_error(sbx: Sbx, image: str, tty: Start) -> None:
    terminal = tty([*COMMAND, "run", *NONE, image, "no-such-command"], env=sbx.env)
    assert terminal.wait() == 127
    assert terminal.settings == terminal.before
    assert b"sbx: execute no-such-command: not found in PATH\r\n" in terminal.output


def test_a_window_that_is_closed(sbx: Sbx, image: str, tty: Start) -> None:
    terminal = tty([*COMMAND, "run", *NONE, image, "sh", "-c", "echo up; sleep 1000"], env=sbx.env)
    terminal.expect("up")
    pids = tree(terminal.process.pid)
    terminal.hang_up()
    terminal.process.wait(20)
    for pid in pids[1:]:
        eventually(lambda pid=pid: is_gone(pid), "all have ended")  # type: ignore[misc]


def test_stopped_and_continued_from_outside(sbx: Sbx, image: str, tty: Start) -> None:
    """As by kill -TSTP: while we are stopped the caller's terminal is as it was."""
    terminal = tty([*COMMAND, "run", *NONE, "-e", "PS1=ready> ", image, "sh", "-i"], env=sbx.env)
    terminal.expect("ready> ")
    terminal.process.send_signal(signal.SIGTSTP)
    assert os.WIFSTOPPED(os.waitpid(terminal.process.pid, os.WUNTRACED)[1])
    assert not is_raw(terminal)
    terminal.process.send_signal(signal.SIGCONT)
    eventually(lambda: is_raw(terminal), "the terminal is ours again")
    terminal.line("exit 4")
    assert terminal.wait() == 4


def test_nothing_is_typed_into_the_callers_terminal(sbx: Sbx, tty: Start) -> None:
    """Even where the command has it as its stdin, TIOCSTI is refused; by the kernel too, for it is not its terminal."""
    code = """
import fcntl
try:
    fcntl.ioctl(0, 0x5412, b"x")
    print("typed")
except OSError as error:
    print("refused", error.errno)
"""
    for options in ([], ["--no-tty"], ["--no-tty", "--seccomp", "unconfined"]):
        terminal = tty([*COMMAND, "run", *NONE, *options, *host_python(), code], env=sbx.env)
        terminal.expect("refused [0-9]+\r\n")
        assert terminal.wait() == 0


def test_in_the_background(sbx: Sbx, image: str, tty: Start) -> None:
    """With -t a job in the background wants the terminal: the kernel stops it, as every program, until fg."""
    terminal = tty(["sh", "-i"], env={**sbx.env, "PS1": "outer> ", "SBX": shlex.join(COMMAND)})
    terminal.expect("outer> ")
    terminal.line(f"$SBX run -t --net none -e 'PS1=inner> ' {image} sh -i &")
    eventually(lambda: [state_of(pid) for pid in children(terminal.process.pid)] == ["T"], "it is stopped")
    terminal.line("fg")
    terminal.expect("inner> ")
    terminal.line("echo begun; exit 6")
    terminal.expect("\r\nbegun\r\n")
    terminal.expect("outer> ")
    terminal.line("echo status $?")
    terminal.expect("status 6")
    terminal.line("exit")
    terminal.wait()


# ── tmux ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tmux:
    """A tmux server of its own with one window."""

    def __init__(self, socket: Path, env: dict[str, str]) -> None:
        self.socket = socket
        self.env = env

    def __call__(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self.socket, *words], env=self.env, capture_output=True, text=True, check=True
        )
        return done.stdout

    def line(self, text: str) -> None:
        self("send-keys", "-l", text)
        self("send-keys", "Enter")

    def shows(self, text: str) -> None:
        eventually(lambda: text in self("capture-pane", "-p"), f"{text!r} on the screen")


@pytest.fixture
def tmux(tmp_path: Path, sbx: Sbx) -> Iterator[Tmux]:
    server = Tmux(
        tmp_path / "tmux", {**sbx.env, "SBX": shlex.join(COMMAND), "TERM": "xterm", "PS1": "outer> ", "ENV": ""}
    )
    server("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "exec sh")
    yield server
    server("kill-server")


@needs.program("tmux")
def test_in_tmux(tmux: Tmux, image: str) -> None:
    """As a person would: a shell, a job that is stopped and continued, a resized window, and back again."""
    pane = int(tmux("display-message", "-p", "#{pane_pid}"))
    tmux.line("PS1='outer> '")
    tmux.shows("outer> ")
    tmux.line(f"$SBX run --net none -e 'PS1=inner> ' {image} sh -i")
    tmux.shows("inner>")
    tmux.line("stty size; sleep 1000")
    tmux.shows("24 80")
    eventually(lambda: in_foreground(pane, "sleep"), "it has the terminal")
    tmux("send-keys", "C-z")
    tmux.shows("Stopped")
    tmux("resize-window", "-x", "100", "-y", "30")
    tmux.line("until test \"$(stty size)\" = '30 100'; do sleep 0.01; done; echo re''sized")
    tmux.shows("resized")
    tmux.line("fg")
    eventually(lambda: in_foreground(pane, "sleep"), "it has the terminal again")
    tmux("send-keys", "C-c")
    eventually(lambda: in_foreground(pane, "sh"), "the shell has it")
    tmux.line("vi /tmp/file")
    eventually(lambda: in_foreground(pane, "vi"), "the editor has it")
    tmux.shows("- /tmp/file")
    tmux("send-keys", "itext", "Escape")
    tmux.shows("- /tmp/file [Modified]")
    tmux("send-keys", ":wq", "Enter")
    eventually(lambda: in_foreground(pane, "sh"), "the shell has it again")
    tmux.line("cat /tmp/file; exit 9")
    tmux.shows("text")
    eventually(lambda: not children(pane), "sbx has ended")
    tmux.line("echo status $?; stty -a | grep -o ' icanon'")
    tmux.shows("status 9")
    tmux.shows(" icanon")
