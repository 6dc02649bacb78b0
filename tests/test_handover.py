"""Processes that part without a copy of the interpreter: the machine code, its lists, what is told when one fails."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import Sbx
from launching import NONE, eventually, is_gone, running, tree

from rootless import handover

MACHINE = platform.machine()
known = pytest.mark.skipif(MACHINE not in handover.CODE, reason=f"no machine code for {MACHINE}")

HEAD = """
import os, select, signal, sys
sys.path.insert(0, sys.argv[1])
from rootless import handover as h, syscalls
EXIT_GROUP = 231
"""
SPLIT = (
    HEAD
    + """
hand = h.Handover(syscalls.CLONE_VM | syscalls.SIGCHLD, 2, b"lost X\\n")
hand.call(h.WRITE, 1, hand.put(b"stays\\n"), 6)
hand.call(*{call})
hand.call(EXIT_GROUP, 7)
before = list(range(1000))
if os.fork() == 0:
    hand.split()
    assert sum(before) == 499500
    os.write(1, b"goes on\\n" if os.getppid() else b"")
    os._exit(9)
os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.wait()[1]))
"""
)
MEET = (
    HEAD
    + """
status, told = os.pipe()
go, say = os.pipe()
hand = h.Handover(syscalls.SIGCHLD, told, b"lost X\\n")
hand.call_first(h.CLOSE, say)
hand.call_first(h.READ, go, hand.put(b" "), 1)
hand.call_first(*{first})
hand.pidfd = hand.argument(2)
{early}
hand.call(h.WRITE, 1, hand.path, 16)
hand.call(h.WRITE, 1, hand.put(b"\\n"), 1)
hand.call(h.FCNTL, 0, 1)  # F_GETFD: fails unless it is a descriptor
hand.call(h.PWRITE, os.memfd_create("seen"), hand.process, 4, 0)
hand.call(*{second})
hand.call(h.WRITE, told, hand.put(b"."), 1)
hand.call(EXIT_GROUP, 5)
mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
begun = hand.begin(0, say, status)
signal.pthread_sigmask(signal.SIG_SETMASK, mask)
os.close(told)
if {killed}:
    os.kill(begun, 9)
try:
    new = hand.meet()
except OSError as error:
    print(error.errno, hand.failed_call(), os.waitstatus_to_exitcode(os.waitpid(begun, 0)[1]))
    sys.exit()
if new == 0:  # goes when it is told to, or when whoever made it is gone
    while not select.select([go], [], [], 0.01)[0] and os.getppid() == begun:
        pass
    os._exit(0)
os.write(say, b".")
print(new, os.waitstatus_to_exitcode(os.waitpid(begun, 0)[1]), flush=True)
"""
)
LEND = (
    HEAD
    + """
import time
status, told = os.pipe()
go, say = os.pipe()
held, holds = os.pipe()
signals = syscalls.signal_descriptor([signal.SIGTERM])
hand = h.Handover(syscalls.CLONE_VM | syscalls.SIGCHLD, told, b"lost X\\n")
hand.call_first(h.CLOSE, say)
hand.call_first(h.READ, go, hand.put(b" "), 1)
{early}
for fd in (told, holds):
    hand.call(h.WRITE, fd, hand.put(b"."), 1)
hand.call(EXIT_GROUP, 5)
script = b"read said <&$0; echo lost $said"
hand.lends((held, holds), go, status, signals, 1, [b"/bin/sh", b"-c", script, b"%d" % status], [b"PATH=/usr/bin:/bin"])
ours = os.getpid()
before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
begun = hand.begin(0, say, status)
os.close(told)
for fd in (go, held, holds):
    os.close(fd)
try:
    new = hand.meet()
except OSError as error:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    os.waitpid(begun, 0)
    print(error.errno)
    sys.exit()
