"""Warm: images from the store to registries. Outside.

What the registry has is not sent; what another repository at the same registry has is mounted from there; the rest is
uploaded, several blobs at once. Bytes go as they are stored, so digests stay what they were.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Event

from rootless.errors import SbxError
from rootless.oci import credentials, images, layout, manifest, registries
from rootless.oci.layout import Workspace
from rootless.oci.manifest import Descriptor, Index, Manifest
from rootless.oci.pace import Patience
from rootless.oci.progress import Progress
from rootless.oci.registries import Endpoint, Registries
from rootless.oci.registry import Registry
from rootless.oci.uploads import Uploads
from rootless.reference import Reference, parse

AT_ONCE = 3
_PIECE = 1 << 18


@dataclass(frozen=True)
class _Document:
    descriptor: Descriptor
    data: bytes


def push(
    stored: Reference,
    target: Reference,
    tell: Progress | None = None,
    chunk: int = 0,
    configuration: Registries | None = None,
    patience: Patience | None = None,
) -> str:
    """Push the image `stored` to where `target` says, and return its digest there, which is the one it has here.

    With `chunk`, blobs are uploaded in requests of so many bytes. An index goes with those of its images that the store
    has; if some are missing, the image for this machine goes alone. Mirrors are for reading: only the registry itself
    is written to. Raises SbxError ``image-unknown``, ``blob-missing``, ``registry-…``; then nothing has the tag.
    """
    tell = tell or Progress()
    configuration = configuration or registries.load()
    endpoint = next(each for each in configuration.endpoints(target) if not each.mirror)
    credential = credentials.find(endpoint.registry or endpoint.host, endpoint.repository)
    registry = Registry(endpoint, configuration, credential, patience, ("pull", "push"))
    with Workspace() as work:
        documents, blobs = _parts(work, stored)
        registry.probe()
        _Blobs(registry, _neighbours(configuration, endpoint, stored), tell, chunk).send(f"push {target}", blobs)
        for document in documents[:-1]:
            registry.put_manifest(document.descriptor.digest, document.data, document.descriptor.media_type)
        top = documents[-1]
        registry.put_manifest(target.digest or target.tag, top.data, top.descriptor.media_type)
    return top.descriptor.digest


def _parts(work: Workspace, stored: Reference) -> tuple[list[_Document], list[Descriptor]]:
    """Return the documents to push, the one that gets the tag last, and the blobs that they need; all are pinned."""
    image = images.get(stored)
    top = _read(work, image.target, stored)
    parsed = manifest.parse(top.data, top.descriptor.media_type)
    if isinstance(parsed, Index):
        children = [_read(work, entry, stored) for entry in parsed.manifests if _is_here(entry)]
        if len(children) < len(parsed.manifests):
            children, top = [], _read(work, image.descriptor, stored)
    else:
        children = []
    documents = [*children, top]
    blobs: dict[str, Descriptor] = {}
    for document in documents:
        part = manifest.parse(document.data, document.descriptor.media_type)
        if isinstance(part, Manifest):
            blobs.update((each.digest, each) for each in (*part.layers, part.config))
    for blob in blobs.values():
        work.pin(blob.digest)
        if layout.blob_size(blob.digest) != blob.size:
            raise SbxError("blob-missing", f"push {stored}: {blob.digest} is not in the store", "pull the image again")
    return documents, list(blobs.values())


def _read(work: Workspace, descriptor: Descriptor, stored: Reference) -> _Document:
    work.pin(descriptor.digest)
    return _Document(descriptor, layout.read_blob(descriptor, f"manifest of {stored}"))


def _is_here(entry: Descriptor) -> bool:
    """Tell whether the store has an entry of an index, with all of its blobs."""
    if layout.blob_size(entry.digest) != entry.size:
        return False
    part = manifest.parse(layout.read_blob(entry, "manifest"), entry.media_type)
    return isinstance(part, Manifest) and all(
        layout.blob_size(each.digest) == each.size for each in (*part.layers, part.config)
    )


def _neighbours(configuration: Registries, endpoint: Endpoint, stored: Reference) -> dict[str, list[str]]:
    """Return which repositories at the same registry have which blobs, as far as the store's references tell."""
    found: dict[str, list[str]] = {}
    for name in layout.ref_names():
        try:
            other = parse(name)
            place = next(each for each in configuration.endpoints(other) if not each.mirror)
            if place.host != endpoint.host or place.repository == endpoint.repository:
                continue
            image = images.find(other)
        except SbxError:
            continue  # damaged, or blocked: nothing to mount from
        for blob in (*image.manifest.layers, image.manifest.config) if image else ():
            repositories = found.setdefault(blob.digest, [])
            # the image's own name is the likeliest to have it there
            repositories.insert(0 if other.name == stored.name else len(repositories), place.repository)
    return found


class _Blobs:
    """Brings blobs to one repository. Threads will do: nothing is forked here, and the time goes into the network."""

    def __init__(self, registry: Registry, neighbours: dict[str, list[str]], tell: Progress, chunk: int) -> None:
        self._registry = registry
        self._uploads = Uploads(registry)
        self._neighbours = neighbours
        self._tell = tell
        self._chunk = chunk
        self._stop = Event()

    def send(self, what: str, blobs: Sequence[Descriptor]) -> None:
        """Bring all blobs there, or raise the first error when the others have stopped."""
        self._tell.begin(what, [(blob.digest.partition(":")[2][:12], blob.size) for blob in blobs])
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            running = {pool.submit(self._send_one, part, blob) for part, blob in enumerate(blobs)}
            while running:
                finished, running = wait(running, 0.1 if self._tell.live else None, FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                self._tell.tick()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._tell.end()

    def _send_one(self, part: int, blob: Descriptor) -> None:
        if self._registry.has_blob(blob.digest):
            how = "already there"
        elif any(self._uploads.mount(blob.digest, source) for source in self._neighbours.get(blob.digest, [])[:3]):
            how = "mounted"
        else:
            self._uploads.upload(
                blob.digest, blob.size, lambda start, end: self._pieces(part, blob, start, end), self._chunk
            )
            how = "done"
        self._tell.done(part, how)

    def _pieces(self, part: int, blob: Descriptor, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of a stored blob from `start` to `end`."""
        with open(layout.blob_path(blob.digest), "rb", buffering=0) as file:
            while start < end and (data := os.pread(file.fileno(), min(_PIECE, end - start), start)):
                if self._stop.is_set():
                    raise SbxError("push-stopped", f"push {blob.digest}: another blob has failed")
                start += len(data)
                self._tell.update(part, start)
                yield data
