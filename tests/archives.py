"""Archives as their enemies write them: tar bytes, header by header, with nothing checked.

`HOSTILE` is the collection: name → (archive, error code), or None for the code where the archive is odd but unpacks.
"""

from __future__ import annotations

from typing import Any

BLOCK = 512
END = bytes(2 * BLOCK)
FILE, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, FOLDER, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
OCTAL_LIMIT = 8**11


def number(value: int | bytes, width: int) -> bytes:
    """Return a header's number: octal, base-256 where that is too short, or raw bytes as they are."""
    if isinstance(value, bytes):
        return value.ljust(width, b"\0")
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    if value < 0:
        return value.to_bytes(width, "big", signed=True)
    return b"\x80" + value.to_bytes(width - 1, "big")


def header(
    name: bytes,
    kind: bytes = FILE,
    size: int | bytes = 0,
    mode: int | bytes = 0o644,
    uid: int | bytes = 0,
    gid: int | bytes = 0,
    mtime: int | bytes = 0,
    link: bytes = b"",
    magic: bytes = b"ustar\x0000",
    major: int = 0,
    minor: int = 0,
    prefix: bytes = b"",
    checksum: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """Return a header block with a right checksum (or the one given)."""
    block = b"".join(
        (
            name[:100].ljust(100, b"\0"),
            number(mode, 8),
            number(uid, 8),
            number(gid, 8),
            number(size, 12),
            number(mtime, 12),
            b" " * 8,
            kind,
            link[:100].ljust(100, b"\0"),
            magic.ljust(8, b"\0"),
            b"root".ljust(32, b"\0"),
            b"root".ljust(32, b"\0"),
            number(major, 8),
            number(minor, 8),
            prefix[:155].ljust(155, b"\0"),
            bytes(12),
        )
    )
    if tail:
        block = block[: BLOCK - len(tail)] + tail
    return block[:148] + (checksum or b"%06o\0 " % sum(block)).ljust(8) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes = b"", kind: bytes = FILE, **fields: Any) -> bytes:
    """Return a member with its data."""
    return header(name, kind, **{"size": len(data), **fields}) + padded(data)


def folder(name: bytes, mode: int = 0o755, **fields: Any) -> bytes:
    return member(name, kind=FOLDER, mode=mode, **fields)


def symlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return member(name, kind=SYMLINK, link=target, mode=0o777, **fields)


def hardlink(name: bytes, target: bytes, **fields: Any) -> bytes:
    return member(name, kind=LINK, link=target, **fields)


def records(*pairs: tuple[bytes, bytes]) -> bytes:
    """Return pax records; each length counts itself."""
    result = b""
    for key, value in pairs:
        rest = b" " + key + b"=" + value + b"\n"
        length = len(rest) + 1
        while len(b"%d" % length) + len(rest) != length:
            length = len(b"%d" % length) + len(rest)
        result += b"%d" % length + rest
    return result


