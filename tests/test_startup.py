"""The hot commands load nothing but what they need: a fresh interpreter tells what it imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from test_imports import CHEAP, WARM

#: What the interpreter says of each import with -X importtime: a name behind two columns of microseconds.
REPORT = re.compile(r"^import time: +[0-9]+ \| +[0-9]+ \| +(\S+)$", re.MULTILINE)
#: Besides the standard modules named in test_imports: the bridge to the kernel, and the binding that syscalls.py looks
#: for where Python has no os.unshare; os.wait4 makes its answer of `resource`, after the command has ended.
ALLOWED = CHEAP | {"_ctypes", "_struct", "rootless", "unshare", "resource"}


def imported(*arguments: str, code: str = "", env: dict[str, str] | None = None) -> tuple[int, set[str], str]:
    """Run the command (or `code`): its exit status, the modules that it and its children loaded, and what it said."""
    interpreter = [COMMAND[0], *COMMAND[1:-1], "-X", "importtime"]
    command = [*interpreter, "-c", code] if code else [*interpreter, COMMAND[-1], *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, env=env)
    return done.returncode, set(REPORT.findall(done.stderr)), re.sub(r"(?m)^import time:.*\n", "", done.stderr)


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """What an interpreter loads for `import os` alone, with the names of the allowed modules' own C halves."""
    return imported(code=f"import {', '.join(sorted(CHEAP - {'__future__'}))}, _ctypes, _struct")[1]


def assert_hot(loaded: set[str], bare: set[str]) -> None:
    foreign = {name for name in loaded - bare if name.split(".")[0] not in ALLOWED}
    assert not foreign, f"imported on the launch path: {' '.join(sorted(foreign))}"
    assert not loaded & WARM, f"imported on the launch path: {' '.join(sorted(loaded & WARM))}"


def assert_hot_run(sbx: Sbx, bare: set[str], *arguments: str) -> None:
    # The first launch may compile the filter; the second is the one that counts.
    sbx("run", *arguments, check=0)
    status, loaded, stderr = imported("run", *arguments, env=sbx.env)
    assert (status, stderr) == (0, "")
    assert "rootless.launch" in loaded
    assert_hot(loaded, bare)


@needs.userns
@needs.busybox
@pytest.mark.parametrize(
    "options",
    [
        ["--net", "none"],
        ["--net", "none", "--idmap", "single"],
        ["--net", "none", "--read-only", "-e", "A=b", "--workdir", "/tmp", "--tmpfs", "/scratch", "--user", "0"],
    ],
    ids=lambda options: " ".join(options[2:]) or "plain",
)
def test_run(sbx: Sbx, image: str, bare: set[str], options: list[str]) -> None:
    assert_hot_run(sbx, bare, *options, image, "true")


@needs.userns
@needs.busybox
def test_run_on_a_folder(sbx: Sbx, rootfs: Path, bare: set[str]) -> None:
    assert_hot_run(sbx, bare, "--net", "none", "--rootfs", str(rootfs), "true")


@needs.userns
def test_run_on_the_host(sbx: Sbx, bare: set[str]) -> None:
    assert_hot_run(sbx, bare, "--net", "none", "host", "true")


@needs.userns
@needs.busybox
def test_shell_without_a_terminal(sbx: Sbx, image: str, bare: set[str]) -> None:
    sbx("run", "--net", "none", image, "true", check=0)
    status, loaded, stderr = imported("shell", "--net", "none", image, env=sbx.env)
    assert (status, stderr) == (0, "")
    assert_hot(loaded, bare)


@needs.userns
@needs.busybox
def test_exec(sbx: Sbx, image: str, bare: set[str]) -> None:
    with sbx.start("run", "--net", "none", "--name", "startup", image, "sh", "-c", "echo up; cat") as running:
        assert running.stdout
        assert running.stdout.readline() == b"up\n"
        status, loaded, stderr = imported("exec", "startup", "true", env=sbx.env)
        running.communicate()
    assert (status, stderr) == (0, "")
    assert_hot(loaded, bare)


@needs.userns
@needs.busybox
@needs.program("strace")
@pytest.mark.parametrize("net", ["none", "auto"])
def test_nothing_is_imported_once_the_root_is_switched(sbx: Sbx, image: str, tmp_path: Path, net: str) -> None:
    """What can be imported there comes from the image, or not at all; a module that is built in hides the mistake."""
    trace = tmp_path / "trace"
    # newuidmap is setuid, and gains nothing under strace: a single id needs none
    arguments = ["run", "--idmap", "single", "--net", net, image, "true"]
    sbx(*arguments, check=0)
    strace = ["strace", "-f", "-s", "200", "-e", "trace=pivot_root,write", "-o", str(trace)]
    command = [*COMMAND[:-1], "-X", "importtime", COMMAND[-1], *arguments]
    done = subprocess.run([*strace, *command], stdin=subprocess.DEVNULL, capture_output=True, env=sbx.env, timeout=60)
    assert done.returncode == 0, done.stderr
    before, switch, after = trace.read_text().partition(" pivot_root(")
    assert switch
    assert "import time:" in before
    inside = switch_pid(before)
    late = [line for line in after.splitlines() if line.startswith(inside) and "import time:" in line]
    assert not late, late


def switch_pid(before: str) -> str:
    """Return the process id at the start of the line that was cut off."""
    return before.rsplit("\n", 1)[-1].split()[0]


def test_the_package_itself_imports_nothing(bare: set[str]) -> None:
    code = f"import sys; sys.path.insert(0, {str(needs.CHECKOUT)!r}); import rootless"
    status, loaded, _ = imported(code=code)
    assert status == 0
    assert loaded - bare == {"rootless"}


def test_a_heavy_module_is_noticed(tmp_path: Path, bare: set[str]) -> None:
    """The check itself: a launch path that imports json is caught."""
    status, loaded, _ = imported(code="import json")
    assert status == 0
    with pytest.raises(AssertionError, match="json"):
        assert_hot(loaded, bare)


def test_the_interpreter_is_the_one_under_test() -> None:
    assert os.path.samefile(COMMAND[0], sys.executable)
