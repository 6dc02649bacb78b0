"""Warm: layers, from a stream of compressed bytes to an unpacked folder. Outside.

`ingest` is the one way in, for tarballs, archives and registries alike. While the bytes arrive they are hashed, kept,
decompressed, hashed again, and unpacked by a child that is confined to the new folder:

    source ─ digest ─ blob file ─ decompress ─ diff-id ─ pipe ─▶ child: oci.unpack

Nothing of it is in the store before both digests are found right. An unpacked layer is ``layers/KEY``: ``fs`` is the
tree, its files owned by whatever ids the map has; ``meta`` is marshal of what is known of it. KEY says what it is: the
diff-id and the id map.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import marshal
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rootless import paths, store, trees
from rootless.errors import SbxError
from rootless.oci import codecs, inside, layout, manifest
from rootless.oci import unpack as unpacker
from rootless.oci.codecs import Read
from rootless.oci.layout import Workspace
from rootless.oci.manifest import Descriptor
from rootless.oci.tar import CHUNK, DEFAULT, Limits
from rootless.reference import check_digest
from rootless.spec import IdMap

INPUT = 256 << 10  #: bytes that are asked of a source at once
AT_ONCE = 3  #: layers in the making at once: a core or two unpack while another waits for the disk
_PIPE = 1 << 20
_F_SETPIPE_SZ = 1031
#: errors that the bytes themselves may be to blame for; any other is the line's, the disk's or the user's
_WRONG = ("archive-", "digest-", "size-", "id-")

Open = Callable[[int], Read]  #: from which byte on → read(n), which gives 1 to n bytes, none at the end
Progress = Callable[[int], None]  #: is told how many compressed bytes have come so far


@dataclass(frozen=True)
class LayerInfo:
    """A layer that the store has: its blob, and unpacked as ``layers/KEY`` where `key` is not empty."""

    digest: str
    size: int
    diff_id: str
    media_type: str
    key: str = ""
    fresh: bool = True  #: False: everything was there already, and no byte was asked of the source
    summary: dict[str, Any] | None = None  #: what oci.unpack.unpack returned, if that ran


def layer_key(diff_id: str, idmap: IdMap) -> str:
    """Return the name below layers/ of the layer `diff_id` unpacked for `idmap`: 22 characters, since the names of all
    layers must fit the one page of options that mount(2) takes."""
    return _key(diff_id, idmap.key)


def _key(diff_id: str, map_key: str) -> str:
    digest = hashlib.sha256(f"{diff_id} {map_key}".encode()).digest()
    return base64.b32encode(digest).decode("ascii").lower()[:22]


def ingest(
    work: Workspace,
    open_at: Open,
    *,
    idmap: IdMap | None,
    digest: str = "",
    size: int | None = None,
    diff_id: str = "",
    media_type: str = "",
    progress: Progress | None = None,
    limits: Limits = DEFAULT,
) -> LayerInfo:
    """Take a layer into the store and unpack it for `idmap` (None: keep only the blob); everything is pinned by `work`.

    `open_at(offset)` is called once, when bytes are needed, and returns the function that reads the compressed bytes
    from `offset` on: with a `digest`, what an earlier transfer left is taken first. With a `digest` it is also only
    called if the store does not have the blob. `digest`, `size` and `diff_id` are what the layer is expected to be,
    each may be unknown. Without a `digest`, a stream that is not gzip or zstd (for which alone there are layer types)
    is compressed on the way: nothing is ever stored uncompressed.

    May run in several threads at once. Raises SbxError ``digest-mismatch``, ``size-mismatch``, ``archive-…``,
    ``id-unmapped``, ``disk-full``, and whatever `open_at` raises. Then the store is as before, but that bytes which
    came are kept in partial/ if their `digest` is known and they were not found wrong.
    """
    if digest:
        check_digest(digest)
    with contextlib.ExitStack() as held:
        if digest:
            held.enter_context(layout.lock(f"blob-{digest.partition(':')[2]}"))
            work.pin(digest)
        key = ""
        if diff_id and idmap:
            key = layer_key(diff_id, idmap)
            held.enter_context(layout.lock(f"layer-{key}"))
            work.pin(key)
        there = layout.blob_size(digest) if digest else None
        if there is not None and size is not None and there != size:
            there = None  # damaged, or announced wrongly: either way it has to come again
        unpacked = bool(key) and read_meta(key) is not None
        if there is not None and diff_id and (unpacked or not idmap):
            return LayerInfo(digest, there, diff_id, media_type, key, fresh=False)
        try:
            if there is not None:
                open_at = open_blob(digest)
            job = _Ingestion(work, idmap if not unpacked else None, limits, progress)
            return job.run(open_at, digest, size, diff_id, media_type, stored=there is not None)
        except OSError as error:
            raise layout.full(error, size or 0) from None


def ingest_all(jobs: Sequence[Callable[[], LayerInfo]]) -> list[Descriptor]:
    """Run `jobs`, each of which ingests one layer, several at once, and return their layers in the same order.

    One job is done here, several by processes of their own.
    """

    def described(job: Callable[[], LayerInfo]) -> tuple[str, str, int]:
        info = job()
        return info.media_type, info.digest, info.size

    if len(jobs) == 1:
        return [Descriptor(*described(jobs[0]))]
    from rootless.oci import workers

    def in_worker(job: Callable[[], LayerInfo]) -> workers.Job:
        return lambda report: described(job)

    found = workers.run([in_worker(job) for job in jobs], AT_ONCE, lambda place, size: None, lambda place, result: None)
    return [Descriptor(*result) for result in found]


def open_blob(digest: str) -> Open:
    """Return a source that reads the stored blob `digest`."""

    def open_at(offset: int) -> Read:
        return open(layout.blob_path(digest), "rb", buffering=0).read

    return open_at


class _Ingestion:
    """One layer on its way in."""

    def __init__(self, work: Workspace, idmap: IdMap | None, limits: Limits, progress: Progress | None) -> None:
        self.work = work
        self.idmap = idmap
        self.limits = limits
        self.progress = progress
        self.wrapper = ""
        self.result = -1
        self.worker: inside.Worker | None = None

    def run(
        self, open_at: Open, digest: str, size: int | None, diff_id: str, media_type: str, stored: bool
    ) -> LayerInfo:
        """Run the pipeline to its end and put what came out of it into the store."""
        tap = _Tap(self.work, digest, size, stored, self.progress)
        try:
            if self.idmap:
                self.start_unpacking(self.idmap)
            found_diff_id, kind, total = self.pump(tap, open_at)
            tap.finish(kind)
            if diff_id and found_diff_id != diff_id:
                raise SbxError(
                    "digest-mismatch", f"read layer {tap.digest}: its diff-id is {found_diff_id}, not {diff_id}"
                )
            summary = self.finish_unpacking()
        except BaseException as error:
            tap.abandon(error)
            self.abandon()
            raise
        tap.install()
        key = self.install(found_diff_id, total, summary) if self.idmap else ""
        media_type = media_type or tap.media_type(kind)
        return LayerInfo(tap.digest, tap.size, found_diff_id, media_type, key, summary=summary)

    def pump(self, tap: _Tap, open_at: Open) -> tuple[str, str, int]:
        """Move everything from source to child; return the diff-id, the compression and the uncompressed size."""
        kind, read = codecs.open_stream(tap.start(open_at))
        if tap.expected and kind not in ("", "gzip", "zstd"):
            raise SbxError("archive-unsupported", f"read layer {tap.expected}: layers are not compressed by {kind}")
        tap.recompress(kind)
        hasher = hashlib.sha256()
        total = 0
        while data := read(CHUNK):
            hasher.update(data)
            total += len(data)
            if total > self.limits.size:
                raise SbxError(
                    "archive-limit",
                    f"read the layer: it unpacks to more than {self.limits.size} bytes",
                    "--max-size raises the limit",
                )
            tap.uncompressed(data)
            self.feed(data)
        return f"sha256:{hasher.hexdigest()}", kind, total

    # ── the child ─────────────────────────────────────────────────────────────────────────────────────────────────

    def start_unpacking(self, idmap: IdMap) -> None:
        """Start the child that unpacks into a new folder of the workspace."""
        self.wrapper = self.work.draft("layer")
        folder = self.wrapper + "/fs"
        os.mkdir(self.wrapper, 0o700)
        os.mkdir(folder)
        # Below a folder with a set-group-id bit ours would have a strange group, and hand it on.
        os.chown(folder, -1, os.getegid())
        os.chmod(folder, 0o755)
        self.result = os.memfd_create("unpacked", os.MFD_CLOEXEC)
        result, limits = self.result, self.limits

        def work(reader: int) -> None:
            root = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            single = idmap.mode == "single"
            # With one id the child could do without its namespace; it is confined in it all the same.
            summary = unpacker.unpack(
                lambda size: os.read(reader, size), root, single=single, limits=limits, ids=idmap.key
            )
            data = memoryview(marshal.dumps(summary, 4))
            while data:
                data = data[os.write(result, data) :]

        self.worker = inside.start(idmap, work, folder)
        with contextlib.suppress(OSError):  # the user may have many pipes already; then it stays small
            import fcntl

            fcntl.fcntl(self.worker.feed, _F_SETPIPE_SZ, _PIPE)

    def feed(self, data: bytes) -> None:
        """Give the child more. If it has ended, that is its error, or it has read the archive to its end."""
        if not self.worker or self.worker.feed < 0:
            return
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.worker.feed, view) :]
        except BrokenPipeError:
            self.worker.finish()

    def finish_unpacking(self) -> dict[str, Any] | None:
        """Wait for the child and return what it says of the layer; raises its error."""
        if not self.worker:
            return None
        self.worker.finish()
        summary: dict[str, Any] = marshal.loads(os.pread(self.result, os.fstat(self.result).st_size, 0))
        os.close(self.result)
        self.result = -1
        return summary

    def abandon(self) -> None:
        """End the child; its folder goes with the workspace, or now, to give the room back."""
        if self.worker:
            with contextlib.suppress(SbxError):
                self.worker.finish()
        if self.result >= 0:
            os.close(self.result)
            self.result = -1
        if self.wrapper:
            with contextlib.suppress(SbxError):
                layout.remove_tree(self.wrapper)

    def install(self, diff_id: str, total: int, summary: dict[str, Any] | None) -> str:
        """Rename the unpacked layer into place; whoever was quicker had the same."""
        assert self.idmap is not None
        key = layer_key(diff_id, self.idmap)
        self.work.pin(key)
        meta = {
            "diff_id": diff_id,
            "idmap": self.idmap.key,
            "archive_size": total,
            "boot": store.boot_id(),
            **(summary or {}),
        }
        with open(self.wrapper + "/meta", "wb") as file:
            file.write(marshal.dumps(meta, 4))
        try:
            os.rename(self.wrapper, layout.path("layers", key))
        except OSError:
            if read_meta(key) is None:
                # a layer that lost its meta to a power cut stands in the way
                os.rename(layout.path("layers", key), self.work.draft("damaged"))
                os.rename(self.wrapper, layout.path("layers", key))
            else:
                layout.remove_tree(self.wrapper)
        return key


class _Tap:
    """The compressed side: hashes and keeps what passes, and compares it with what was announced."""

    def __init__(self, work: Workspace, digest: str, size: int | None, stored: bool, progress: Progress | None) -> None:
        self.work = work
        self.expected = digest
        self.expected_size = size
        self.stored = stored
        self.progress = progress
        self.digest = digest
        self.size = 0
        self.hasher = hashlib.sha256()
        self.file = -1
        self.name = ""
        self.read_source: Read | None = None
        self.compress: Callable[[bytes | memoryview | None], bytes] | None = None

    def start(self, open_at: Open) -> Read:
        """Open the source, behind the bytes that an earlier transfer has left."""
        if self.stored:
            self.read_source = open_at(0)
            return self.read
        if not self.expected:
            self.name = self.work.draft("blob")
            self.file = os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self.read_source = open_at(0)
            return self.read
        self.name = layout.path("partial", self.expected.partition(":")[2])
        self.file = os.open(self.name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        left = os.fstat(self.file).st_size
        if self.expected_size is not None and left > self.expected_size:
            os.ftruncate(self.file, 0)
            left = 0
        self.left = left
        self.open_at = open_at
        return self.read_left

    def read_left(self, size: int) -> bytes:
        """Read what an earlier transfer has left, then the rest from the source."""
        if self.size < self.left and (data := os.read(self.file, min(size, self.left - self.size))):
            self.take(data)
            return data
        if self.read_source is None:
            if self.left and self.left == self.expected_size:
                return b""
            self.read_source = self.open_at(self.left)
        return self.read(size)

    def read(self, size: int) -> bytes:
        """Read from the source; one byte more than was announced ends it."""
        assert self.read_source is not None
        data = self.read_source(min(size, INPUT))
        if data:
            if not self.stored and not self.compress:
                _write(self.file, data)
            self.take(data)
        return data

    def take(self, data: bytes) -> None:
        self.size += len(data)
        if self.expected_size is not None and self.size > self.expected_size:
            raise SbxError(
                "size-mismatch",
                f"read layer {self.expected}: it is longer than the {self.expected_size} bytes announced",
            )
        if not self.compress:
            self.hasher.update(data)
        if self.progress:
            self.progress(self.size)

    def recompress(self, kind: str) -> None:
        """Store gzip instead of a stream that was not announced and is of a `kind` without a layer type of its own."""
        if self.expected or kind in ("gzip", "zstd"):
            return
        self.compress = codecs.compressor()
        self.hasher = hashlib.sha256()
        os.ftruncate(self.file, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        self.size_stored = 0

    def uncompressed(self, data: bytes | None) -> None:
        """Take uncompressed data, for a stream that is compressed anew."""
        if self.compress and (packed := self.compress(data)):
            _write(self.file, packed)
            self.hasher.update(packed)
            self.size_stored += len(packed)

    def media_type(self, kind: str) -> str:
        """Return the layer type of what was stored, for a stream of that `kind`."""
        if kind == "zstd":
            return manifest.OCI_LAYER_ZSTD
        return manifest.OCI_LAYER_GZIP if kind == "gzip" or self.compress else manifest.OCI_LAYER

    def finish(self, kind: str) -> None:
        """Check size and digest at the end of the stream."""
        if self.compress:
            self.uncompressed(None)
            self.size = self.size_stored
        if self.expected_size is not None and self.size != self.expected_size:
            raise SbxError(
                "size-mismatch", f"read layer {self.expected}: it ends after {self.size} of {self.expected_size} bytes"
            )
        self.digest = f"sha256:{self.hasher.hexdigest()}"
        if self.expected and self.digest != self.expected:
            hint = "sbx system check --repair removes what is damaged" if self.stored else ""
            raise SbxError("digest-mismatch", f"read layer {self.expected}: its digest is {self.digest}", hint)
        if self.file >= 0:
            os.fsync(self.file)

    def install(self) -> None:
        """Put the finished blob into its place."""
        if self.stored:
            return
        self.work.pin(self.digest)
        layout.install(self.name, layout.blob_path(self.digest))
        os.close(self.file)
        self.file = -1

    def abandon(self, error: BaseException) -> None:
        """Keep the beginning of an announced blob for the next try, unless its content may be why this one failed."""
        if self.file < 0:
            return
        wrong = isinstance(error, SbxError) and error.code.startswith(_WRONG)
        empty = os.fstat(self.file).st_size == 0
        os.close(self.file)
        self.file = -1
        if wrong or empty or not self.expected:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# ── unpacked layers ───────────────────────────────────────────────────────────────────────────────────────────────────


def read_meta(key: str) -> dict[str, Any] | None:
    """Return what is known of the unpacked layer `key`, or None when it is not there, or not known to be whole.

    A layer is not fsynced: that would take longer than unpacking. So after a reboot its files are counted once, and
    if none is missing or short, what is on the disk is what there was.
    """
    meta = peek_meta(key)
    if meta and meta["boot"] and meta["boot"] != store.boot_id():
        return _recheck(key, meta)
    return meta


def peek_meta(key: str) -> dict[str, Any] | None:
    """Return the meta of the unpacked layer `key` as it is written, or None when there is none that fits."""
    try:
        with open(layout.path("layers", key, "meta"), "rb") as file:
            meta = marshal.loads(file.read())
        if isinstance(meta, dict) and _key_of(meta) == key and meta["size"] >= 0 and isinstance(meta["boot"], str):
            return meta
    except (OSError, EOFError, ValueError, TypeError, KeyError):
        pass
    return None


def _key_of(meta: dict[str, Any]) -> str:
    return _key(meta["diff_id"], meta["idmap"])


def _recheck(key: str, meta: dict[str, Any]) -> dict[str, Any] | None:
    """Count the files of a layer from before the last boot; return its meta, marked as safe, if none is missing."""
    try:
        if count_files(key) != (meta["files"], meta["size"]):
            return None
    except (OSError, SbxError):
        return None
    meta["boot"] = ""
    with Workspace() as work:
        draft = work.draft("meta")
        with open(draft, "wb") as file:
            file.write(marshal.dumps(meta, 4))
            file.flush()
            os.fsync(file.fileno())
        layout.install(draft, layout.path("layers", key, "meta"))
    return meta


def count_files(key: str) -> tuple[int, int]:
    """Return how many files the unpacked layer `key` has, and their bytes."""
    folder = layout.path("layers", key, "fs")
    try:
        return _count(folder)
    except PermissionError:
        from rootless import idmap

        result = os.memfd_create("count", os.MFD_CLOEXEC)
        try:
            inside.call(idmap.for_caller()[0], lambda: _tell(result, _count("/")), root=folder)
            files, size = marshal.loads(os.pread(result, 100, 0))
        finally:
            os.close(result)
        return files, size


def _count(folder: str) -> tuple[int, int]:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return trees.count(fd)
    finally:
        os.close(fd)


def _tell(fd: int, value: tuple[int, int]) -> None:
    os.write(fd, marshal.dumps(value, 4))


def layer_keys() -> list[str]:
    """Return the keys of all unpacked layers, whole or not."""
    try:
        return sorted(os.listdir(paths.data() + "/layers"))
    except FileNotFoundError:
        return []
