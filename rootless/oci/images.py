"""Warm: images in the store: from a reference to what a launch needs, and from layers to an image. Outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rootless import store
from rootless.errors import SbxError, printable
from rootless.oci import layers, layout, manifest
from rootless.oci.layers import LayerInfo
from rootless.oci.layout import Workspace
from rootless.oci.manifest import Config, Descriptor, Index, Manifest, Platform
from rootless.oci.tar import DEFAULT, Limits
from rootless.reference import Reference, parse
from rootless.spec import IdMap, Image

ID_LENGTH = 12  #: hex digits of a digest that are shown


@dataclass(frozen=True)
class Stored:
    """An image whose documents are in the store: what its manifest and config say. `digest` is the manifest's."""

    reference: str
    target: Descriptor  #: what the reference points to: the manifest, or an index that has it
    descriptor: Descriptor
    manifest: Manifest
    config: Config

    @property
    def digest(self) -> str:
        return self.descriptor.digest

    @property
    def id(self) -> str:
        """The digest of the config, which docker and podman call the image's id."""
        return self.manifest.config.digest

    @property
    def size(self) -> int:
        """Bytes of the stored blobs."""
        return self.descriptor.size + self.manifest.config.size + sum(layer.size for layer in self.manifest.layers)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def resolve(reference: Reference) -> tuple[str, Descriptor] | None:
    """Return the name that the store has for `reference`, and what it points to; None when there is none.

    A reference by digest is also answered by any name of the same repository whose image has that digest.
    """
    if (found := layout.get_ref(reference)) is not None:
        return str(reference), found
    if not reference.digest:
        return None
    for name, descriptor in layout.refs().items():
        other = parse(name)
        if other.name == reference.name and (not reference.tag or other.tag == reference.tag):
            if descriptor.digest == reference.digest:
                return name, descriptor
            if descriptor.media_type in manifest.INDEXES and _has_entry(descriptor, reference.digest):
                return name, descriptor
    return None


def _has_entry(descriptor: Descriptor, digest: str) -> bool:
    try:
        index = manifest.parse(layout.read_blob(descriptor, "the index"), descriptor.media_type, "the index")
    except SbxError:
        return False
    return isinstance(index, Index) and any(entry.digest == digest for entry in index.manifests)


def load(name: str, target: Descriptor, platform: Platform | None = None) -> Stored:
    """Return the image behind `target` for `platform` (default: this machine's), read from the store.

    Raises SbxError ``blob-missing``, ``blob-damaged``, ``document-…``, ``platform-missing``.
    """
    what = f"the manifest of {name}"
    document = manifest.parse(layout.read_blob(target, what), target.media_type, what)
    descriptor = target
    for _ in range(3):  # an index may point to an index
        if isinstance(document, Manifest):
            break
        descriptor = choose(document, platform, name)
        document = manifest.parse(layout.read_blob(descriptor, what), descriptor.media_type, what)
    if not isinstance(document, Manifest):
        raise manifest.invalid(what, "indexes lead to indexes")
    config = manifest.parse_config(layout.read_blob(document.config, f"the config of {name}"), f"the config of {name}")
    if len(config.diff_ids) != len(document.layers):
        raise manifest.invalid(what, f"it has {len(document.layers)} layers, its config {len(config.diff_ids)}")
    return Stored(name, target, descriptor, document, config)


def choose(index: Index, platform: Platform | None, name: str) -> Descriptor:
    """Return the entry of `index` for `platform`; raises SbxError ``platform-missing``, which lists what there is."""
    wanted = platform or Platform.host()
    entry = index.choose(wanted)
    if entry is None:
        there = (
            ", ".join(sorted({printable(str(entry.platform)) for entry in index.manifests if entry.platform})) or "none"
        )
        raise SbxError(
            "platform-missing",
            f"choose an image of {name} for {wanted}: there are only {there}",
            "--platform chooses another one",
        )
    return entry


def find(reference: Reference, platform: Platform | None = None) -> Stored | None:
    """Return the image that is stored as `reference`, or None; raises what `load` raises."""
    found = resolve(reference)
    image = load(str(reference), found[1], platform) if found else None
    # An index says itself what its images are for; an image alone has only its config for that.
    if image and platform and image.descriptor is image.target and not image.config.platform.serves(platform):
        there = image.config.platform
        raise SbxError("platform-missing", f"choose an image of {reference} for {platform}: there is only {there}")
    return image


def get(reference: Reference) -> Stored:
    """Return the image that is stored as `reference`; raises SbxError ``image-unknown`` when there is none."""
    stored = find(reference)
    if stored is None:
        raise SbxError(
            "image-unknown", f"find image {reference.familiar}: not in the store", "sbx images lists what is there"
        )
    return stored


