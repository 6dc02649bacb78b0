"""Warm: where images go, a class for each scheme. Outside.

    oci:FOLDER[:NAME]           an OCI image layout, made or added to
    oci-archive:FILE[:NAME]     the same in a tar
    docker-archive:FILE[:NAME]  what `docker save` writes: layers uncompressed, which every docker can load

An OCI layout has the stored bytes as they are, so digests stay what they were. FILE may be ``-``, which is stdout.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import Protocol

from rootless.errors import SbxError, printable
from rootless.oci import codecs, layout, manifest, tar
from rootless.oci.images import Stored
from rootless.oci.layout import Workspace
from rootless.oci.manifest import REF_NAME, Descriptor
from rootless.oci.pack import Entry, Writer
from rootless.oci.sources import CONTAINERD_NAME, split_name
from rootless.reference import parse

STDOUT = "-"
_CHUNK = 1 << 20


class Sink(Protocol):
    """A place for images."""

    def put(self, work: Workspace, images: list[Stored]) -> None:
        """Write all of `images`, or raise SbxError and leave the place as it was (a pipe has what it has)."""


class LayoutFolder:
    """oci:FOLDER[:NAME]"""

    def __init__(self, text: str) -> None:
        self.path, self.name = split_name(text)

    def put(self, work: Workspace, images: list[Stored]) -> None:
        try:
            os.makedirs(f"{self.path}/blobs/sha256", exist_ok=True)
            for image in images:
                for descriptor in blobs_of(image):
                    self._put_blob(descriptor)
            self._put_file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
            self._put_file("index.json", manifest.encode(self._index(images)))
        except OSError as error:
            raise unwritable(self.path, error) from None

    def _put_blob(self, descriptor: Descriptor) -> None:
        name = f"blobs/sha256/{descriptor.digest.partition(':')[2]}"
        if os.path.exists(f"{self.path}/{name}") and os.path.getsize(f"{self.path}/{name}") == descriptor.size:
            return
        draft = f"{self.path}/{name}.{os.getpid()}"
        try:
            with open(draft, "wb") as file:
                copy_blob(descriptor, file.write)
            os.rename(draft, f"{self.path}/{name}")
        finally:
            if os.path.exists(draft):
                os.unlink(draft)

    def _put_file(self, name: str, data: bytes) -> None:
        draft = f"{self.path}/{name}.{os.getpid()}"
        with open(draft, "wb") as file:
            file.write(data)
        os.rename(draft, f"{self.path}/{name}")

    def _index(self, images: list[Stored]) -> dict[str, object]:
        """Return the layout's index with `images` added; an entry of the same name is replaced."""
        added = entries(images, self.name)
        names = {entry["annotations"][REF_NAME] for entry in added}  # type: ignore[index]
        kept = []
        if os.path.exists(f"{self.path}/index.json"):
            with open(f"{self.path}/index.json", "rb") as file:
                document = manifest.decode(
                    file.read(manifest.DOCUMENT_LIMIT + 1), f"index.json of {printable(self.path)}"
                )
            for entry in document.get("manifests", []):
                if (entry.get("annotations") or {}).get(REF_NAME) not in names:
                    kept.append(entry)
        return index(kept + added)


class LayoutArchive:
    """oci-archive:FILE[:NAME]"""

    def __init__(self, text: str) -> None:
        self.path, self.name = split_name(text)

    def put(self, work: Workspace, images: list[Stored]) -> None:
        write_file(self.path, lambda write: self._write(Writer(write), images))

    def _write(self, writer: Writer, images: list[Stored]) -> None:
        writer.add_bytes(Entry(b"oci-layout"), b'{"imageLayoutVersion":"1.0.0"}')
        writer.add_bytes(Entry(b"index.json"), manifest.encode(index(entries(images, self.name))))
        for folder in (b"blobs", b"blobs/sha256"):
            writer.add(Entry(folder, tar.FOLDER, 0o755))
        for descriptor in dict.fromkeys(each for image in images for each in blobs_of(image)):
            name = f"blobs/sha256/{descriptor.digest.partition(':')[2]}"
            writer.add(Entry(name.encode(), size=descriptor.size))
            copy_blob(descriptor, writer.data)
            writer.pad(descriptor.size)
        writer.close()


