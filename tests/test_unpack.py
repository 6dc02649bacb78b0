"""Unpacking honest archives: what is on disk afterwards, with one id and with many."""

from __future__ import annotations

import io
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import archives
import needs
import pytest
from archives import archive, folder, hardlink, member, pax, symlink

from rootless import idmap
from rootless.errors import SbxError
from rootless.oci import layers, layout, unpack
from rootless.oci.layout import Workspace
from rootless.spec import IdMap, IdMapping

OPAQUE = "user.overlay.opaque"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    result = tmp_path / "root"
    result.mkdir()
    return result


def into(root: Path, *members: bytes) -> unpack.Summary:
    """Unpack as a caller with one id, without any namespace."""
    fd = os.open(root, os.O_RDONLY)
    stream = io.BytesIO(archive(*members))
    try:
        return unpack.unpack(stream.read, fd, single=True)
    finally:
        os.close(fd)


def is_whiteout(path: Path) -> bool:
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


# ── order: a later member wins ────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_again(root: Path) -> None:
    into(root, member(b"a", b"first, and longer"), hardlink(b"b", b"a"), member(b"a", b"second", mode=0o600))
    assert (root / "a").read_text() == "second"
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o600
    assert (root / "b").read_text() == "first, and longer", "a hard link keeps what it was made of"


def test_a_folder_again_keeps_what_is_in_it(root: Path) -> None:
    into(root, folder(b"a", 0o700), member(b"a/b", b"x"), folder(b"a", 0o751))
    assert (root / "a" / "b").read_text() == "x"
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o751


def test_a_file_where_a_folder_was(root: Path) -> None:
    summary = into(root, folder(b"a"), folder(b"a/b"), member(b"a/b/c", b"gone"), member(b"a", b"x"))
    assert (root / "a").read_text() == "x"
    assert (summary["files"], summary["size"]) == (1, 1)


def test_a_folder_where_a_file_was(root: Path) -> None:
    into(root, member(b"a", b"x"), folder(b"a"), member(b"a/b", b"y"))
    assert (root / "a" / "b").read_text() == "y"


def test_a_folder_where_a_symlink_was(root: Path) -> None:
    into(root, folder(b"real"), symlink(b"a", b"real"), folder(b"a"), member(b"a/b", b"y"))
    assert not (root / "a").is_symlink()
    assert not (root / "real" / "b").exists()


def test_a_symlink_where_a_folder_was(root: Path) -> None:
    into(root, folder(b"real"), member(b"a/b", b"x"), symlink(b"a", b"real"), member(b"a/c", b"y"))
    assert (root / "a").is_symlink()
    assert [path.name for path in (root / "real").iterdir()] == ["c"], "links of the layer's own are followed, inside"


def test_a_symlink_that_changes_its_target(root: Path) -> None:
    into(root, folder(b"x"), folder(b"y"), symlink(b"a", b"x"), member(b"a/1"), symlink(b"a", b"y"), member(b"a/2"))
    assert os.listdir(root / "x") == ["1"]
    assert os.listdir(root / "y") == ["2"]


def test_missing_parents_are_made(root: Path) -> None:
    into(root, member(b"a/b/c", b"x"))
    assert stat.S_IMODE((root / "a" / "b").stat().st_mode) == 0o755


def test_what_is_there_is_counted(root: Path) -> None:
    summary = into(
        root, member(b"a", b"12345"), hardlink(b"b", b"a"), member(b"c", b"1"), member(b"c", b"123"), member(b"a", b"")
    )
    assert (summary["entries"], summary["files"], summary["size"]) == (5, 3, 8)


# ── attributes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_times_to_the_nanosecond_also_of_folders_and_links(root: Path) -> None:
    time = pax((b"mtime", b"1600000000.123456789"))
    into(
        root,
        time,
        folder(b"a"),
        time,
        member(b"a/b", b"x"),
        time,
        symlink(b"a/c", b"b"),
        time,
        member(b"a/d", kind=archives.FIFO),
    )
    for path in (root / "a", root / "a" / "b", root / "a" / "c", root / "a" / "d"):
        assert path.lstat().st_mtime_ns == 1_600_000_000_123_456_789, path


def test_modes(root: Path) -> None:
    into(
        root,
        *(member(b"%o" % mode, mode=mode) for mode in (0o000, 0o111, 0o444, 0o666, 0o777, 0o4755, 0o2711)),
        folder(b"tmp", 0o1777),
    )
    assert {path.name: f"{stat.S_IMODE(path.stat().st_mode):o}" for path in root.iterdir() if path.name != "tmp"} == {
        path.name: path.name for path in root.iterdir() if path.name != "tmp"
    }
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777


def test_the_roots_own_attributes(root: Path) -> None:
    into(root, folder(b"./", 0o711, mtime=1000), member(b"./a"))
    assert stat.S_IMODE(root.stat().st_mode) == 0o711
    assert root.stat().st_mtime == 1000


def test_what_a_set_group_id_folder_would_hand_down(root: Path) -> None:
    into(root, folder(b"a", 0o2775), folder(b"a/b", 0o755), member(b"a/c"))
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o2775
    assert stat.S_IMODE((root / "a" / "b").stat().st_mode) == 0o755


