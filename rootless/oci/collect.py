"""Warm: remove what nothing refers to any more. Outside. The protocol is at the top of layout."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from rootless import paths
from rootless.errors import SbxError
from rootless.oci import layers, layout, manifest
from rootless.oci.layout import Workspace
from rootless.oci.manifest import DOCUMENT_LIMIT, Descriptor, Index, Manifest
from rootless.reference import check_digest

PARTIAL_AGE = 7 * 86400  #: seconds after which the beginning of a blob is not waited for any longer


@dataclass
class Freed:
    """What a collection removed: counts, and the bytes of blobs and of unpacked files."""

    blobs: int = 0
    layers: int = 0
    size: int = 0
    kept: list[str] = field(default_factory=list)  #: layers that nothing but a running sandbox uses


class Marks:
    """What is needed: blobs by digest, layers by key or by diff-id."""

    def __init__(self) -> None:
        self.digests: set[str] = set()
        self.diff_ids: set[str] = set()
        self.keys: set[str] = set()

    def follow(self, digest: str, document: bool) -> None:
        """Mark a blob and what it leads to. A missing one leads nowhere; one that cannot be read ends the collection,
        since what it leads to would be lost with it."""
        if digest in self.digests:
            return
        self.digests.add(digest)
        size = layout.blob_size(digest)
        if not document or size is None or size > DOCUMENT_LIMIT:
            return
        parsed = manifest.parse(layout.read_blob(Descriptor("", digest, size), f"blob {digest}"), "", f"blob {digest}")
        if isinstance(parsed, Index):
            for entry in parsed.manifests:
                self.follow(entry.digest, True)
        elif isinstance(parsed, Manifest):
            self.config(parsed.config)
            self.digests.update(layer.digest for layer in parsed.layers)

    def config(self, descriptor: Descriptor) -> None:
        self.digests.add(descriptor.digest)
        if layout.blob_size(descriptor.digest) is None:
            return
        what = f"config {descriptor.digest}"
        self.diff_ids.update(manifest.parse_config(layout.read_blob(descriptor, what), what).diff_ids)

    def pins(self, items: set[str]) -> None:
        """Mark what workspaces are at. A digest may be anything's, so it is followed if it reads as a manifest."""
        for item in items:
            if ":" not in item:
                self.keys.add(item)
                continue
            with contextlib.suppress(SbxError):
                self.follow(check_digest(item), True)


def collect(work: Workspace, partials: bool = False) -> Freed:
    """Remove blobs, layers and launch records that nothing needs, and return what that was.

    What a living workspace has pinned or a running sandbox uses stays. With `partials`, beginnings of blobs go too,
    else only those that are old. Raises SbxError when a reference leads to something damaged: then nothing is removed.
    """
    freed = Freed()
    garbage: list[str] = []
    with layout.gate():
        marks = mark()
        _forget_launches(marks)
        running = running_layers()
        for digest in stored_blobs():
            if digest not in marks.digests:
                freed.size += layout.blob_size(digest) or 0
                garbage.append(_take_away(work, layout.blob_path(digest)))
                freed.blobs += 1
        for key in layers.layer_keys():
            meta = layers.peek_meta(key)
            if key in marks.keys or (meta and meta["diff_id"] in marks.diff_ids):
                continue
            if key in running:
                freed.kept.append(key)
                continue
            freed.size += meta["size"] if meta else 0
            garbage.append(_take_away(work, layout.path("layers", key)))
            freed.layers += 1
        freed.size += _collect_partials(partials, marks)
    # The gate is open again; removing trees may take its time. What a kill leaves here is debris in tmp/.
    for item in garbage:
        layout.remove_tree(item)
    return freed


def mark() -> Marks:
    """Return what is needed, by pins and references."""
    marks = Marks()
    pins = layout.living_pins()
    for name in layout.ref_names():
        descriptor = layout.get_ref(name)
        if descriptor:
            marks.follow(descriptor.digest, True)
    marks.pins(pins)
    return marks


def _forget_launches(marks: Marks) -> None:
    """Remove launch records of references that are gone, before anybody looks which sandboxes run."""
    names = set(layout.ref_names())
    for file, name in layout.launch_records():
        digest = name.partition("@")[2]
        if name not in names and digest not in marks.digests:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file)


def _take_away(work: Workspace, item: str) -> str:
    """Move something out of the store into the workspace: from now on it is not there for anybody."""
    place = work.draft("garbage")
    os.rename(item, place)
    return place


def running_layers() -> set[str]:
    """Return the keys of the layers that running sandboxes use."""
    keys: set[str] = set()
    try:
        entries = list(os.scandir(paths.data() + "/sandboxes"))
    except FileNotFoundError:
        return keys
    for entry in entries:
        with contextlib.suppress(OSError), open(entry.path + "/lock", encoding="ascii", errors="replace") as file:
            names = file.read().split()
            if layout.is_held(entry.path + "/lock"):
                keys.update(name.partition("/")[0] for name in names)
    return keys


def stored_blobs() -> list[str]:
    """Return the digests of all blobs."""
    found = []
    for name in sorted(os.listdir(layout.path("blobs", "sha256"))):
        with contextlib.suppress(SbxError):
            found.append(check_digest(f"sha256:{name}"))
    return found


def _collect_partials(everything: bool, marks: Marks) -> int:
    """Remove beginnings of blobs that nobody is at; return their bytes."""
    import time

    size = 0
    for entry in os.scandir(layout.path("partial")):
        status = entry.stat(follow_symlinks=False)
        if f"sha256:{entry.name}" in marks.digests or layout.is_locked(f"blob-{entry.name}"):
            continue
        if everything or status.st_mtime < time.time() - PARTIAL_AGE:
            size += status.st_size
            os.unlink(entry.path)
    return size
