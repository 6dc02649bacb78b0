"""Warm: the store's files: an OCI image layout that many processes write at once. Outside.

Below paths.data():

    oci-layout, index.json      the OCI image layout (image-layout.md); index.json is derived from refs/
    blobs/sha256/HEX            manifests, configs, layers as they came, compressed; named by their digest
    refs/REFERENCE              the truth: one file for each reference, a descriptor in JSON
    layers/KEY/fs, KEY/meta     unpacked layers (oci.layers)
    launch/MAP/REFERENCE        launch records (store)
    partial/HEX                 the verified beginning of a blob whose transfer was cut off
    locks/NAME                  locks; a lock's file exists while somebody holds or wants it
    locks/collect               the gate, see below; always there once made
    tmp/NAME/                   a Workspace: what one process has in the making
    sandboxes/ID/lock           made and held by launches: the layers that a running sandbox uses

Every file is written in a workspace, fsynced, renamed into place, and its folder fsynced. So after kill -9 or a power
cut the store is as before or as after. There is no global lock. The protocol:

1. A workspace's folder is flocked as long as its process lives. One that nobody holds is debris, and the next process
   that makes a workspace removes it.
2. What has the same name has the same content (digests, layer keys), so two who make the same thing at once are both
   right: the second rename fails or changes nothing. To not do the work twice, `lock(name)` is held while a blob is
   fetched or a layer unpacked, and who gets it looks again first.
3. Nothing is used or made without a *pin*: `Workspace.pin(item)` writes the item's name (a digest, or a layer's key)
   into the workspace and only then looks whether the item is there. Pins are removed with the workspace, after the
   reference that keeps the items has been written.
4. Pinning holds the gate shared for the microseconds that it takes. The collector (oci.collect) holds it exclusively
   while it reads the pins of living workspaces, then the references, then the layers of running sandboxes, and renames
   what none of them needs into its own workspace. Pins before references: a pin goes only after its reference came.
   So an item that was there when it was pinned stays, as long as the pin does.
5. A launch writes its layers into sandboxes/ID/lock, which it holds, and looks for its launch record after that. The
   collector removes launch records before it looks at the sandboxes. One of the two sees the other.
6. A reference is written before the launch records of what it was before are removed; who writes a launch record looks
   at the reference again after that, and removes the record if it has changed. index.json is written by whoever
   changed a reference, and again if the references have changed once more meanwhile.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from types import TracebackType

from rootless import paths, store, trees
from rootless.errors import SbxError
from rootless.oci import manifest
from rootless.oci.manifest import DOCUMENT_LIMIT, REF_NAME, Descriptor
from rootless.reference import Reference, check_digest

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def path(*parts: str) -> str:
    """Return the path of something in the store."""
    return "/".join((paths.data(), *parts))


def ensure() -> str:
    """Make the store's folders where they are missing, and return its own."""
    root = paths.data()
    # A umask that takes the owner's own rights away would make folders that nobody can enter.
    os.umask(os.umask(0o077) & ~0o700)
    if not os.path.exists(root + "/oci-layout"):
        for folder in ("blobs/sha256", "refs", "layers", "launch", "partial", "locks", "tmp"):
            paths.ensure(f"{root}/{folder}")
        while not _mark(root):
            pass
    return root


def _mark(root: str) -> bool:
    """Write oci-layout, the last to come: where it is, the folders are. Two who write it write the same.

    False where the draft was taken for debris, which it looks like until it is locked.
    """
    draft = f"{root}/tmp/.oci-layout-{os.urandom(6).hex()}"
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if not _is_at(fd, draft):
            return False
        os.write(fd, b'{"imageLayoutVersion":"1.0.0"}')
        os.fsync(fd)
        os.rename(draft, root + "/oci-layout")
        return True
    finally:
        os.close(fd)


def exists() -> bool:
    """Tell whether there is a store at all."""
    return os.path.exists(path("oci-layout"))


# ── locks and workspaces ──────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock `name` of the store; waits for whoever holds it. Its file goes with its last holder."""
    file = path("locks", name)
    while True:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _is_at(fd, file):
            break
        os.close(fd)  # its holder has removed it meanwhile, and it locks nothing any more
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)
        os.close(fd)


def is_locked(name: str) -> bool:
    """Tell whether somebody holds the lock `name`."""
    return os.path.exists(path("locks", name)) and is_held(path("locks", name))