thoughts = [os.getpid() == ours]
hand.lend()
thoughts += [os.getpid() == new, os.read(go, 1)]
os.write(told, b"words\\n")
{borrowed}
thoughts.append(os.getpid() == ours)
os.waitpid(begun, 0)
os.write(1, " ".join(map(str, [*thoughts, os.read(status, 9)])).encode() + b"\\n")  # in one, for others write, too
signal.signal(signal.SIGTERM, lambda *_: print("heard", flush=True))
signal.pthread_sigmask(signal.SIG_SETMASK, before)
"""
)
END = "hand.hand_back(EXIT_GROUP, 3)"
DEAF = "len(signal.pthread_sigmask(0, [])) > 50"
INNER = """inner = h.Handover(syscalls.CLONE_VM | syscalls.SIGCHLD, 2, b'lost X ')
inner.call(EXIT_GROUP, 0)
inner.split()"""
NOTHING = "(h.SETSID,) if os.getsid(0) != os.getpid() else (h.FCNTL, 0, 1)"


def run(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, str(needs.CHECKOUT)],
        capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return sorted((done.stdout + done.stderr).splitlines())


@pytest.mark.parametrize("machine", handover.CODE)
def test_the_bytes_are_what_the_source_says(machine: str, tmp_path: Path) -> None:
    prefix = "" if machine == MACHINE else f"{machine}-linux-gnu-"
    needs.enforce("" if shutil.which(f"{prefix}as") else f"no assembler for {machine}")
    source = str(needs.CHECKOUT / "helpers" / f"handover-{machine}.s")
    assembled, binary = str(tmp_path / "it.o"), str(tmp_path / "it")
    subprocess.run([f"{prefix}as", "-o", assembled, source], check=True)
    subprocess.run([f"{prefix}objcopy", "-O", "binary", "-j", ".text", assembled, binary], check=True)
    assert Path(binary).read_bytes() == handover.CODE[machine]


@known
def test_split() -> None:
    assert run(SPLIT.format(call="(h.FCNTL, 0, 1)")) == ["7", "goes on", "stays"]


@known
def test_a_call_that_fails_after_the_split_is_told() -> None:
    # EBADF is 9, and 32 more is a closing bracket
    assert run(SPLIT.format(call="(h.FCNTL, 999, 1)")) == ["125", "goes on", "lost )", "stays"]


@known
def test_meet() -> None:
    path, line = run(MEET.format(first="(h.FCNTL, 0, 1)", second="(h.FCNTL, 0, 1)", killed=False, early=""))
    pid, status = line.split()
    assert path.startswith("/proc/")
    assert path.rpartition("/")[2] == pid
    assert status == "5"


@known
@pytest.mark.parametrize(
    ("first", "second", "killed", "early", "told"),
    [
        ("(h.FCNTL, 999, 1)", "(h.FCNTL, 0, 1)", False, "", ["9 2 125"]),
        ("(h.FCNTL, 0, 1)", "(h.FCNTL, 999, 1)", False, "", ["9 7 125"]),
        ("(h.FCNTL, 0, 1)", "(h.FCNTL, 0, 1)", True, "", ["10 -1 -9"]),
        # it dies when it has made the other one, and before it has told of that
        ("(h.FCNTL, 0, 1)", "(h.FCNTL, 0, 1)", False, "hand.call(EXIT_GROUP, 6)", ["10 -1 6"]),
        # end of file is nothing to go on for
        ("(h.READ, os.open('/dev/null', 0), hand.put(b''), 1)", "(h.FCNTL, 0, 1)", False, "", ["10 -1 125"]),
    ],
    ids=["before", "after", "killed", "gone", "end of file"],
)
def test_meet_tells_what_failed(first: str, second: str, killed: bool, early: str, told: list[str]) -> None:
    code = MEET.format(first=first, second=second, killed=killed, early=early)
    assert [line for line in run(code) if line[0] != "/"] == told


@known
@pytest.mark.parametrize(
    ("borrowed", "said"),
    [
        (END, []),
        ("hand.execve(b'/bin/sh', [b'sh', b'-c', b'echo $A $0', b'x y'], {b'A': b'1 2', b'B': b''})", ["1 2 x y"]),
        (
            "hand.execve(os.open('/bin/sh', os.O_RDONLY), [b'sh', b'-c', b'echo $A'], {b'A': b'by number'})",
            ["by number"],
        ),
        # what fails leaves us where we were
        (
            f"try: hand.execve(b'/none', [], {{}})\nexcept FileNotFoundError: thoughts.append({DEAF})\n{END}",
            [],
        ),
        # a signal is kept for when the memory is back
        (f"os.kill(ours, 15); time.sleep(0.2)\n{END}", ["heard"]),
        # another process may take its turn
        (f"{INNER}\nthoughts.append(os.getpid() != new)\n{END}", []),
    ],
    ids=["end", "path", "file", "refused", "signal", "split"],
)
def test_lend(borrowed: str, said: list[str]) -> None:
    thoughts, *others = sorted(run(LEND.format(early="", borrowed=borrowed)), key=lambda line: not line.startswith("T"))
    between = "True " if "/none" in borrowed or "split" in borrowed else ""
    assert thoughts == f"True True b'.' {between}True b'words\\n'"
    assert others == said


@known
@pytest.mark.parametrize(
    "borrowed",
    ["os.kill(new, 9)", "os.kill(ours, 15); time.sleep(2); os._exit(0)"],  # it has a second to end what it is doing
    ids=["killed", "patience"],
)
def test_memory_that_is_lost(borrowed: str) -> None:
    """Then the lender is another program."""
    assert run(LEND.format(early="", borrowed=borrowed)) == ["lost words"]


@known
def test_whoever_waits_for_memory_ends_with_the_one_that_made_it() -> None:
    assert run(LEND.format(early="hand.call(EXIT_GROUP, 6)", borrowed="")) == ["10"]


@known
def test_a_list_that_is_too_long_is_refused() -> None:
    hand = handover.Handover(0, 2, b"lost X\n")
    for _ in range(60):
        hand.call(handover.CLOSE, 999)
    with pytest.raises(OSError, match="too long"):
        hand.split()
    hand = handover.Handover(0, 2, b"lost X\n")
    hand.put(b"x" * 9000)
    with pytest.raises(OSError, match="too long"):
        hand.split()


# ── a launch ──────────────────────────────────────────────────────────────────────────────────────────────────────────

LAUNCH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from rootless import entry, handover, idmap, init, processes, supervisor, syscalls
{change}
sys.exit(entry.main())
"""
REFUSED = """
import os
whole = init.in_memory
def refused(name, *rest):
    fd = whole(name, *rest)
    if name == "{name}":
        os.fchmod(fd, 0)
    return fd
init.in_memory = refused
"""
LATE = """
import time
from rootless import parent
greet = parent.Sandbox._greet
def late(*words):
    time.sleep(0.3)
    greet(*words)
parent.Sandbox._greet = late
"""
NO_ROOT = """
class Map(idmap.WriteMaps):
    def execute(self, pid):
        for mapping in (*self.idmap.uids, *self.idmap.gids):
            mapping.container_id += 1
        return super().execute(pid)
from rootless import plan
plan.WriteMaps = Map
"""


