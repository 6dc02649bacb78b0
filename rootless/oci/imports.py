"""Warm: make an image of a root filesystem. Outside."""

from __future__ import annotations

import os
from typing import Any

from rootless.errors import SbxError, printable
from rootless.oci import images, layers
from rootless.oci.codecs import Read
from rootless.oci.images import Stored
from rootless.oci.layout import Workspace
from rootless.oci.manifest import Platform
from rootless.oci.tar import DEFAULT, Limits
from rootless.reference import Reference
from rootless.spec import IdMap

STDIN = "-"


def store(
    reference: Reference,
    source: str,
    idmap: IdMap,
    run: dict[str, Any],
    comment: str,
    platform: Platform | None = None,
    limits: Limits = DEFAULT,
) -> tuple[Stored, list[dict[str, Any]]]:
    """Store the root filesystem in the tar `source` (a path, or ``-``) as an image of one layer, unpacked for `idmap`.

    Returns the image and, for a layer that was unpacked, what the unpacker says of it. `run` is the ``config`` object
    of its configuration. Raises SbxError ``archive-unreadable`` and what layers.ingest raises; then the store is as
    before.
    """
    fd = _open(source)
    try:
        with Workspace() as work:
            info = layers.ingest(work, lambda offset: _reader(fd, source), idmap=idmap, limits=limits)
            comment = comment or f"imported from {printable(os.path.basename(source))}"
            stored = images.save(work, reference, [info], run, comment, platform)
            images.prepare_in(work, reference, idmap)
    finally:
        if fd != 0:
            os.close(fd)
    return stored, [info.summary] if info.summary else []


def _open(source: str) -> int:
    """Open the archive for reading; raises SbxError ``archive-unreadable``."""
    if source == STDIN:
        if os.isatty(0):
            raise SbxError(
                "archive-unreadable",
                "read the archive from stdin: that is a terminal",
                "redirect a file or a pipe to it",
            )
        return 0
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(source, error) from None
    if os.path.isdir(source):
        os.close(fd)
        raise SbxError(
            "archive-unreadable",
            f"read the archive {printable(source)}: it is a folder",
            f"write dir:{printable(source)} to import a folder",
        )
    return fd


def _reader(fd: int, source: str) -> Read:
    empty = True

    def read(size: int) -> bytes:
        nonlocal empty
        try:
            data = os.read(fd, size)
        except OSError as error:
            raise _unreadable(source, error) from None
        if not data and empty:
            raise SbxError("archive-unreadable", f"read the archive {printable(source)}: it is empty")
        empty = False
        return data

    return read


def _unreadable(source: str, error: OSError) -> SbxError:
    return SbxError("archive-unreadable", f"read the archive {printable(source)}: {error.strerror}")