def listing() -> list[Stored | SbxError]:
    """Return all images of the store by name; in the place of one that cannot be read stands what is wrong with it."""
    found: list[Stored | SbxError] = []
    for name, descriptor in layout.refs().items():
        try:
            found.append(load(name, descriptor))
        except SbxError as error:
            found.append(error)
    return found


def one(text: str) -> Stored:
    """Return the image that `text` means, a reference or the beginning of an id; raises what `named` and `load` do."""
    name = named(text)[0]
    reference = parse(name)
    if "@" in text:
        reference = parse(text)
    return get(reference)


def pinned(work: Workspace, name: str) -> Stored:
    """Return the image of the reference `name` with all its blobs pinned by `work`; raises ``image-unknown``."""
    while True:
        target = layout.get_ref(name)
        if target is None:
            raise SbxError("image-unknown", f"find image {name}: not in the store", "sbx images lists what is there")
        work.pin(target.digest)
        # Pinned, and still referred to after that: so it was not collected before it was pinned.
        if layout.get_ref(name) == target:
            return load(name, target)


def history(image: Stored) -> list[dict[str, Any]]:
    """Return the steps that made an image, the newest first, each with the size of the layer that it added."""
    sizes = [layer.size for layer in image.manifest.layers]
    steps = []
    for entry in image.config.history:
        adds = not entry.get("empty_layer")
        steps.append(
            {
                "created": str(entry.get("created", "")),
                "created_by": str(entry.get("created_by", "")),
                "comment": str(entry.get("comment", "")),
                "size": sizes.pop(0) if adds and sizes else 0,
            }
        )
    # an image need not tell all of its history
    steps += [{"created": "", "created_by": "", "comment": "", "size": size} for size in sizes]
    return steps[::-1]


def named(text: str) -> list[str]:
    """Return the names of the references that `text` means: a reference, or the beginning of an id or digest.

    Raises SbxError ``image-unknown`` or ``image-ambiguous``.
    """
    hexadecimal = text.removeprefix("sha256:")
    by_id = len(hexadecimal) >= 4 and not set(hexadecimal) - set("0123456789abcdef")
    if not text.startswith("sha256:"):
        try:
            if (found := resolve(parse(text))) is not None:
                return [found[0]]
        except SbxError:
            if not by_id:
                raise
    matches: dict[str, list[str]] = {}
    for image in listing() if by_id else ():
        if isinstance(image, Stored):
            for digest in (image.id, image.digest, image.target.digest):
                if digest.removeprefix("sha256:").startswith(hexadecimal):
                    matches.setdefault(image.id, []).append(image.reference)
                    break
    if len(matches) > 1:
        raise SbxError(
            "image-ambiguous", f"find image {text}: {len(matches)} images begin with that", "give more digits"
        )
    if not matches:
        raise SbxError(
            "image-unknown", f"find image {printable(text)}: not in the store", "sbx images lists what is there"
        )
    return next(iter(matches.values()))


# ── launching ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(
    reference: Reference,
    idmap: IdMap,
    platform: Platform | None = None,
    limits: Limits = DEFAULT,
    progress: Callable[[str], None] | None = None,
) -> Image | None:
    """Return the stored image `reference` ready to run with `idmap`; None when the store has no such reference.

    Layers that are not unpacked for this map yet are unpacked from the local blobs, and a launch record is written, so
    that the next `store.find` answers. `progress` is told the diff-id of each layer that has to be unpacked.
    """
    if not layout.exists():
        return None
    with Workspace() as work:
        return prepare_in(work, reference, idmap, platform, limits, progress)


def prepare_in(
    work: Workspace,
    reference: Reference,
    idmap: IdMap,
    platform: Platform | None = None,
    limits: Limits = DEFAULT,
    progress: Callable[[str], None] | None = None,
) -> Image | None:
    """Do what `prepare` does, in a workspace that is there already."""
    while True:
        found = resolve(reference)
        if found is None:
            return None
        work.pin(found[1].digest)
        stored = load(str(reference), found[1], platform)
        work.pin(stored.digest, stored.id, *(layer.digest for layer in stored.manifest.layers))
        boots, folders = _unpack_all(work, stored, idmap, limits, progress)
        image = as_image(stored, folders)
        # Another platform than the host's is asked for by an option, which the record's name does not hold.
        if platform is None:
            _write_record(work, image, idmap, next((boot for boot in boots if boot), ""))
            if resolve(reference) != found:
                layout.forget_launches(str(reference))
                continue
        return image


