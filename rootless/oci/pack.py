"""Either side: write tar archives, and pack folders into them. Warm.

POSIX.1-2001 (pax) where a name, a number or an attribute needs it, ustar otherwise. The same tree gives the same bytes:
names in the order of their bytes, no names of users, no time of packing.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple

from rootless import syscalls
from rootless.errors import SbxError, printable
from rootless.oci import tar
from rootless.oci.tar import BLOCK, CHUNK

Write = Callable[[bytes | memoryview], object]
Owners = dict[bytes, tuple[int, int, int]]  #: path → uid, gid, mode, where they are not those of the file

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
_OCTAL_SIZE = 8**11
_OCTAL_ID = 8**7
# name mode uid gid size mtime checksum type link magic version owner group major minor prefix (padding)
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")


class Entry(NamedTuple):
    """What a header says. `name` is a path without a leading slash; `mtime` is in nanoseconds."""

    name: bytes
    kind: bytes = tar.FILE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size: int = 0
    mtime: int = 0
    link: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    major: int = 0
    minor: int = 0


class Writer:
    """Write an archive to `write`, member by member; `close` ends it."""

    def __init__(self, write: Write) -> None:
        self._write = write

    def add(self, entry: Entry) -> None:
        """Write a member's header; `entry.size` bytes of data, in any pieces, and `pad` must follow."""
        self._write(header(entry))

    def data(self, piece: bytes | memoryview) -> None:
        """Write some of a member's data."""
        self._write(piece)

    def pad(self, size: int) -> None:
        """End a member of `size` bytes."""
        if size % BLOCK:
            self._write(bytes(-size % BLOCK))

    def add_bytes(self, entry: Entry, data: bytes) -> None:
        """Write a whole member."""
        self.add(entry._replace(size=len(data)))
        self.data(data)
        self.pad(len(data))

    def close(self) -> None:
        """Write the end of the archive."""
        self._write(bytes(2 * BLOCK))


def header(entry: Entry) -> bytes:
    """Return the header blocks of a member."""
    name = entry.name + b"/" if entry.kind == tar.FOLDER and not entry.name.endswith(b"/") else entry.name
    records = b""
    prefix, short = _split(name)
    if prefix is None:
        records += _record(b"path", name)
        prefix, short = b"", name[-100:]
    link = entry.link
    if len(link) > 100:
        records += _record(b"linkpath", link)
        link = link[:100]
    seconds, fraction = divmod(entry.mtime, 1_000_000_000)
    if fraction or not 0 <= seconds < _OCTAL_SIZE:
        sign, whole = ("-", -entry.mtime) if entry.mtime < 0 else ("", entry.mtime)
        exact = f"{sign}{whole // 1_000_000_000}.{whole % 1_000_000_000:09d}".rstrip("0").rstrip(".")
        records += _record(b"mtime", exact.encode())
    numbers = ((b"size", entry.size, _OCTAL_SIZE), (b"uid", entry.uid, _OCTAL_ID), (b"gid", entry.gid, _OCTAL_ID))
    for key, value, bound in numbers:
        if value >= bound:
            records += _record(key, b"%d" % value)
    for attribute, content in entry.xattrs:
        records += _record(b"SCHILY.xattr." + attribute, content)
    block = _block(short, prefix, link, entry, min(max(seconds, 0), _OCTAL_SIZE - 1))
    if not records:
        return block
    extended = _block(
        b"PaxHeaders/" + short[-80:].rstrip(b"/"), b"", b"", Entry(b"", b"x", 0o644, size=len(records)), 0
    )
    return extended + records + bytes(-len(records) % BLOCK) + block


def _split(name: bytes) -> tuple[bytes | None, bytes]:
    """Split a name into ustar's two fields; (None, name) if it does not fit."""
    if len(name) <= 100:
        return b"", name
    for place in range(len(name) - 101, min(len(name) - 1, 156)):
        if place > 0 and name[place] == 0x2F:
            return name[:place], name[place + 1 :]
    return None, name


