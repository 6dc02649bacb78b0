"""Fixtures: the command as a subprocess, images, a terminal; and the check that every test leaves nothing behind."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import hypothesis
import needs
import pytest
from terminals import Terminal

MAIN = needs.CHECKOUT / "rootless" / "__main__.py"
#: The command as helpers/sbx starts it.
COMMAND = (sys.executable, "-I", "-S", "-E", str(MAIN))
#: Variables of the caller's that a test may rely on; nothing else of ours reaches the command.
KEPT = ("PATH", "HOME", "USER", "LOGNAME", "XDG_RUNTIME_DIR", "LANG", "TMPDIR")
OFFLINE = "offline"  #: the name of the offline test image in the store

# No database: a failure prints what reproduces it. No deadline: the machine is shared. CI tries the same every time.
hypothesis.settings.register_profile("here", database=None, deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("here")

# A shell starts what it puts into the background with SIGINT ignored, and what we start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PR_SET_CHILD_SUBREAPER = 36
#: What rootless podman leaves for its next run, and a test that ran podman beside us with it.
PAUSE = " catatonit -P "
END = 5.0  #: seconds in which what a test started must have ended


# ── which tests run ───────────────────────────────────────────────────────────────────────────────────────────────────


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--vm", action="store_true", help="also run the tests marked vm")


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Name binary and long values by their argument: random bytes in a test's name differ between two workers."""
    binary = isinstance(val, bytes) and not val.isalnum()
    return argname if binary or (isinstance(val, str) and len(val) > 80) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [name for name in ("slow", "vm") if not config.getoption(name)]
    chosen = [item for item in items if not any(item.get_closest_marker(name) for name in left_out)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
    for item in items:
        if item.get_closest_marker("vm") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(0))  # a machine under emulation has a limit of its own


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        needs.enforce(mark.args[0]())


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Result(NamedTuple):
    """What a finished command gave: status as a shell reports it, and text (undecodable bytes as surrogates)."""

    status: int
    stdout: str
    stderr: str


class Sbx:
    """The command `sbx` with a data folder of its own.

    Call it with the arguments. `env` adds variables, a value of None takes one away. It does not judge the exit
    status, unless `check` is given: `ok` does, and returns stdout.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.env = {name: os.environ[name] for name in KEPT if name in os.environ} | {"SBX_HOME": str(home)}

    def __call__(
        self,
        *arguments: str | bytes | Path,
        input: str | bytes = b"",
        env: Mapping[str, str | None] | None = None,
        cwd: Path | str | None = None,
        timeout: float = 60,
        check: int | None = None,
    ) -> Result:
        done = subprocess.run(
            [*COMMAND, *arguments],
            input=input.encode() if isinstance(input, str) else input,
            capture_output=True,
            env=self._environment(env),
            cwd=cwd,
            timeout=timeout,
        )
        status = done.returncode if done.returncode >= 0 else 128 - done.returncode
        result = Result(status, _text(done.stdout), _text(done.stderr))
        assert check is None or status == check, result
        return result

    def ok(self, *arguments: str | bytes | Path, **options: object) -> str:
        """Run it, require status 0, and return stdout without the last newline."""
        return self(*arguments, check=0, **options).stdout.removesuffix("\n")  # type: ignore[arg-type]

    def start(
        self, *arguments: str | bytes | Path, env: Mapping[str, str | None] | None = None, **options: object
    ) -> subprocess.Popen[bytes]:
        """Start it with pipes and return the process; the test ends it."""
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")} | options
        return subprocess.Popen([*COMMAND, *arguments], env=self._environment(env), **pipes)  # type: ignore[call-overload,no-any-return]

    def _environment(self, changes: Mapping[str, str | None] | None) -> dict[str, str]:
        merged: dict[str, str | None] = {**self.env, **(changes or {})}
        return {name: value for name, value in merged.items() if value is not None}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder that this worker's tests share: images are imported into it once."""
    folder = tmp_path_factory.mktemp("home")
    yield folder
    _delete(folder)


@pytest.fixture
def sbx(home: Path) -> Iterator[Sbx]:
    """The command, with this worker's data folder. Afterwards nothing of the test may be left."""
    with nothing_left(home):
        yield Sbx(home)


