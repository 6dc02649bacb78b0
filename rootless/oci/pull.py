"""Warm: images from registries into the store. Outside.

    reference ─▶ endpoints ─▶ manifest (by tag or digest, of one platform) ─▶ config ─▶ layers, several at once ─▶ ref

Each layer that is missing is fetched by a process of its own, which streams it through layers.ingest: nothing is
fetched twice, and what a cut-off pull has left is used. The reference is written last: an image is there or it is not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rootless.errors import SbxError
from rootless.oci import credentials, images, layers, layout, manifest, registries, workers
from rootless.oci import progress as display
from rootless.oci.layout import Workspace
from rootless.oci.manifest import Config, Descriptor, Index, Manifest, Platform
from rootless.oci.pace import Patience
from rootless.oci.progress import Progress
from rootless.oci.registries import Registries
from rootless.oci.registry import Document, Registry
from rootless.reference import Reference, parse
from rootless.spec import IdMap, Image

POLICIES = ("missing", "always", "never", "newer")
AT_ONCE = 3  #: layers in the making at once, as docker has it: more would only share the same line and the same cores
#: how a beginning of a blob shows that a power cut has damaged it
_SUSPECT = ("digest-mismatch", "size-mismatch", "archive-")
_REPORT_BYTES = 1 << 19

_Place = TypeVar("_Place")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Pulled:
    """What a pull has brought: the reference, the digest that it has at the registry, and whether anything was new."""

    reference: Reference
    digest: str
    fresh: bool


@dataclass(frozen=True)
class _Found:
    """An image at a registry: what the tag points to, and the manifest for one platform, which may be the same."""

    top: Document
    document: Document
    manifest: Manifest


# ── by policy ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def obtain(
    wanted: Reference | str, ids: IdMap, policy: str = "missing", platform: str = "", quiet: bool = False
) -> Image:
    """Return the image that `wanted` means, unpacked for `ids`: from the store, or pulled, as the policy says.

    Raises SbxError ``image-unknown`` and what pull() raises.
    """
    stamps = registries.stamps()  # of the files before they are read
    pulled = ensure(str(wanted), ids, policy, platform, display.choose(quiet))
    registries.remember(str(wanted), pulled.reference, stamps)
    image = images.prepare(pulled.reference, ids, Platform.parse(platform) if platform else None)
    if image is None:
        raise SbxError("image-unknown", f"find image {pulled.reference}: it was removed while it was prepared")
    return image


def ensure(text: str, ids: IdMap, policy: str, platform: str, tell: Progress) -> Pulled:
    """Make sure by `policy` that the store has an image for `text`, and return which one.

    ``missing`` pulls what the store does not have; ``always`` asks the registry, and fetches what is new; ``newer``
    does too, but goes on with what is here when the registry cannot be asked; ``never`` does not ask.
    """
    if policy not in POLICIES:
        raise SbxError("policy-unknown", f"pull by policy {policy!r}: it is one of {', '.join(POLICIES)}")
    configuration = registries.load()
    candidates = configuration.resolve(text)
    # An image of exactly that name is meant before an alias is, as by a launch that does not read the files.
    names = dict.fromkeys([parse(text), *candidates])
    here = next((stored for each in names if (stored := _stored(each, platform))), None)
    # what a digest names does not change
    if here and (policy in ("missing", "never") or here.reference.digest):
        return here
    if policy == "never":
        raise SbxError("image-unknown", f"find image {text}: it is not in the store", f"fetch it: sbx pull {text}")
    try:
        return _first(candidates, lambda each: pull(each, ids, platform, tell, configuration))
    except SbxError as error:
        if policy != "newer" or not here:
            raise
        tell.say(f"{error.message}: going on with the image that is here")
        return here


def _stored(reference: Reference, platform: str) -> Pulled | None:
    """Return what the store has for `reference` and the platform, if all its documents and blobs are there."""
    if not layout.exists():
        return None
    try:
        found = images.find(reference, Platform.parse(platform) if platform else None)
    except SbxError as error:
        if error.code in ("platform-missing", "blob-missing", "blob-damaged"):
            return None
        raise
    if found is None or any(layout.blob_size(layer.digest) != layer.size for layer in found.manifest.layers):
        return None
    return Pulled(reference, found.target.digest, fresh=False)


def _first(places: Sequence[_Place], ask: Callable[[_Place], _Answer]) -> _Answer:
    """Return the first good answer, asking in turn. If there is none, the last place's error counts, as the others only
    stand in for it."""
    for place in places[:-1]:
        with contextlib.suppress(SbxError):
            return ask(place)
    return ask(places[-1])


# ── one image ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def pull(
    reference: Reference,
    ids: IdMap | None,
    platform: str = "",
    tell: Progress | None = None,
    configuration: Registries | None = None,
    patience: Patience | None = None,
) -> Pulled:
    """Bring the image `reference` into the store, unpacked for `ids` (None: its blobs only).

    What the store has is not fetched; if the tag still means what it meant, nothing is. Several processes may pull the
    same image: each blob is fetched by one of them. Raises SbxError: ``image-unknown``, ``platform-missing``,
    ``registry-…``, ``digest-mismatch``, ``size-mismatch``, ``document-…``, ``layer-foreign``, ``disk-full`` and more;
    then the reference is as before, and what has come of the blobs is kept for the next try.
    """
    tell = tell or Progress()
    places = _places(reference, configuration or registries.load(), patience)
    if here := _unchanged(places[0], reference, platform):
        return here
    wanted = Platform.parse(platform) if platform else Platform.host()
    found, place = _first(places, lambda each: (_find(each, reference, wanted), each))
    # who had the manifest is asked for the rest; the others only for what it turns out not to have
    sources = [place, *(other for other in places if other is not place)]
    with Workspace() as work:
        config = _config(work, sources, found, wanted, bool(platform), tell)
        _layers(work, sources, reference, found.manifest, config, ids, tell)
        target = None
        for document in (found.document, found.top):
            target = layout.put_blob(work, document.data, document.media_type)
        assert target is not None
        layout.set_ref(work, reference, target)
    return Pulled(reference, found.top.digest, fresh=True)


def _places(reference: Reference, configuration: Registries, patience: Patience | None) -> list[Registry]:
    """Return the registries that may have `reference`, the first to ask first, each with our credential for it."""
    return [
        Registry(
            endpoint, configuration, credentials.find(endpoint.registry or endpoint.host, endpoint.repository), patience
        )
        for endpoint in configuration.endpoints(reference)
    ]


def _unchanged(place: Registry, reference: Reference, platform: str) -> Pulled | None:
    """Return the stored image if `place` says that the tag still means it; None in any doubt."""
    here = _stored(reference, platform)
    if here is None or reference.digest:
        return here
    with contextlib.suppress(SbxError):  # what is wrong there, the full way will tell
        if place.manifest_digest(reference.tag) == here.digest:
            return here
    return None


def _find(place: Registry, reference: Reference, wanted: Platform) -> _Found:
    """Return what `place` has for `reference`, verified as far as documents go."""
    what = f"manifest {reference}"
    top = place.manifest(reference.digest or reference.tag)
    parsed = manifest.parse(top.data, top.media_type, what)
    if isinstance(parsed, Manifest):
        top = Document(top.data, parsed.media_type, top.digest)
        return _Found(top, top, parsed)
    entry = images.choose(parsed, wanted, str(reference))
    child = place.manifest(entry.digest)
    if len(child.data) != entry.size:
        raise SbxError("size-mismatch", f"read {what}: {len(child.data)} bytes, the index says {entry.size}")
    chosen = manifest.parse(child.data, entry.media_type, what)
    if isinstance(chosen, Index):
        raise manifest.invalid(what, "an index in an index")
    top = Document(top.data, parsed.media_type, top.digest)
    return _Found(top, Document(child.data, chosen.media_type, child.digest), chosen)


def _config(
    work: Workspace, sources: Sequence[Registry], found: _Found, wanted: Platform, asked: bool, tell: Progress
) -> Config:
    """Bring the image's config into the store and return it."""
    descriptor, what = found.manifest.config, f"config of {sources[0]}"
    work.pin(descriptor.digest)
    if layout.blob_size(descriptor.digest) == descriptor.size:
        data = layout.read_blob(descriptor, what)
    else:
        data = b"".join(_chunks(sources, descriptor, 0))
        if manifest.digest_of(data) != descriptor.digest:
            raise SbxError(
                "digest-mismatch", f"verify {what}: its digest is {manifest.digest_of(data)}, not {descriptor.digest}"
            )
        layout.put_blob(work, data, descriptor.media_type)
    config = manifest.parse_config(data, what)
    if len(config.diff_ids) != len(found.manifest.layers):
        raise manifest.invalid(what, f"it has {len(config.diff_ids)} diff-ids for {len(found.manifest.layers)} layers")
    if not config.platform.serves(wanted):
        if asked:
            raise SbxError(
                "platform-missing", f"choose an image of {sources[0]} for {wanted}: there is only {config.platform}"
            )
        tell.say(f"{sources[0]} is an image for {config.platform}, this is {wanted}")
    return config


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _layers(
    work: Workspace,
    sources: Sequence[Registry],
    reference: Reference,
    wanted: Manifest,
    config: Config,
    ids: IdMap | None,
    tell: Progress,
) -> None:
    """Bring the layers into the store, several at once, the largest first so that none is waited for at the end."""
    # a layer that is listed twice is fetched once
    pairs = dict.fromkeys(zip(wanted.layers, config.diff_ids, strict=True))
    ordered = sorted(pairs, key=lambda pair: -pair[0].size)
    _check_space(reference, [layer for layer, _ in ordered])
    tell.begin(f"pull {reference}", [(layer.digest.partition(":")[2][:12], layer.size) for layer, _ in ordered])

    def done(place: int, fresh: bool) -> None:
        tell.done(place, "done" if fresh else "already here")

    try:
        jobs = [_job(work, sources, layer, diff_id, ids) for layer, diff_id in ordered]
        workers.run(jobs, AT_ONCE, tell.update, done, tell.tick if tell.live else None)
    finally:
        tell.end()