def is_held(file: str) -> bool:
    """Tell whether a living process has locked the file or folder `file` exclusively."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


class Workspace:
    """A folder below tmp/ for what is in the making. Leaving it removes everything that was not renamed away.

    Threads may share one: names from `draft` are never given twice, and pins are appended whole.
    """

    def __init__(self) -> None:
        try:
            root = ensure()
            self.folder = self._make(root)
            self._pins = os.open(self.folder + "/pins", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise full(error) from None
        self._count = 0

    def _make(self, root: str) -> str:
        while True:
            folder = f"{root}/tmp/{os.getpid()}-{os.urandom(6).hex()}"
            os.mkdir(folder, 0o700)
            # Until it is locked it looks like debris to everybody.
            try:
                self._fd = os.open(folder, _OPEN_FOLDER)
            except FileNotFoundError:
                continue
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if _is_at(self._fd, folder):
                return folder
            os.close(self._fd)

    def __enter__(self) -> Workspace:
        clear_debris(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the workspace with its pins; what resists is left as debris for the next."""
        os.close(self._pins)
        with contextlib.suppress(SbxError):
            remove_tree(self.folder)
        os.close(self._fd)

    def draft(self, kind: str = "draft") -> str:
        """Return a path in the workspace that nothing has yet."""
        self._count += 1
        return f"{self.folder}/{kind}-{self._count}-{os.urandom(4).hex()}"

    def pin(self, *items: str) -> None:
        """Keep the items (digests, layer keys) from being collected, from now until the workspace goes.

        What exists after this returns, stays; what does not exist yet will not be collected when it is made.
        """
        with gate(fcntl.LOCK_SH):
            os.write(self._pins, "".join(item + "\n" for item in items).encode())