def test_user_attributes(root: Path) -> None:
    summary = into(
        root,
        pax((b"SCHILY.xattr.user.a", b"1\x00\n2")),
        member(b"f"),
        pax((b"SCHILY.xattr.user.b", b"3")),
        folder(b"d"),
    )
    assert os.getxattr(root / "f", "user.a") == b"1\x00\n2"
    assert os.getxattr(root / "d", "user.b") == b"3"
    assert summary["xattrs_dropped"] == 0


def test_one_id_owns_all_and_the_rest_is_recorded(root: Path) -> None:
    summary = into(
        root,
        folder(b"home", 0o500, uid=1000, gid=100),
        member(b"home/file", b"x", uid=1000, gid=100),
        member(b"plain", b"x"),
        member(b"su", b"x", mode=0o4755),
        member(b"mail", b"x", mode=0o6755, gid=8),
        symlink(b"link", b"plain", uid=5),
        hardlink(b"home/again", b"home/file"),
    )
    assert {path.lstat().st_uid for path in root.rglob("*")} == {os.getuid()}
    assert summary["owners"] == {
        b"home": (1000, 100, 0o500),
        b"home/file": (1000, 100, 0o644),
        b"home/again": (1000, 100, 0o644),
        b"mail": (0, 8, 0o6755),
        b"link": (5, 0, 0o777),
    }
    assert stat.S_IMODE((root / "home").stat().st_mode) == 0o700, "else its owner could not remove it"
    assert stat.S_IMODE((root / "su").stat().st_mode) == 0o4755
    assert stat.S_IMODE((root / "mail").stat().st_mode) == 0o4755, "a set-group-id program of a group that is not there"
    assert summary["setid_dropped"] == 1


def test_devices_are_listed(root: Path) -> None:
    summary = into(
        root,
        member(b"null", kind=archives.CHARACTER, major=1, minor=3, mode=0o666),
        member(b"sda", kind=archives.BLOCK_DEVICE, major=8),
    )
    assert summary["devices"] == [(b"null", "c", 1, 3, 0o666, 0, 0), (b"sda", "b", 8, 0, 0o644, 0, 0)]
    assert os.listdir(root) == []


# ── whiteouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_whiteouts(root: Path) -> None:
    into(root, member(b"etc/.wh.gone"), member(b".wh.also"))
    assert is_whiteout(root / "etc" / "gone")
    assert is_whiteout(root / "also")


def test_opaque_folders(root: Path) -> None:
    into(root, folder(b"a"), member(b"a/.wh..wh..opq"), member(b"a/b", b"x"), member(b"c/.wh..wh..opq"))
    assert os.getxattr(root / "a", OPAQUE) == b"y"
    assert os.getxattr(root / "c", OPAQUE) == b"y"
    assert os.listdir(root / "a") == ["b"]


def test_an_opaque_root_is_told(root: Path) -> None:
    assert into(root, member(b".wh..wh..opq"), member(b"a"))["opaque"] is True


@pytest.mark.parametrize("order", [1, -1])
def test_whiteout_and_file_of_one_layer(root: Path, order: int) -> None:
    into(root, *[member(b".wh.a"), member(b"a", b"x")][::order])
    assert (root / "a").read_text() == "x"


@pytest.mark.parametrize("order", [1, -1])
def test_whiteout_and_folder_of_one_layer(root: Path, order: int) -> None:
    """The whiteout hides what lower layers have, so the new folder is opaque."""
    into(root, *[member(b".wh.a"), folder(b"a") + member(b"a/b", b"x")][::order])
    assert os.getxattr(root / "a", OPAQUE) == b"y"
    assert (root / "a" / "b").read_text() == "x"


def test_whiteout_and_a_folder_that_is_only_a_parent(root: Path) -> None:
    into(root, member(b".wh.a"), member(b"a/b", b"x"))
    assert os.getxattr(root / "a", OPAQUE) == b"y"


def test_the_book_keeping_of_aufs_is_left_out(root: Path) -> None:
    into(root, folder(b".wh..wh.plnk"), member(b".wh..wh.plnk/1.2"), member(b".wh..wh.aufs"))
    assert os.listdir(root) == []


def test_names_that_only_look_like_whiteouts(root: Path) -> None:
    into(root, member(b"a.wh.b", b"x"), member(b"wh.c", b"x"))
    assert sorted(os.listdir(root)) == ["a.wh.b", "wh.c"]


