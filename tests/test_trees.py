"""Removing trees: of any depth, with any rights, following nothing, with few descriptors."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from rootless import trees
from rootless.errors import SbxError


def dig(top: Path, depth: int) -> None:
    """Make folders nested `depth` deep, far beyond what a path can name."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)


def test_kinds(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "file").write_text("x")
    (top / "dangling").symlink_to("nowhere")
    os.mkfifo(top / "a" / "b" / "fifo")
    with open(os.fsencode(top) + b"/\xff\n", "w"):
        pass
    trees.remove(str(top))
    assert os.listdir(tmp_path) == []


def test_links_are_not_followed(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (canary / "folder").mkdir(parents=True)
    (canary / "file").write_text("alive")
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (top / "a" / "out").symlink_to(canary)
    (top / "out").symlink_to(canary / "folder")
    trees.remove(str(top))
    assert sorted(os.listdir(canary)) == ["file", "folder"]
    link = tmp_path / "link"
    link.symlink_to(canary)
    trees.remove(str(link))
    assert sorted(os.listdir(tmp_path)) == ["canary"]


def test_what_is_not_there_is_removed(tmp_path: Path) -> None:
    trees.remove(str(tmp_path / "nothing"))


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    trees.remove("file", os.open(tmp_path, os.O_RDONLY))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o200, 0o300, 0o400, 0o500])
def test_folders_that_their_owner_may_not_enter(tmp_path: Path, mode: int) -> None:
    inner = tmp_path / "top" / "a" / "b"
    (inner / "c" / "d").mkdir(parents=True)
    (inner / "file").touch()
    for folder in (inner / "c" / "d", inner / "c", inner, inner.parent, inner.parent.parent):
        folder.chmod(mode)
    trees.remove(str(tmp_path / "top"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_thousands_of_levels(tmp_path: Path, few: bool) -> None:
    """With few descriptors these would run out, and with many the interpreter's stack."""
    top = tmp_path / "top"
    top.mkdir()
    dig(top, 5000 if few else 2000)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free + 4 if few else before[1], before[1]))
        trees.remove(str(top))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert os.listdir(tmp_path) == []


def test_names_like_those_that_it_makes_up(tmp_path: Path) -> None:
    top = tmp_path / "top"
    for name in (".1", ".2", ".3"):
        (top / name / "a" / ".1" / "b").mkdir(parents=True)
        (top / name / "file").touch()
    (top / ".4").touch()
    trees.remove(str(top))
    assert os.listdir(tmp_path) == []


def test_empty_keeps_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    before = tmp_path.stat().st_ino
    trees.empty(str(tmp_path))
    assert os.listdir(tmp_path) == []
    assert tmp_path.stat().st_ino == before


def test_what_resists_is_told_and_the_rest_is_gone(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("nothing resists the superuser")
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)
    (top / "b").mkdir()
    # /proc/self/fd is a folder of another filesystem that refuses: reached through a descriptor, not a link
    with pytest.raises(SbxError) as raised:
        trees.remove("/proc/self/fdinfo")
    assert raised.value.code == "tree-removal"
    assert "/proc/self/fdinfo" in raised.value.message
    trees.remove(str(top))


def test_what_another_process_moves_there_meanwhile_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moment when a folder is listed and the one when it is removed."""
    (tmp_path / "top" / "folder" / "below").mkdir(parents=True)
    names = [".1", ".2", ".3"]
    listed = trees._entries

    def with_another(folder: int) -> list[tuple[bytes, bool]]:
        entries = listed(folder)
        if names:
            os.mkdir(names.pop(), dir_fd=folder)
        return entries

    monkeypatch.setattr(trees, "_entries", with_another)
    trees.remove(str(tmp_path / "top"))
    assert (os.listdir(tmp_path), names) == ([], [])


def test_count(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("12345")
    os.link(tmp_path / "a" / "one", tmp_path / "again")
    (tmp_path / "two").write_text("1")
    (tmp_path / "link").symlink_to("a")
    fd = os.open(tmp_path, os.O_RDONLY)
    assert trees.count(fd) == (2, 6)
    os.close(fd)
