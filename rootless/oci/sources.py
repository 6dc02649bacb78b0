"""Warm: where images and root filesystems come from, a class for each scheme. Outside.

    tar:FILE               a root filesystem in a tar of any compression; what no scheme means; ``-`` is stdin
    dir:FOLDER             a root filesystem in a folder
    bin:PROGRAM,PROGRAM…   programs of the host, with the libraries that they load
    oci:FOLDER[:NAME]      an OCI image layout
    oci-archive:FILE[:NAME]     the same in a tar, as `podman save --format oci-archive` and newer dockers write it
    docker-archive:FILE[:NAME]  what `docker save` has always written

The first three give one layer (`Rootfs`), the others whole images (`Images`), whose digests and diff-ids are verified
while they are taken in. docker://, a registry, is oci.pull's.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from rootless.errors import SbxError, printable
from rootless.oci import images, layers, layout, manifest
from rootless.oci.codecs import Read
from rootless.oci.images import Stored
from rootless.oci.layers import LayerInfo, Open
from rootless.oci.layout import Workspace
from rootless.oci.manifest import DOCUMENT_LIMIT, Descriptor, Index, Manifest, Platform
from rootless.oci.tar import DEFAULT, Limits
from rootless.reference import Reference, parse
from rootless.spec import IdMap

if TYPE_CHECKING:
    from rootless.oci.archives import Archive, DockerEntry
    from rootless.oci.binaries import Collection

# What only one scheme needs is imported there: importing a tar is over in the time that ten more modules take.
STDIN = "-"
CONTAINERD_NAME = "io.containerd.image.name"  #: the full reference, where REF_NAME may be the tag alone


@dataclass(frozen=True)
class Taking:
    """How something is to be taken in."""

    work: Workspace
    idmap: IdMap | None
    limits: Limits = DEFAULT
    platform: Platform | None = None


class Rootfs(Protocol):
    """A source of one root filesystem."""

    comment: str
    run: dict[str, Any]

    def open(self, idmap: IdMap) -> contextlib.AbstractContextManager[Read]:
        """Give a function that reads it as a tar stream."""


class Images(Protocol):
    """A source of whole images."""

    def take(self, taking: Taking, names: list[Reference]) -> list[Stored]:
        """Take the images in, under their own names, or the one image under `names` where those are given."""


# ── root filesystems ──────────────────────────────────────────────────────────────────────────────────────────────────


class TarFile:
    """A root filesystem in a tar."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.comment = f"imported from {printable(os.path.basename(path))}"
        self.run: dict[str, Any] = {}

    @contextlib.contextmanager
    def open(self, idmap: IdMap) -> Iterator[Read]:
        fd = open_file(self.path)
        try:
            yield _nonempty(fd, self.path)
        finally:
            if fd != 0:
                os.close(fd)