class DockerArchive:
    """docker-archive:FILE[:NAME]"""

    def __init__(self, text: str) -> None:
        self.path, self.name = split_name(text)

    def put(self, work: Workspace, images: list[Stored]) -> None:
        write_file(self.path, lambda write: self._write(Writer(write), images))

    def _write(self, writer: Writer, images: list[Stored]) -> None:
        listed: dict[str, dict[str, object]] = {}
        written: set[str] = set()
        for image in images:
            tag = self.name or image.reference
            reference = parse(tag)
            tags = (
                [f"{reference.familiar}{'' if ':' in reference.familiar else ':' + reference.tag}"]
                if reference.tag
                else []
            )
            names = [f"{diff_id.partition(':')[2]}.tar" for diff_id in image.config.diff_ids]
            if image.id in listed:
                listed[image.id]["RepoTags"] += tags  # type: ignore[operator]
                continue
            config = f"{image.id.partition(':')[2]}.json"
            listed[image.id] = {"Config": config, "RepoTags": tags, "Layers": names}
            data = layout.read_blob(image.manifest.config, f"the config of {image.reference}")
            writer.add_bytes(Entry(config.encode()), data)
            for name, descriptor in zip(names, image.manifest.layers, strict=True):
                if name not in written:
                    self._add_layer(writer, name, descriptor)
                    written.add(name)
        writer.add_bytes(Entry(b"manifest.json"), manifest.encode(list(listed.values())))
        writer.close()

    def _add_layer(self, writer: Writer, name: str, descriptor: Descriptor) -> None:
        """Write a layer uncompressed. Its length must be known before its first byte, so it is decompressed twice."""
        size = 0
        for piece in _uncompressed(descriptor):
            size += len(piece)
        writer.add(Entry(name.encode(), size=size))
        for piece in _uncompressed(descriptor):
            writer.data(piece)
        writer.pad(size)


def _uncompressed(descriptor: Descriptor) -> Iterator[bytes]:
    with _open_blob(descriptor) as file:
        _, read = codecs.open_stream(file.read)
        while piece := read(_CHUNK):
            yield piece


def _open_blob(descriptor: Descriptor) -> io.FileIO:
    try:
        return open(layout.blob_path(descriptor.digest), "rb", buffering=0)
    except FileNotFoundError:
        raise SbxError(
            "blob-missing", f"read {descriptor.digest}: it is not in the store", "pull or import the image again"
        ) from None


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def blobs_of(image: Stored) -> list[Descriptor]:
    """Return the blobs of an image: manifest, config, layers, each once."""
    return list(dict.fromkeys([image.descriptor, image.manifest.config, *image.manifest.layers]))


def copy_blob(descriptor: Descriptor, write: Callable[[bytes], object]) -> None:
    """Write a stored blob, verified while it is read; raises ``blob-missing`` or ``blob-damaged``."""
    import hashlib

    hasher = hashlib.sha256()
    size = 0
    with _open_blob(descriptor) as file:
        while data := file.read(_CHUNK):
            hasher.update(data)
            size += len(data)
            if size > descriptor.size:
                break
            write(data)
    if size != descriptor.size or f"sha256:{hasher.hexdigest()}" != descriptor.digest:
        raise SbxError(
            "blob-damaged", f"read {descriptor.digest}: it is damaged", "sbx system check tells what else is"
        )


def entries(images: list[Stored], name: str) -> list[dict[str, object]]:
    """Return the descriptors of `images` for an index, under their own names or, one image alone, under `name`."""
    if name and len(images) > 1:
        raise SbxError(
            "image-ambiguous", f"name {len(images)} images {printable(name)}: they would be one", "leave the name out"
        )
    found: list[dict[str, object]] = []
    for image in images:
        annotations = {**image.descriptor.annotations, REF_NAME: name or image.reference}
        if not name:
            annotations[CONTAINERD_NAME] = image.reference
        found.append(image.descriptor.json() | {"annotations": annotations})
    return found


def index(manifests: list[dict[str, object]]) -> dict[str, object]:
    return {"schemaVersion": 2, "mediaType": manifest.OCI_INDEX, "manifests": manifests}


def write_file(path: str, write: Callable[[Callable[[bytes | memoryview], object]], None]) -> None:
    """Let `write` write a file that takes its place when it is whole, or stdout."""
    write_fd(path, lambda fd: write(_all_to(fd)))


def write_fd(path: str, write: Callable[[int], None]) -> None:
    """Like write_file, for who wants a descriptor."""
    if path == STDOUT:
        if os.isatty(1):
            raise SbxError(
                "output-terminal",
                "write an archive to stdout: that is a terminal",
                "redirect it, or name a file with -o",
            )
        try:
            write(1)
        except OSError as error:
            raise unwritable("to stdout", error) from None
        return
    draft = f"{path}.{os.getpid()}"
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(draft, path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        if os.path.exists(draft):
            os.unlink(draft)


def _all_to(fd: int) -> Callable[[bytes | memoryview], object]:
    def write(data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    return write


def unwritable(path: str, error: OSError) -> SbxError:
    return SbxError("output-unwritable", f"write {printable(path)}: {error.strerror}")


SINKS: dict[str, Callable[[str], Sink]] = {
    "oci": LayoutFolder,
    "oci-archive": LayoutArchive,
    "docker-archive": DockerArchive,
}


def open_sink(text: str) -> Sink:
    """Return the sink that ``SCHEME:REST`` means; a text without a scheme is the file of an OCI archive."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in SINKS:
        return SINKS[scheme](rest)
    return LayoutArchive(text)
