"""Warm: read tar archives from a stream, for unpacking hostile ones. Knows formats, touches no file.

Understood: POSIX.1-1988 (ustar), POSIX.1-2001 (pax, local and global records, extended attributes as SCHILY.xattr),
GNU tar (long names and links, base-256 numbers, sparse files of the kinds S, 0.0, 0.1 and 1.0), star and Unix V7.
Where implementations differ, Go's archive/tar is followed, since that is what image tools read; where reading either
way could hide something from one of two readers, the archive is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rootless.errors import SbxError

BLOCK = 512
CHUNK = 256 << 10  #: bytes that are asked for at once
EXTENSIONS = 64  #: extension headers before one member
FILE, LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, FOLDER, FIFO, VOLUME = b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"V"
#: kinds whose header may claim a size and has no data all the same
_HEADER_ONLY = frozenset((LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, FOLDER, FIFO))
_LONG_NAME, _LONG_LINK, _SPARSE, _PAX, _PAX_SOLARIS, _GLOBAL = b"L", b"K", b"S", b"x", b"X", b"g"
_FILES = frozenset((FILE, b"7"))  # 7 is a contiguous file, which nobody has made for decades
_ZEROES = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."
#: records that name one member; in a global header they would name all that follow, differently for each reader
_LOCAL_ONLY = (b"path", b"linkpath", b"size", b"GNU.sparse.", _XATTR)
# name mode uid gid size mtime checksum type link magic version owner group major minor prefix (padding)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
# bounds of what a kernel can store: ids below the reserved -1, times in the range of ext4 and beyond
ID_LIMIT = 0xFFFFFFFE
_TIME_LIMIT = 1 << 35
_SIZE_LIMIT = 1 << 63


class Limits(NamedTuple):
    """What one archive may cost. All are adjustable; what goes beyond is an SbxError ``archive-limit``."""

    entries: int = 1_000_000  #: members
    size: int = 64 << 30  #: bytes of the uncompressed archive, and of all files at their full length
    path: int = 4095  #: bytes of a path, and of a link's target
    depth: int = 2048  #: folders within folders
    header: int = 1 << 20  #: bytes of the extension headers of one member
    xattr: int = 64 << 10  #: bytes of one extended attribute; the kernel's own limit


DEFAULT = Limits()


class Member:
    """One member as its headers tell it, unchecked but for numbers: names are raw bytes, ids at most ID_LIMIT."""

    __slots__ = ("gid", "kind", "link", "major", "minor", "mode", "mtime", "name", "size", "sparse", "uid", "xattrs")

    def __init__(
        self, name: bytes, kind: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, link: bytes
    ) -> None:
        self.name = name
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = size  #: of the file when unpacked
        self.mtime = mtime  #: in nanoseconds since the epoch
        self.link = link
        self.major = 0
        self.minor = 0
        self.sparse: list[tuple[int, int]] | None = None  #: (offset, length) of the pieces that are stored
        self.xattrs: list[tuple[bytes, bytes]] = []


class Reader:
    """Iterate over an archive's members; after each, `pieces()` gives its data. What is not taken is skipped.

    `read(n)` returns at least one and at most n bytes, or none at the end. Iteration ends at the end-of-archive marker
    or at the end of the stream between two members; bytes after the marker are not read. Raises SbxError
    ``archive-invalid`` with the place, ``archive-limit`` when `limits` are crossed.
    """

    def __init__(self, read: Callable[[int], bytes], limits: Limits = DEFAULT) -> None:
        self._read = read
        self._limits = limits
        self._buffer = b""
        self._at = 0  # place in the buffer
        self._base = 0  # place of the buffer in the archive
        self._data = 0  # bytes of the current member's data not yet taken
        self._padding = 0  # zeroes behind them
        self._globals: dict[bytes, bytes] = {}
        self.entries = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            self.entries += 1
            if self.entries > self._limits.entries:
                raise _limit(f"more than {self._limits.entries} entries", "--max-entries raises the limit")
            yield member

    @property
    def position(self) -> int:
        """Where the current member's data begins, or goes on, in the archive."""
        return self._base + self._at

    # ── the stream ────────────────────────────────────────────────────────────────────────────────────────────────

    def pieces(self) -> Iterator[memoryview]:
        """Yield the current member's stored data, in pieces as they come; each is valid until the next is asked for."""
        while self._data:
            available = len(self._buffer) - self._at
            if not available:
                self._fill()
                continue
            size = min(self._data, available)
            piece = memoryview(self._buffer)[self._at : self._at + size]
            self._at += size
            self._data -= size
            yield piece

    def whole(self) -> memoryview | None:
        """Take all of the current member's stored data if it is at hand, else None: a short cut for small files."""
        end = self._at + self._data
        if end > len(self._buffer):
            return None
        piece = memoryview(self._buffer)[self._at : end]
        self._at = end
        self._data = 0
        return piece

    def _fill(self) -> None:
        """Replace the used-up buffer by the next bytes of the stream."""
        self._base += len(self._buffer)
        self._at = 0
        self._buffer = self._read(CHUNK)
        if not self._buffer:
            raise self._invalid("it is cut off")

    def _skip(self, size: int) -> None:
        """Move `size` bytes on."""
        while size > (available := len(self._buffer) - self._at):
            size -= available
            self._fill()
        self._at += size

    def _take(self, size: int) -> bytes:
        """Return the next `size` bytes, which the caller has bounded."""
        end = self._at + size
        if end > len(self._buffer):
            parts = [self._buffer[self._at :]]
            missing = end - len(self._buffer)
            while missing > 0:
                parts.append(self._read(CHUNK))
                if not parts[-1]:
                    raise self._invalid("it is cut off")
                missing -= len(parts[-1])
            self._base += self._at
            self._at, end = 0, size
            self._buffer = b"".join(parts)
        taken = self._buffer[self._at : end]
        self._at = end
        return taken

    def _block(self) -> bytes:
        """Return the next header block, or nothing when the stream ends here."""
        if self._at == len(self._buffer):
            self._base += self._at
            self._at = 0
            self._buffer = self._read(CHUNK)
            if not self._buffer:
                return b""
        return self._take(BLOCK)

    # ── headers ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _next(self) -> Member | None:
        """Return the next member, or None at the end of the archive."""
        self._skip(self._data + self._padding)
        self._data = self._padding = 0
        records: dict[bytes, bytes] = {}
        sparse: list[bytes] = []  # offsets and lengths of pax sparse 0.0, whose keys repeat
        long_name = long_link = None
        extended = 0
        for _ in range(EXTENSIONS):
            block = self._block()
            if not block or block == _ZEROES:
                self._check_end(block, bool(extended))
                return None
            fields = self._fields(block)
            kind = fields[7]
            if kind not in (_PAX, _PAX_SOLARIS, _GLOBAL, _LONG_NAME, _LONG_LINK):
                return self._member(block, fields, records, sparse, long_name, long_link)
            data = self._extension(self._number(fields[4], "size"), extended)
            extended += len(data)
            if kind == _LONG_NAME:
                long_name = data.partition(b"\0")[0]
            elif kind == _LONG_LINK:
                long_link = data.partition(b"\0")[0]
            elif kind == _GLOBAL:
                self._set_globals(self._records(data, []))
                extended = 0
            else:
                records.update(self._records(data, sparse))
        raise self._invalid(f"more than {EXTENSIONS} extension headers before one member")

    def _check_end(self, block: bytes, pending: bool) -> None:
        """The end is nothing at all, or two blocks of zeroes; and no extension waits for its member."""
        if pending:
            raise self._invalid("it ends after an extension header")
        if block and self._block() not in (b"", _ZEROES):
            raise self._invalid("a block of zeroes stands between members")

    def _fields(self, block: bytes) -> tuple[bytes, ...]:
        """Split a header block and verify its checksum, as unsigned or, as old programs had it, signed bytes."""
        fields: tuple[bytes, ...] = _HEADER.unpack(block)
        checksum = fields[6]
        # the checksum counts itself as eight spaces
        total = sum(block) - sum(checksum) + 256
        if not self._matches(checksum, total):
            signed = total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
            if not self._matches(checksum, signed):
                first = self._base + self._at == BLOCK
                raise self._invalid("this is not a tar archive" if first else "a header's checksum is wrong")
        return fields

    def _matches(self, checksum: bytes, total: int) -> bool:
        text = checksum.partition(b"\0")[0].strip()
        return text.isdigit() and not text.strip(b"01234567") and int(text, 8) == total

    def _number(self, field: bytes, what: str) -> int:
        """Read an octal number, or a base-256 one as GNU tar writes it when octal is too short."""
        text = field.partition(b"\0")[0].strip()
        if text.isdigit():
            try:
                return int(text, 8)
            except ValueError:
                raise self._invalid(f"a {what} is not octal") from None
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")
        if field[0] == 0xFF:
            return int.from_bytes(field, "big", signed=True)
        if text or field.strip(b"\0 "):
            raise self._invalid(f"a {what} is not a number")
        return 0

    def _extension(self, size: int, before: int) -> bytes:
        """Return the data of an extension header, without its padding."""
        if not 0 <= size <= self._limits.header - before:
            raise _limit(f"extension headers of more than {self._limits.header} bytes")
        return self._take(size + -size % BLOCK)[:size]

    def _records(self, data: bytes, sparse: list[bytes]) -> dict[bytes, bytes]:
        """Parse pax records, ``LENGTH KEY=VALUE\\n``; collect those of sparse 0.0 in order in `sparse`."""
        records: dict[bytes, bytes] = {}
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + 20)
            length = data[at:space]
            end = at + int(length) if space > 0 and length.isdigit() else 0
            if not space < end <= len(data) or data[end - 1] != 0x0A:
                raise self._invalid("a pax record is malformed")
            key, equals, value = data[space + 1 : end - 1].partition(b"=")
            if not equals or not key:
                raise self._invalid("a pax record is malformed")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                sparse.append(value)
            records[key] = value
            at = end
        return records

    def _set_globals(self, records: dict[bytes, bytes]) -> None:
        if any(key.startswith(_LOCAL_ONLY) for key in records):
            raise self._invalid("a global header names what belongs to one member")
        self._globals.update(records)

    def _member(
        self,
        block: bytes,
        fields: tuple[bytes, ...],
        records: dict[bytes, bytes],
        sparse: list[bytes],
        long_name: bytes | None,
        long_link: bytes | None,
    ) -> Member:
        """Put a member together from its header block and what extension headers said before it."""
        kind = fields[7]
        name = fields[0].partition(b"\0")[0] if long_name is None else long_name
        if kind == b"\0":
            # the oldest archives know a folder by its name
            kind = FOLDER if name.endswith(b"/") else FILE
        elif kind in _FILES:
            kind = FILE
        if fields[9] == b"ustar\0" and fields[15][0] and long_name is None:
            # star keeps times behind a shorter prefix
            prefix = fields[15][:131] if block[508:] == b"tar\0" else fields[15]
            name = prefix.partition(b"\0")[0] + b"/" + name
        number = self._number
        member = Member(
            name,
            kind,
            number(fields[1], "mode") & 0o7777,
            number(fields[2], "user id"),
            number(fields[3], "group id"),
            number(fields[4], "size"),
            number(fields[5], "time") * 1_000_000_000,
            fields[8].partition(b"\0")[0] if long_link is None else long_link,
        )
        if kind in (CHARACTER, BLOCK_DEVICE):
            member.major, member.minor = number(fields[13], "device number"), number(fields[14], "device number")
        if records or self._globals:
            self._apply(member, {**self._globals, **records})
        if not (0 <= member.uid <= ID_LIMIT and 0 <= member.gid <= ID_LIMIT):
            raise self._invalid("a user or group id is out of range")
        if not 0 <= member.size < _SIZE_LIMIT:
            raise self._invalid("a size is out of range")
        if kind == _SPARSE:
            self._old_sparse(member, block)
        elif kind == FILE:
            self._data = member.size
            self._padding = -member.size % BLOCK
            if b"GNU.sparse.major" in records or b"GNU.sparse.map" in records or sparse:
                self._pax_sparse(member, records, sparse)
        elif kind in _HEADER_ONLY:
            member.size = 0
        elif kind == VOLUME:
            member.size = 0  # the label of a tape, not a file
        else:
            raise self._invalid(f"a member is of unknown type {kind!r}")
        return member

    def _apply(self, member: Member, records: dict[bytes, bytes]) -> None:
        """Let pax records override what the header block said. An empty value takes a record back."""
        for key, value in records.items():
            if key.startswith(_XATTR):
                if len(value) > self._limits.xattr:
                    raise _limit(f"an extended attribute of more than {self._limits.xattr} bytes")
                member.xattrs.append((key[len(_XATTR) :], value))
            elif not value:
                continue
            elif key == b"path":
                member.name = value
            elif key == b"linkpath":
                member.link = value
            elif key == b"size":
                member.size = self._decimal(value, "size")
            elif key == b"uid":
                member.uid = self._decimal(value, "user id")
            elif key == b"gid":
                member.gid = self._decimal(value, "group id")
            elif key == b"mtime":
                member.mtime = self._time(value)
        if b"\0" in member.name or b"\0" in member.link:
            raise self._invalid("a name holds a NUL byte")

    def _decimal(self, value: bytes, what: str) -> int:
        if not value.isdigit() or len(value) > 20:
            raise self._invalid(f"a {what} is not a number")
        return int(value)

    def _time(self, value: bytes) -> int:
        """Return seconds with a fraction as nanoseconds, exactly; digits beyond those are dropped."""
        whole, _, fraction = value.removeprefix(b"-").partition(b".")
        if not (whole + fraction).isdigit() or len(value) > 40:
            raise self._invalid("a time is not a number")
        nanoseconds = int(whole or b"0") * 1_000_000_000 + int((fraction + b"000000000")[:9])
        return -nanoseconds if value.startswith(b"-") else nanoseconds

    # ── sparse files: GNU tar's manual, appendix "Storing Sparse Files" ───────────────────────────────────────────

    def _old_sparse(self, member: Member, block: bytes) -> None:
        """Kind S: four pieces in the header, more in blocks behind it, the real length in the header."""
        stored = member.size
        numbers: list[int] = []
        more = block[482] != 0
        self._sparse_entries(block[386:482], numbers)
        size = self._number(block[483:495], "size")
        while more:
            block = self._take(BLOCK)
            self._sparse_entries(block[:504], numbers)
            more = block[504] != 0
            if len(numbers) * 24 > self._limits.header:
                raise _limit("a sparse file of too many pieces")
        member.kind = FILE
        self._data = stored
        self._padding = -stored % BLOCK
        self._set_sparse(member, size, numbers)

    def _sparse_entries(self, area: bytes, numbers: list[int]) -> None:
        for at in range(0, len(area), 24):
            if not area[at]:
                return
            numbers.append(self._number(area[at : at + 12], "sparse offset"))
            numbers.append(self._number(area[at + 12 : at + 24], "sparse length"))

    def _pax_sparse(self, member: Member, records: dict[bytes, bytes], sparse: list[bytes]) -> None:
        """Kinds 0.0 (repeated records), 0.1 (one record) and 1.0 (numbers in front of the data)."""
        major = records.get(b"GNU.sparse.major", b"0"), records.get(b"GNU.sparse.minor", b"0")
        member.name = records.get(b"GNU.sparse.name", member.name)
        if b"\0" in member.name:
            raise self._invalid("a name holds a NUL byte")
        size = records.get(b"GNU.sparse.realsize", records.get(b"GNU.sparse.size", b""))
        if major == (b"1", b"0"):
            numbers = self._sparse_prefix()
        elif records.get(b"GNU.sparse.major", b"0") == b"0":
            listed = records[b"GNU.sparse.map"].split(b",") if b"GNU.sparse.map" in records else sparse
            numbers = [self._decimal(number, "sparse map") for number in listed if number]
        else:
            raise self._invalid("a sparse file is of an unknown version")
        self._set_sparse(member, self._decimal(size, "sparse size"), numbers)

    def _sparse_prefix(self) -> list[int]:
        """Read the map in front of a 1.0 file's data: a count, then as many pairs, a line each, in whole blocks."""
        lines: list[bytes] = []
        rest = b""
        used = 0
        wanted = 1
        while len(lines) < wanted:
            if used + BLOCK > min(self._data, self._limits.header):
                raise self._invalid("a sparse map is malformed")
            *whole, rest = (rest + self._take(BLOCK)).split(b"\n")
            used += BLOCK
            lines += whole
            if len(rest) > 20 and len(lines) < wanted:
                raise self._invalid("a sparse map is malformed")
            if wanted == 1 and lines:
                wanted = 1 + 2 * self._decimal(lines[0], "sparse map")
        self._data -= used
        return [self._decimal(line, "sparse map") for line in lines[1:wanted]]

    def _set_sparse(self, member: Member, size: int, numbers: list[int]) -> None:
        """Check the pieces: in order, apart, inside the file, and together as long as what is stored."""
        pieces = list(zip(numbers[::2], numbers[1::2], strict=False))
        end = 0
        for offset, length in pieces:
            if offset < end or length < 0:
                raise self._invalid("a sparse map is out of order")
            end = offset + length
        if len(numbers) % 2 or not end <= size < _SIZE_LIMIT or sum(numbers[1::2]) != self._data:
            raise self._invalid("a sparse map does not fit its file")
        member.size = size
        member.sparse = pieces

    def _invalid(self, why: str) -> SbxError:
        return SbxError("archive-invalid", f"read the archive: {why}, near byte {self._base + self._at}")


def clamp_time(nanoseconds: int) -> int:
    """Return a time that every kernel takes: within some centuries of now."""
    bound = _TIME_LIMIT * 1_000_000_000
    return max(-bound, min(nanoseconds, bound))


def _limit(what: str, hint: str = "") -> SbxError:
    return SbxError("archive-limit", f"read the archive: {what}", hint)
