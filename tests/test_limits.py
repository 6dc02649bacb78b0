"""Limits as the kernel enforces them, on a host where the user can have a cgroup with memory, pids and cpu.

Where there is none they are run by tests/test_vm.py, in a machine that has.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import needs
import pytest
from conftest import Sbx

from rootless import cgroups

BOX = ("--net", "none", "--rootfs")
OUT_OF_MEMORY = r"sbx: out of memory: limit 32 MiB, peak (32|31\.\d) MiB\n"


@pytest.fixture(scope="module", autouse=True)
def _limits(home: Path, rootfs: Path) -> None:
    """Skip where this user cannot have limits, with the command's own words for it."""
    done = Sbx(home)("run", "--memory", "64m", "--pids", "64", "--cpus", "1", *BOX, rootfs, "true")
    needs.enforce(done.stderr.split("\n")[0] if done.status else "")


@contextmanager
def running(sbx: Sbx, *arguments: object, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a sandbox that says when it is up, wait for that, and stop it afterwards."""
    process = sbx.start("run", "--name", name, *map(str, arguments), "sh", "-c", "echo up; exec sleep 1000")
    assert process.stdout
    assert process.stdout.readline() == b"up\n", process.communicate()
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def cgroup_of(sbx: Sbx, name: str) -> Path:
    """Return the cgroup of a running sandbox."""
    return Path(json.loads(sbx.ok("inspect", name))[0]["receipt"]["cgroup"])


@pytest.fixture
def neighbour(sbx: Sbx, rootfs: Path) -> Iterator[Callable[[], None]]:
    """A sandbox beside the one under test; call it to see that it goes on."""
    with running(sbx, "--memory", "64m", "--pids", "32", *BOX, rootfs, name="neighbour") as process:

        def goes_on() -> None:
            assert process.poll() is None
            assert sbx.ok("exec", "neighbour", "echo", "well") == "well"

        yield goes_on


def test_a_memory_bomb_ends_and_says_why(sbx: Sbx, rootfs: Path, neighbour: Callable[[], None]) -> None:
    done = sbx(
        "run", "--memory", "32m", "--memory-swap", "32m", *BOX, rootfs, "sh", "-c", "tail /dev/zero; echo survived"
    )
    # memory.oom.group: the shell, which used next to nothing, has ended with it
    assert (done.status, done.stdout) == (137, "")
    assert re.fullmatch(OUT_OF_MEMORY, done.stderr), done.stderr
    neighbour()


def test_a_fork_bomb_stops_at_its_limit(sbx: Sbx, rootfs: Path, tmp_path: Path, neighbour: Callable[[], None]) -> None:
    account = tmp_path / "account"
    bomb = "i=0; while [ $i -lt 60 ]; do sleep 100 & i=$((i+1)); done; exit 3"
    done = sbx("run", "--pids", "20", "--stats-json", account, *BOX, rootfs, "sh", "-c", bomb, timeout=120)
    used = json.loads(account.read_text())
    assert done.status != 0
    assert used["pids_peak"] <= 20
    assert used["pids_limit_hits"] > 0
    assert "sbx: the limit of 20 processes was reached" in done.stderr
    neighbour()


def test_a_cpu_hog_gets_its_share(sbx: Sbx, rootfs: Path, tmp_path: Path, neighbour: Callable[[], None]) -> None:
    account = tmp_path / "account"
    hog = "while :; do :; done"
    done = sbx("run", "--cpus", "0.2", "--timeout", "5", "--stats-json", account, *BOX, rootfs, "sh", "-c", hog)
    used = json.loads(account.read_text())
    assert done.status == 124
    assert used["reason"] == "timeout"
    assert used["cpu_seconds"] < 0.35 * used["wall_seconds"], used
    assert used["throttled_seconds"] > 1
    neighbour()


def test_a_writer_is_slowed_down(sbx: Sbx, rootfs: Path, tmp_path: Path, neighbour: Callable[[], None]) -> None:
    account = tmp_path / "account"
    with tempfile.TemporaryDirectory(dir=Path.home()) as folder:  # /tmp may be no disk
        arguments: list[str | Path] = [
            "--io-write-bps",
            f"{folder}:1m",
            "-v",
            f"{folder}:/data",
            "--stats-json",
            account,
        ]
        write = "dd if=/dev/zero of=/data/file bs=1M count=5 conv=fsync"
        done = sbx("run", *arguments, *BOX, rootfs, "sh", "-c", write, timeout=120)
    if done.status == 125 and ("no controller io" in done.stderr or "not on a disk" in done.stderr):
        needs.enforce(done.stderr.split("\n")[0])
    assert done.status == 0, done.stderr
    used = json.loads(account.read_text())
    assert used["wall_seconds"] > 3, used
    assert used["io_write_bytes"] >= 5 << 20
    neighbour()


def test_processors_are_chosen(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--cpuset-cpus", "0", *BOX, rootfs, "grep", "Cpus_allowed_list", "/proc/self/status")
    if "no controller cpuset" in done.stderr:
        needs.enforce(done.stderr.split("\n")[0])
    assert done.stdout == "Cpus_allowed_list:\t0\n"
    done = sbx("run", "--cpuset-cpus", "4000", *BOX, rootfs, "true")
    assert (done.status, done.stderr.startswith("sbx: set cpuset.cpus to 4000: ")) == (125, True)


def test_debug_says_where_the_cgroup_is(sbx: Sbx, rootfs: Path) -> None:
    said = sbx("run", "--debug", "--memory", "64m", *BOX, rootfs, "true", check=0).stderr
    assert re.search(
        r"^sbx: cgroup /sys/fs/cgroup/.*/sbx-\w+, made in (the cgroup that we are in|the scope|SBX_CGROUP)", said, re.M
    )


def test_the_receipt_shows_limits_in_force(sbx: Sbx, rootfs: Path) -> None:
    limits = ["--memory", "50000001", "--pids", "33", "--cpus", "0.75", "--cpu-weight", "50"]
    receipt = sbx.ok(
        "run", *limits, "--require", "memory,pids,cpus,seccomp,net", "--receipt", "-", *BOX, rootfs, "true"
    )
    rows = json.loads(receipt)["rows"]
    assert rows["memory"] == {
        "asked": "50000001", "actual": str(50000001 // 4096 * 4096), "in_force": True, "mechanism": "cgroup memory.max",
    }  # fmt: skip
    assert (rows["pids"]["actual"], rows["cpus"]["actual"]) == ("33", "75000 100000")
    assert all(rows[name]["in_force"] for name in ("memory", "oom-group", "pids", "cpus", "cpu-weight"))


def test_limits_too_low_to_begin(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--memory", "512k", "--memory-swap", "512k", *BOX, rootfs, "true")
    assert done.status in (125, 137)
    assert "out of memory: limit 512 KiB" in done.stderr
    done = sbx("run", "--pids", "1", *BOX, rootfs, "true")
    assert (done.status, done.stderr.split("\n")[0]) == (
        125,
        "sbx: limit processes to 1: pid 1 and the command are two",
    )
    assert sbx("run", "--pids", "2", *BOX, rootfs, "true").status == 0
    done = sbx("run", "--pids", "2", *BOX, rootfs, "sh", "-c", "true & wait")
    assert "sbx: the limit of 2 processes was reached" in done.stderr


def test_inside_the_cgroup_is_the_root_and_nothing_else_is_in_it(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, "--memory", "64m", *BOX, rootfs, name="one") as process:
        folder = cgroup_of(sbx, "one")
        assert sbx.ok("exec", "one", "cat", "/proc/self/cgroup").split("\n")[-1] == "0::/"
        pids = [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
        assert len(pids) == 2  # pid 1 and the command
        assert process.pid not in pids
        # What joins later is in it before it begins.
        joined = sbx.start("exec", "one", "sh", "-c", "echo in; cat")
        assert joined.stdout
        assert joined.stdout.readline() == b"in\n"
        assert len((folder / "cgroup.procs").read_text().split()) == 3
        joined.communicate()
    assert not folder.exists()


def test_update_pause_kill(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, "--memory", "64m", "--pids", "20", *BOX, rootfs, name="one") as process:
        folder = cgroup_of(sbx, "one")
        sbx.ok("update", "--memory", "80m", "--pids", "9", "--cpus", "0.5", "one")
        assert (folder / "memory.max").read_text() == f"{80 << 20}\n"
        assert (folder / "pids.max").read_text() == "9\n"
        assert (folder / "cpu.max").read_text() == "50000 100000\n"
        sbx.ok("pause", "one")
        assert "frozen 1" in (folder / "cgroup.events").read_text()
        assert json.loads(sbx.ok("stats", "--once", "--json", "one"))["state"] == "paused"
        paused = sbx("exec", "one", "true")
        assert (paused.status, paused.stderr.split("\n")[0]) == (125, "sbx: run a command in one: it is paused")
        sbx.ok("unpause", "one")
        assert sbx.ok("exec", "one", "echo", "on") == "on"
        sbx.ok("pause", "one")
        sbx.ok("kill", "one")  # the paused, too
        process.communicate(timeout=30)
        assert process.returncode == 137


def _ours() -> str:
    """Return the topmost of the cgroups around this one in which this user may move processes, or ""."""
    top, found = cgroups.mount_point(), ""
    folder = cgroups.of_process()
    while folder.startswith(top):
        if os.access(f"{folder}/cgroup.procs", os.W_OK) and os.stat(folder).st_uid == os.geteuid():
            found = folder
        folder = os.path.dirname(folder)
    return found


@pytest.fixture
def named() -> Iterator[Path]:
    """A cgroup that the user made for sandboxes, beside the one that the tests are in."""
    if not (above := _ours()):
        pytest.skip("a login session's cgroup is root's: this user can move no process out of it")
    folder = Path(above, "named")
    folder.mkdir()
    try:
        yield folder
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
        folder.rmdir()


def test_a_named_subtree(sbx: Sbx, rootfs: Path, named: Path) -> None:
    """By its folder, and as /proc/PID/cgroup has it."""
    for words in (str(named), str(named).removeprefix(cgroups.mount_point())):
        done = sbx("run", "--debug", "--memory", "64m", *BOX, rootfs, "true", env={"SBX_CGROUP": words}, check=0)
        assert re.search(rf"^sbx: cgroup {re.escape(str(named))}/sbx-\w+, made in SBX_CGROUP$", done.stderr, re.M)
    limits = ("--memory", "32m", "--memory-swap", "32m")
    done = sbx("run", *limits, *BOX, rootfs, "tail", "/dev/zero", env={"SBX_CGROUP": str(named)})
    assert re.fullmatch(OUT_OF_MEMORY, done.stderr), done.stderr
    # exec finds it without being told
    process = sbx.start(
        "run", "--name", "one", "--pids", "20", *BOX, rootfs, "sh", "-c", "echo up; exec sleep 1000",
        env={"SBX_CGROUP": str(named)},
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    assert sbx.ok("exec", "one", "cat", "/proc/self/cgroup").endswith("0::/")
    assert cgroup_of(sbx, "one").parent == named
    process.terminate()
    process.communicate(timeout=30)


def test_a_named_subtree_out_of_reach(sbx: Sbx, rootfs: Path) -> None:
    """One's own, but from a login session, which is root's part of the tree: nobody but root may move us there."""
    uid = os.geteuid()
    above = Path(cgroups.mount_point(), f"user.slice/user-{uid}.slice/user@{uid}.service/app.slice")
    if _ours() or not os.access(above, os.W_OK):
        pytest.skip("this user may move processes here, or has no systemd of its own")
    named = above / "named"
    named.mkdir()
    try:
        done = sbx("run", "--memory", "64m", *BOX, rootfs, "echo", "ran", env={"SBX_CGROUP": str(named)})
        assert (done.status, done.stdout) == (125, "")
        message, hint = done.stderr.rstrip("\n").split("\n")
        assert message.startswith(f"sbx: limit memory: join {named}/sbx-")
        assert "this needs write permission in the cgroup above both it and ours" in message
        assert "start from a shell in that subtree" in hint
        assert not list(named.glob("sbx-*"))
    finally:
        named.rmdir()


def test_a_named_cgroup_with_processes_or_of_the_wrong_type(sbx: Sbx, rootfs: Path, named: Path) -> None:
    def said() -> str:
        done = sbx("run", "--memory", "64m", *BOX, rootfs, "echo", "ran", env={"SBX_CGROUP": str(named)})
        assert (done.status, done.stdout) == (125, "")
        return done.stderr.split("\n")[0].removeprefix(f"sbx: use SBX_CGROUP {named}: ")

    stranger = subprocess.Popen(["sleep", "1000"])
    try:
        (named / "cgroup.procs").write_text(str(stranger.pid))
        assert said() == f"processes are in it: {stranger.pid}"
        assert (named / "cgroup.procs").read_text() == f"{stranger.pid}\n"  # and stays
    finally:
        stranger.kill()
        stranger.wait()
    (named / "leaf").mkdir()
    (named / "leaf" / "cgroup.type").write_text("threaded")
    assert said() == "it is of the type domain threaded, in which no limits can be set"


@pytest.mark.skipif(os.geteuid() == 0, reason="every cgroup is root's")
def test_a_named_cgroup_of_somebody_else(sbx: Sbx, rootfs: Path) -> None:
    """Also in the middle of one's own: what is missing is write permission to its files."""
    done = sbx("run", "--memory", "64m", *BOX, rootfs, "true", env={"SBX_CGROUP": "/system.slice"})
    assert (done.status, done.stderr.split("\n")[0]) == (
        125,
        f"sbx: use SBX_CGROUP {cgroups.mount_point()}/system.slice: it is no cgroup that you own",
    )


def test_a_sandbox_that_joins_has_limits_of_its_own(sbx: Sbx, rootfs: Path) -> None:
    """`--join` shares namespaces; who runs out of memory or processes is the one whose limit it was."""
    with running(sbx, "--memory", "64m", "--pids", "20", *BOX, rootfs, name="first") as process:
        for shared in (["net,ipc,uts"], ["pid", "--net", "none"]):
            join: list[str | Path] = ["--join", "first", "--share", *shared, "--rootfs", rootfs]
            limits = ["--memory", "32m", "--memory-swap", "32m", "--pids", "9"]
            receipt = json.loads(
                sbx.ok("run", *limits, "--require", "memory,pids", "--receipt", "-", *join, "true").split("\n")[0]
            )
            assert (receipt["rows"]["memory"]["actual"], receipt["rows"]["pids"]["actual"]) == (str(32 << 20), "9")
            assert receipt["cgroup"] != str(cgroup_of(sbx, "first"))
            done = sbx("run", *limits, *join, "tail", "/dev/zero")
            assert (done.status, bool(re.fullmatch(OUT_OF_MEMORY, done.stderr))) == (137, True), done
            done = sbx("run", *limits, *join, "sh", "-c", "i=0; while [ $i -lt 12 ]; do sleep 9 & i=$((i+1)); done")
            assert "sbx: the limit of 9 processes was reached" in done.stderr
            assert process.poll() is None
            assert sbx.ok("exec", "first", "echo", "well") == "well"
        # Without a limit it has no cgroup, and is not in the other's either.
        with running(sbx, "--join", "first", "--rootfs", rootfs, name="bare"):
            assert json.loads(sbx.ok("inspect", "bare"))[0]["receipt"]["cgroup"] is None
            assert len((cgroup_of(sbx, "first") / "cgroup.procs").read_text().split()) == 2


def test_stats_and_top(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, "--memory", "64m", *BOX, rootfs, name="one"):
        used = json.loads(sbx.ok("stats", "--once", "--json", "one"))
        assert (used["name"], used["source"], used["pids"], used["memory_limit_bytes"]) == (
            "one",
            "cgroup",
            2,
            64 << 20,
        )
        assert 0 < used["memory_bytes"] <= used["memory_peak_bytes"]
        assert "64 MiB" in sbx.ok("stats", "--once", "one")
        assert "sleep 1000" in sbx.ok("top", "one")


def test_a_killed_parent_leaves_no_cgroup(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, "--memory", "64m", *BOX, rootfs, name="one") as process:
        folder = cgroup_of(sbx, "one")
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        assert _vanishes(folder)


def test_when_parent_and_supervisor_were_killed_the_next_launch_clears(sbx: Sbx, rootfs: Path) -> None:
    with running(sbx, "--memory", "64m", *BOX, rootfs, name="one") as process:
        folder = cgroup_of(sbx, "one")
        supervisor = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])
        process.send_signal(signal.SIGSTOP)
        os.kill(supervisor, signal.SIGKILL)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
    sbx.ok("run", "--memory", "64m", *BOX, rootfs, "true")
    assert _vanishes(folder)


