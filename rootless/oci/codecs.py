"""Warm: decompress streams of unknown kind, a bounded piece at a time.

What a stream is, its first bytes tell, not its name or media type. A decompressor never gives out more than was asked
for, so that a bomb costs time that can be counted and not memory that can't.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

from rootless.errors import SbxError

Read = Callable[[int], bytes]  #: at least one and at most n bytes, or none at the end

INPUT = 256 << 10
_MEMORY = 1 << 27  #: bytes that a decompressor may use for its window: what zstd --long=27 and xz -9 need
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"\xfd7zXZ\x00", "xz"), (b"BZh", "bzip2"))


def detect(head: bytes) -> str:
    """Return gzip, zstd, xz or bzip2 when `head` begins a stream of that kind, else an empty text."""
    if head[:4] != b"" and head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstd"  # a skippable frame, with which some tools begin
    return next((name for magic, name in _MAGIC if head.startswith(magic)), "")


def open_stream(read: Read) -> tuple[str, Read]:
    """Return the kind of compression of the stream that `read` gives, and a function that reads it decompressed.

    The function raises SbxError ``archive-invalid`` when the stream is damaged or cut off, or has something behind it.
    """
    head = b""
    while len(head) < 6 and (more := read(INPUT)):
        head += more
    whole = _Pushed(head, read).read
    kind = detect(head)
    if kind == "zstd":
        return kind, _Zstd(whole).read
    return kind, (_Members(kind, whole).read if kind else whole)


class _Pushed:
    """A stream whose first bytes have been looked at."""

    def __init__(self, head: bytes, read: Read) -> None:
        self.head = head
        self.rest = read

    def read(self, size: int) -> bytes:
        if not self.head:
            return self.rest(size)
        taken, self.head = self.head[:size], self.head[size:]
        return taken


class _Members:
    """A stream of one or more compressed members, one after the other, as gzip, xz and bzip2 allow it."""

    def __init__(self, kind: str, read: Read) -> None:
        self.kind = kind
        self.input = read
        self.pending = b""
        self.member = _decompressor(kind)

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes of the decompressed stream."""
        while True:
            if self.member.eof and not self.next_member():
                return b""
            if self.member.needs_input and not self.pending:
                self.pending = self.input(INPUT)
                if not self.pending:
                    raise _damaged(self.kind, "it is cut off")
            try:
                data = self.member.decompress(self.pending, size)
            except Exception as error:  # each module has an exception of its own
                raise _damaged(self.kind, str(error)[:100]) from None
            self.pending = b""
            if data:
                return data

    def next_member(self) -> bool:
        """Begin the next member; False at the end of the stream."""
        rest = self.member.unused_data
        while len(rest) < 6 and (more := self.input(INPUT)):
            rest += more
        if not rest:
            return False
        if detect(rest) != self.kind:
            raise _damaged(self.kind, "something else follows it")
        self.member = _decompressor(self.kind)
        self.pending = rest
        return True


class _Decompressor:
    """What the decompressors of lzma, bz2 and isal's igzip have in common."""

    eof: bool
    needs_input: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Decompress and return at most `max_length` bytes."""
        raise NotImplementedError


def _decompressor(kind: str) -> _Decompressor:
    if kind == "gzip":
        from isal import igzip_lib

        member: object = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP, hist_bits=15)
        return cast(_Decompressor, member)
    if kind == "xz":
        import lzma

        return cast(_Decompressor, lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MEMORY))
    import bz2

    return cast(_Decompressor, bz2.BZ2Decompressor())


class _Zstd:
    """Zstandard frames.

    Of the binding's readers only stream_reader bounds what comes out, and it takes a stream that is cut off for one
    that has ended. So a last frame of ours is put behind the stream: what it holds comes out at the
    end if, and only if, the frame before it was complete.
    """

    def __init__(self, read: Read) -> None:
        import zstandard

        self.error = zstandard.ZstdError
        self.input: Read | None = read
        self.seal = os.urandom(16)
        self.last = zstandard.ZstdCompressor(write_content_size=True).compress(self.seal)
        engine = zstandard.ZstdDecompressor(max_window_size=_MEMORY)
        self.reader = engine.stream_reader(_Input(self.feed), read_size=INPUT, read_across_frames=True)  # type: ignore[arg-type]
        self.held = b""

    def feed(self, size: int) -> bytes:
        """Give the decompressor its input: the stream, then the seal."""
        if self.input and (data := self.input(size)):
            return data
        self.input = None
        data, self.last = self.last, b""
        return data

    def read(self, size: int) -> bytes:
        """Return up to `size` decompressed bytes; the last ones are held back, as they may be the seal."""
        while True:
            try:
                data = self.reader.read(size)
            except self.error as error:
                raise _damaged("zstd", str(error)[:100]) from None
            if not data:
                if self.held != self.seal:
                    raise _damaged("zstd", "it is cut off")
                return b""
            data = self.held + data
            data, self.held = data[:-16], data[-16:]
            if data:
                return data


class _Input:
    """A file for those who want one."""

    def __init__(self, read: Read) -> None:
        self.read = read


def compressor() -> Callable[[bytes | memoryview | None], bytes]:
    """Return a function that compresses what it is given as gzip, and ends the stream when it is given None.

    igzip at its fastest: it keeps up with a disk, and the same input gives the same output.
    """
    from isal import isal_zlib

    engine = isal_zlib.compressobj(1, isal_zlib.DEFLATED, 31)

    def compress(data: bytes | memoryview | None) -> bytes:
        return engine.flush() if data is None else engine.compress(data)

    return compress


def _damaged(kind: str, why: str) -> SbxError:
    return SbxError("archive-invalid", f"decompress {kind}: {why[:1].lower() + why[1:]}")
