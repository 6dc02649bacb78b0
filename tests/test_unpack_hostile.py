"""Hostile archives: they unpack harmlessly, or end in one clear error, and touch nothing outside either way."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path

import archives
import pytest
from archives import HOSTILE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rootless import trees
from rootless.errors import SbxError
from rootless.oci import unpack
from rootless.oci.tar import Limits

TIGHT = Limits(entries=5000, size=1 << 30)


class Ground:
    """A folder to unpack into, beside one that must not change. No namespace, no pivot: the first wall alone."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self.canary = folder / "canary"
        self.canary.mkdir()
        (self.canary / "file").write_text("alive")
        (self.canary / "file").chmod(0o640)
        self.folder = folder

    def unpack(self, archive: bytes, limits: Limits = TIGHT) -> unpack.Summary:
        """Unpack as a caller with a single id would, reading in pieces of awkward lengths."""
        self.root.mkdir()
        fd = os.open(self.root, os.O_RDONLY)
        stream = io.BytesIO(archive)
        chance = random.Random(len(archive))
        try:
            return unpack.unpack(
                lambda size: stream.read(chance.randint(1, min(size, 3000))), fd, single=True, limits=limits
            )
        finally:
            os.close(fd)

    def clear(self) -> None:
        trees.remove(str(self.root))

    def outside(self) -> object:
        """Return everything there is to see outside of the root."""
        seen = []
        for path in (self.folder, self.canary, self.canary / "file"):
            status = path.lstat()
            times = (status.st_mtime_ns, status.st_ctime_ns) if path != self.folder else ()
            seen.append(
                (status.st_mode, status.st_uid, status.st_nlink if path != self.folder else 0, times, _xattrs(path))
            )
        return seen, sorted(os.listdir(self.folder)), os.listdir(self.canary), (self.canary / "file").read_text()


def _xattrs(path: Path) -> list[str]:
    return os.listxattr(path, follow_symlinks=False)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(ground: Ground, name: str) -> None:
    archive, code = HOSTILE[name]
    ground.root.mkdir()
    before = ground.outside()
    ground.root.rmdir()
    if code is None:
        ground.unpack(archive)
    else:
        with pytest.raises(SbxError) as raised:
            ground.unpack(archive)
        assert raised.value.code == code
        assert len(raised.value.message) < 400
        assert "\n" not in raised.value.message
    assert ground.outside() == before
    ground.clear()
    assert not ground.root.exists()


def test_what_a_symlink_led_to_is_inside(ground: Ground) -> None:
    ground.unpack(HOSTILE["symlink chain"][0])
    assert (ground.root / "canary" / "file").read_text() == "x"


def test_absolute_names_are_below_the_root(ground: Ground) -> None:
    ground.unpack(HOSTILE["absolute"][0])
    assert (ground.root / "canary" / "file").read_text() == "x"


def test_no_device_is_made(ground: Ground) -> None:
    for name in ("device at hosts", "whiteout device", "hardlink to a device"):
        summary = ground.unpack(HOSTILE[name][0])
        assert len(summary["devices"]) == 1
        found = [path for path in ground.root.rglob("*") if not path.is_dir()]
        assert found == [], name
        ground.clear()


def test_attributes_of_overlayfs_are_dropped(ground: Ground) -> None:
    summary = ground.unpack(HOSTILE["overlay attributes"][0])
    assert os.listxattr(ground.root / "a") == []
    assert summary["xattrs_dropped"] == 2


# ── bombs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_entries_are_limited(ground: Ground) -> None:
    archive = archives.archive(*(archives.member(b"%d" % n) for n in range(11)))
    assert ground.unpack(archive, Limits(entries=11))["entries"] == 11
    ground.clear()
    with pytest.raises(SbxError, match="more than 10 entries") as raised:
        ground.unpack(archive, Limits(entries=10))
    assert raised.value.code == "archive-limit"
    assert raised.value.hint


def test_bytes_are_limited_before_they_are_read(ground: Ground) -> None:
    archive = archives.archive(archives.member(b"a", bytes(600)), archives.member(b"b", bytes(600)))
    assert ground.unpack(archive, Limits(size=1200))["size"] == 1200
    ground.clear()
    with pytest.raises(SbxError) as raised:
        ground.unpack(archive, Limits(size=1199))
    assert raised.value.code == "archive-limit"
    assert not (ground.root / "b").exists() or (ground.root / "b").stat().st_size == 0


def test_a_sparse_file_counts_in_full(ground: Ground) -> None:
    archive = archives.archive(archives.old_sparse(b"a", [(0, 512)], 2 << 30, bytes(512)))
    with pytest.raises(SbxError) as raised:
        ground.unpack(archive)
    assert raised.value.code == "archive-limit"