def launch(sbx: Sbx, change: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    code = LAUNCH.format(change=change)
    return subprocess.run(
        [sys.executable, "-c", code, str(needs.CHECKOUT), "run", *NONE, *words],
        env=sbx.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (REFUSED.format(name="init"), "become a small program: Permission denied"),
        (REFUSED.format(name="supervisor"), "become a small program: Permission denied"),
        # Pid 1 is gone by the time that we turn to it; its supervisor's last word is the reason
        (REFUSED.format(name="supervisor") + LATE, "become a small program: Permission denied"),
        ('processes.text = lambda ids: "0 0 x"', "start pid 1: write the inner id map: Invalid argument"),
        (NO_ROOT, "become root and drop supplementary groups: Invalid argument"),
    ],
    ids=["init", "supervisor", "late", "maps", "root"],
)
def test_a_launch_that_fails_there(sbx: Sbx, image: str, change: str, said: str) -> None:
    done = launch(sbx, change, image, "sleep", "10")
    assert done.stderr.startswith(f"sbx: {said}"), done
    assert (done.returncode, done.stdout) == (125, "")
    # and the fixture has looked for processes, mounts and folders


@needs.userns
@needs.busybox
@pytest.mark.parametrize(
    "change",
    [
        "handover.CODE.clear()",
        "def forbidden(*words): raise PermissionError(13, '')\ninit.in_memory = forbidden",
        "def forbidden(code): raise PermissionError(13, '')\nsyscalls.load_code = forbidden",
    ],
    ids=["no code", "no files in memory", "no executable memory"],
)
def test_where_it_cannot_be_processes_are_forked(sbx: Sbx, image: str, change: str) -> None:
    script = "cat /proc/self/setgroups; id -u; cat /proc/1/comm; exit 7"
    done = launch(sbx, change, image, "sh", "-c", script)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines() == ["deny", "0", "sbx-init"]


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_parent_is_killed_while_maps_are_written(sbx: Sbx, image: str, tmp_path: Path, when: str) -> None:
    """Then nothing goes on: no pid 1 is made, by a supervisor that nobody has met."""
    change = """
import os, time
class Map(idmap.WriteMaps):
    def execute(self, pid):
        after = len(sys.argv) > 1 and sys.argv.pop() == "after"
        if after:
            super().execute(pid)
        print(pid, flush=True)
        time.sleep(30)
from rootless import plan
plan.WriteMaps = Map
"""
    words = [sys.executable, "-c", LAUNCH.format(change=change), str(needs.CHECKOUT), "run", *NONE, image, "true", when]
    with subprocess.Popen(
        words, env=sbx.env, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2),
    ) as process:  # fmt: skip
        assert process.stdout
        supervisor = int(process.stdout.readline())
        process.kill()
    eventually(lambda: is_gone(supervisor), "the supervisor has ended")
    assert list(tmp_path.iterdir()) == []  # a core file, say
    sbx.ok("run", *NONE, image, "true")  # clears the folder
    eventually(lambda: not os.listdir(sbx.home / "sandboxes"), "the debris is cleared")


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


