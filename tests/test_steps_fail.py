"""Each step of a launch fails once, for real: the message names it, the status is ours, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import needs
import pytest
import sabotage
from conftest import COMMAND, Sbx
from launching import NONE

pytestmark = [needs.userns, needs.busybox, needs.subids]

#: Steps of a launch that cannot be made to fail from outside the kernel, and why.
CANNOT_FAIL = {
    "Unshare": "its test is below: within a sandbox that allows no user namespaces",
    "Ready": "writes to a pipe that the parent reads",
    "SetUmask": "umask(2) always succeeds",
    "HideMemory": "asks for what every process may do",
    "StartCommand": "fork(2): fails where memory does",
    "NewKeyring": "a quota of keys that other processes of the user would have to fill",
    "NoNewPrivileges": "always allowed",
    "SetCapabilities": "takes away only",
    "ArmDeathSignal": "always allowed",
    "OrdinarySignals": "passes over what it cannot set",
    "ConfineCommand": "does nothing where Landlock is missing",
}
OPTIONS = {
    "BindLower": ["--rootfs"],
    "ReadOnlyRoot": ["--read-only"],
    "OpenTerminal": ["-t"],
    "RaiseOomScore": ["--oom-score-adj", "500"],
    "Tree": ["-v", "/etc:/mnt"],
    "MakeFolder": ["-w", "/work"],
    "CloseDescriptors": ["--pass-fd", "2"],
}


def run(sbx: Sbx, step: str, image: str, rootfs: Path) -> subprocess.CompletedProcess[str]:
    options = OPTIONS.get(step, [])
    words = ["run", *NONE, *options, str(rootfs) if step == "BindLower" else image, "true"]
    return subprocess.run(
        [sys.executable, sabotage.__file__, step, *words],
        env=sbx.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("step", sabotage.CHANGES)
def test_a_step_that_fails(sbx: Sbx, image: str, rootfs: Path, step: str) -> None:
    _, said = sabotage.CHANGES[step]
    done = run(sbx, step, image, rootfs)
    first = done.stderr.splitlines()[0] if done.stderr else ""
    assert first.startswith("sbx: "), done
    assert said in first
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (127 if step == "Exec" else 125, "")
    # and the fixture has looked for processes, mounts and folders


def test_the_first_step_fails(sbx: Sbx) -> None:
    """Where no user namespace can be made: within a sandbox of ours, as it happens."""
    words = [
        "run",
        *NONE,
        "-v",
        f"{needs.CHECKOUT}:{needs.CHECKOUT}:ro",
        "-v",
        f"{sys.prefix}:{sys.prefix}:ro",  # the interpreter may be in the home folder, which is hidden
        "--tmpfs",
        "/tmp/home",
        "-e",
        "SBX_HOME=/tmp/home",
    ]
    result = sbx(*words, "host", *COMMAND, "run", *NONE, "host", "true")
    assert result.status == 125
    assert "sbx: create namespaces user: " in result.stderr


def test_a_child_that_fails_while_its_maps_are_written_says_why(sbx: Sbx) -> None:
    """The parent does not wait for it to be ready; here it cannot tell its steps, to a full disk."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from rootless import errors, idmap, parent, plan
try:
    parent.start(plan.for_call(idmap.for_caller("auto")[0], print, None, False), trace=True)
except errors.SbxError as error:
    print(error.message)
"""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, str(needs.CHECKOUT)],
            env=sbx.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=full, text=True, timeout=60,
        )  # fmt: skip
    assert done.stdout == "create namespaces user: No space left on device\n"


def test_every_step_has_its_test(sbx: Sbx, image: str, rootfs: Path) -> None:
    """The plan itself says what there is: a new step needs a row."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from rootless import launch, options, plan
whole = plan.for_sandbox
def show(*arguments):
    made = whole(*arguments)
    print(*{type(step).__name__ for step in (*made.inside, *made.before_go)})
    return made
launch.plan.for_sandbox = show
launch.run(options.read("run", sys.argv[2:]))
"""
    wide = ["-t", "--read-only", "--oom-score-adj", "5", "-v", "/etc:/mnt", "-w", "/work", "--pass-fd", "2"]
    for words in ([*wide, image, "true"], ["--rootfs", str(rootfs), "true"]):
        done = subprocess.run(
            [sys.executable, "-c", code, str(needs.CHECKOUT), *NONE, "--dry-run", *words],
            env=sbx.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        found = set(done.stdout.splitlines()[0].split())
        assert not found - set(sabotage.CHANGES) - set(CANNOT_FAIL)
