"""A short name that leads elsewhere is as fast as any other, and right as soon as a file says something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import NONE, eventually
from test_imports import CHEAP
from test_startup import assert_hot, imported

pytestmark = [needs.userns, needs.busybox]


@pytest.fixture
def ours(fresh_sbx: Sbx, tmp_path: Path) -> Sbx:
    """The command with a home of its own, and two images whose names no alias has yet."""
    home = tmp_path / "own-home"
    (home / ".config" / "sbx").mkdir(parents=True)
    fresh_sbx.env |= {"HOME": str(home), "CONTAINERS_REGISTRIES_CONF": "/dev/null"}
    for name in ("one", "two"):
        (tmp_path / name / "bin").mkdir(parents=True)
        fresh_sbx.ok("import", f"registry.test/{name}", "bin:/bin/sh", "-c", f"ENV WHICH={name}")
    return fresh_sbx


@pytest.fixture
def alias(ours: Sbx) -> Callable[[str], None]:
    """Write where `tool` leads."""

    def write(target: str) -> None:
        file = Path(ours.env["HOME"], ".config/sbx/registries.conf")
        file.write_text(f'[aliases]\ntool = "{target}"\n')

    return write


def which(sbx: Sbx) -> str:
    return sbx.ok("run", *NONE, "--pull", "never", "tool", "/bin/sh", "-c", "echo $WHICH")


def loaded(sbx: Sbx) -> set[str]:
    """Return what a launch imports."""
    status, modules, stderr = imported("run", *NONE, "--pull", "never", "tool", "/bin/sh", "-c", ":", env=sbx.env)
    assert (status, stderr) == (0, "")
    return modules


def is_slow(sbx: Sbx) -> bool:
    return "rootless.oci.registries" in loaded(sbx)


@pytest.fixture(scope="module")
def bare() -> set[str]:
    return imported(code=f"import {', '.join(sorted(CHEAP - {'__future__'}))}, _ctypes")[1]


def test_it_is_remembered_once_the_files_have_settled(ours: Sbx, alias: Callable[[str], None], bare: set[str]) -> None:
    alias("registry.test/one")
    assert which(ours) == "one"
    assert is_slow(ours), "a file that has just changed may change again within the same tick of its clock"
    eventually(lambda: not is_slow(ours), "the alias is remembered")
    assert_hot(loaded(ours), bare)
    assert which(ours) == "one"


def test_what_a_file_says_holds_at_once(ours: Sbx, alias: Callable[[str], None], tmp_path: Path) -> None:
    settings = Path(ours.env["HOME"], ".config/sbx/registries.conf")

    def settled() -> None:
        eventually(lambda: not is_slow(ours), "the alias is remembered")

    alias("registry.test/one")
    settled()
    before = settings.stat()
    alias("registry.test/two")  # of the same length, and given the same time
    os.utime(settings, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert which(ours) == "two"
    settled()

    folder = Path(ours.env["HOME"], ".config/containers/registries.conf.d")
    folder.mkdir(parents=True)
    assert which(ours) == "two", "ours wins"
    drop_in = settings.with_name("registries.conf.d")
    drop_in.mkdir()
    (drop_in / "a.conf").write_text('[aliases]\ntool = "registry.test/one"\n')
    assert which(ours) == "one", "a later file wins"
    settled()
    (drop_in / "a.conf").write_text('[aliases]\ntool = "registry.test/two"\n')
    assert which(ours) == "two", "in place"
    settled()

    other = tmp_path / "other.conf"
    other.write_text('unqualified-search-registries = ["registry.test"]\n')
    ours.env["CONTAINERS_REGISTRIES_CONF"] = str(other)
    assert is_slow(ours), "another file is read"

    settings.unlink()
    (drop_in / "a.conf").unlink()
    result = ours("run", *NONE, "--pull", "never", "tool", "/bin/sh")
    assert (result.status, result.stderr.splitlines()[0]) == (125, "sbx: find image tool: it is not in the store")


def test_an_image_of_exactly_that_name_comes_first(ours: Sbx, alias: Callable[[str], None]) -> None:
    """Whether the files are read or not."""
    alias("registry.test/one")
    eventually(lambda: not is_slow(ours), "the alias is remembered")
    ours.ok("import", "tool", "bin:/bin/sh", "-c", "ENV WHICH=own")
    assert which(ours) == "own"
    arguments = ("tool", "/bin/sh", "-c", "echo $WHICH")
    platform = ours.ok("inspect", "-f", "{{.platform}}", "tool")
    assert ours.ok("run", *NONE, "--pull", "never", "--platform", platform, *arguments) == "own"
    ours.ok("rmi", "tool")
    assert which(ours) == "one"


def test_what_is_remembered_of_an_image_that_has_gone(ours: Sbx, alias: Callable[[str], None]) -> None:
    alias("registry.test/one")
    eventually(lambda: not is_slow(ours), "the alias is remembered")
    ours.ok("rmi", "registry.test/one")
    assert ours("run", *NONE, "--pull", "never", "tool", "/bin/sh").status == 125


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xe9\0\0\0\0"], ids=["empty", "nonsense", "a number"])
def test_a_damaged_note_is_none(ours: Sbx, alias: Callable[[str], None], content: bytes) -> None:
    alias("registry.test/one")
    eventually(lambda: not is_slow(ours), "the alias is remembered")
    [note] = (ours.home / "cache" / "aliases").iterdir()
    note.write_bytes(content)
    assert which(ours) == "one"
    assert note.read_bytes() != content, "written again"