def sandboxes() -> set[Path]:
    """Return all cgroups that are or hold a sandbox, of whatever parent."""
    return {path for path in Path(cgroups.mount_point()).rglob("sbx-*") if path.name != cgroups.OURS}


def test_nothing_is_left(sbx: Sbx, rootfs: Path) -> None:
    before = sandboxes()
    for command in (["true"], ["false"], ["/nowhere"], ["sh", "-c", "sleep 100 & exit 3"]):
        sbx("run", "--memory", "64m", *BOX, rootfs, *command)
    sbx("run", "--memory", "64m", "--require", "time", *BOX, rootfs, "true", check=125)
    assert all(_vanishes(path) for path in sandboxes() - before)


def test_many_at_once_keep_their_accounts(sbx: Sbx, rootfs: Path) -> None:
    """A launch clears debris; a cgroup that has just become empty is none until its parent has read it."""
    bomb: list[str | Path] = ["--memory", "32m", "--memory-swap", "32m", *BOX, rootfs, "tail", "/dev/zero"]
    bombs = [sbx.start("run", *bomb) for _ in range(3)]
    for _ in range(6):
        sbx.ok("run", "--memory", "64m", *BOX, rootfs, "true")
    for process in bombs:
        _, errors = process.communicate(timeout=120)
        assert re.fullmatch(OUT_OF_MEMORY, errors.decode())


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_thousand_sandboxes_leave_no_cgroup(sbx: Sbx, rootfs: Path) -> None:
    before = sandboxes()
    for _ in range(250):
        batch = [sbx.start("run", "--memory", "64m", *BOX, rootfs, "true") for _ in range(4)]
        ended = [(process.communicate(timeout=120), process.returncode) for process in batch]
        assert ended == [((b"", b""), 0)] * 4
    assert all(_vanishes(path) for path in sandboxes() - before)


def _vanishes(folder: Path) -> bool:
    """Wait for a cgroup's end: whoever removes it is no child of ours that could be waited for."""
    deadline = time.monotonic() + 20
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not folder.exists()