def _check_space(reference: Reference, wanted: Sequence[Descriptor]) -> None:
    """Refuse at once what cannot fit: the blobs that are missing, as large as their descriptors say."""
    needed = sum(layer.size - _partial_size(layer) for layer in wanted if layout.blob_size(layer.digest) is None)
    disk = os.statvfs(layout.ensure())
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise SbxError(
            "disk-full",
            f"pull {reference}: {display.size(needed)} are needed, {display.size(free)} are free",
            "free some space, or set SBX_HOME to a larger disk",
        )


def _job(
    work: Workspace, sources: Sequence[Registry], layer: Descriptor, diff_id: str, ids: IdMap | None
) -> workers.Job:
    """Return what fetches one layer in a process of its own."""

    def fetch(report: workers.Report) -> bool:
        return layers.ingest(
            work, lambda offset: _Source(_chunks(sources, layer, offset)).read, idmap=ids, digest=layer.digest,
            size=layer.size, diff_id=diff_id, media_type=layer.media_type, progress=_Throttle(report).report,
        ).fresh  # fmt: skip

    def job(report: workers.Report) -> bool:
        for source in sources:
            source.forget_connections()
        resumed = _partial_size(layer) > 0
        try:
            return fetch(report)
        except SbxError as error:
            if not resumed or not error.code.startswith(_SUSPECT):
                raise
            _forget_partial(layer)
            return fetch(report)

    return job