def test_replacing_again_and_again_counts_too(ground: Ground) -> None:
    """A limit on what is there at the end would let an archive write for ever."""
    archive = archives.archive(*(archives.member(b"a", bytes(500)) for _ in range(10)))
    with pytest.raises(SbxError) as raised:
        ground.unpack(archive, Limits(size=4999))
    assert raised.value.code == "archive-limit"


def test_depth_is_limited(ground: Ground) -> None:
    with pytest.raises(SbxError) as raised:
        ground.unpack(archives.archive(archives.folder(b"a/b/c/d")), Limits(depth=2))
    assert raised.value.code == "archive-unsafe"


# ── chance ────────────────────────────────────────────────────────────────────────────────────────────────────────────

names = st.sampled_from(
    [
        b"a",
        b"b",
        b"a/b",
        b"a/b/c",
        b"b/a",
        b"./a",
        b"/a",
        b"..",
        b"../canary",
        b"../canary/file",
        b"a/../b",
        b".",
        b".wh.a",
        b".wh.b",
        b"a/.wh.b",
        b".wh..wh..opq",
        b"a/.wh..wh..opq",
        b"canary/file",
        b"\xff\n",
        b"a/",
    ]
)
targets = st.sampled_from(
    [b"a", b"b", b"a/b", b"..", b"../canary", b"../canary/file", b"/", b"/canary", b"/a", b".", b"../../x", b""]
)
kinds = st.sampled_from([b"0", b"0", b"1", b"2", b"2", b"3", b"5", b"5", b"6", b"\0", b"7"])
members = st.builds(
    lambda name, kind, link, data, mode, uid: archives.member(
        name, data if kind in b"07\0" else b"", kind, link=link, mode=mode, uid=uid, major=1, minor=3
    ),
    names,
    kinds,
    targets,
    st.binary(max_size=20),
    st.sampled_from([0o644, 0o755, 0, 0o7777, 0o111]),
    st.sampled_from([0, 0, 33, 1000]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(members, max_size=14))
def test_any_order_of_members(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    check_harmless(tmp_path_factory, archives.archive(*parts))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Archives of the collection and honest ones, with bytes changed, cut out, put twice, or cut off."""
    archive = bytearray(data.draw(st.sampled_from(SEEDS), label="seed"))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(len(archive) - 1, 0)))
        match data.draw(st.sampled_from(["byte", "cut", "double", "end", "checksum"])):
            case "byte" if archive:
                archive[at] = data.draw(st.integers(0, 255))
            case "cut":
                del archive[at : at + 512]
            case "double":
                archive[at:at] = archive[at - at % 512 : at - at % 512 + 512]
            case "end":
                del archive[at:]
            case _:
                mend_checksum(archive, at - at % 512)
    check_harmless(tmp_path_factory, bytes(archive))


def mend_checksum(archive: bytearray, at: int) -> None:
    """Make the block at `at` a valid header again: what is behind the checksum is where the bugs are."""
    block = archive[at : at + 512]
    if len(block) == 512:
        block[148:156] = b" " * 8
        archive[at + 148 : at + 156] = b"%06o\0 " % sum(block)


SEEDS = [archive for name, (archive, _) in HOSTILE.items() if len(archive) < 20000] + [
    archives.archive(
        archives.folder(b"etc"),
        archives.member(b"etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
        archives.symlink(b"bin", b"usr/bin"),
        archives.folder(b"usr/bin"),
        archives.pax((b"path", b"usr/bin/" + b"n" * 120), (b"SCHILY.xattr.user.a", b"b")),
        archives.member(b"short", b"data" * 300, mode=0o4755),
        archives.hardlink(b"link", b"etc/passwd"),
        archives.old_sparse(b"holes", [(512, 512), (4096, 512), (8192, 1), (9000, 1), (9002, 1)], 10000, b"s" * 1027),
        archives.member(b".wh.gone"),
        archives.member(b"etc/.wh..wh..opq"),
    )
]


def check_harmless(factory: pytest.TempPathFactory, archive: bytes) -> None:
    ground = Ground(factory.mktemp("ground"))
    ground.root.mkdir()
    before = ground.outside()
    ground.root.rmdir()
    descriptors = os.listdir("/proc/self/fd")
    mask = os.umask(0o022)
    try:
        ground.unpack(archive)
        code = "archive-"
    except SbxError as error:
        code = error.code
    assert code.startswith("archive-")
    assert os.umask(mask) == 0o022
    assert ground.outside() == before
    ground.clear()
    assert not ground.root.exists()
    assert os.listdir("/proc/self/fd") == descriptors
    trees.remove(str(ground.folder))