@known
@needs.userns
@needs.busybox
def test_who_is_left(sbx: Sbx, image: str) -> None:
    """Neither supervisor nor init has anything of the interpreter's, nor any file but what it waits for."""
    with running(sbx, "run", *NONE, image, "sh", "-c", "echo up; exec sleep 1000") as process:
        _, supervisor, init, _ = tree(process.pid)
        for pid, name in ((supervisor, "sbx-supervisor"), (init, "sbx-init")):
            # the command may be a moment ahead of its last calls
            eventually(lambda pid=pid: int(status_of(pid)["VmRSS"].split()[0]) < 100, f"{name} is a small program")  # type: ignore[misc]
            status = status_of(pid)
            assert status["Name"].strip() == name
            files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int)]
            assert files[:3] == ["/dev/null"] * 3
            kinds = sorted(file.rpartition("/")[2].partition(":")[0] for file in files[3:])
            if pid == supervisor:
                assert kinds == ["anon_inode", "lock", "pipe", "pipe"]
                assert os.getsid(pid) == pid
                assert int(status["SigBlk"], 16) & 0x7FFFFFFF == 0x7FFFFFFF & ~(1 << 8 | 1 << 18)
            else:
                assert kinds == []
                assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == 1 << 5
                assert status["NoNewPrivs"].strip() == "1"


# ── a launch in the parent's memory ───────────────────────────────────────────────────────────────────────────────────

