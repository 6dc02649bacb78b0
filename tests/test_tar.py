"""The tar reader against archives of GNU tar, Python and our own hand, in every dialect."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import archives
import pytest
from archives import archive, member, pax

from rootless.errors import SbxError
from rootless.oci import tar, unpack


def read(data: bytes, chunk: int = 0, limits: tar.Limits = tar.DEFAULT) -> list[tuple[tar.Member, bytes]]:
    """Return all members with their stored data; `chunk` bytes come at once, all if 0."""
    stream = io.BytesIO(data)
    reader = tar.Reader(lambda size: stream.read(min(size, chunk or size)), limits)
    return [(entry, b"".join(bytes(piece) for piece in reader.pieces())) for entry in reader]


def one(data: bytes) -> tar.Member:
    [(entry, _)] = read(data)
    return entry


@pytest.mark.parametrize("chunk", [0, 1, 7, 511, 512, 513, 4096])
def test_pieces_of_any_length(chunk: int) -> None:
    data = archive(member(b"a", b"x" * 1000), member(b"b"), pax((b"path", b"c" * 200)), member(b"c", b"y" * 513))
    found = [(entry.name, content) for entry, content in read(data, chunk)]
    assert found == [(b"a", b"x" * 1000), (b"b", b""), (b"c" * 200, b"y" * 513)]


def test_data_that_nobody_takes_is_skipped() -> None:
    stream = io.BytesIO(archive(member(b"a", b"x" * 3000), member(b"b")))
    assert [entry.name for entry in tar.Reader(lambda size: stream.read(min(size, 100)))] == [b"a", b"b"]


def test_header_fields() -> None:
    entry = one(archive(member(b"a", b"x", mode=0o4711, uid=12, gid=34, mtime=1_700_000_000)))
    assert (entry.mode, entry.uid, entry.gid, entry.mtime) == (0o4711, 12, 34, 1_700_000_000 * 10**9)


def test_base_256_numbers() -> None:
    entry = one(archive(member(b"a", b"", uid=3_000_000_000, mtime=-5)))
    assert (entry.uid, entry.mtime) == (3_000_000_000, -5 * 10**9)


def test_pax_overrides_the_header() -> None:
    records = pax((b"uid", b"3000000000"), (b"mtime", b"-1.25"), (b"path", b"\xff\xfe"), (b"linkpath", b"\xe9"))
    entry = one(archive(records, archives.symlink(b"short", b"short", uid=1)))
    assert (entry.name, entry.link, entry.uid, entry.mtime) == (b"\xff\xfe", b"\xe9", 3_000_000_000, -1_250_000_000)


def test_pax_fractions_are_exact() -> None:
    assert one(archive(pax((b"mtime", b"1700000000.123456789123")), member(b"a"))).mtime == 1_700_000_000_123_456_789


def test_an_empty_record_takes_back() -> None:
    data = archive(pax((b"uid", b"7"), kind=b"g"), pax((b"uid", b"")), member(b"a", uid=3), member(b"b", uid=3))
    assert [entry.uid for entry, _ in read(data)] == [3, 7]


def test_xattrs_in_their_order_with_any_bytes() -> None:
    entry = one(archive(pax((b"SCHILY.xattr.user.a", b"1=\n\0"), (b"SCHILY.xattr.user.b", b"")), member(b"a")))
    assert entry.xattrs == [(b"user.a", b"1=\n\0"), (b"user.b", b"")]


def test_prefix_of_ustar_and_none_of_gnu() -> None:
    assert one(archive(member(b"b", prefix=b"a"))).name == b"a/b"
    assert one(archive(member(b"b", prefix=b"a", magic=b"ustar  \0"))).name == b"b"
    assert one(archive(member(b"b", prefix=b"a", magic=b""))).name == b"b"


def test_star_keeps_times_behind_its_prefix() -> None:
    tail = b"a".ljust(131, b"\0") + b"00000000001\0" * 2 + bytes(8) + b"tar\0"
    assert one(archive(archives.header(b"b", tail=tail))).name == b"a/b"


def test_old_folders_are_known_by_their_names() -> None:
    assert one(archive(member(b"a/", kind=b"\0", magic=b""))).kind == tar.FOLDER
    assert one(archive(member(b"a", kind=b"\0", magic=b""))).kind == tar.FILE


def test_headers_without_data_may_claim_some() -> None:
    """As Go reads them: what follows is the next header, not data."""
    found = read(
        archive(
            archives.header(b"d", archives.FOLDER, size=512), archives.header(b"l", archives.LINK, size=512, link=b"d")
        )
    )
    assert [entry.size for entry, _ in found] == [0, 0]


def test_signed_checksums() -> None:
    block = archives.header(b"\xff\xff")
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + b" " * 8 + block[156:])
    assert one(archive(archives.header(b"\xff\xff", checksum=b"%06o\0 " % signed))).name == b"\xff\xff"


def test_the_end() -> None:
    assert read(b"") == []
    assert read(bytes(1024)) == []
    assert len(read(member(b"a"))) == 1, "no marker at all, as some programs write"
    assert len(read(archive(member(b"a")) + b"anything")) == 1


def test_volume_labels_are_told_apart() -> None:
    assert one(archive(member(b"label", kind=b"V"))).kind == tar.VOLUME


@pytest.mark.parametrize(
    ("limits", "code"), [(tar.Limits(entries=1), "archive-limit"), (tar.Limits(header=100), "archive-limit")]
)
def test_limits(limits: tar.Limits, code: str) -> None:
    with pytest.raises(SbxError) as raised:
        read(archive(member(b"a"), pax((b"comment", b"c" * 200)), member(b"b")), limits=limits)
    assert raised.value.code == code


# ── other people's programs ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what dialects differ in: long names, long links, holes, odd bytes, times."""
    top = tmp_path_factory.mktemp("tree")
    deep = top / ("d" * 90) / ("e" * 90) / ("f" * 90)
    deep.mkdir(parents=True)
    (deep / ("g" * 90)).write_bytes(b"deep")
    (deep / "link").symlink_to("t" * 300)
    os.link(deep / ("g" * 90), deep / "hard")
    (top / "empty").touch()
    (top / "large").write_bytes(bytes(range(256)) * 9000)
    with open(os.fsencode(top) + b"/\xff\xfe name", "wb") as file:
        file.write(b"odd")
    with open(top / "holes", "wb") as file:
        for place in (1 << 16, 1 << 20, 3 << 20, 5 << 20, 7 << 20, 9 << 20):
            file.seek(place)
            file.write(b"island")
        file.truncate(12 << 20)
    os.utime(top / "empty", ns=(1_600_000_000_123_456_789,) * 2)
    (top / "mode").touch(0o640)
    return top