def _unpack_all(
    work: Workspace, stored: Stored, idmap: IdMap, limits: Limits, progress: Callable[[str], None] | None
) -> tuple[list[str], list[str]]:
    """Have all layers of an image unpacked; return their boots, and the names of their folders, the top one first."""
    pairs = list(zip(stored.manifest.layers, stored.config.diff_ids, strict=True))
    keys = [layers.layer_key(diff_id, idmap) for diff_id in stored.config.diff_ids]
    work.pin(*keys)
    metas = {key: layers.read_meta(key) for key in keys}
    jobs = {}
    for (descriptor, diff_id), key in zip(pairs, keys, strict=True):
        if metas[key] is None:
            if progress and key not in jobs:
                progress(diff_id)
            jobs[key] = _unpacking(work, stored.reference, descriptor, diff_id, idmap, limits)
    if jobs:
        layers.ingest_all(list(jobs.values()))
    boots: list[str] = []
    folders: list[str] = []
    for key in reversed(keys):
        meta = metas[key] or layers.read_meta(key) or {}
        # overlayfs refuses a folder that stands twice in its list; the lower one had nothing to add
        if f"{key}/fs" not in folders:
            boots.append(meta.get("boot", ""))
            folders.append(f"{key}/fs")
        if meta.get("opaque"):
            break  # it hides everything below, which overlayfs does not see at a layer's root
    return boots, folders


def _unpacking(
    work: Workspace, name: str, layer: Descriptor, diff_id: str, idmap: IdMap, limits: Limits
) -> Callable[[], LayerInfo]:
    """Return what unpacks one layer from its stored blob."""
    return lambda: layers.ingest(
        work, _missing(name, layer), idmap=idmap, digest=layer.digest, size=layer.size, diff_id=diff_id,
        media_type=layer.media_type, limits=limits,
    )  # fmt: skip


def _missing(name: str, descriptor: Descriptor) -> layers.Open:
    """Return a source for a blob that should have been in the store."""

    def open_at(offset: int) -> Callable[[int], bytes]:
        raise SbxError(
            "blob-missing",
            f"unpack {name}: layer {descriptor.digest} is not in the store",
            "pull or import the image again",
        )

    return open_at


def as_image(stored: Stored, folders: list[str]) -> Image:
    """Return what a launch needs to know of an image."""
    config = stored.config
    return Image(
        reference=stored.reference,
        digest=stored.digest,
        layers=folders,
        env=config.env,
        entrypoint=config.entrypoint,
        cmd=config.cmd,
        working_dir=config.working_dir,
        user=config.user,
        stop_signal=config.stop_signal,
    )


def _write_record(work: Workspace, image: Image, idmap: IdMap, boot: str) -> None:
    """Write a launch record. It is not fsynced: one that is cut off is no record."""
    draft = work.draft("record")
    with open(draft, "wb") as file:
        file.write(store.encode(image, boot))
    layout.install(draft, store.record_path(image.reference, idmap), sync=False)


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def now() -> str:
    """Return the time as image configs have it; SOURCE_DATE_EPOCH stands in for the clock, for repeatable builds."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(seconds) if seconds.isdigit() else None))


def save(
    work: Workspace,
    reference: Reference,
    parts: list[LayerInfo],
    run: dict[str, object],
    comment: str,
    platform: Platform | None = None,
) -> Stored:
    """Make an image of layers that the store has (the lowest first), name it, and return it.

    `run` is the ``config`` object of its configuration, `comment` what its history says.
    """
    created = now()
    where = (platform or Platform.host()).json()
    document = {
        "created": created,
        **where,
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": [part.diff_id for part in parts]},
        "history": [{"created": created, "created_by": "sbx import", "comment": comment} for _ in parts],
    }
    config = layout.put_blob(work, manifest.encode(document), manifest.OCI_CONFIG)
    entries = [Descriptor(part.media_type, part.digest, part.size) for part in parts]
    descriptor = layout.put_blob(work, Manifest(manifest.OCI_MANIFEST, config, entries).encode(), manifest.OCI_MANIFEST)
    layout.set_ref(work, reference, descriptor)
    return load(str(reference), descriptor)


def tag(work: Workspace, source: str, targets: list[Reference]) -> None:
    """Let `targets` point to what the image `source` (a name, or the beginning of an id) points to.

    Raises SbxError ``image-unknown`` and the like; then no name has changed.
    """
    stored = pinned(work, named(source)[0])
    for target in targets:
        layout.set_ref(work, target, stored.target)