#: Pid 1, or the command, stops where it is told to, in its parent's memory, and says who it is.
HELD = """
import os, time
from rootless import mounts, privileges
act = {step}.execute
def held(step, child):
    os.write(1, b"%d %d\\n" % (os.getpid(), child.lender is not None))
    time.sleep(30)
    act(step, child)
{step}.execute = held
"""
IMPORT = """
from rootless import mounts
def execute(step, child):
    import colorsys
mounts.StopPropagation.execute = execute
"""
STOPS = ["mounts.PivotRoot", "privileges.CloseDescriptors"]


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize("step", STOPS)
@pytest.mark.parametrize("victim", ["parent", "supervisor", "pid 1", "command"])
def test_one_is_killed_in_its_parents_memory(sbx: Sbx, image: str, step: str, victim: str) -> None:
    """Whichever it is, all of it ends, and nothing is left."""
    with begin(sbx, image, step) as process:
        pids = dict(zip(["parent", "supervisor", "pid 1", "command"], tree(process.pid), strict=False))
        os.kill(pids.get(victim, pids["pid 1"]), signal.SIGKILL)
        assert process.wait(20) == (-9 if victim == "parent" else 125)
        if victim != "parent":
            assert process.stderr
            assert process.stderr.read() == b"sbx: start the sandbox: its first process was killed\n"
    for pid in pids.values():
        eventually(lambda pid=pid: is_gone(pid), "all have ended")  # type: ignore[misc]
    assert victim == "parent" or os.listdir(sbx.home / "sandboxes") == []


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize("step", STOPS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_hangs_in_its_parents_memory(sbx: Sbx, image: str, step: str, number: int) -> None:
    with begin(sbx, image, step) as process:
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert process.stderr
        assert process.stderr.read() == b"sbx: start the sandbox: interrupted\n"
    assert os.listdir(sbx.home / "sandboxes") == []


def begin(sbx: Sbx, image: str, step: str, *words: str, lent: bytes = b"1", **options: Any) -> subprocess.Popen[bytes]:
    code = LAUNCH.format(change=HELD.format(step=step).replace("os.write(1", "os.write(2"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(needs.CHECKOUT), "run", *NONE, *words, image, "true"],
        env=sbx.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    assert process.stderr
    assert process.stderr.readline().split()[1] == lent
    return process


@known
@needs.userns
@needs.busybox
@needs.subids
def test_the_parent_gets_its_memory_back_as_it_was(sbx: Sbx, image: str) -> None:
    script = "echo up; exec sleep 1000"
    with running(sbx, "run", *NONE, "-u", "guest", image, "sh", "-c", script) as process:
        parent = Path(f"/proc/{process.pid}")
        # It is the last of the three to wake up
        eventually(lambda: b"exec sleep 1000" in (parent / "cmdline").read_bytes(), "its words are back")
        eventually(lambda: os.access(parent / "environ", os.R_OK), "it may be looked into")
        assert b"SBX_HOME=" in (parent / "environ").read_bytes()
        eventually(lambda: b"SigBlk:\t0000000000000000\n" in (parent / "status").read_bytes(), "it hears signals")


@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize("step", STOPS)
@pytest.mark.parametrize("words", [[], ["--privileged"], ["--unshare", "time"]], ids=["lent", "privileged", "copied"])
def test_nobody_is_let_in_before_it_is_complete(sbx: Sbx, image: str, step: str, words: list[str]) -> None:
    """Before that it has the host's file tree, and then the parent's memory."""
    code = LAUNCH.format(change=HELD.format(step=step).replace("sleep(30)", "sleep(1.5)"))
    command = [sys.executable, "-c", code, str(needs.CHECKOUT), "run", *NONE, *words, "--name", "young", image, "sleep"]
    with subprocess.Popen([*command, "9"], env=sbx.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert json.loads(sbx.ok("ps", "--json")) == []
        inside = sbx.ok("exec", "young", "sh", "-c", "grep -c ID=offline /etc/os-release; tr -d '\\0' </proc/1/cmdline")
        assert inside == "1\nsbx-init"
        process.terminate()


@needs.userns
@needs.busybox
def test_who_comes_late_publishes_nobody_elses_record(sbx: Sbx, image: str) -> None:
    """The first one has ended, its supervisor has deleted its folder, and another one has the name by now."""
    late = """
import os, sys
from rootless import state
publish = state.Folder.publish_record
def late(folder):
    os.write(1, b"first\\n")
    sys.stdin.readline()
    publish(folder)
    os.write(1, b"published\\n")
state.Folder.publish_record = late
"""
    name = ["run", *NONE, "--name", "x"]
    code = [sys.executable, "-c", LAUNCH.format(change=late), str(needs.CHECKOUT)]
    pipes: Any = {"env": sbx.env, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*code, *name, "--idmap", "keep", image, "true"], **pipes) as first:
        assert first.stdin
        assert first.stdout
        assert first.stdout.readline() == b"first\n"
        folder = sbx.home / "sandboxes" / "x"
        eventually(lambda: not folder.exists(), "its supervisor has deleted it")
        code[2] = LAUNCH.format(change=HELD.format(step=STOPS[0]).replace("sleep(30)", "sleep(1)"))
        with subprocess.Popen([*code, *name, "--unshare", "time", image, "sleep", "9"], **pipes) as second:
            assert second.stdout
            second.stdout.readline()
            first.stdin.write(b"\n")
            first.stdin.flush()
            assert first.stdout.readline() == b"published\n"
            assert not (folder / "record").exists()
            second.terminate()
    assert first.returncode == 0


@needs.userns
@needs.busybox
def test_a_start_that_takes_too_long_is_told(sbx: Sbx, image: str) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(needs.CHECKOUT)!r})
from rootless import errors, state
state._START = 0.1
try:
    state.find("slow")
except errors.SbxError as error:
    print(error.code, error.message)