def unpacked(data: bytes, folder: Path) -> Path:
    folder.mkdir()
    fd = os.open(folder, os.O_RDONLY)
    stream = io.BytesIO(data)
    unpack.unpack(stream.read, fd, single=True)
    os.close(fd)
    return folder


def described(top: Path, time: int) -> dict[bytes, object]:
    """Return what is in a tree; times in units of `time` nanoseconds."""
    found: dict[bytes, object] = {}
    for folder, folders, files in os.walk(os.fsencode(top)):
        for name in folders + files:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content: object = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif not os.path.isdir(path):
                with open(path, "rb") as file:
                    content = file.read()
            key = os.path.relpath(path, os.fsencode(top))
            found[key] = (status.st_mode, status.st_nlink, status.st_mtime_ns // time, content)
    return found


def by_gnu(*options: str) -> Callable[[Path], bytes]:
    def make(tree: Path) -> bytes:
        return subprocess.run(["tar", "-c", *options, "-C", tree, "."], check=True, capture_output=True).stdout

    return make


def by_python(format: int) -> Callable[[Path], bytes]:
    def make(tree: Path) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as output:
            output.add(tree, ".")
        return buffer.getvalue()

    return make


DIALECTS = {
    "gnu": (by_gnu("--format=gnu"), 10**9),
    "gnu sparse": (by_gnu("--format=gnu", "--sparse"), 10**9),
    "posix": (by_gnu("--format=posix"), 1),
    "posix sparse 0.0": (by_gnu("--format=posix", "--sparse", "--sparse-version=0.0"), 1),
    "posix sparse 0.1": (by_gnu("--format=posix", "--sparse", "--sparse-version=0.1"), 1),
    "posix sparse 1.0": (by_gnu("--format=posix", "--sparse", "--sparse-version=1.0"), 1),
    "python gnu": (by_python(tarfile.GNU_FORMAT), 10**9),
    "python pax": (by_python(tarfile.PAX_FORMAT), 10**9),  # whose times went through a float
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(tree: Path, tmp_path: Path, dialect: str) -> None:
    make, time = DIALECTS[dialect]
    data = make(tree)
    result = unpacked(data, tmp_path / "result")
    assert described(result, time) == described(tree, time)
    if "sparse" in dialect:
        assert len(data) < 4 << 20
        assert (result / "holes").stat().st_blocks * 512 < 1 << 20, "the holes are holes again"


@pytest.mark.parametrize("format", ["v7", "ustar"])
def test_dialects_of_short_names(tmp_path: Path, format: str) -> None:
    source = tmp_path / "source"
    (source / ("a" * 60)).mkdir(parents=True)
    (source / ("a" * 60) / ("b" * (60 if format == "ustar" else 30))).write_text("text")
    (source / "link").symlink_to("a" * 60)
    result = unpacked(by_gnu(f"--format={format}")(source), tmp_path / "result")
    assert described(result, 10**9) == described(source, 10**9)
