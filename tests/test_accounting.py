"""What a run used and why it ended, without any cgroup; processor time and output as limits."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from terminals import Terminal

from rootless import accounting

BOX = ("--net", "none", "--rootfs")
SPIN = "while :; do :; done"


def account(sbx: Sbx, tmp_path: Path, *words: str | Path) -> tuple[int, dict[str, object]]:
    file = tmp_path / "account"
    done = sbx("run", "--stats-json", file, *words)
    return done.status, json.loads(file.read_text())


@pytest.mark.parametrize(
    ("script", "status", "reason"), [("exit 0", 0, "exit"), ("exit 7", 7, "exit"), ("kill -TERM $$", 143, "signal")]
)
def test_why_it_ended(sbx: Sbx, rootfs: Path, tmp_path: Path, script: str, status: int, reason: str) -> None:
    ended, used = account(sbx, tmp_path, *BOX, rootfs, "sh", "-c", script)
    assert (ended, used["status"], used["reason"]) == (status, status, reason)
    assert used.get("signal") == (15 if reason == "signal" else None)


def test_processor_time_is_counted(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    status, used = account(sbx, tmp_path, "--timeout", "1", *BOX, rootfs, "sh", "-c", SPIN)
    assert (status, used["reason"]) == (124, "timeout")
    assert 0.2 < float(str(used["user_seconds"])) < 2
    assert 1 <= float(str(used["wall_seconds"])) < 12


def test_a_limit_on_processor_time(sbx: Sbx, rootfs: Path) -> None:
    began = time.monotonic()
    done = sbx("run", "--cpu-time", "0.5", *BOX, rootfs, "sh", "-c", SPIN)
    assert (done.status, done.stderr) == (152, "sbx: limit of processor time reached: 0.5 s\n")
    assert time.monotonic() - began > 0.5
    # of all processes together, those that have ended included
    children = f"for i in 1 2 3; do sh -c '{SPIN}' & done; wait"
    assert sbx("run", "--cpu-time", "0.5", *BOX, rootfs, "sh", "-c", children).status == 152
    # time asleep is none
    assert sbx("run", "--cpu-time", "0.5", *BOX, rootfs, "sleep", "1").status == 0


def test_a_limit_on_output(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--output-limit", "10k", *BOX, rootfs, "sh", "-c", "yes & yes >&2")
    assert done.status == 153
    assert len(done.stdout) + len(done.stderr.replace("sbx: limit of output reached: 10k\n", "")) == 10 << 10
    done = sbx("run", "--output-limit", "10k", *BOX, rootfs, "sh", "-c", "head -c 10240 /dev/zero; exit 4")
    assert (done.status, len(done.stdout)) == (4, 10240)
    done = sbx("run", "--output-limit", "10k", *BOX, rootfs, "sh", "-c", "head -c 10241 /dev/zero")
    assert (done.status, len(done.stdout)) == (153, 10240)


def test_output_under_a_limit_is_passed_on_as_it_is(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--output-limit", "1m", *BOX, rootfs, "sh", "-c", "seq 20000; echo error >&2; exit 5")
    assert (done.status, done.stderr) == (5, "error\n")
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 20001))
    # the failure of a start is told on the caller's own stderr
    done = sbx("run", "--output-limit", "1m", *BOX, rootfs, "/nowhere")
    assert (done.status, done.stderr.count("\n")) == (127, 1)


def test_a_reader_that_goes_away_ends_it(sbx: Sbx, rootfs: Path) -> None:
    process = sbx.start("run", "--output-limit", "1g", *BOX, rootfs, "yes")
    head = subprocess.run(["head", "-n", "1"], stdin=process.stdout, capture_output=True)
    assert process.stdout
    process.stdout.close()
    assert head.stdout == b"y\n"
    assert process.wait(20) == 141
    for stream in (process.stdin, process.stderr):
        assert stream
        stream.close()


def test_output_on_a_terminal_is_limited(sbx: Sbx, rootfs: Path, tty: Callable[..., Terminal]) -> None:
    terminal = tty([*COMMAND, "run", "--output-limit", "20k", *BOX, str(rootfs), "yes"], env=sbx.env)
    assert terminal.wait(20) == 153


def test_the_summary_names_what_was_used(sbx: Sbx, rootfs: Path) -> None:
    lines = sbx("run", "--stats", *BOX, rootfs, "true").stderr.split("\n")
    assert lines[0] == "sbx: ended: exit, status 0"
    assert lines[1].startswith("sbx: wall ")
    assert [line.split(":")[1].strip() for line in lines[2:5]] == ["memory", "page faults", "context switches"]


def test_what_was_used_does_not_go_to_the_commands_stdout(sbx: Sbx, rootfs: Path) -> None:
    done = sbx("run", "--stats-json", "-", *BOX, rootfs, "echo", "ran")
    assert (done.status, done.stdout) == (125, "")
    assert done.stderr == "sbx: write what was used to stdout: that is the command's\nhint: name a file\n"


@pytest.mark.parametrize("option", ["--stats-json", "--receipt"])
@pytest.mark.parametrize(
    ("file", "cause"),
    [("no/file", "No such file or directory"), ("", "Is a directory"), ("closed/file", "Permission denied")],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_runs(
    sbx: Sbx, rootfs: Path, tmp_path: Path, option: str, file: str, cause: str
) -> None:
    if os.geteuid() == 0 and "Permission" in cause:
        pytest.skip("root may write everywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    (tmp_path / "shared").mkdir()
    touch = ("-v", f"{tmp_path / 'shared'}:/shared", *BOX, rootfs, "touch", "/shared/ran")
    other = "--receipt" if option == "--stats-json" else "--stats-json"
    done = sbx("run", other, tmp_path / "new", option, tmp_path / file, *touch)
    assert (done.status, done.stdout) == (125, "")
    assert done.stderr == f"sbx: write {tmp_path / file}: {cause}\n"
    # nothing ran, and nothing is left: neither a sandbox's folder (sbx sees to that) nor the other file, empty
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "shared"]
    assert not list((tmp_path / "shared").iterdir())


def test_a_launch_that_fails_leaves_files_as_they_were(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("as it was")
    outputs = ("--stats-json", tmp_path / "new", "--receipt", tmp_path / "old")
    assert sbx("run", *outputs, "--user", "nobody-at-all", *BOX, rootfs, "true").status == 125
    assert sbx("run", *outputs, "--output-limit", "much", *BOX, rootfs, "true").status == 125
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "as it was")]


def test_files_are_written_over_and_pipes_written_to(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    (tmp_path / "old").write_text("long before " * 10_000)
    os.symlink("target", tmp_path / "link")
    sbx.ok("run", "--stats-json", tmp_path / "old", "--receipt", tmp_path / "link", *BOX, rootfs, "true")
    assert json.loads((tmp_path / "old").read_text())["status"] == 0
    assert json.loads((tmp_path / "target").read_text())["version"] == 1
    reader, writer = os.pipe()
    process = sbx.start(
        "run", "--stats-json", f"/dev/fd/{writer}", *BOX, rootfs, "sh", "-c", "ls /proc/self/fd", pass_fds=[writer]
    )
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert json.load(stream)["reason"] == "exit"
    said, errors = process.communicate(timeout=20)
    assert (said, errors, process.returncode) == (b"0\n1\n2\n3\n", b"", 0)


@needs.tun
@needs.program("slirp4netns")
def test_network_bytes_are_counted(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    # Asks the back end's own resolver: nothing leaves the machine for it to be counted.
    ask = "nslookup -timeout=1 name.invalid 10.0.2.3 || true"
    words: list[str | Path] = ["--net", "slirp4netns", "--rootfs", rootfs, "sh", "-c", ask]
    status, used = account(sbx, tmp_path, *words)
    assert status == 0
    assert int(str(used["net_sent_bytes"])) > 40


@pytest.mark.parametrize(
    ("used", "line"),
    [
        ({"memory_limit_bytes": 64 << 20, "memory_peak_bytes": 64 << 20}, "out of memory: limit 64 MiB, peak 64 MiB"),
        ({"memory_limit_bytes": 1536, "memory_peak_bytes": 1024}, "out of memory: limit 1.5 KiB, peak 1 KiB"),
        ({}, "out of memory: the host's, or a limit above the sandbox's"),
    ],
)
def test_out_of_memory_in_one_line(used: dict[str, object], line: str) -> None:
    assert accounting.reason(137, "", {"out_of_memory": 1}) == "out of memory"
    assert accounting.explanation("out of memory", used) == [line]
    assert accounting.reason(137, "", {"out_of_memory": 0}) == "signal"
