"""Warm: take something in as an image of a given name. Outside."""

from __future__ import annotations

from typing import Any

from rootless.errors import SbxError
from rootless.oci import changes, images, layers, sources
from rootless.oci.images import Stored
from rootless.oci.layout import Workspace
from rootless.oci.manifest import Platform
from rootless.oci.sources import Rootfs, Taking
from rootless.oci.tar import DEFAULT, Limits
from rootless.reference import Reference
from rootless.spec import IdMap


def store(
    reference: Reference,
    source: str,
    idmap: IdMap,
    instructions: list[str],
    comment: str = "",
    platform: Platform | None = None,
    limits: Limits = DEFAULT,
) -> tuple[Stored, list[dict[str, Any]]]:
    """Store what `source` means (see oci.sources) as the image `reference`, unpacked for `idmap`.

    `instructions` change the configuration of a root filesystem. Returns the image and, for a layer that was unpacked,
    what the unpacker says of it. Raises SbxError: what the source raises, and layers.ingest; then the store is as
    before.
    """
    origin = sources.open_source(source)
    with Workspace() as work:
        if not hasattr(origin, "take"):
            return _store_rootfs(work, origin, reference, idmap, instructions, comment, platform, limits)
        if instructions or comment:
            raise SbxError(
                "option-invalid",
                f"import {source}: it is a whole image, and --change and --message are for root filesystems",
            )
        return origin.take(Taking(work, idmap, limits, platform), [reference])[0], []


def _store_rootfs(
    work: Workspace,
    origin: Rootfs,
    reference: Reference,
    idmap: IdMap,
    instructions: list[str],
    comment: str,
    platform: Platform | None,
    limits: Limits,
) -> tuple[Stored, list[dict[str, Any]]]:
    """Store a root filesystem as an image of one layer."""
    run = changes.apply(origin.run, instructions)
    with origin.open(idmap) as read:
        info = layers.ingest(work, lambda offset: read, idmap=idmap, limits=limits)
    stored = images.save(work, reference, [info], run, comment or origin.comment, platform)
    images.prepare_in(work, reference, idmap)
    return stored, [info.summary] if info.summary else []
