"""Warm: what the store takes on the disk, and whether it is whole. Outside."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from rootless import store
from rootless.errors import SbxError
from rootless.oci import collect, images, layers, layout, manifest
from rootless.oci.images import Stored
from rootless.oci.layout import Workspace
from rootless.oci.manifest import REF_NAME
from rootless.reference import parse


@dataclass
class Usage:
    """How many of a kind there are, their bytes, and how many of these nothing refers to."""

    kind: str
    count: int = 0
    size: int = 0
    reclaimable: int = 0

    def add(self, size: int, needed: bool) -> None:
        self.count += 1
        self.size += size
        self.reclaimable += 0 if needed else size


def survey() -> list[Usage]:
    """Return what blobs, unpacked layers (for each id map), beginnings of blobs and debris take. Removes nothing."""
    blobs, partial, debris = Usage("blobs"), Usage("partial blobs"), Usage("unfinished")
    unpacked: dict[str, Usage] = {}
    if not layout.exists():
        return [blobs, partial, debris]
    marks = collect.mark()
    for digest in collect.stored_blobs():
        blobs.add(layout.blob_size(digest) or 0, digest in marks.digests)
    running = collect.running_layers()
    for key in layers.layer_keys():
        meta = layers.peek_meta(key) or {}
        ids = meta.get("idmap", "damaged")
        needed = key in marks.keys or key in running or meta.get("diff_id") in marks.diff_ids
        unpacked.setdefault(ids, Usage(f"layers for {_map_name(ids)}")).add(meta.get("size", 0), needed)
    for entry in os.scandir(layout.path("partial")):
        partial.add(entry.stat(follow_symlinks=False).st_size, layout.is_locked(f"blob-{entry.name}"))
    for entry in os.scandir(layout.path("tmp")):
        debris.add(_size_of(entry.path), layout.is_held(entry.path))
    return [blobs, *sorted(unpacked.values(), key=lambda usage: usage.kind), partial, debris]


def _map_name(key: str) -> str:
    """Return an id map's key as a short text: the ids that are root and the first other one."""
    return key if key in ("single", "damaged") else "ids " + key.split(" 0:0:0")[0]


def _size_of(path: str) -> int:
    """Return the bytes of the files below `path`, as far as they can be seen."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{folder}/{name}").st_size
    return total


# ── checking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be; `cure` removes it, so that it can be fetched or made again."""

    what: str
    path: str = ""  #: what to remove; empty if removing would not help


def check(quick: bool = False) -> Iterator[Problem]:
    """Yield all that is wrong with the store. With `quick`, sizes are compared and no blob is read."""
    if not layout.exists():
        return
    for name in layout.ref_names():
        yield from _check_image(name)
    for digest in collect.stored_blobs():
        if not quick and (problem := _check_blob(digest)):
            yield problem
    for key in layers.layer_keys():
        yield from _check_layer(key)
    yield from _check_launches()
    yield from _check_index()


def _check_image(name: str) -> Iterator[Problem]:
    """A reference can be read, and all that it leads to is there."""
    file = layout.path("refs", store.escape(name))
    try:
        target = layout.get_ref(parse(name))
        if target is None:
            return  # it went away meanwhile
        image = images.load(name, target)
    except SbxError as error:
        # an image of another platform alone is no fault
        if error.code != "platform-missing":
            yield Problem(f"image {name}: {error.message}", file)
        return
    for layer in image.manifest.layers:
        size = layout.blob_size(layer.digest)
        if size != layer.size:
            yield Problem(f"image {name}: layer {layer.digest} is {'missing' if size is None else 'cut off'}", file)


def _check_blob(digest: str) -> Problem | None:
    hasher = hashlib.sha256()
    try:
        with open(layout.blob_path(digest), "rb", buffering=0) as file:
            while data := file.read(1 << 20):
                hasher.update(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        return Problem(f"blob {digest}: {error.strerror}", layout.blob_path(digest))
    if f"sha256:{hasher.hexdigest()}" == digest:
        return None
    return Problem(f"blob {digest}: its bytes have changed", layout.blob_path(digest))


def _check_layer(key: str) -> Iterator[Problem]:
    """An unpacked layer has its meta, and as many files and bytes as when it was unpacked."""
    path = layout.path("layers", key)
    meta = layers.peek_meta(key)
    if meta is None:
        yield Problem(f"layer {key}: what is known of it is lost", path)
        return
    try:
        found = layers.count_files(key)
    except (OSError, SbxError) as error:
        yield Problem(f"layer {key}: it cannot be read: {error}", path)
        return
    if found != (meta["files"], meta["size"]):
        yield Problem(
            f"layer {key}: it has {found[0]} files of {found[1]} bytes, not {meta['files']} of {meta['size']}", path
        )


def _check_launches() -> Iterator[Problem]:
    """A launch record belongs to a reference, or to a digest that is there."""
    names = set(layout.ref_names())
    for file, name in layout.launch_records():
        if name not in names and images.resolve(parse(name)) is None:
            yield Problem(f"launch record of {name}: there is no such image", file)


def _check_index() -> Iterator[Problem]:
    """index.json says what the references say."""
    with contextlib.suppress(OSError, SbxError, KeyError, TypeError):
        with open(layout.path("index.json"), "rb") as file:
            document = manifest.decode(file.read(manifest.DOCUMENT_LIMIT + 1), "index.json")
        listed = {entry["annotations"][REF_NAME]: entry["digest"] for entry in document["manifests"]}
        if listed == {name: target.digest for name, target in layout.refs().items()}:
            return
    if layout.ref_names():
        yield Problem("index.json: it does not say what the references say", layout.path("index.json"))


def repair(problems: list[Problem]) -> None:
    """Remove what is damaged, and derive again what is derived."""
    with Workspace() as work:
        for problem in problems:
            if problem.path:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(problem.path, work.draft("damaged"))
        layout.write_index(work)
        for _, name in list(layout.launch_records()):
            layout.forget_launches(name)  # they are made again in a moment, and may speak of what is gone


# ── pruning ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def unused() -> list[str]:
    """Return the references of images that no running sandbox uses."""
    running = collect.running_layers()
    used = {meta["diff_id"] for key in running if (meta := layers.peek_meta(key))}
    found = []
    for entry in images.listing():
        if isinstance(entry, Stored) and not used.intersection(entry.config.diff_ids):
            found.append(entry.reference)
    return found
