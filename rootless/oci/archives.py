"""Warm: archives of images, whose members are wanted by name and not in their order. Outside.

A plain tar in a file is read where it lies; one that is compressed, or comes through a pipe, is put into the workspace
member by member first. Member names are keys here, never paths.
"""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass
from types import TracebackType

from rootless.errors import SbxError, printable
from rootless.oci import codecs, documents, tar
from rootless.oci.codecs import Read
from rootless.oci.layout import Workspace, full
from rootless.oci.tar import Limits

_MEMBERS = 100_000


@dataclass(frozen=True)
class _Place:
    """Where a member's data is."""

    fd: int
    offset: int
    size: int


class Archive:
    """An opened archive: `names` are its files, by normalised name."""

    def __init__(self, work: Workspace, path: str, limits: Limits) -> None:
        from rootless.oci import sources

        self.shown = printable(path)
        self._work = work
        self._limits = limits._replace(entries=min(limits.entries, _MEMBERS))
        self._places: dict[str, _Place] = {}
        self._links: dict[str, str] = {}
        self._spool = -1
        self._fd = sources.open_file(path)

    def __enter__(self) -> Archive:
        try:
            self._index()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in {self._fd, self._spool}:
            if fd > 0:
                os.close(fd)
        self._fd = self._spool = -1

    @property
    def names(self) -> set[str]:
        return set(self._places) | set(self._links)

    def read(self, name: str, limit: int) -> bytes:
        """Return a small member's data, at most `limit` bytes of it."""
        place = self._place(name)
        return _pread(place, 0, min(place.size, limit))

    def open(self, name: str) -> Read:
        """Return a function that reads a member from its beginning."""
        place = self._place(name)
        at = 0

        def read(size: int) -> bytes:
            nonlocal at
            data = _pread(place, at, min(size, place.size - at))
            at += len(data)
            return data

        return read

    def _place(self, name: str) -> _Place:
        key = posixpath.normpath(name)
        for _ in range(8):  # docker once linked layers that images share
            if key in self._places:
                return self._places[key]
            if key not in self._links:
                break
            key = self._links[key]
        raise SbxError("archive-invalid", f"read {self.shown}: {printable(name)[:100]} is not in it")

    def _index(self) -> None:
        """Find all members, without keeping their data if it can be read again."""
        at = 0

        def read_counted(size: int) -> bytes:
            nonlocal at
            data = os.read(self._fd, size)
            at += len(data)
            return data

        kind, read = codecs.open_stream(read_counted)
        again = not kind and stat.S_ISREG(os.fstat(self._fd).st_mode)
        start = os.lseek(self._fd, 0, os.SEEK_CUR) - at if again else 0
        if not again:
            name = self._work.draft("spool")
            self._spool = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.unlink(name)
        reader = tar.Reader(read, self._limits)
        total = 0
        for member in reader:
            name = posixpath.normpath(os.fsdecode(member.name).lstrip("/"))
            total += member.size
            if total > self._limits.size:
                raise SbxError("archive-limit", f"read {self.shown}: it holds more than {self._limits.size} bytes")
            if member.kind in (tar.SYMLINK, tar.LINK):
                base = posixpath.dirname(name) if member.kind == tar.SYMLINK else ""
                self._links[name] = posixpath.normpath(posixpath.join(base, os.fsdecode(member.link)))
            elif member.kind == tar.FILE and member.sparse is None:
                self._places[name] = (
                    _Place(self._fd, start + reader.position, member.size) if again else self._keep(reader, member)
                )

    def _keep(self, reader: tar.Reader, member: tar.Member) -> _Place:
        """Put a member's data into the workspace."""
        offset = os.lseek(self._spool, 0, os.SEEK_END)
        try:
            for piece in reader.pieces():
                while piece:
                    piece = piece[os.write(self._spool, piece) :]
        except OSError as error:
            raise full(error, member.size) from None
        return _Place(self._spool, offset, member.size)


def _pread(place: _Place, at: int, size: int) -> bytes:
    return os.pread(place.fd, size, place.offset + at) if size > 0 else b""


# ── docker save ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class DockerEntry:
    """One image of a `docker save`: names of members, and the names it goes by."""

    config: str
    layers: list[str]
    tags: list[str]


def docker_entries(archive: Archive) -> list[DockerEntry]:
    """Return the images that manifest.json lists."""
    what = f"manifest.json of {archive.shown}"
    document = documents.decode(archive.read("manifest.json", documents.LIMIT + 1), what)
    if not isinstance(document, list):
        raise SbxError("document-invalid", f"read {what}: it is not a list")
    found = []
    for entry in document:
        config = entry.get("Config") if isinstance(entry, dict) else None
        layers = _texts(entry.get("Layers")) if isinstance(entry, dict) else None
        tags = _texts(entry.get("RepoTags") or []) if isinstance(entry, dict) else None
        if not isinstance(config, str) or layers is None or tags is None:
            raise SbxError("document-invalid", f"read {what}: an entry is not as docker writes it")
        found.append(DockerEntry(config, layers, tags))
    return found


def _texts(value: object) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