@needs.userns
def test_overlayfs_takes_them_for_its_own(tmp_path: Path) -> None:
    """The proof is the kernel's: two layers, mounted, show what the image means."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for layer in (lower, upper, tmp_path / "merged"):
        layer.mkdir()
    into(
        lower,
        member(b"gone", b"x"),
        member(b"kept", b"x"),
        member(b"opaque/old", b"x"),
        member(b"again/old", b"x"),
        member(b"merged/old", b"x"),
    )
    into(
        upper,
        member(b".wh.gone"),
        member(b"opaque/.wh..wh..opq"),
        member(b"opaque/new"),
        member(b".wh.again"),
        folder(b"again"),
        member(b"merged/new"),
    )
    options = f"userxattr,lowerdir={upper}:{lower}"
    script = f"cd {tmp_path} && mount -t overlay overlay -o {options} merged && cd merged && find . -type f"
    found = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(found) == ["./kept", "./merged/new", "./merged/old", "./opaque/new"]


# ── many ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SBX_HOME", str(tmp_path / "store"))
    yield tmp_path / "store"
    layout.remove_tree(str(tmp_path / "store"))


def ingest(data: bytes, ids: IdMap) -> tuple[Path, unpack.Summary]:
    with Workspace() as work:
        stream = io.BytesIO(data)
        info = layers.ingest(work, lambda offset: stream.read, idmap=ids)
    assert info.summary is not None
    return Path(layout.path("layers", info.key, "fs")), info.summary


@needs.subids
def test_owners_of_subordinate_ids(store: Path) -> None:
    ids, _ = idmap.for_caller("auto")
    top, summary = ingest(
        archive(
            folder(b"home", uid=1000, gid=100),
            member(b"home/file", b"x", uid=1000, gid=100, mode=0o4755),
            symlink(b"link", b"x", uid=33),
            member(b"mine", b"x", mode=0o2755),
            pax((b"SCHILY.xattr.security.capability", bytes.fromhex("0100000202000000" + "00" * 12))),
            member(b"ping", b"x", mode=0o755),
        ),
        ids,
    )
    first = ids.uids[1].host_id
    assert (top / "home").stat().st_uid == first + 999
    assert (top / "home" / "file").stat().st_gid == ids.gids[1].host_id + 99
    assert stat.S_IMODE((top / "home" / "file").stat().st_mode) == 0o4755
    assert (top / "link").lstat().st_uid == first + 32
    assert (top / "mine").stat().st_uid == os.getuid()
    assert stat.S_IMODE((top / "mine").stat().st_mode) == 0o2755
    assert len(os.getxattr(top / "ping", "security.capability")) == 24, "version 3, which counts in our namespace only"
    assert summary["owners"] == {}
    assert summary["xattrs_dropped"] == 0


@needs.subids
def test_modes_that_shut_everybody_out(store: Path) -> None:
    ids, _ = idmap.for_caller("auto")
    top, _ = ingest(archive(folder(b"a", 0), folder(b"a/b", 0, uid=7), member(b"a/b/c", b"x", mode=0, uid=7)), ids)
    assert stat.S_IMODE((top / "a").stat().st_mode) == 0
    layout.remove_tree(str(top))
    assert not top.exists()


@needs.subids
def test_keep_maps_the_caller_to_itself(store: Path) -> None:
    ids, _ = idmap.for_caller("keep")
    top, _ = ingest(archive(folder(b".", uid=0), member(b"own", uid=os.getuid()), member(b"roots", uid=0)), ids)
    assert (top / "own").stat().st_uid == os.getuid()
    assert (top / "roots").stat().st_uid != os.getuid()


@needs.subids
def test_an_owner_outside_the_map(store: Path) -> None:
    ids, _ = idmap.for_caller("auto")
    with pytest.raises(SbxError) as raised:
        ingest(archive(member(b"a", b"x", uid=4_000_000_000)), ids)
    assert raised.value.code == "id-unmapped"
    assert "4000000000" in raised.value.message
    assert "single" in raised.value.hint
    assert os.listdir(store / "layers") == os.listdir(store / "tmp") == []


def test_the_same_owner_with_one_id(store: Path) -> None:
    ids, _ = idmap.for_caller("single")
    top, summary = ingest(archive(member(b"a", b"x", uid=4_000_000_000)), ids)
    assert (top / "a").stat().st_uid == os.getuid()
    assert summary["owners"] == {b"a": (4_000_000_000, 0, 0o644)}


def test_the_child_sees_nothing_but_its_folder(store: Path) -> None:
    """Even what the first wall would let through ends at the second: no name leads out of the pivoted root."""
    from rootless.oci import inside

    ids, _ = idmap.for_caller("single")
    store.mkdir()
    (store.parent / "canary").write_text("alive")
    told = os.memfd_create("told")

    def look() -> None:
        seen = [os.path.exists(path) for path in ("/etc/passwd", str(store), "../canary", "/proc/self")]
        os.write(told, repr((os.listdir("/"), seen)).encode())

    inside.call(ids, look, root=str(store))
    assert os.pread(told, 1000, 0) == b"([], [False, False, False, False])"
    os.close(told)


def test_a_key_is_made_of_diff_id_and_map() -> None:
    one = IdMap(mode="auto", uids=[IdMapping()], gids=[IdMapping()])
    two = IdMap(mode="keep", uids=[IdMapping()], gids=[IdMapping(size=2)])
    keys = {layers.layer_key(diff_id, ids) for diff_id in ("sha256:1", "sha256:2") for ids in (one, two)}
    assert len(keys) == 4
    assert {len(key) for key in keys} == {22}
