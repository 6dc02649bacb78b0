"""Warm: manifests, indexes and image configurations, read with bounds. Knows formats, touches no file.

Follows the OCI image specification 1.1 (descriptor.md, manifest.md, image-index.md, config.md) and Docker's image
manifest version 2, schema 2. What comes from a registry or an archive is hostile: at most 4 MiB, flat enough to parse,
numbers of bounded length, no key twice, no field in another letter case than the specification's (Go programs
read those too, so two readers would see two documents), and never an index and a manifest in one (CVE-2021-41190).
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

from rootless.errors import SbxError, printable
from rootless.oci import documents
from rootless.reference import check_digest

DOCUMENT_LIMIT = documents.LIMIT  #: bytes of a manifest, index or configuration
LAYER_LIMIT = 127  #: layers of an image; their names fit the page that mount(2) takes

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = OCI_LAYER + "+gzip"
OCI_LAYER_ZSTD = OCI_LAYER + "+zstd"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
REF_NAME = "org.opencontainers.image.ref.name"

INDEXES = (OCI_INDEX, DOCKER_LIST)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)
#: layer media type → the compression that it promises; what is in the stream is found out by looking
LAYERS = {
    OCI_LAYER: "",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    DOCKER_LAYER: "gzip",
    DOCKER_LAYER.removesuffix(".gzip"): "",
    DOCKER_LAYER.removesuffix(".gzip") + ".zstd": "zstd",
}
#: registries must not hand these out; where their `urls` lead, nobody knows (CVE-2020-15157)
FOREIGN_LAYERS = (
    *(OCI_LAYER.replace("layer", "layer.nondistributable") + suffix for suffix in ("", "+gzip", "+zstd")),
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
)


@dataclass(frozen=True)
class Platform:
    """An operating system and processor, as Go names them."""

    os: str = "linux"
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def json(self) -> dict[str, Any]:
        document = {"architecture": self.architecture, "os": self.os}
        return document | ({"variant": self.variant} if self.variant else {})

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Return the platform that ``[os/]architecture[/variant]`` means, such as ``linux/arm64/v8`` or ``arm64``."""
        parts = text.lower().split("/")
        if len(parts) == 1:
            parts.insert(0, "linux")
        if not 2 <= len(parts) <= 3 or not all(
            part.isascii() and part.translate(_PUNCTUATION).isalnum() for part in parts
        ):
            raise SbxError(
                "platform-invalid", f"bad platform {printable(text)!r}", "write it as linux/amd64 or linux/arm64/v8"
            )
        architecture = _ARCHITECTURES.get(parts[1], parts[1])
        return cls(parts[0], architecture, parts[2] if len(parts) == 3 else "")

    @classmethod
    def host(cls) -> Platform:
        """Return this machine's platform."""
        machine = os.uname().machine
        variant = {"armv7l": "v7", "armv6l": "v6"}.get(machine, "")
        return cls("linux", _ARCHITECTURES.get(machine, machine), variant)

    def serves(self, wanted: Platform) -> bool:
        """Tell whether an image for this platform is what `wanted` asks for. v8 is the only arm64 there is."""
        if (self.os, self.architecture) != (wanted.os, wanted.architecture):
            return False
        default = "v8" if self.architecture == "arm64" else ""
        return (self.variant or default) == (wanted.variant or default) or not wanted.variant or not self.variant


#: what may stand in the parts of a platform, besides letters and digits
_PUNCTUATION = {ord(char): None for char in "._-"}
_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "i686": "386",
    "armv7l": "arm",
    "armv6l": "arm",
    "loongarch64": "loong64",
}


@dataclass(frozen=True)
class Descriptor:
    """A pointer to a blob: what it is, its digest (checked: it may be a file name), its size in bytes."""

    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict, hash=False)
    platform: Platform | None = None

    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = self.platform.json()
        return document


@dataclass(frozen=True)
class Manifest:
    """One image for one platform."""

    media_type: str
    config: Descriptor
    layers: list[Descriptor] = field(hash=False)
    annotations: dict[str, str] = field(default_factory=dict, hash=False)

    def encode(self) -> bytes:
        """Return the document's bytes, always the same for the same manifest."""
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": self.config.json(),
            "layers": [layer.json() for layer in self.layers],
        }
        return encode(document | ({"annotations": self.annotations} if self.annotations else {}))


@dataclass(frozen=True)
class Index:
    """Several images under one name, mostly one for each platform."""

    media_type: str
    manifests: list[Descriptor] = field(hash=False)

    def choose(self, wanted: Platform) -> Descriptor | None:
        """Return the image for `wanted`: one of exactly that variant, else the first that serves, else None."""
        serving = [entry for entry in self.manifests if entry.platform is None or entry.platform.serves(wanted)]
        # an entry without a platform fits all, but one that says what it is for is the better answer
        return min(serving, key=lambda entry: (entry.platform is None, entry.platform != wanted), default=None)