"""
    with begin(sbx, image, STOPS[0], "--name", "slow") as process:
        done = subprocess.run([sys.executable, "-c", code], env=sbx.env, capture_output=True, text=True, check=True)
        assert done.stdout == "sandbox-starting find sandbox slow: it is still starting\n"
        process.terminate()


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize(
    ("change", "said"),
    [
        # nothing is found by name, not even here, where the names are still the host's
        (
            IMPORT,
            "stop mounts from propagating to the host: ModuleNotFoundError: No module named 'colorsys'",
        ),
        # a copy of an interpreter would stay in the parent's memory
        (
            "processes._leave_to_command = lambda child: False",
            "start the command's process; pid 1 stays as init: Resource temporarily unavailable",
        ),
    ],
    ids=["import", "process"],
)
def test_what_must_not_be_done_in_lent_memory(sbx: Sbx, image: str, change: str, said: str) -> None:
    done = launch(sbx, change, image, "true")
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.splitlines()[0] == f"sbx: {said}"


@known
@needs.userns
@needs.busybox
@needs.subids
def test_memory_that_is_lent_is_hidden(sbx: Sbx, image: str) -> None:
    with begin(sbx, image, "mounts.PivotRoot") as process:
        for pid in tree(process.pid):
            if Path(f"/proc/{pid}/comm").read_text() != "sbx-supervisor\n":
                with pytest.raises(PermissionError):
                    Path(f"/proc/{pid}/environ").read_bytes()
        process.terminate()


@known
@needs.userns
@needs.busybox
@needs.subids
@pytest.mark.parametrize("step", ["processes.AwaitAttached", "privileges.LoadFilter"])
def test_a_signal_to_all_of_it_while_it_begins(sbx: Sbx, image: str, step: str) -> None:
    """Pid 1 and the command get it too, in their parent's memory: it is the command's."""
    code = LAUNCH.format(change=HELD.format(step=step).replace("sleep(30)", "sleep(0.3)"))
    command = [sys.executable, "-c", code, str(needs.CHECKOUT), "run", *NONE, image, "sleep", "9"]
    with subprocess.Popen(
        command, env=sbx.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()
        for pid in tree(process.pid)[2:]:
            os.kill(pid, signal.SIGUSR1)
        assert process.wait(20) == 128 + signal.SIGUSR1
        assert process.stderr
        assert process.stderr.read() == b""


@known
@needs.userns
@needs.busybox
@needs.subids
def test_a_signal_just_before_the_memory_is_lent(sbx: Sbx, image: str) -> None:
    change = LATE.replace("greet(*words)", "os.kill(os.getpid(), 15); greet(*words)") + HELD.format(step=STOPS[0])
    begun = time.monotonic()
    done = launch(sbx, change, image, "true")
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "sbx: start the sandbox: interrupted\n")
    assert time.monotonic() - begun < 10


@known
@needs.userns
@needs.busybox
@needs.subids
def test_what_the_caller_ignores_is_no_reason(sbx: Sbx, image: str) -> None:
    with begin(sbx, image, STOPS[0], preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        process.send_signal(signal.SIGHUP)
        process.terminate()
        assert process.wait(20) == 143


@known
@needs.userns
@needs.busybox
@needs.subids
def test_a_supervisor_that_stands_still(sbx: Sbx, image: str) -> None:
    """Then there is an end to waiting, and the next launch clears up."""
    with begin(sbx, image, STOPS[0]) as process:
        supervisor = tree(process.pid)[1]
        os.kill(supervisor, signal.SIGSTOP)
        process.terminate()
        assert process.wait(30) == 143
        os.kill(supervisor, signal.SIGCONT)
    eventually(lambda: is_gone(supervisor), "it has ended")


@needs.userns
@needs.busybox
def test_limits_are_the_commands_alone(sbx: Sbx, image: str) -> None:
    assert sbx("run", *NONE, "--ulimit", "fsize=0", "--privileged", image, "true") == (0, "", "")
    words = ["run", *NONE, "--oom-score-adj", "500", image]
    with running(sbx, *words, "sh", "-c", "echo up; exec sleep 9") as process:
        mine = Path("/proc/self/oom_score_adj").read_text()
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == mine


@known
@needs.userns
@needs.busybox
@needs.subids
def test_no_memory_is_lent_where_more_would_be_lost(sbx: Sbx, image: str, tmp_path: Path) -> None:
    with begin(sbx, image, STOPS[0], "--cidfile", str(tmp_path / "cid"), lent=b"0") as process:
        process.terminate()
        assert process.wait(20) == 143
    assert not (tmp_path / "cid").exists()
    # and here what it says goes through the parent
    code = LAUNCH.format(change=HELD.format(step=STOPS[0]))
    command = [sys.executable, "-c", code, str(needs.CHECKOUT), "run", *NONE, "--output-limit", "1000", image, "true"]
    with subprocess.Popen(command, env=sbx.env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        eventually(lambda: len(tree(process.pid)) == 3, "pid 1")
        process.terminate()
        assert process.wait(20) == 143
        assert process.stderr
        assert process.stderr.read() == b"sbx: start the sandbox: interrupted\n"