class Folder:
    """A root filesystem in a folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.comment = f"imported from the folder {printable(os.path.basename(os.path.abspath(path)))}"
        self.run: dict[str, Any] = {}

    def open(self, idmap: IdMap) -> contextlib.AbstractContextManager[Read]:
        from rootless.oci import export

        return export.folder(self.path, idmap)


class Binaries:
    """Programs of the host."""

    def __init__(self, names: str) -> None:
        from rootless.oci import binaries

        self.names = [name for name in names.split(",") if name]
        if not self.names:
            raise SbxError("source-invalid", "read bin:: no program is named", "write bin:/bin/sh,/usr/bin/env")
        self.comment = f"programs of the host: {printable(', '.join(self.names))}"
        self.collection = binaries.collect(self.names)
        self.run: dict[str, Any] = {
            "Cmd": [binaries.find(self.names[0])],
            "Env": [f"PATH={_search_path(self.collection)}"],
        }

    @contextlib.contextmanager
    def open(self, idmap: IdMap) -> Iterator[Read]:
        from rootless.oci import binaries

        with layout.Workspace() as work, open(work.draft("programs"), "w+b", buffering=0) as file:
            binaries.pack(self.collection, file.write)
            file.seek(0)
            yield file.read


def _search_path(collection: Collection) -> str:
    """Return the PATH under which the collected programs are found."""
    standard = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
    own = [os.path.dirname(path) for path in collection.files if ".so" not in os.path.basename(path)]
    return ":".join(dict.fromkeys([*standard, *own]))


def open_file(path: str) -> int:
    """Open an archive for reading (``-`` is stdin); raises SbxError ``archive-unreadable``."""
    if path == STDIN:
        if os.isatty(0):
            raise SbxError(
                "archive-unreadable",
                "read the archive from stdin: that is a terminal",
                "redirect a file or a pipe to it",
            )
        return 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(path, error) from None
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        shown = printable(path)
        raise SbxError(
            "archive-unreadable", f"read the archive {shown}: it is a folder", f"write dir:{shown} to import a folder"
        )
    return fd


def unreadable(path: str, error: OSError) -> SbxError:
    return SbxError("archive-unreadable", f"read the archive {printable(path)}: {error.strerror}")


def _nonempty(fd: int, path: str) -> Read:
    empty = True

    def read(size: int) -> bytes:
        nonlocal empty
        try:
            data = os.read(fd, size)
        except OSError as error:
            raise unreadable(path, error) from None
        if not data and empty:
            raise SbxError("archive-unreadable", f"read the archive {printable(path)}: it is empty")
        empty = False
        return data

    return read


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Blobs:
    """The blobs of a layout, wherever it is: in a folder or in an archive."""

    where: str
    read_file: Callable[[str, int], bytes]  #: name, bytes at most
    open_file: Callable[[str], Read]
    memory: dict[str, bytes] = field(default_factory=dict)

    def document(self, descriptor: Descriptor, what: str) -> bytes:
        """Return a small blob, its size and digest verified."""
        if descriptor.size > DOCUMENT_LIMIT:
            raise SbxError("document-limit", f"read {what}: it is larger than {DOCUMENT_LIMIT} bytes")
        data = self.read_file(_blob_name(descriptor.digest), descriptor.size + 1)
        if len(data) != descriptor.size:
            raise SbxError("size-mismatch", f"read {what}: it has {len(data)} bytes, not {descriptor.size}")
        if manifest.digest_of(data) != descriptor.digest:
            raise SbxError(
                "digest-mismatch", f"read {what}: its digest is {manifest.digest_of(data)}, not {descriptor.digest}"
            )
        return data

    def opener(self, descriptor: Descriptor) -> Open:
        """Return a source of a blob for layers.ingest."""

        def open_at(offset: int) -> Read:
            read = self.open_file(_blob_name(descriptor.digest))
            skip(read, offset)
            return read

        return open_at


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


class _Layout:
    """An OCI image layout: image-layout.md."""

    def __init__(self, blobs: _Blobs, wanted: str) -> None:
        self.blobs = blobs
        self.wanted = wanted

    def take(self, taking: Taking, names: list[Reference]) -> list[Stored]:
        """Take in the images that the index lists (or the one that is wanted)."""
        taken = []
        entries = self.entries()
        if names and len(entries) > 1:
            listed = ", ".join(printable(_name(entry)) or entry.digest for entry in entries[:10])
            raise SbxError(
                "image-ambiguous", f"read {self.blobs.where}: it has {len(entries)} images: {listed}", "add :NAME"
            )
        for entry in entries:
            targets = names or [self.own_name(entry)]
            taken += [self.take_one(taking, entry, targets)]
        return taken

    def entries(self) -> list[Descriptor]:
        """Return the descriptors of index.json that are asked for; raises ``image-unknown`` when there are none."""
        what = f"index.json of {self.blobs.where}"
        document = manifest.parse(self.blobs.read_file("index.json", DOCUMENT_LIMIT + 1), manifest.OCI_INDEX, what)
        if not isinstance(document, Index):
            raise manifest.invalid(what, "it is not an index")
        found = [
            entry
            for entry in document.manifests
            if not self.wanted or self.wanted in (_name(entry), _tag(entry), entry.digest)
        ]
        if not found:
            there = (
                ", ".join(printable(_name(entry)) for entry in document.manifests if _name(entry)) or "none with a name"
            )
            raise SbxError(
                "image-unknown", f"find image {printable(self.wanted)} in {self.blobs.where}: there are {there}"
            )
        return found

    def own_name(self, entry: Descriptor) -> Reference:
        """Return the name that an image brings along; raises ``image-unnamed`` when it has none that is whole."""
        name = _name(entry)
        bare = CONTAINERD_NAME not in entry.annotations and not set(name) & set("/:")
        # A bare word may be a name (skopeo writes what it was told) or a tag alone, which names nothing.
        if not name or (bare and (name == "latest" or name[0].isdigit())):
            raise SbxError(
                "image-unnamed",
                f"name the image {entry.digest} of {self.blobs.where}: it brings no name",
                "give one: sbx import NAME SOURCE",
            )
        return parse(name)

    def take_one(self, taking: Taking, target: Descriptor, names: list[Reference]) -> Stored:
        """Take in one image: manifest, config, layers, and at last its names."""
        what = f"the manifest of {names[0].familiar}"
        data = self.blobs.document(target, what)
        document = manifest.parse(data, target.media_type, what)
        for _ in range(3):
            if isinstance(document, Manifest):
                break
            target = images.choose(document, taking.platform, names[0].familiar)
            data = self.blobs.document(target, what)
            document = manifest.parse(data, target.media_type, what)
        if not isinstance(document, Manifest):
            raise manifest.invalid(what, "indexes lead to indexes")
        config_data = self.blobs.document(document.config, f"the config of {names[0].familiar}")
        config = manifest.parse_config(config_data, f"the config of {names[0].familiar}")
        if len(config.diff_ids) != len(document.layers):
            raise manifest.invalid(what, f"it has {len(document.layers)} layers, its config {len(config.diff_ids)}")
        pairs = dict.fromkeys(zip(document.layers, config.diff_ids, strict=True))
        layers.ingest_all([self._taking_layer(taking, layer, diff_id) for layer, diff_id in pairs])
        layout.put_blob(taking.work, config_data, document.config.media_type)
        stored = layout.put_blob(taking.work, data, document.media_type)
        return name_image(taking, stored, names)

    def _taking_layer(self, taking: Taking, layer: Descriptor, diff_id: str) -> Callable[[], LayerInfo]:
        return lambda: layers.ingest(
            taking.work, self.blobs.opener(layer), idmap=taking.idmap, digest=layer.digest, size=layer.size,
            diff_id=diff_id, media_type=layer.media_type, limits=taking.limits,
        )  # fmt: skip


def _name(entry: Descriptor) -> str:
    return entry.annotations.get(CONTAINERD_NAME) or entry.annotations.get(manifest.REF_NAME, "")


def _tag(entry: Descriptor) -> str:
    return entry.annotations.get(manifest.REF_NAME, "")


def name_image(taking: Taking, descriptor: Descriptor, names: list[Reference]) -> Stored:
    """Let `names` point to an image that is all there, and prepare the first for launching."""
    for name in names:
        layout.set_ref(taking.work, name, descriptor)
        if taking.idmap:
            images.prepare_in(taking.work, name, taking.idmap)
    return images.load(str(names[0]), descriptor, taking.platform)


class LayoutFolder:
    """oci:FOLDER[:NAME]"""

    def __init__(self, text: str) -> None:
        self.path, self.wanted = split_name(text)

    def take(self, taking: Taking, names: list[Reference]) -> list[Stored]:
        if not os.path.isdir(self.path):
            raise SbxError("folder-missing", f"open the layout {printable(self.path)}: there is no such folder")
        blobs = _Blobs(printable(self.path), self._read, self._open)
        return _Layout(blobs, self.wanted).take(taking, names)

    def _file(self, name: str) -> int:
        """Open a file of the layout; a link or a fifo in its place is refused, not followed or waited for."""
        try:
            fd = os.open(f"{self.path}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(f"{self.path}/{name}", error) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SbxError("archive-unreadable", f"read {printable(self.path)}/{name}: it is not a file")
        return fd

    def _read(self, name: str, limit: int) -> bytes:
        with os.fdopen(self._file(name), "rb") as file:
            return file.read(limit)

    def _open(self, name: str) -> Read:
        return os.fdopen(self._file(name), "rb", buffering=0).read


class LayoutArchive:
    """oci-archive:FILE[:NAME]"""

    def __init__(self, text: str) -> None:
        self.path, self.wanted = split_name(text)

    def take(self, taking: Taking, names: list[Reference]) -> list[Stored]:
        from rootless.oci.archives import Archive

        with Archive(taking.work, self.path, taking.limits) as archive:
            return take_layout(archive, self.wanted, taking, names)


def take_layout(archive: Archive, wanted: str, taking: Taking, names: list[Reference]) -> list[Stored]:
    """Take in the images of an OCI layout in an archive."""
    return _Layout(_Blobs(archive.shown, archive.read, archive.open), wanted).take(taking, names)


class DockerArchive:
    """docker-archive:FILE[:NAME]"""

    def __init__(self, text: str) -> None:
        self.path, self.wanted = split_name(text)

    def take(self, taking: Taking, names: list[Reference]) -> list[Stored]:
        from rootless.oci.archives import Archive

        with Archive(taking.work, self.path, taking.limits) as archive:
            return take_docker(archive, self.wanted, taking, names)


def take_docker(archive: Archive, wanted: str, taking: Taking, names: list[Reference]) -> list[Stored]:
    """Take in the images that manifest.json of `docker save` lists."""
    from rootless.oci.archives import docker_entries

    entries = docker_entries(archive)
    if wanted:
        name = str(parse(wanted))
        entries = [entry for entry in entries if name in [str(parse(tag)) for tag in entry.tags]]
    if not entries:
        raise SbxError("image-unknown", f"find image {printable(wanted) or 'any'} in {archive.shown}: it is not there")
    if names and len(entries) > 1:
        raise SbxError("image-ambiguous", f"read {archive.shown}: it has {len(entries)} images", "add :NAME")
    return [
        _take_docker_image(archive, entry, taking, names or [parse(tag) for tag in entry.tags]) for entry in entries
    ]


def _take_docker_image(archive: Archive, entry: DockerEntry, taking: Taking, names: list[Reference]) -> Stored:
    if not names:
        raise SbxError(
            "image-unnamed", f"name an image of {archive.shown}: it brings no name", "give one: sbx import NAME SOURCE"
        )
    what = f"the config of {names[0].familiar}"
    data = archive.read(entry.config, DOCUMENT_LIMIT + 1)
    config = manifest.parse_config(data, what)
    stated = os.path.basename(entry.config).removesuffix(".json")
    if (
        len(stated) == 64
        and not set(stated) - set("0123456789abcdef")
        and manifest.digest_of(data) != f"sha256:{stated}"
    ):
        raise SbxError(
            "digest-mismatch", f"read {what}: its digest is {manifest.digest_of(data)}, its name says {stated}"
        )
    if len(config.diff_ids) != len(entry.layers):
        raise manifest.invalid(what, f"it has {len(config.diff_ids)} layers, the archive {len(entry.layers)}")
    parts = layers.ingest_all(
        [_taking_tar(archive, taking, *pair) for pair in zip(entry.layers, config.diff_ids, strict=True)]
    )
    stored = layout.put_blob(taking.work, data, manifest.OCI_CONFIG)
    document = Manifest(manifest.OCI_MANIFEST, stored, parts)
    return name_image(taking, layout.put_blob(taking.work, document.encode(), manifest.OCI_MANIFEST), names)


def skip(read: Read, size: int) -> None:
    """Read `size` bytes and forget them."""
    while size > 0 and (data := read(min(size, 1 << 20))):
        size -= len(data)


def _taking_tar(archive: Archive, taking: Taking, name: str, diff_id: str) -> Callable[[], LayerInfo]:
    return lambda: layers.ingest(
        taking.work, lambda offset: archive.open(name), idmap=taking.idmap, diff_id=diff_id, limits=taking.limits
    )


def split_name(text: str) -> tuple[str, str]:
    """Split ``PATH[:NAME]`` at its first colon; a path that has one cannot be written so."""
    path, _, name = text.partition(":")
    if not path:
        raise SbxError("source-invalid", f"read {printable(text)!r}: it names no file")
    return path, name


# ── schemes ───────────────────────────────────────────────────────────────────────────────────────────────────────────

ROOTFS: dict[str, Callable[[str], Rootfs]] = {"tar": TarFile, "dir": Folder, "bin": Binaries}
IMAGES: dict[str, Callable[[str], Images]] = {
    "oci": LayoutFolder,
    "oci-archive": LayoutArchive,
    "docker-archive": DockerArchive,
}


def open_source(text: str) -> Rootfs | Images:
    """Return the source that ``SCHEME:REST`` means; a text without a scheme of ours is the path of a tar."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ROOTFS:
        return ROOTFS[scheme](rest)
    if colon and scheme in IMAGES:
        return IMAGES[scheme](rest)
    if colon and rest.startswith("//"):
        hint = "fetch it: sbx pull" if scheme == "docker" else f"the schemes are {', '.join([*ROOTFS, *IMAGES])}"
        raise SbxError("source-invalid", f"read {printable(text)}: not something to import", hint)
    return TarFile(text)


def take_any(taking: Taking, path: str) -> list[Stored]:
    """Take in all images of an archive, of whichever kind it is: `sbx load`."""
    from rootless.oci.archives import Archive

    with Archive(taking.work, path, taking.limits) as archive:
        # Newer dockers write both at once; the layout alone keeps the digests.
        if "index.json" in archive.names:
            return take_layout(archive, "", taking, [])
        if "manifest.json" in archive.names:
            return take_docker(archive, "", taking, [])
        raise SbxError(
            "archive-invalid",
            f"read {archive.shown}: it holds no images",
            "sbx import makes an image of a root filesystem",
        )