@dataclass(frozen=True)
class Config:
    """An image's configuration: how to run it, and the diff-ids of its layers, the lowest first.

    All text is free of NUL; `env` entries are NAME=VALUE. `document` is the whole of it, for those who write it back.
    """

    platform: Platform
    diff_ids: list[str]
    env: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    cmd: list[str] = field(default_factory=list)
    working_dir: str = ""
    user: str = ""
    stop_signal: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    created: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def encode(document: object) -> bytes:
    """Return `document` as JSON without spaces, in the order in which it was built."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def digest_of(data: bytes) -> str:
    """Return the sha256 digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def decode(data: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object in `data`; `what` names it in errors (``document-invalid``, ``document-limit``)."""
    document = documents.decode(data, what)
    if not isinstance(document, dict):
        raise invalid(what, "it is not a JSON object")
    return document


def invalid(what: str, why: str) -> SbxError:
    """Return the error for a document that is not what it should be."""
    return SbxError("document-invalid", f"read {what}: {why}")


class _Fields:
    """A JSON object whose fields are taken by name and type; `where` tells its place in errors."""

    def __init__(self, document: object, where: str, known: str) -> None:
        if not isinstance(document, dict):
            raise invalid(where, "an object is missing")
        self.where = where
        self.document = document
        names = {name.casefold(): name for name in known.split()}
        for key in document:
            if names.get(key.casefold(), key) != key:
                raise invalid(where, f"the field {printable(key)!r} is spelt {names[key.casefold()]!r}")

    def text(self, name: str, default: str = "") -> str:
        value = self.document.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or "\0" in value or not _is_unicode(value):
            raise invalid(self.where, f"{name} is not text")
        return value

    def number(self, name: str) -> int:
        value = self.document.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise invalid(self.where, f"{name} is not a size")
        return value

    def items(self, name: str) -> list[Any]:
        value = self.document.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise invalid(self.where, f"{name} is not a list")
        return value

    def texts(self, name: str) -> list[str]:
        values = self.items(name)
        for value in values:
            if not isinstance(value, str) or "\0" in value or not _is_unicode(value):
                raise invalid(self.where, f"{name} is not a list of texts")
        return values

    def mapping(self, name: str) -> dict[str, str]:
        value = self.document.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise invalid(self.where, f"{name} is not an object of texts")
        return value


def _is_unicode(text: str) -> bool:
    r"""JSON can spell half of a surrogate pair (``"\ud800"``), which no file name or argument can be."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


# ── documents ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def parse(data: bytes, media_type: str = "", what: str = "the manifest") -> Manifest | Index:
    """Return the manifest or index in `data`.

    `media_type` is what the sender said it is; the document's own ``mediaType``, where it has one, must agree.
    Raises SbxError ``document-invalid``, ``document-limit``, ``media-type-unknown``.
    """
    document = decode(data, what)
    fields = _Fields(
        document, what, "schemaVersion mediaType config layers manifests annotations subject artifactType fsLayers"
    )
    if document.get("schemaVersion") == 1 or "fsLayers" in document:
        raise SbxError("media-type-unknown", f"read {what}: it is of Docker's schema 1, which nobody can verify")
    if document.get("schemaVersion") != 2:
        raise invalid(what, "schemaVersion is not 2")
    stated = fields.text("mediaType") or media_type
    if media_type in INDEXES + MANIFESTS and stated != media_type:
        raise invalid(what, f"it says that it is {printable(stated)}, its sender said {media_type}")
    if "manifests" in document and ("layers" in document or "config" in document):
        raise invalid(what, "it is an index and a manifest at once")
    if "manifests" in document and (stated in INDEXES or not stated):
        return _index(fields, stated or OCI_INDEX)
    if "config" in document and (stated in MANIFESTS or not stated):
        return _manifest(fields, stated or OCI_MANIFEST)
    raise SbxError("media-type-unknown", f"read {what}: {printable(stated) or 'it'} is not an image")


def _manifest(fields: _Fields, media_type: str) -> Manifest:
    config = descriptor(fields.document["config"], f"{fields.where}: config")
    if config.media_type not in CONFIGS:
        raise SbxError(
            "media-type-unknown",
            f"read {fields.where}: a config of type {printable(config.media_type)} is not an image's",
        )
    if config.size > DOCUMENT_LIMIT:
        raise SbxError("document-limit", f"read {fields.where}: the config is larger than {DOCUMENT_LIMIT >> 20} MiB")
    layers = [
        descriptor(entry, f"{fields.where}: layer {place}") for place, entry in enumerate(fields.items("layers"), 1)
    ]
    if not layers:
        raise SbxError("image-empty", f"read {fields.where}: the image has no layers, so there is nothing to run")
    if len(layers) > LAYER_LIMIT:
        raise SbxError("layer-limit", f"read {fields.where}: it has {len(layers)} layers, {LAYER_LIMIT} is the limit")
    for layer in layers:
        check_layer_type(layer.media_type, fields.where)
    return Manifest(media_type, config, layers, fields.mapping("annotations"))


def check_layer_type(media_type: str, where: str) -> None:
    """Refuse layers that cannot be unpacked, or that must not be fetched."""
    if media_type in FOREIGN_LAYERS:
        raise SbxError(
            "layer-foreign",
            f"read {where}: it has a foreign layer, which is fetched from elsewhere",
            "such images are for Windows",
        )
    if media_type not in LAYERS:
        raise SbxError("media-type-unknown", f"read {where}: it has a layer of type {printable(media_type)!r}")


def _index(fields: _Fields, media_type: str) -> Index:
    entries = [
        descriptor(entry, f"{fields.where}: entry {place}") for place, entry in enumerate(fields.items("manifests"), 1)
    ]
    return Index(media_type, entries)


def descriptor(document: object, where: str) -> Descriptor:
    """Return the descriptor in a JSON object, its digest and size checked."""
    fields = _Fields(document, where, "mediaType digest size annotations platform urls data artifactType")
    digest = fields.text("digest")
    try:
        check_digest(digest)
    except SbxError as error:
        raise invalid(where, error.message) from None
    if not digest.startswith("sha256:"):
        raise SbxError(
            "digest-unknown", f"read {where}: digests of kind {digest.partition(':')[0]} are not used for images"
        )
    platform = None
    if fields.document.get("platform") is not None:
        platform = _platform(fields.document["platform"], where)
    return Descriptor(fields.text("mediaType"), digest, fields.number("size"), fields.mapping("annotations"), platform)


def _platform(document: object, where: str) -> Platform:
    fields = _Fields(document, where, "architecture os variant os.version os.features features")
    return Platform(fields.text("os"), fields.text("architecture"), fields.text("variant"))


def parse_config(data: bytes, what: str = "the image's config") -> Config:
    """Return the image configuration in `data`, all that a launch uses of it checked.

    Raises SbxError ``document-invalid`` or ``document-limit``.
    """
    document = decode(data, what)
    top = _Fields(document, what, "architecture os variant created author config rootfs history")
    rootfs = _Fields(document.get("rootfs"), f"{what}: rootfs", "type diff_ids")
    if rootfs.text("type", "layers") != "layers":
        raise invalid(what, "its rootfs is not made of layers")
    diff_ids = rootfs.texts("diff_ids")
    for diff_id in diff_ids:
        _check_diff_id(diff_id, what)
    known = "User ExposedPorts Env Entrypoint Cmd Volumes WorkingDir Labels StopSignal Healthcheck OnBuild Shell"
    run = _Fields(document.get("config") or {}, f"{what}: config", known)
    env = run.texts("Env")
    for entry in env:
        # a name without a value would take the caller's (CVE-2026-57231)
        if entry.find("=") < 1:
            raise invalid(what, f"the environment entry {printable(entry)[:60]!r} is not NAME=VALUE")
    history = top.items("history")
    if not all(isinstance(entry, dict) for entry in history):
        raise invalid(what, "history is not a list of objects")
    return Config(
        platform=_platform({key: document.get(key) for key in ("os", "architecture", "variant")}, what),
        diff_ids=diff_ids,
        env=env,
        entrypoint=_command(run, "Entrypoint"),
        cmd=_command(run, "Cmd"),
        working_dir=run.text("WorkingDir"),
        user=run.text("User"),
        stop_signal=run.text("StopSignal"),
        labels=run.mapping("Labels"),
        created=top.text("created"),
        history=history,
        document=document,
    )


def _command(fields: _Fields, name: str) -> list[str]:
    """Return a command as a list; very old images have it as one text."""
    if isinstance(fields.document.get(name), str):
        return [fields.text(name)]
    return fields.texts(name)


def _check_diff_id(diff_id: str, what: str) -> None:
    try:
        check_digest(diff_id)
    except SbxError as error:
        raise invalid(what, error.message) from None
    if not diff_id.startswith("sha256:"):
        raise SbxError(
            "digest-unknown", f"read {what}: diff-ids of kind {diff_id.partition(':')[0]} are not used for images"
        )
