"""One more command in a running sandbox: what it sees, what protects it, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import needs
import pytest
from conftest import Sbx
from launching import NONE, as_ordinary, eventually, is_gone, running, shell_status, state_of, tree

pytestmark = [needs.userns, needs.busybox]

SHOW = """
    grep -E '^(Cap|NoNewPrivs|Seccomp|Groups|Umask|Uid|Gid|SigBlk|SigIgn)' /proc/self/status
    cd /proc/self; cat limits cgroup mountinfo setgroups oom_score_adj uid_map gid_map
    for name in user mnt pid net uts ipc cgroup; do readlink ns/$name; done
    ls fd; hostname"""


@pytest.fixture(params=[[], ["--idmap", "single"], ["--no-init"]], ids=["default", "single", "no-init"])
def box(request: pytest.FixtureRequest, sbx: Sbx, image: str) -> Iterator[str]:
    """The name of a running sandbox whose first command has shown itself in /tmp/first."""
    words = ["run", *NONE, *request.param, "--name", "box", "-e", "FIRST=1", "-w", "/tmp", image]
    with running(sbx, *words, "sh", "-c", f"({SHOW}) >/tmp/first; echo up; cat"):
        yield "box"


def test_it_is_protected_as_the_first_command(sbx: Sbx, box: str) -> None:
    first = sbx.ok("exec", box, "cat", "/tmp/first")
    assert "NoNewPrivs:\t1\n" in first
    assert "Seccomp:\t2\n" in first
    assert first.count("user:[") == 1
    assert sbx.ok("exec", box, "sh", "-c", SHOW).splitlines() == first.splitlines()


def test_options(sbx: Sbx, box: str) -> None:
    assert sbx.ok("exec", box, "sh", "-c", "pwd; echo $FIRST $HOME") == "/tmp\n1 /root"
    assert sbx.ok("exec", "-w", "/etc", "-e", "FIRST=2", box, "sh", "-c", "pwd; echo $FIRST") == "/etc\n2"
    result = sbx("exec", "-w", "/no/such", box, "true")
    assert (result.status, result.stderr) == (125, "sbx: change to folder /no/such: No such file or directory\n")


@needs.subids
def test_users(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, "--name", "users", "-u", "guest", image, "sh", "-c", "echo up; cat"):
        show = ["sh", "-c", 'echo "$(id -u):$(id -g) $HOME"; grep -E "CapEff|Groups" /proc/self/status']
        assert sbx.ok("exec", "users", *show).split() == ["1000:1000", "/home/guest", "Groups:", "CapEff:", "0" * 16]
        assert sbx.ok("exec", "-u", "nobody", "users", *show).startswith("65534:65534 /\n")
        assert sbx.ok("exec", "-u", "0", "users", *show).startswith("0:0 /root\n")
        for user in ("4294967295", "0000000000004294967295", "-1"):
            assert sbx("exec", f"--user={user}", "users", *show).status == 125
        assert "not in the image's /etc/passwd" in sbx("exec", "-u", "no-such", "users", *show).stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["no-such"], 127),
        (["/etc"], 126),
    ],
    ids=str,
)
def test_statuses(sbx: Sbx, image: str, words: list[str], status: int) -> None:
    with running(sbx, "run", *NONE, "--name", "ends", image, "sh", "-c", "echo up; cat"):
        assert sbx("exec", "ends", *words).status == status


def test_bytes_and_arguments(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, "--name", "bytes", image, "sh", "-c", "echo up; cat"):
        data = os.urandom(1 << 20)
        with sbx.start("exec", "bytes", "cat") as process:
            assert process.communicate(data)[0] == data
        odd = [b"", b"a\nb", b"\xff\xfe", b"-x", b"--"]
        assert sbx.ok("exec", "bytes", "printf", "<%s>", *odd) == "<><a\nb><\udcff\udcfe><-x><-->"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1"])
def test_signals(sbx: Sbx, image: str, name: str) -> None:
    number = int(signal.Signals["SIG" + name])
    with running(sbx, "run", *NONE, "--name", "signals", image, "sh", "-c", "echo up; cat"):
        script = f"trap 'echo got; exit 7' {name}; echo up; sleep 1000 >/dev/null & wait"
        with running(sbx, "exec", "signals", "sh", "-c", script, preexec_fn=as_ordinary(number)) as process:
            process.send_signal(number)
            assert process.stdout
            assert (process.stdout.read(), process.wait()) == (b"got\n", 7)
        with running(
            sbx, "exec", "signals", "sh", "-c", "echo up; sleep 1000", preexec_fn=as_ordinary(number)
        ) as process:
            process.send_signal(number)
            assert shell_status(process.wait()) == 128 + number
        assert sbx.ok("exec", "signals", "echo", "lives on") == "lives on"


def test_stop_and_continue(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, "--name", "stops", image, "sh", "-c", "echo up; cat"):
        words = ["exec", "stops", "sh", "-c", "echo up; cat; exit 3"]
        with running(sbx, *words, preexec_fn=as_ordinary(signal.SIGTSTP)) as process:
            process.send_signal(signal.SIGTSTP)
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            command = tree(process.pid)[2]
            eventually(lambda: state_of(command) == "T", "the command has stopped")
            process.send_signal(signal.SIGCONT)
            assert (process.communicate(b"")[0], process.returncode) == (b"", 3)


@pytest.mark.parametrize("victim", [0, 1, 2], ids=["parent", "supervisor", "command"])
@pytest.mark.parametrize("user", ["root", "guest"])
def test_killed(sbx: Sbx, image: str, victim: int, user: str) -> None:
    """Whatever dies, the rest of the joined command does too, and the sandbox lives on."""
    with running(sbx, "run", *NONE, "--name", "survivor", image, "sh", "-c", "echo up; cat"):
        with running(sbx, "exec", "-u", user, "survivor", "sh", "-c", "echo up; exec sleep 1000") as process:
            pids = tree(process.pid)
            assert len(pids) == 3
            os.kill(pids[victim], signal.SIGKILL)
            assert process.wait() in (-9, 137)
            for pid in pids[1:]:
                eventually(lambda pid=pid: is_gone(pid), "all of it has ended")  # type: ignore[misc]
        assert sbx.ok("exec", "survivor", "echo", "lives on") == "lives on"


def test_it_ends_with_the_sandbox(sbx: Sbx, image: str) -> None:
    script = "trap '' TERM HUP; echo up; exec sleep 1000"
    with (
        running(sbx, "run", *NONE, "--name", "short", image, "sh", "-c", "echo up; cat") as first,
        running(sbx, "exec", "short", "sh", "-c", script) as second,
    ):
        first.terminate()
        assert first.wait() == 143
        assert second.wait() == 137


def test_joining_a_sandbox_that_is_about_to_end(sbx: Sbx, image: str) -> None:
    """Again and again at any moment of its end: a status of the command's, or one clear error."""
    for turn in range(12):
        with running(sbx, "run", *NONE, "--name", f"ending{turn}", image, "sh", "-c", "echo up; cat") as first:
            results = []
            joining = threading.Thread(target=lambda: results.append(sbx("exec", f"ending{turn}", "true")))  # noqa: B023
            joining.start()
            threading.Event().wait(turn * 0.004)
            first.kill() if turn % 2 else first.terminate()
            first.wait()
            joining.join()
        [result] = results
        assert result.status in (0, 125, 137), result
        assert "Traceback" not in result.stderr
        assert result.status != 125 or result.stderr.startswith("sbx: "), result


def test_nobody_to_join(sbx: Sbx) -> None:
    result = sbx("exec", "no-such", "true")
    assert (result.status, result.stderr) == (
        125, "sbx: find sandbox no-such: none of that name or id is running\nhint: see: sbx ps\n",
    )  # fmt: skip


def test_many_at_once(sbx: Sbx, image: str) -> None:
    with running(sbx, "run", *NONE, "--name", "many", image, "sh", "-c", "echo up; cat"):
        processes = [sbx.start("exec", "many", "echo", str(n), stdin=subprocess.DEVNULL) for n in range(16)]
        for n, process in enumerate(processes):
            with process:
                assert process.communicate()[0] == f"{n}\n".encode()
                assert process.returncode == 0


def test_a_joined_commands_daemon_stays_with_the_sandbox(sbx: Sbx, image: str) -> None:
    """As with docker: the sandbox is its home, and ends it."""
    with running(sbx, "run", *NONE, "--name", "home", image, "sh", "-c", "echo up; cat"):
        assert sbx.ok("exec", "home", "sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo done") == "done"
        assert sbx.ok("exec", "home", "sh", "-c", "ps | grep [s]leep")