@contextlib.contextmanager
def gate(how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold the gate: shared to pin; exclusively, so that nobody pins, to collect, for no longer than that must be."""
    fd = os.open(path("locks/collect"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def living_pins() -> set[str]:
    """Return what the workspaces of living processes have pinned."""
    pins: set[str] = set()
    for entry in _entries(path("tmp")):
        if is_held(entry.path):
            with contextlib.suppress(OSError), open(entry.path + "/pins", encoding="ascii", errors="replace") as file:
                pins.update(file.read().splitlines())
    return pins


def clear_debris(work: Workspace) -> None:
    """Remove what processes that no longer live have left in tmp/. What resists is left, silently: it harms nobody.

    Whoever left it may have been killed between a reference and index.json, so that is written first.
    """
    derived: bool | None = None
    for entry in _entries(path("tmp")):
        try:
            fd = os.open(entry.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if derived is None:
                derived = _derive(work)
            remove_tree(entry.path)
        except (OSError, SbxError):
            continue
        finally:
            os.close(fd)
    if derived is False:
        _derive(work)  # a full disk may have room now


def _derive(work: Workspace) -> bool:
    try:
        write_index(work)
        return True
    except OSError:
        return False


def remove_tree(folder: str) -> None:
    """Remove a folder of the store, also when it holds files of subordinate ids.

    Raises SbxError ``tree-removal`` when something resists.
    """
    try:
        trees.remove(folder)
    except SbxError:
        from rootless import idmap
        from rootless.oci import inside

        # With all of the caller's ids mapped, whoever owns the files is one of them.
        ids, _ = idmap.for_caller()
        parent, _, name = folder.rpartition("/")
        inside.call(ids, lambda: trees.remove(name), root=parent)


def _is_at(fd: int, file: str) -> bool:
    """Tell whether the open `fd` is what has the name `file`."""
    try:
        there = os.stat(file, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write_file(file: str, data: bytes, sync: bool = True) -> None:
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: str) -> None:
    """Make the names in `folder` survive a power cut."""
    fd = os.open(folder, _OPEN_FOLDER)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def install(draft: str, file: str, sync: bool = True) -> None:
    """Rename a finished file into place, with the folders that its name needs."""
    folder = file.rpartition("/")[0]
    try:
        os.rename(draft, file)
    except FileNotFoundError:
        paths.ensure(folder)
        os.rename(draft, file)
    if sync:
        sync_folder(folder)


def full(error: OSError, needed: int = 0) -> SbxError:
    """Return what to tell about a write to the store that failed."""
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        much = f", {needed} bytes are needed" if needed else ""
        return SbxError(
            "disk-full",
            f"write to {paths.data()}: {error.strerror}{much}",
            "free some space, or set SBX_HOME to a larger disk",
        )
    return SbxError(
        "data-unwritable",
        f"write to {paths.data()}: {error.strerror}",
        "set SBX_HOME to a folder on a local disk that you may write to",
    )


# ── blobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def blob_path(digest: str) -> str:
    """Return where the blob `digest` is, or would be. A text that is no digest is refused before it is a path."""
    check_digest(digest)
    return path("blobs", *digest.split(":"))


def blob_size(digest: str) -> int | None:
    """Return the size of the blob `digest`, or None when the store does not have it. Pin it first to keep it."""
    try:
        return os.stat(blob_path(digest), follow_symlinks=False).st_size
    except FileNotFoundError:
        return None


def read_blob(descriptor: Descriptor, what: str) -> bytes:
    """Return a small blob (a manifest, an index, a config), its size and digest verified; `what` names it in errors.

    Raises SbxError ``blob-missing``, ``blob-damaged`` or ``document-limit``.
    """
    if descriptor.size > DOCUMENT_LIMIT:
        raise SbxError("document-limit", f"read {what}: it is larger than {DOCUMENT_LIMIT >> 20} MiB")
    try:
        with open(blob_path(descriptor.digest), "rb") as file:
            data = file.read(descriptor.size + 1)
    except FileNotFoundError:
        raise SbxError(
            "blob-missing", f"read {what}: {descriptor.digest} is not in the store", "pull or import the image again"
        ) from None
    if len(data) != descriptor.size or manifest.digest_of(data) != descriptor.digest:
        raise SbxError(
            "blob-damaged", f"read {what}: {descriptor.digest} is damaged", "sbx system check tells what else is"
        )
    return data


def put_blob(work: Workspace, data: bytes, media_type: str) -> Descriptor:
    """Store a small blob and return its descriptor; it is pinned."""
    descriptor = Descriptor(media_type, manifest.digest_of(data), len(data))
    work.pin(descriptor.digest)
    if blob_size(descriptor.digest) != len(data):
        draft = work.draft("blob")
        try:
            _write_file(draft, data)
            install(draft, blob_path(descriptor.digest))
        except OSError as error:
            raise full(error, len(data)) from None
    return descriptor


# ── references ────────────────────────────────────────────────────────────────────────────────────────────────────────


def get_ref(reference: Reference | str) -> Descriptor | None:
    """Return what `reference` points to, or None."""
    return _read_ref(path("refs", store.escape(str(reference))))


def _read_ref(file: str) -> Descriptor | None:
    try:
        with open(file, "rb") as stream:
            data = stream.read(DOCUMENT_LIMIT)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return manifest.descriptor(manifest.decode(data, f"the reference {file}"), f"the reference {file}")


def refs() -> dict[str, Descriptor]:
    """Return all references with what they point to, by name. Damaged ones are left out; `sbx system check` tells."""
    found = {}
    for name in ref_names():
        with contextlib.suppress(SbxError):
            if descriptor := get_ref(name):
                found[name] = descriptor
    return found


def ref_names() -> list[str]:
    """Return the names of all references, sorted."""
    return sorted(store.unescape(name) for name in _walk(path("refs"), ""))


def _walk(folder: str, prefix: str) -> Iterator[str]:
    """Yield the relative paths of the files below `folder`; long names are spread over folders, see store.escape."""
    for entry in _entries(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, f"{prefix}{entry.name}/")
        else:
            yield prefix + entry.name


def set_ref(work: Workspace, reference: Reference, descriptor: Descriptor) -> None:
    """Let `reference` point to an image whose blobs are all there, and pinned by `work`; durable on return."""
    draft = work.draft("ref")
    name = str(reference)
    try:
        _write_file(draft, manifest.encode(descriptor.json()))
        install(draft, path("refs", store.escape(name)))
        forget_launches(name)
        write_index(work)
    except OSError as error:
        raise full(error) from None


def remove_ref(work: Workspace, reference: Reference | str) -> bool:
    """Remove a reference and its launch records; False when there was none. What it alone kept is for oci.collect."""
    file = path("refs", store.escape(str(reference)))
    try:
        os.unlink(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise full(error) from None
    sync_folder(file.rpartition("/")[0])
    forget_launches(str(reference))
    write_index(work)
    return True


def forget_launches(name: str) -> None:
    """Remove the launch records of the reference `name`, for all id maps."""
    for folder in launch_maps():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(path("launch", folder, store.escape(name)))


def launch_maps() -> list[str]:
    """Return the folders below launch/, one for each id map that was used; a long key is spread over several levels."""
    found = []
    pending = [entry.name for entry in _entries(path("launch"))]
    while pending:
        folder = pending.pop()
        if folder.endswith("+"):
            pending += [f"{folder}/{entry.name}" for entry in _entries(path("launch", folder))]
        else:
            found.append(folder)
    return found


def launch_records() -> Iterator[tuple[str, str]]:
    """Yield (file, reference) for each launch record."""
    for folder in launch_maps():
        for name in _walk(path("launch", folder), ""):
            yield path("launch", folder, name), store.unescape(name)


def write_index(work: Workspace) -> None:
    """Derive index.json from the references, again if they change meanwhile. Not fsynced: it can be derived again."""
    while True:
        before = refs()
        entries = [
            entry.json() | {"annotations": entry.annotations | {REF_NAME: name}}
            for name, entry in sorted(before.items())
        ]
        document = {"schemaVersion": 2, "mediaType": manifest.OCI_INDEX, "manifests": entries}
        draft = work.draft("index")
        _write_file(draft, json.dumps(document, indent=1).encode(), sync=False)
        os.rename(draft, path("index.json"))
        if refs() == before:
            return