@pytest.fixture
def fresh_sbx(tmp_path: Path) -> Iterator[Sbx]:
    """The command with an empty data folder: for tests that change the store or damage it."""
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    with nothing_left(folder):
        yield Sbx(folder)
    _delete(folder)


@pytest.fixture
def tty() -> Iterator[Callable[..., Terminal]]:
    """Start a command on a terminal: `tty([*COMMAND, "shell", image], env=sbx.env)`."""
    open_ones: list[Terminal] = []

    def start(command: Sequence[str], env: Mapping[str, str], size: tuple[int, int] = (24, 80)) -> Terminal:
        open_ones.append(Terminal(command, {"TERM": "xterm", **env}, size))
        return open_ones[-1]

    yield start
    for terminal in open_ones:
        terminal.close()


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="session")
def offline_tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The offline test image's root filesystem, built from the host's static busybox."""
    needs.enforce(needs.busybox.args[0]())
    tarball = tmp_path_factory.mktemp("image") / "offline.tar"
    subprocess.run([needs.CHECKOUT / "images" / "offline", tarball], check=True, stdin=subprocess.DEVNULL)
    return tarball


@pytest.fixture(scope="session")
def rootfs(offline_tarball: Path) -> Path:
    """The offline test image's root filesystem as a folder."""
    folder = offline_tarball.parent / "rootfs"
    folder.mkdir()
    subprocess.run(["tar", "-xf", offline_tarball, "-C", folder], check=True)
    return folder


@pytest.fixture(scope="session")
def image(home: Path, offline_tarball: Path) -> str:
    """The name of the offline test image, imported into this worker's store."""
    Sbx(home).ok("import", OFFLINE, offline_tarball)
    return OFFLINE


@pytest.fixture(scope="session")
def alpine(home: Path) -> str:
    """The name of a real Alpine, imported into this worker's store."""
    needs.enforce(needs.alpine.args[0]())
    tarball = needs.alpine_tarball()
    assert tarball
    Sbx(home).ok("import", "alpine", tarball)
    return "alpine"


# ── nothing is left behind ────────────────────────────────────────────────────────────────────────────────────────────


class nothing_left:
    """Require that what a block started has ended, that it mounted nothing outside, and left no sandbox's folder."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __enter__(self) -> None:
        # Orphans come to us instead of to the host's init, and so are seen. Only for this long, since nobody else here
        # reaps them.
        _be_subreaper(True)
        self.children = _children()
        self.mounts = _mounts()
        self.sandboxes = self._folders()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        _be_subreaper(False)
        left = [text for pid in _ended(_children() - self.children) if not (text := _describe(pid)).endswith(PAUSE)]
        left += [f"mount {line}" for line in _mounts() - self.mounts]
        left += [f"folder {path}" for path in self._folders() - self.sandboxes]
        # A test that failed has said something more important.
        assert kind or not left, "left behind: " + "; ".join(left)

    def _folders(self) -> set[str]:
        folder = self.home / "sandboxes"
        return set(os.listdir(folder)) if folder.is_dir() else set()


def _be_subreaper(enabled: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(enabled), 0, 0, 0)


def _children() -> set[int]:
    """Return the ids of this process's children, whichever of its threads started them."""
    return {int(pid) for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


def _mounts() -> set[str]:
    return set(Path("/proc/self/mountinfo").read_text().splitlines())


def _ended(pids: set[int]) -> set[int]:
    """Reap those of `pids` that end in time, and return the others."""
    deadline = time.monotonic() + END
    return {pid for pid in pids if not _reap(pid, deadline)}


def _reap(pid: int, deadline: float) -> bool:
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        os.waitpid(pid, 0)
    finally:
        os.close(pidfd)
    return True


def _describe(pid: int) -> str:
    """Kill `pid` and tell what it was."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except OSError:
        command = "ended late"
    return f"process {pid} {command}"


def _delete(folder: Path) -> None:
    """Delete a data folder; what subordinate ids own in it can be deleted as root of the user namespace only."""
    Sbx(folder)("unshare", "rm", "-rf", folder)
    shutil.rmtree(folder, ignore_errors=True)