def _record(key: bytes, value: bytes) -> bytes:
    """Return a pax record, whose length counts itself."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(rest) + len(str(length)) != length:
        length = len(rest) + len(str(length))
    return b"%d" % length + rest


def _block(name: bytes, prefix: bytes, link: bytes, entry: Entry, seconds: int) -> bytes:
    """Return one header block; what is too large for its field stands in a pax record, and here as 0."""
    block = _HEADER.pack(
        name, b"%07o" % entry.mode, b"%07o" % (entry.uid % _OCTAL_ID), b"%07o" % (entry.gid % _OCTAL_ID),
        b"%011o" % (entry.size % _OCTAL_SIZE), b"%011o" % seconds, b" " * 8, entry.kind, link, b"ustar", b"00",
        b"", b"",
        b"%07o" % entry.major, b"%07o" % entry.minor, prefix,
    )  # fmt: skip
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Packer:
    """Pack the open folder `top` as it is, following nothing.

    `owners` overrides owners and modes by path; ids in `unmapped` (those that the namespace has no name for) become 0.
    Sockets and device nodes are left out and counted in `left_out`.
    """

    def __init__(self, top: int, write: Write, owners: Owners | None = None, unmapped: int = -1) -> None:
        self.top = top
        self.writer = Writer(write)
        self.owners = owners or {}
        self.unmapped = unmapped
        self.seen: dict[tuple[int, int], bytes] = {}
        self.left_out = 0
        self.path = b""

    def run(self) -> None:
        """Write the whole archive. Raises SbxError ``pack-failed`` with the name of what could not be read."""
        try:
            self.pack_folder(self.top, b".", os.fstat(self.top))
            self.pack_below()
        except OSError as error:
            raise SbxError("pack-failed", f"pack {printable(self.path)[:120]}: {error.strerror}") from None
        self.writer.close()

    def pack_below(self) -> None:
        """Pack what is in the folders, each folder before what is in it, without recursion."""
        pending = [b""]
        while pending:
            path = pending.pop()
            self.path = path
            folder = syscalls.openat2(self.top, path or b".", _FOLDER, _RESOLVE)
            try:
                below = []
                for name in sorted(os.fsencode(name) for name in os.listdir(folder)):
                    inner = path + b"/" + name if path else name
                    self.path = inner
                    try:
                        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # overlayfs lists whiteouts of folders that one layer alone has
                    if stat.S_ISDIR(status.st_mode):
                        self.pack_child_folder(folder, name, inner, status)
                        below.append(inner)
                    else:
                        self.pack_leaf(folder, name, inner, status)
                pending += reversed(below)
            finally:
                os.close(folder)

    def pack_child_folder(self, parent: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        fd = os.open(name, _FOLDER, dir_fd=parent)
        try:
            self.pack_folder(fd, path, status)
        finally:
            os.close(fd)

    def pack_folder(self, fd: int, path: bytes, status: os.stat_result) -> None:
        self.writer.add(self.entry(path, tar.FOLDER, status, xattrs=_xattrs(fd)))

    def pack_leaf(self, folder: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        mode = status.st_mode
        if stat.S_ISREG(mode):
            self.pack_file(folder, name, path, status)
        elif stat.S_ISLNK(mode):
            self.writer.add(self.entry(path, tar.SYMLINK, status, os.fsencode(os.readlink(name, dir_fd=folder))))
        elif stat.S_ISFIFO(mode):
            self.writer.add(self.entry(path, tar.FIFO, status))
        else:
            self.left_out += 1

    def pack_file(self, folder: int, name: bytes, path: bytes, status: os.stat_result) -> None:
        """Write a file, or a link to the name under which it was written before."""
        if status.st_nlink > 1:
            first = self.seen.setdefault((status.st_dev, status.st_ino), path)
            if first != path:
                self.writer.add(self.entry(path, tar.LINK, status, first))
                return
        fd = os.open(name, _FILE, dir_fd=folder)
        try:
            size = os.fstat(fd).st_size
            self.writer.add(self.entry(path, tar.FILE, status, size=size, xattrs=_xattrs(fd)))
            left = size
            while left and (data := os.read(fd, min(left, CHUNK))):
                self.writer.data(data)
                left -= len(data)
            if left:
                raise OSError(errno.EIO, "it became shorter while it was read")
            self.writer.pad(size)
        finally:
            os.close(fd)

    def entry(
        self, path: bytes, kind: bytes, status: os.stat_result, link: bytes = b"", size: int = 0,
        xattrs: tuple[tuple[bytes, bytes], ...] = (),
    ) -> Entry:  # fmt: skip
        uid, gid, mode = self.owners.get(path, (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)))
        uid = 0 if uid == self.unmapped else uid
        gid = 0 if gid == self.unmapped else gid
        return Entry(path, kind, mode, uid, gid, size, status.st_mtime_ns, link, xattrs)


def _xattrs(fd: int) -> tuple[tuple[bytes, bytes], ...]:
    """Return the attributes of an open file that belong to it and not to this host."""
    found = []
    try:
        names = sorted(os.fsencode(name) for name in os.listxattr(fd))
    except OSError:
        return ()  # a filesystem without
    for name in names:
        if name == b"security.capability" or (name.startswith(b"user.") and not name.startswith(b"user.overlay.")):
            try:
                found.append((name, os.getxattr(fd, name)))
            except OSError:
                continue
    return tuple(found)