def _partial_path(layer: Descriptor) -> str:
    return layout.path("partial", layer.digest.partition(":")[2])


def _partial_size(layer: Descriptor) -> int:
    try:
        return os.stat(_partial_path(layer), follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0


def _forget_partial(layer: Descriptor) -> None:
    """Remove a beginning of a blob that led astray; whoever holds its lock is let finish first."""
    with layout.lock(f"blob-{layer.digest.partition(':')[2]}"), contextlib.suppress(FileNotFoundError):
        os.unlink(_partial_path(layer))


def _chunks(sources: Sequence[Registry], wanted: Descriptor, offset: int) -> Iterator[bytes]:
    """Yield a blob from `offset` on, from the first of the sources, and where that fails from the next."""
    for source in sources:
        try:
            for chunk in source.blob(wanted.digest, wanted.size, offset):
                offset += len(chunk)
                yield chunk
            return
        except SbxError:
            if source is sources[-1]:
                raise


class _Source:
    """Chunks as they come, behind a read(n)."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        """Return 1 to `size` bytes, or none at the end."""
        data = self._rest or next(self._chunks, b"")
        self._rest = data[size:]
        return data[:size] if self._rest else data


class _Throttle:
    """Reports that are worth a message: not one for each packet."""

    def __init__(self, report: workers.Report) -> None:
        self._report = report
        self._last = -_REPORT_BYTES

    def report(self, count: int) -> None:
        if count - self._last >= _REPORT_BYTES:
            self._last = count
            self._report(count)
