"""Limits as they are asked for, and the words for what this host cannot enforce; enforcement is in test_limits.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import needs
import pytest
from conftest import COMMAND, Sbx
from terminals import Terminal

from rootless import cgroups, options, resources
from rootless.errors import SbxError

BOX = ("--net", "none", "--rootfs")


def asked(*words: str) -> dict[str, str]:
    request = options.read("run", [*words, "image"])
    assert request is not None
    return resources.asked(request)


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ("--memory 64m", {"memory.max": "67108864", "memory.swap.max": "67108864", "memory.oom.group": "1"}),
        ("-m64M --memory-swap 96m", {"memory.max": "67108864", "memory.swap.max": "33554432", "memory.oom.group": "1"}),
        ("-m 1g --memory-swap -1", {"memory.max": "1073741824", "memory.swap.max": "max", "memory.oom.group": "1"}),
        ("-m 1kib --memory-swap 1024", {"memory.max": "1024", "memory.swap.max": "0", "memory.oom.group": "1"}),
        ("--memory-high 1.5g", {"memory.high": "1610612736"}),
        ("--cpus 1.5", {"cpu.max": "150000 100000"}),
        ("--cpus .25 --cpu-weight 10", {"cpu.max": "25000 100000", "cpu.weight": "10"}),
        ("--cpuset-cpus 0-1,3", {"cpuset.cpus": "0-1,3"}),
        ("--pids-limit 100", {"pids.max": "100"}),
        ("--pids 1 --no-init", {"pids.max": "1"}),
        ("--pids -1", {}),
        ("--cgroup-conf memory.low=4096", {"memory.low": "4096"}),
        ("--ulimit nofile=10", {}),
    ],
)
def test_options_become_files(words: str, files: dict[str, str]) -> None:
    assert asked(*words.split()) == files


@pytest.mark.parametrize(
    "words",
    [
        "--memory 64x",
        "--memory -1",
        "--memory 1e9",
        "--memory-swap 64m",
        "--memory 64m --memory-swap 32m",
        "--cpus 0",
        "--cpus 0.001",
        "--cpus 1,5",
        "--cpus nan",
        "--cpu-weight 0",
        "--cpu-weight 10001",
        "--cpuset-cpus 0;1",
        "--pids 1",
        "--io-read-bps 10m",
        "--io-read-bps /dev/null:10m",
        "--io-read-bps /nowhere:10m",
        "--io-write-iops /:1.5",
        "--cgroup-conf memory.max",
        "--cgroup-conf cgroup.procs=1",
        "--cgroup-conf ../memory.max=1",
    ],
)
def test_bad_limits_are_refused(words: str) -> None:
    with pytest.raises(SbxError) as caught:
        asked(*words.split())
    assert caught.value.code in ("limit-invalid", "size-invalid")


def test_limits_of_one_disk_share_a_line() -> None:
    disks = [path for path in Path("/sys/block").iterdir() if Path("/dev", path.name).is_block_device()]
    if not disks:
        needs.enforce("no block device in /dev")
    disk = Path("/dev", disks[0].name)
    number = os.stat(disk).st_rdev
    files = asked("--io-read-bps", f"{disk}:1m", "--io-write-iops", f"{disk}:10")
    assert files == {"io.max": f"{os.major(number)}:{os.minor(number)} rbps=1048576 wiops=10"}


def test_the_plan_shows_them(sbx: Sbx, rootfs: Path) -> None:
    lines = sbx.ok("run", "--dry-run", "--memory", "64m", "--pids", "9", *BOX, rootfs, "true").split("\n")
    joins = next(place for place, line in enumerate(lines) if "memory.max=67108864" in line)
    # in it before pid 1 is made, out of it (the supervisor) before the command may start
    assert joins < next(place for place, line in enumerate(lines) if line.startswith("start pid 1"))
    assert any("take the supervisor out of the cgroup, pids.max=9" in line for line in lines)
    assert "the cgroup" not in sbx.ok("run", "--dry-run", *BOX, rootfs, "true")


@pytest.fixture
def _no_limits(home: Path, rootfs: Path) -> None:
    if Sbx(home)("run", "--memory", "64m", *BOX, rootfs, "true").status == 0:
        pytest.skip("this host enforces limits")


@pytest.mark.usefixtures("_no_limits")
def test_what_cannot_be_enforced_is_an_error(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--memory", "64m", "--pids", "9", *BOX, rootfs, "echo", "ran")
    assert (done.status, done.stdout) == (125, "")
    message, hint = done.stderr.rstrip("\n").split("\n")
    assert message.startswith("sbx: limit memory, pids: ")
    # the cure, then the weaker means by name, then the way on
    assert hint.startswith("hint: ")
    assert hint.index("--ulimit as=BYTES") < hint.index("--ulimit nproc=N") < hint.index("--best-effort")


@pytest.mark.usefixtures("_no_limits")
def test_best_effort_warns_and_goes_on(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    receipt = tmp_path / "receipt"
    done = sbx("run", "--memory", "64m", "--best-effort", "--receipt", receipt, *BOX, rootfs, "echo", "ran")
    assert (done.status, done.stdout) == (0, "ran\n")
    assert done.stderr.startswith("sbx: warning: limit memory: ")
    assert '"memory": {"asked": "67108864", "actual": null, "in_force": false' in receipt.read_text()
    required = sbx("run", "--memory", "64m", "--best-effort", "--require", "memory", *BOX, rootfs, "echo", "ran")
    assert (required.status, required.stdout) == (125, "")
    assert "require memory: it is not in force" in required.stderr


@pytest.mark.usefixtures("_no_limits")
def test_counting_needs_no_cgroup(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--stats", *BOX, rootfs, "sh", "-c", "exit 3")
    assert done.status == 3
    assert done.stderr.startswith("sbx: ended: exit, status 3\n")


v2 = pytest.mark.skipif(not cgroups.mount_point(), reason="no cgroup v2 tree is mounted here")


@v2
@pytest.mark.parametrize(
    ("named", "cause"),
    [
        pytest.param("/", "it is no cgroup that you own", marks=pytest.mark.skipif(os.geteuid() == 0, reason="root")),
        ("nowhere", "there is no such cgroup"),
        ("/sbx-1/../sbx-0", "there is no such cgroup"),
        ("cgroup.procs", "there is no such cgroup"),
        ("../../../tmp", "there is no such cgroup"),
        ("/tmp", "it is not in the cgroup v2 tree, "),
        ("no\nlines\033[0m", "there is no such cgroup"),
    ],
)
def test_a_named_cgroup_that_cannot_be_used_is_an_error(sbx: Sbx, rootfs: Path, named: str, cause: str) -> None:
    """Also where nothing but an account is asked for, and where our own cgroup would do."""
    done = sbx("run", "--stats", *BOX, rootfs, "echo", "ran", env={"SBX_CGROUP": named})
    message, hint = done.stderr.rstrip("\n").split("\n")
    assert (done.status, done.stdout) == (125, "")
    assert message.startswith(f"sbx: use SBX_CGROUP {cgroups.mount_point()}") or "../" in named
    assert cause in message
    assert hint.startswith("hint: ")
    best = sbx("run", "--stats", "--best-effort", *BOX, rootfs, "echo", "ran", env={"SBX_CGROUP": named})
    assert (best.status, best.stdout) == (0, "ran\n")


@v2
def test_a_v1_cgroup_cannot_be_named(sbx: Sbx, rootfs: Path) -> None:
    with open("/proc/self/mounts") as stream:
        old = next((line.split()[1] for line in stream if line.split()[2] == "cgroup"), "")
    if not old:
        pytest.skip("no cgroup v1 tree here")
    done = sbx("run", "--stats", *BOX, rootfs, "true", env={"SBX_CGROUP": old})
    assert (done.status, "it is not in the cgroup v2 tree, " in done.stderr) == (125, True)


def test_commands_on_a_sandbox_without_cgroup(sbx: Sbx, rootfs: Path) -> None:
    process = sbx.start("run", "--name", "plain", *BOX, rootfs, "sh", "-c", "echo up; exec sleep 100")
    assert process.stdout
    process.stdout.readline()
    try:
        cgroups.look()
        cause, cure = "it was started without limits", ""
    except SbxError as error:
        cause, cure = error.message.removeprefix("find a cgroup: "), error.hint + "; then "
        if "none was delegated" in cause:
            assert cure == "as root: sh helpers/delegate-cgroup PID-OF-YOUR-SHELL; then "
    cure += "start it with --stats, or with a limit such as --pids 10000"
    for command in (["pause"], ["unpause"], ["update", "--pids", "9"]):
        done = sbx(*command, "plain")
        said = f"sbx: {command[0]} plain: it has no cgroup of its own: {cause}\nhint: {cure}\n"
        assert (done.status, done.stdout, done.stderr) == (125, "", said)
    assert "sleep 100" in sbx.ok("top", "plain")
    assert '"source": "processes"' in sbx.ok("stats", "--json", "--once", "plain")
    process.terminate()
    process.communicate(timeout=20)


def test_stats_live_on_a_terminal(sbx: Sbx, rootfs: Path, tty: Callable[..., Terminal]) -> None:
    process = sbx.start("run", "--name", "seen", *BOX, rootfs, "sh", "-c", "echo up; exec sleep 100")
    assert process.stdout
    process.stdout.readline()
    terminal = tty([*COMMAND, "stats", "--interval", "0.2"], env=sbx.env, size=(24, 160))
    for _ in range(2):  # it changes in its place
        terminal.expect("seen +running")
    process.terminate()
    process.communicate(timeout=20)
    terminal.send("\3")
    assert terminal.wait(20) == 130


def test_tables_of_counters(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\nmax 7\noom_kill 2\n")
    (tmp_path / "memory.peak").write_text("4096\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cgroup.controllers").write_text("io memory\n")
    (tmp_path / "io.stat").write_text(
        "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0\n254:0 rbytes=5 wbytes=1 rios=1 wios=1\n"
    )
    assert cgroups.account(str(tmp_path)) == {
        "memory_peak_bytes": 4096, "out_of_memory": 2, "memory_limit_hits": 7,
        "io_read_bytes": 15, "io_write_bytes": 21, "io_reads": 2, "io_writes": 3,
    }  # fmt: skip


def test_rounding_holds_in_the_receipt() -> None:
    from rootless.receipt import _holds

    assert _holds("50000001", "49999872")
    assert not _holds("50000001", "49000000")
    assert not _holds("50000001", "max")
    assert _holds("8:0 rbps=1048576", "8:0 rbps=1048576 wbps=max riops=max wiops=max")
    assert not _holds("8:0 rbps=1048576", "8:16 rbps=1048576 wbps=max riops=max wiops=max")
    assert not _holds("75000 100000", "")


def test_update_asks_for_what_run_asks_for() -> None:
    values: dict[str, Any] = dict.fromkeys(resources.OPTIONS, "") | {"cpu_weight": None, "pids": 5}
    values |= {name: [] for name in resources.OPTIONS if name.startswith("io_") or name == "cgroup_conf"}
    assert resources.asked(SimpleNamespace(**values)) == {"pids.max": "5"}
