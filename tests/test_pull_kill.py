"""kill -9 at any moment of a pull: the next pull succeeds, and finds what the one before has left."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx
from pulling import Puller
from real_registry import RealRegistry, SmallImage, copy_to, digest

pytestmark = [needs.userns, needs.program("docker-registry", "skopeo")]

FILES = {f"folder{n}/": b"" for n in range(20)} | {f"folder{n % 20}/file{n}": os.urandom(n * 20) for n in range(400)}
IMAGE = SmallImage(FILES, {"noise": os.urandom(3_000_000)}, {"more": os.urandom(2_000_000)})


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with RealRegistry(tmp_path_factory.mktemp("registry")) as server:
        copy_to(server.host, "a/b", IMAGE.write_layout(tmp_path_factory.mktemp("layout")))
        yield server.host


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    yield Puller(tmp_path)
    Sbx(tmp_path / "store")("unshare", "rm", "-rf", tmp_path / "store")


def family(pid: int) -> list[int]:
    """Return a process and all below it."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return [pid]
    return [pid, *(member for text in lists for child in text.split() for member in family(int(child)))]


def kill_someone(process: subprocess.Popen[bytes], choice: random.Random) -> None:
    """Kill the command itself, or any one process below it; the others must end, too."""
    members = {}
    for pid in family(process.pid):
        try:
            members[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
    victim = members[process.pid] if choice.random() < 0.5 else choice.choice(list(members.values()))
    try:
        signal.pidfd_send_signal(victim, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it was quicker
    process.wait(timeout=30)
    for pidfd in members.values():
        assert select.select([pidfd], [], [], 10)[0], "a process of the pull goes on after it"
        os.close(pidfd)


def run_and_kill(puller: Puller, name: str, choice: random.Random, longest: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, "pull", "--quiet", name], env=puller.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    time.sleep(choice.uniform(0, longest))
    kill_someone(process, choice)


def whole(puller: Puller, name: str) -> None:
    """Require that a pull succeeds now, and that the store holds the image and nothing that was in the making."""
    got = puller(name)
    assert got.digest == digest(IMAGE.manifest)
    content = puller.content(got)
    assert {path: data for path, data in FILES.items() if not path.endswith("/")}.items() <= content.items()
    assert (len(content["noise"]), len(content["more"])) == (3_000_000, 2_000_000)
    for blob, data in IMAGE.blobs.items():
        assert (puller.store / "blobs" / "sha256" / blob.removeprefix("sha256:")).read_bytes() == data
    assert puller.names("tmp") == []
    assert puller.names("partial") == []
    checked = subprocess.run([*COMMAND, "system", "check"], env=puller.env, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked


def rounds(puller: Puller, registry: str, count: int, seed: int) -> None:
    name = f"{registry}/a/b"
    choice = random.Random(seed)
    start = time.monotonic()
    whole(puller, name)
    longest = time.monotonic() - start
    done = 0
    while done < count:
        Sbx(puller.store)("unshare", "rm", "-rf", puller.store)
        # several kills in a row, so that what one has left is what the next begins with
        for _ in range(choice.randint(1, 4)):
            run_and_kill(puller, name, choice, longest)
            done += 1
        whole(puller, name)


def test_kill(puller: Puller, registry: str) -> None:
    rounds(puller, registry, 10, seed=1)


@pytest.mark.slow
def test_kill_a_hundred_times(puller: Puller, registry: str) -> None:
    rounds(puller, registry, 100, seed=2)