def pax(*pairs: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    """Return an extended header, to be put before a member."""
    return member(b"PaxHeaders/x", records(*pairs), kind)


def gnu_long(name: bytes = b"", link: bytes = b"") -> bytes:
    """Return GNU tar's headers of a long name or link, to be put before a member."""
    result = member(b"././@LongLink", name + b"\0", b"L") if name else b""
    return result + (member(b"././@LongLink", link + b"\0", b"K") if link else b"")


def archive(*members: bytes) -> bytes:
    return b"".join(members) + END


def old_sparse(name: bytes, pieces: list[tuple[int, int]], size: int, data: bytes) -> bytes:
    """Return a sparse member of GNU tar's old kind, up to four pieces in the header and the others behind it."""
    entries = [number(offset, 12) + number(length, 12) for offset, length in pieces]
    area = b"".join(entries[:4]).ljust(96, b"\0")
    rest = entries[4:]
    tail = area + (b"\1" if rest else b"\0") + number(size, 12) + bytes(17)
    block = header(name, b"S", len(data), magic=b"ustar  \0", tail=tail)
    while rest:
        block += b"".join(rest[:21]).ljust(504, b"\0") + (b"\1" if rest[21:] else b"\0") + bytes(7)
        rest = rest[21:]
    return block + padded(data)


def _deep(depth: int) -> bytes:
    return b"".join(gnu_long(b"d/" * level) + folder(b"d") for level in range(1, depth))


HOSTILE: dict[str, tuple[bytes, str | None]] = {
    # ── out of the tree ──
    "dot dot": (archive(member(b"../canary/file", b"x")), "archive-unsafe"),
    "dot dot inside": (archive(member(b"a/../../canary/file", b"x")), "archive-unsafe"),
    "dot dot by prefix": (archive(member(b"canary/file", b"x", prefix=b"..")), "archive-unsafe"),
    "dot dot by pax": (archive(pax((b"path", b"../canary/file")), member(b"harmless", b"x")), "archive-unsafe"),
    "dot dot by gnu": (archive(gnu_long(b"../canary/file"), member(b"harmless", b"x")), "archive-unsafe"),
    "dot dot folder": (archive(folder(b"..", 0o777)), "archive-unsafe"),
    "absolute": (archive(member(b"/canary/file", b"x")), None),
    "many slashes": (archive(member(b"////canary//./file", b"x")), None),
    "symlink then write": (archive(symlink(b"out", b"../canary"), member(b"out/file", b"x")), "archive-unsafe"),
    "absolute symlink then write": (archive(symlink(b"out", b"/canary"), member(b"out/file", b"x")), "archive-unsafe"),
    "symlink chain": (
        archive(symlink(b"a", b"b"), symlink(b"b", b".."), member(b"a/canary/file", b"x")),
        None,
    ),
    "symlink loop": (archive(symlink(b"a", b"b"), symlink(b"b", b"a"), member(b"a/file", b"x")), "archive-unsafe"),
    "proc symlink": (archive(symlink(b"a", b"/proc/self/cwd/../canary"), member(b"a/file", b"x")), "archive-unsafe"),
    "symlink at the name": (archive(symlink(b"file", b"../canary/file"), member(b"file", b"x")), None),
    "folder over a symlink": (
        archive(symlink(b"out", b"../canary"), folder(b"out", 0o777), member(b"out/file", b"x")),
        None,
    ),
    "mode through a symlink": (archive(symlink(b"out", b"../canary/file"), hardlink(b"link", b"out")), None),
    "hardlink out": (archive(hardlink(b"link", b"../canary/file")), "archive-unsafe"),
    "hardlink absolute": (archive(hardlink(b"link", b"/canary/file")), "archive-unsafe"),
    "hardlink through a symlink": (
        archive(symlink(b"out", b"../canary"), hardlink(b"link", b"out/file")),
        "archive-unsafe",
    ),
    "hardlink to a folder": (archive(folder(b"a"), hardlink(b"link", b"a")), "archive-unsafe"),
    "hardlink to nothing": (archive(hardlink(b"link", b"nothing")), "archive-unsafe"),
    "hardlink to the root": (archive(hardlink(b"link", b".")), "archive-unsafe"),
    "hardlink to itself": (archive(member(b"a", b"x"), hardlink(b"a", b"a")), None),
    "hardlink inside what makes room": (
        archive(folder(b"a"), member(b"a/b", b"x"), hardlink(b"a", b"a/b")),
        "archive-unsafe",
    ),
    "whiteout out": (archive(member(b".wh...")), "archive-unsafe"),
    "whiteout through dot dot": (archive(member(b"../canary/.wh.file")), "archive-unsafe"),
    "whiteout through a symlink": (archive(symlink(b"out", b"../canary"), member(b"out/.wh.file")), "archive-unsafe"),
    "opaque through a symlink": (archive(symlink(b"out", b"../canary"), member(b"out/.wh..wh..opq")), "archive-unsafe"),
    "whiteout of nothing": (archive(member(b".wh.")), "archive-unsafe"),
    "folder below a whiteout": (archive(member(b".wh.a/b", b"x")), "archive-unsafe"),
    # ── the root entry ──
    "root as a file": (archive(member(b".", b"x")), "archive-unsafe"),
    "root as a symlink": (archive(symlink(b"./", b"/canary")), "archive-unsafe"),
    "root as a fifo": (archive(member(b"/", kind=FIFO)), "archive-unsafe"),
    "no name": (archive(member(b"", b"x")), "archive-unsafe"),
    # ── places that others will read ──
    "fifo at passwd": (archive(folder(b"etc"), member(b"etc/passwd", kind=FIFO)), None),
    "device at hosts": (archive(folder(b"etc"), member(b"etc/hosts", kind=CHARACTER, major=1, minor=5)), None),
    "whiteout device": (archive(member(b"null", kind=CHARACTER, major=0, minor=0)), None),
    "hardlink to a device": (
        archive(member(b"null", kind=CHARACTER, major=1, minor=3), hardlink(b"other", b"null")),
        None,
    ),
    "overlay attributes": (
        archive(
            pax((b"SCHILY.xattr.user.overlay.redirect", b"/canary"), (b"SCHILY.xattr.trusted.overlay.opaque", b"y")),
            folder(b"a"),
        ),
        None,
    ),
    "security attributes": (archive(pax((b"SCHILY.xattr.security.selinux", b"x")), member(b"a", b"x")), None),
    # ── names ──
    "NUL in a name": (archive(pax((b"path", b"a\0b")), member(b"x", b"x")), "archive-invalid"),
    "NUL in a link": (archive(pax((b"linkpath", b"a\0b")), symlink(b"x", b"x")), "archive-invalid"),
    "name too long": (archive(gnu_long(b"x" * 256), member(b"x", b"x")), "archive-unsafe"),
    "path too long": (archive(gnu_long(b"a/" * 2048 + b"x"), member(b"x", b"x")), "archive-unsafe"),
    "link too long": (archive(gnu_long(link=b"a/" * 2048), symlink(b"x", b"x")), "archive-unsafe"),
    "empty link": (archive(symlink(b"x", b"")), "archive-unsafe"),
    "control characters": (archive(member(b"\x1b[2J\n\r\x07", b"x")), None),
    "not UTF-8": (archive(member(b"\xff\xfe/\x80", b"x")), None),
    # ── kinds and order ──
    "file where a folder should be": (archive(member(b"a", b"x"), member(b"a/b", b"x")), "archive-unsafe"),
    "unknown kind": (archive(member(b"a", kind=b"Z")), "archive-invalid"),
    "multi-volume": (archive(member(b"a", b"x", b"M")), "archive-invalid"),
    # ── numbers ──
    "negative size": (archive(header(b"a", size=-512)), "archive-invalid"),
    "8 TiB": (archive(header(b"a", size=8 << 40)), "archive-limit"),
    "huge size": (archive(header(b"a", size=b"\x80" + b"\xff" * 11)), "archive-invalid"),
    "pax size": (archive(pax((b"size", b"99999999999999999999999")), member(b"a", b"x")), "archive-invalid"),
    "pax size negative": (archive(pax((b"size", b"-1")), member(b"a", b"x")), "archive-invalid"),
    "id -1": (archive(member(b"a", b"x", uid=0xFFFFFFFF)), "archive-invalid"),
    "id huge": (archive(pax((b"uid", b"4294967296")), member(b"a", b"x")), "archive-invalid"),
    "mode of letters": (archive(member(b"a", b"x", mode=b"rwxrwx")), "archive-invalid"),
    "number with signs": (archive(member(b"a", b"x", mtime=b"-0000000001")), "archive-invalid"),
    "number with underscores": (archive(member(b"a", b"x", mtime=b"1_0")), "archive-invalid"),
    "time huge": (archive(member(b"a", b"x", mtime=b"\x80" + b"\x7f" * 11)), None),
    "time before all": (archive(member(b"a", b"x", mtime=b"\xff" * 12)), None),
    "pax time": (archive(pax((b"mtime", b"1e400")), member(b"a", b"x")), "archive-invalid"),
    # ── headers ──
    "wrong checksum": (archive(member(b"a", b"x"), member(b"b", b"x", checksum=b"0000000\0")), "archive-invalid"),
    "not a tar": (b"PK\x03\x04" + bytes(2000), "archive-invalid"),
    "zeroes between": (archive(member(b"a", b"x"), bytes(BLOCK), member(b"b", b"x")), "archive-invalid"),
    "cut in a header": (member(b"a", b"x") + header(b"b")[:100], "archive-invalid"),
    "cut in data": (header(b"a", size=5000) + b"x" * 1000, "archive-invalid"),
    "ends after an extension": (pax((b"path", b"a")), "archive-invalid"),
    "extension before the end": (archive(pax((b"path", b"a"))), "archive-invalid"),
    "pax endless": (archive(header(b"x", b"x", size=1 << 40)), "archive-limit"),
    "pax too large": (
        archive(member(b"x", records((b"comment", b"c" * (1 << 21))), b"x"), member(b"a")),
        "archive-limit",
    ),
    "pax many": (archive(*[pax((b"comment", b"c"))] * 65, member(b"a")), "archive-invalid"),
    "pax malformed": (archive(member(b"x", b"999 path=a\n", b"x"), member(b"a")), "archive-invalid"),
    "pax no newline": (archive(member(b"x", b"9 path=aa", b"x"), member(b"a")), "archive-invalid"),
    "pax length of itself": (archive(member(b"x", b"0 path=a\n", b"x"), member(b"a")), "archive-invalid"),
    "global path": (archive(pax((b"path", b"../canary/file"), kind=b"g"), member(b"a", b"x")), "archive-invalid"),
    "global size": (archive(pax((b"size", b"9"), kind=b"g"), member(b"a", b"x")), "archive-invalid"),
    "xattr huge": (archive(pax((b"SCHILY.xattr.user.a", b"v" * 70000)), member(b"a")), "archive-limit"),
    # An extension's own length must not be overridden by the record in the extension before it (CVE-2025-62518).
    "size of an extension": (
        archive(pax((b"size", b"512")), gnu_long(b"real"), header(b"a", size=512) + bytes(512)),
        None,
    ),
    # ── sparse ──
    "sparse overlapping": (archive(old_sparse(b"a", [(0, 512), (0, 512)], 1024, bytes(1024))), "archive-invalid"),
    "sparse outside": (archive(old_sparse(b"a", [(1 << 40, 512)], 1024, bytes(512))), "archive-invalid"),
    "sparse 16 EiB": (archive(old_sparse(b"a", [(0, 512)], (1 << 63) - 1, bytes(512))), "archive-limit"),
    "sparse without data": (archive(old_sparse(b"a", [(0, 512)], 512, b"")), "archive-invalid"),
    "sparse map of letters": (
        archive(
            pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")),
            member(b"a", b"x" * 512),
        ),
        "archive-invalid",
    ),
    "sparse map endless": (
        archive(
            pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")),
            member(b"a", b"99999999\n" + b"1\n" * 9000),
        ),
        "archive-invalid",
    ),
    "sparse name out": (
        archive(
            pax((b"GNU.sparse.name", b"../canary/file"), (b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"1")),
            member(b"a", b"x"),
        ),
        "archive-unsafe",
    ),
    # ── depth ──
    "2,000 folders deep": (archive(_deep(2000)), None),
}
