"""A helper program that does nothing when it should get ready: whoever waits for it hears what else happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import children, eventually, is_gone, shell_status, tree
from test_network import USER_MODE, fake, helpers, running

pytestmark = [needs.userns, needs.busybox]
#: sbx that has less patience
IMPATIENT = "from rootless import __main__, programs; programs.PATIENCE = 1.0; raise SystemExit(__main__.main())"


@contextmanager
def stalled(sbx: Sbx, rootfs: Path, folder: Path, backend: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A launch whose helper program sleeps, and that program's id; both have to be gone within seconds."""
    number = folder / "number"
    env = fake(folder, backend, f"echo $$ >{number}.new; mv {number}.new {number}; exec sleep 1000")
    with sbx.start("run", "--net", backend, "--rootfs", rootfs, "true", env=env) as process:
        eventually(number.exists, "the helper program has started")
        helper = int(number.read_text())
        yield process, helper
        eventually(lambda: is_gone(helper), "the helper program has ended")


@pytest.mark.parametrize("backend", USER_MODE)
def test_a_signal_is_heard(sbx: Sbx, rootfs: Path, tmp_path: Path, backend: str) -> None:
    with stalled(sbx, rootfs, tmp_path, backend) as (process, _):
        process.terminate()
        _, stderr = process.communicate(timeout=10)
    assert (shell_status(process.returncode), stderr) == (143, b"sbx: start the sandbox: interrupted\n")


@pytest.mark.parametrize("backend", USER_MODE)
@pytest.mark.parametrize("victim", ["supervisor", "pid 1"])
def test_the_sandboxs_end_is_heard(sbx: Sbx, rootfs: Path, tmp_path: Path, backend: str, victim: str) -> None:
    with stalled(sbx, rootfs, tmp_path, backend) as (process, helper):
        supervisor = next(pid for pid in children(process.pid) if pid != helper)
        os.kill(tree(supervisor)[0 if victim == "supervisor" else 1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=10)
    assert process.returncode == 125
    assert stderr.startswith(b"sbx: start the sandbox: its first process was killed\n")


@pytest.mark.parametrize("backend", USER_MODE)
def test_patience_ends(sbx: Sbx, rootfs: Path, tmp_path: Path, backend: str) -> None:
    changes = fake(tmp_path, backend, f"echo $$ >{tmp_path}/number; exec sleep 1000")
    env = {**sbx.env, "PATH": str(changes["PATH"])}
    words = [sys.executable, "-c", IMPATIENT, "run", "--net", backend, "--rootfs", str(rootfs), "true"]
    start = time.monotonic()
    done = subprocess.run(words, env=env, cwd=needs.CHECKOUT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert 1 <= time.monotonic() - start < 10
    assert done.returncode == 125
    assert done.stderr.startswith(f"sbx: wait for {backend}: not a word in 1 seconds\nhint: ")
    eventually(lambda: is_gone(int((tmp_path / "number").read_text())), "the helper program has ended")


@needs.program("slirp4netns")
@needs.tun
def test_a_helper_that_stops_answering(sbx: Sbx, rootfs: Path) -> None:
    before = helpers("slirp4netns")
    with running(sbx, rootfs, "--net", "slirp4netns", "--name", "stopped"):
        (helper,) = helpers("slirp4netns") - before
        os.kill(helper, signal.SIGSTOP)
        code = "from rootless import __main__; from rootless.network import ports; ports._ANSWER = 0.5; __main__.main()"
        words = [sys.executable, "-c", code, "port", "stopped", "--add", "0:80"]
        done = subprocess.run(words, env=sbx.env, cwd=needs.CHECKOUT, capture_output=True, text=True, timeout=20)
        os.kill(helper, signal.SIGCONT)
    assert (done.returncode, done.stderr) == (
        125,
        "sbx: publish ports: slirp4netns does not answer\nhint: is it stopped?\n",
    )


@needs.program("slirp4netns")
@needs.tun
def test_who_inherits_a_helpers_pipes_is_not_waited_for(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    """It ends without being ready, and a child of its own holds what it was to say so with."""
    env = fake(tmp_path, "slirp4netns", f"sleep 1000 & echo $! >{tmp_path}/number; echo 'out of order' >&2; exit 1")
    done = sbx("run", "--net", "slirp4netns", "--rootfs", rootfs, "true", env=env, timeout=10)
    os.kill(int((tmp_path / "number").read_text()), signal.SIGKILL)
    assert (done.status, "sbx: attach slirp4netns: out of order\n" in done.stderr) == (125, True), done
