"""Warm: the flat root filesystem of an image, and folders, as tar streams. Outside; the packing is done inside.

An image's layers are merged by the kernel: a child with the image's ids mounts them in a mount namespace of its own and
packs what it sees. So owners come out as the image has them, whatever ids the files have on disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

from rootless import syscalls
from rootless.errors import SbxError
from rootless.oci import inside, layers
from rootless.oci.layout import Workspace
from rootless.oci.pack import Owners, Packer
from rootless.spec import IdMap, Image

_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def image(work: Workspace, image: Image, idmap: IdMap, output: int) -> None:
    """Write the merged root filesystem of a prepared `image` as a tar to the descriptor `output`."""
    owners = _owners(image) if idmap.mode == "single" else {}
    empty, target = work.draft("empty"), work.draft("merged")
    os.mkdir(empty)
    os.mkdir(target)
    names = [*image.layers, empty]  # overlayfs without an upper layer wants two

    def run() -> None:
        syscalls.unshare(syscalls.CLONE_NEWNS)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
        os.chdir(_layers_folder())
        flags = syscalls.MS_RDONLY | syscalls.MS_NODEV | syscalls.MS_NOSUID
        syscalls.mount("overlay", target, "overlay", flags, f"userxattr,lowerdir={':'.join(names)}")
        _pack(os.open(target, _FOLDER), output, owners, -1)

    inside.call(idmap, run)


def _layers_folder() -> str:
    from rootless import store

    return store.layers()


def _pack(top: int, output: int, owners: Owners, unmapped: int) -> None:
    """Pack the open folder `top` into the descriptor `output`."""

    def write(piece: bytes | memoryview) -> None:
        view = memoryview(piece)
        while view:
            view = view[os.write(output, view) :]

    buffered = _Buffered(write)
    Packer(top, buffered.write, owners, unmapped).run()
    buffered.flush()


class _Buffered:
    """Headers are small: many of them go in one write."""

    def __init__(self, write: Callable[[bytes | memoryview], None]) -> None:
        self._write = write
        self._parts: list[bytes | memoryview] = []
        self._size = 0

    def write(self, piece: bytes | memoryview) -> None:
        self._parts.append(piece)
        self._size += len(piece)
        if self._size >= 1 << 18:
            self.flush()

    def flush(self) -> None:
        self._write(b"".join(self._parts))
        self._parts.clear()
        self._size = 0


def _owners(image: Image) -> Owners:
    """Return the owners that unpacking with one id has recorded, as the layers hide one another."""
    merged: Owners = {}
    for name in reversed(image.layers):
        key = name.partition("/")[0]
        meta = layers.peek_meta(key) or {}
        top = os.open(f"{_layers_folder()}/{name}", _FOLDER)
        try:
            merged = {path: owner for path, owner in merged.items() if not _has(top, path)}
        finally:
            os.close(top)
        merged.update(meta.get("owners", {}))
    # the packer knows the root by another name
    if b"" in merged:
        merged[b"."] = merged.pop(b"")
    return merged


def _has(top: int, path: bytes) -> bool:
    try:
        os.close(syscalls.openat2(top, path or b".", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, _RESOLVE))
        return True
    except OSError:
        return False


@contextlib.contextmanager
def folder(path: str, idmap: IdMap) -> Iterator[Callable[[int], bytes]]:
    """Give a function that reads the tar of the folder `path`, owners as `idmap` has them; those it has not are root.

    Raises SbxError ``pack-failed`` or ``folder-missing``, the former at the end of the block.
    """
    if not os.path.isdir(path):
        raise SbxError("folder-missing", f"open the folder {path}: there is no such folder")
    reader, writer = os.pipe2(os.O_CLOEXEC)
    unmapped = _overflow_id()

    def run(feed: int) -> None:
        os.close(reader)
        _pack(os.open("/", _FOLDER), writer, {}, unmapped)

    worker = inside.start(idmap, run, os.path.abspath(path))
    os.close(writer)
    try:
        yield lambda size: os.read(reader, size)
        while os.read(reader, 1 << 16):
            pass
        worker.finish()
    finally:
        os.close(reader)
        with contextlib.suppress(SbxError):
            worker.finish()


def _overflow_id() -> int:
    """Return the id that files of unmapped owners seem to have: user_namespaces(7)."""
    try:
        with open("/proc/sys/kernel/overflowuid", encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 65534
