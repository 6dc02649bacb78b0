"""Mounts: the sandbox's root, /proc, /sys, /dev and what the user asks for. Inside.

mount(2), overlayfs (Documentation/filesystems/overlayfs.rst), pivot_root(2), mount_setattr(2).

Everything that comes from the host is opened *before* the switch of root, as a copy that is attached nowhere (`Tree`,
`Filesystem`); everything that is put somewhere is put there *after* it (`Attach`, `Mask`…), when no name can lead out
any more. Nothing below the new root is touched by name from outside, whatever links an image has planted.
"""

from __future__ import annotations

import os

from rootless import syscalls
from rootless.errors import SbxError
from rootless.steps import Child, Step

RDONLY = syscalls.MOUNT_ATTR_RDONLY
NOSUID = syscalls.MOUNT_ATTR_NOSUID
NODEV = syscalls.MOUNT_ATTR_NODEV
NOEXEC = syscalls.MOUNT_ATTR_NOEXEC

_WORDS = {RDONLY: "ro", NOSUID: "nosuid", NODEV: "nodev", NOEXEC: "noexec"}
_MS_FLAGS = {
    RDONLY: syscalls.MS_RDONLY,
    NOSUID: syscalls.MS_NOSUID,
    NODEV: syscalls.MS_NODEV,
    NOEXEC: syscalls.MS_NOEXEC,
}

#: device → its number; what /dev/NAME of the host is must be exactly this
DEVICES = {
    "null": os.makedev(1, 3), "zero": os.makedev(1, 5), "full": os.makedev(1, 7),
    "random": os.makedev(1, 8), "urandom": os.makedev(1, 9), "tty": os.makedev(5, 0),
}  # fmt: skip
LINKS = {
    "fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
    "core": "/proc/kcore", "ptmx": "pts/ptmx",
}  # fmt: skip


ENOENT, EACCES = 2, 13
_FOLDER, _FILE, _LINK = 0o040000, 0o100000, 0o120000


def words(attributes: int) -> str:
    """Return mount attributes as mount(8) spells them, with a comma before each."""
    return "".join("," + word for bit, word in _WORDS.items() if attributes & bit)


# ── before the switch: what the mounts are made of ────────────────────────────────────────────────────────────────────


class StopPropagation(Step):
    """Make every mount a slave: mounts of the host still arrive, none of ours ever leaves."""

    __slots__ = ()

    def describe(self) -> str:
        return "stop mounts from propagating to the host"

    def execute(self, child: Child) -> None:
        syscalls.mount("", "/", "", syscalls.MS_SLAVE | syscalls.MS_REC)


class Source(Step):
    """What can be attached: `fd` is its unattached mount once the step is done."""

    __slots__ = ("fd",)
    ours = False  #: whether missing mount points may be made in it

    def __init__(self) -> None:
        self.fd = -1


class Tree(Source):
    """A copy of a part of the host's tree, with all that is mounted below it.

    It always takes the mounts below along: in a user namespace the kernel keeps them on (a copy without them would
    show what they hide). Read-only means all of them. `device` demands that the source is the device of that number.
    """

    __slots__ = ("attributes", "device", "path")

    def __init__(self, path: str, attributes: int = 0, device: int = 0) -> None:
        super().__init__()
        self.path = path
        self.attributes = attributes
        self.device = device

    def describe(self) -> str:
        return f"open {self.path}{words(self.attributes)}"

    def execute(self, child: Child) -> None:
        self.fd = syscalls.open_tree(self.path)
        if self.device and os.fstat(self.fd).st_rdev != self.device:
            raise SbxError("device-wrong", f"open {self.path}: it is not the device of that name")
        if self.attributes:
            syscalls.mount_setattr(self.fd, self.attributes, recursive=True)


class Filesystem(Source):
    """A new filesystem: tmpfs, proc, sysfs, devpts, mqueue, cgroup2."""

    __slots__ = ("attributes", "fstype", "options")
    ours = True

    def __init__(self, fstype: str, attributes: int, options: dict[str, str] | None = None) -> None:
        super().__init__()
        self.fstype = fstype
        self.attributes = attributes
        self.options = options or {}

    def describe(self) -> str:
        options = "".join(f",{key}={value}" if value else f",{key}" for key, value in self.options.items())
        return f"create a {self.fstype}{words(self.attributes)}{options}"

    def execute(self, child: Child) -> None:
        self.fd = syscalls.new_mount(self.fstype, self.options, self.attributes)


class Devices(Source):
    """The host's harmless device nodes, each checked by its number: mknod(2) is not for user namespaces."""

    __slots__ = ("fds", "names")

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.fds: dict[str, int] = {}

    def describe(self) -> str:
        return f"open the devices {' '.join(self.names)}"

    def execute(self, child: Child) -> None:
        for name in self.names:
            self.fds[name] = syscalls.open_tree("/dev/" + name, recursive=False)
            if os.fstat(self.fds[name]).st_rdev != DEVICES[name]:
                raise SbxError("device-wrong", f"open /dev/{name}: it is not the device of that name")


# ── the root, and the switch to it ────────────────────────────────────────────────────────────────────────────────────


class Overlay(Step):
    """Mount `lowers`, the top one first, with a writable upper layer, on `folder`.

    All names are relative to `base`: so they are short enough for the one page that mount(2) takes, may stand in a
    folder with a colon in its name, and /proc/mounts inside does not tell where the store is. `folder` gets upper and
    work, which its own mount then covers.

    A *volatile* upper layer is one that nobody will want back: without it, unmounting syncs the whole filesystem.
    """

    __slots__ = ("attributes", "base", "folder", "lowers", "volatile")

    def __init__(self, base: str, lowers: list[str], folder: str, attributes: int, volatile: bool = True) -> None:
        self.base = base
        self.lowers = lowers
        self.folder = folder
        self.attributes = attributes
        self.volatile = volatile

    def describe(self) -> str:
        return f"mount overlay of {len(self.lowers)} layers on {self.folder}{words(self.attributes)}"

    def execute(self, child: Child) -> None:
        os.chdir(self.base)
        self._make_folders()
        upper = os.path.relpath(self.folder, self.base)
        # userxattr: whiteouts and opaque marks are in user.*, the only attributes that a user namespace may write
        options = f"lowerdir={':'.join(self.lowers)},upperdir={upper}/upper,workdir={upper}/work,userxattr"
        options += ",volatile" if self.volatile else ""
        flags = sum(flag for bit, flag in _MS_FLAGS.items() if self.attributes & bit)
        if len(os.fsencode(options)) > 4095:
            raise SbxError(
                "too-many-layers", f"mount overlay of {len(self.lowers)} layers: their names do not fit a page"
            )
        syscalls.mount("overlay", self.folder, "overlay", flags, options)
        _enter_root(self.folder, child)

    def _make_folders(self) -> None:
        """Make upper and work; the root of the sandbox has the owner and mode that the top layer's has."""
        for name in ("upper", "work"):
            try:
                os.mkdir(f"{self.folder}/{name}", 0o700)
            except FileExistsError:
                if name == "upper":
                    return  # kept from an earlier run, with whatever owner and mode it was given there
        like = os.stat(self.lowers[0])
        os.chown(self.folder + "/upper", like.st_uid, like.st_gid)
        os.chmod(self.folder + "/upper", like.st_mode & 0o7777)


class BindLower(Step):
    """Bind the folder `path` on `folder`/lower, to be the lower layer of an overlay."""

    __slots__ = ("folder", "path")

    def __init__(self, path: str, folder: str) -> None:
        self.path = path
        self.folder = folder

    def describe(self) -> str:
        return f"bind {self.path} on {self.folder}/lower"

    def execute(self, child: Child) -> None:
        os.mkdir(self.folder + "/lower", 0o700)
        _bind(self.path, self.folder + "/lower", 0)


class ReadOnlyTree(Step):
    """Use a copy of the host's tree at `path`, all of it read-only, as the root; `folder` is where it is put."""

    __slots__ = ("attributes", "folder", "path")

    def __init__(self, path: str, folder: str, attributes: int) -> None:
        self.path = path
        self.folder = folder
        self.attributes = attributes | RDONLY

    def describe(self) -> str:
        return f"bind {self.path} on {self.folder}{words(self.attributes)}"

    def execute(self, child: Child) -> None:
        _bind(self.path, self.folder, self.attributes)
        _enter_root(self.folder, child)


class BindRoot(Step):
    """Use the folder `path` itself, as a mount of its own, as the root."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return f"bind {self.path} on itself"

    def execute(self, child: Child) -> None:
        _bind(self.path, self.path, 0)
        _enter_root(self.path, child)


def _bind(path: str, target: str, attributes: int) -> None:
    """Mount a copy of the tree at `path`, with `attributes` on all of it, on the folder `target`; both are ours."""
    tree = syscalls.open_tree(path)
    if attributes:
        syscalls.mount_setattr(tree, attributes, recursive=True)
    point = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    syscalls.move_mount(tree, point)
    os.close(point)
    os.close(tree)


def _enter_root(path: str, child: Child) -> None:
    """Go to the mount at `path`; mount points may be made in it."""
    os.chdir(path)
    root = os.open(".", os.O_PATH | os.O_CLOEXEC)
    child.creatable.add(syscalls.mount_id(root))
    os.close(root)


class PivotRoot(Step):
    """Make the current folder the root, and let the host's tree go: pivot_root(2), "pivot_root(".", ".")"."""

    __slots__ = ()

    def describe(self) -> str:
        return "pivot_root, and detach the host's tree"

    def execute(self, child: Child) -> None:
        syscalls.pivot_root(".", ".")
        # The old root now lies on top of the new one, in the same place.
        syscalls.umount(".", syscalls.MNT_DETACH)
        os.chdir("/")


# ── after the switch: what is put where ───────────────────────────────────────────────────────────────────────────────


def _open_inside(path: str, flags: int = os.O_PATH) -> int:
    """Open the absolute `path`; links are followed, but never those of /proc/PID/fd. The root is the sandbox's own."""
    return syscalls.openat2(syscalls.AT_FDCWD, path, flags, syscalls.RESOLVE_NO_MAGICLINKS)


def _mount_point(path: str, child: Child, folder: bool) -> int:
    """Return a descriptor of the mount point `path`, made where it is missing.

    It is made only in the sandbox's own filesystems: never a stub in a folder of the user's.
    """
    try:
        return _open_inside(path)
    except FileNotFoundError:
        pass
    above, _, name = path.rstrip("/").rpartition("/")
    parent = _mount_point(above or "/", child, folder=True)
    try:
        if syscalls.mount_id(parent) not in child.creatable:
            raise SbxError(
                "mount-point-missing",
                f"create mount point {path}: it would appear in your own folder that is mounted there",
                f"create {name} there yourself, or mount somewhere else",
            )
        if folder:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent))
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


#: A path that is not there, or not even for root inside, needs no mask. Anything else (no descriptor is left…) means
#: that it could not be masked.
_MISSING = (FileNotFoundError, NotADirectoryError, PermissionError)


class MakeFolder(Step):
    """Make a folder inside where it is missing, such as the working directory that an image names."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return f"create folder {self.path} if it is missing"

    def execute(self, child: Child) -> None:
        os.close(_mount_point(self.path, child, folder=True))


class Attach(Step):
    """Put an unattached mount at `target`, which is made where it is missing.

    A `strict` target must be what its name says: a link there is refused (an image whose /proc is a link would put
    the masks elsewhere).
    """

    __slots__ = ("source", "strict", "target")

    def __init__(self, source: Source, target: str, strict: bool = False) -> None:
        self.source = source
        self.target = target
        self.strict = strict

    def describe(self) -> str:
        what = self.source.path if isinstance(self.source, Tree) else getattr(self.source, "fstype", "")
        return f"mount {what} on {self.target}"

    def execute(self, child: Child) -> None:
        if self.strict and os.path.islink(self.target):
            raise SbxError("image-hostile", f"mount on {self.target}: it is a symbolic link in the image")
        folder = (os.fstat(self.source.fd).st_mode & 0o170000) == _FOLDER
        target = _mount_point(self.target, child, folder)
        try:
            syscalls.move_mount(self.source.fd, target)
        finally:
            os.close(target)
        if self.source.ours:
            child.creatable.add(syscalls.mount_id(self.source.fd))
        os.close(self.source.fd)


class PopulateDev(Step):
    """Fill the fresh /dev: device nodes, links, and the folders that filesystems of their own go on."""

    __slots__ = ("devices",)

    def __init__(self, devices: Devices) -> None:
        self.devices = devices

    def describe(self) -> str:
        return "populate /dev"

    def execute(self, child: Child) -> None:
        dev = os.open("/dev", os.O_PATH | os.O_CLOEXEC)
        for name, fd in self.devices.fds.items():
            node = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDONLY | os.O_CLOEXEC, 0o666, dir_fd=dev)
            syscalls.move_mount(fd, node)
            os.close(node)
            os.close(fd)
        for name, target in LINKS.items():
            os.symlink(target, name, dir_fd=dev)
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(name, 0o755, dir_fd=dev)
        os.close(dev)


class WriteFiles(Step):
    """Show `files`, path → text, such as /etc/hosts, whatever the image has there.

    They live in a tmpfs of their own, and each is bound over the image's. What is no plain file there (a link to /run
    of the image's builder, a fifo) is replaced; where the root is read-only a link is followed (the host's
    /etc/resolv.conf often leads to /run). An empty one is not made where there is none: resolv.conf without a network.
    """

    __slots__ = ("files",)

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def describe(self) -> str:
        return f"write {' '.join(self.files)}"

    def execute(self, child: Child) -> None:
        # In a place of our own while they are made. Afterwards the tmpfs is out of the tree, but the files keep their
        # names in it: on one without, a sandbox inside this one could mount nothing.
        place = "/dev/.new"
        os.mkdir(place, 0o700)
        tree = syscalls.new_mount("tmpfs", {"size": "1m", "mode": "755"}, NOSUID | NODEV | NOEXEC)
        point = os.open(place, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        syscalls.move_mount(tree, point)
        os.close(point)
        for path, content in self.files.items():
            try:
                self._show(tree, path, content, child)
            except OSError as error:
                raise SbxError("image-unsuitable", f"write {path}: {error.strerror}") from None
        os.close(tree)
        syscalls.umount(place)
        os.rmdir(place)

    def _show(self, place: int, path: str, content: str, child: Child) -> None:
        target = self._target(path, child, bool(content))
        if target < 0:
            return
        name = path.rpartition("/")[2]
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=place)
        os.write(fd, content.encode("utf-8", "surrogateescape"))
        os.close(fd)
        tree = syscalls.open_tree(name, place, recursive=False)
        syscalls.move_mount(tree, target)
        os.close(target)
        os.close(tree)

    def _target(self, path: str, child: Child, wanted: bool) -> int:
        """Return what `path` is to be mounted on, made where it is missing; -1 if it is, and not `wanted`."""
        folder, _, name = path.rpartition("/")
        parent = _mount_point(folder, child, folder=True)
        try:
            kind = os.lstat(name, dir_fd=parent).st_mode & 0o170000
            if kind == _LINK and self._is_read_only(parent):
                path = os.path.join(folder, os.readlink(name, dir_fd=parent))
            elif kind != _FILE:
                if syscalls.mount_id(parent) not in child.creatable:
                    raise SbxError(
                        "mount-point-missing",
                        f"write {path}: it is no plain file, in your own folder that is mounted there",
                        "mount that somewhere else",
                    )
                os.unlink(name, dir_fd=parent)
        except FileNotFoundError:
            if not wanted:
                return -1
        finally:
            os.close(parent)
        return _mount_point(path, child, folder=False)

    @staticmethod
    def _is_read_only(folder: int) -> bool:
        return bool(os.fstatvfs(folder).f_flag & os.ST_RDONLY)


_EMPTY = RDONLY | NOSUID | NODEV | NOEXEC


def _check_null() -> None:
    """Raise OSError or SbxError unless /dev/null is that device: the user may have mounted something else on /dev."""
    null = os.open("/dev/null", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    device = os.fstat(null).st_rdev
    os.close(null)
    if device != DEVICES["null"]:
        raise SbxError("device-wrong", "mask files: /dev/null inside is not the device of that name")


class Mask(Step):
    """Hide `paths`: a file behind /dev/null, a folder behind an empty one. What is not there is passed over."""

    __slots__ = ("paths",)

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def describe(self) -> str:
        return f"mask {' '.join(self.paths)}"

    def execute(self, child: Child) -> None:
        empty = -1
        _check_null()
        for path in self.paths:
            try:
                # Most are files, and this is one call; of a folder it is an error
                syscalls.mount("/dev/null", path, "", syscalls.MS_BIND)
            except NotADirectoryError:
                empty = self._mask_folder(path, empty)
            except OSError as error:
                if error.errno not in (ENOENT, EACCES):  # of the path, that is; EPERM says that it was not masked
                    raise
        if empty >= 0:
            os.close(empty)

    def _mask_folder(self, path: str, empty: int) -> int:
        """Mask a folder, or nothing; return the empty mount to make copies of, which is `empty` if that is one."""
        try:
            target = _open_inside(path, os.O_PATH | os.O_DIRECTORY)
        except _MISSING:
            return empty
        try:
            # one empty filesystem serves all: each further mask is a copy of the first one's mount
            if empty < 0:
                empty = syscalls.new_mount("tmpfs", {"size": "4k", "nr_inodes": "1"}, _EMPTY)
                syscalls.move_mount(empty, target)
                return empty
            tree = syscalls.open_tree("", empty, recursive=False)
            syscalls.move_mount(tree, target)
            os.close(tree)
            return empty
        finally:
            os.close(target)


class ReadOnly(Step):
    """Make `paths` read-only where they exist: each becomes a read-only mount of itself."""

    __slots__ = ("paths",)

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def describe(self) -> str:
        return f"make read-only {' '.join(self.paths)}"

    def execute(self, child: Child) -> None:
        for path in self.paths:
            try:
                target = _open_inside(path)
            except _MISSING:
                continue
            tree = syscalls.open_tree("", target)
            syscalls.mount_setattr(tree, RDONLY, recursive=True)
            syscalls.move_mount(tree, target)
            os.close(tree)
            os.close(target)


class ReadOnlyRoot(Step):
    """Make the root filesystem read-only, now that all mount points exist."""

    __slots__ = ()

    def describe(self) -> str:
        return "make the root filesystem read-only"

    def execute(self, child: Child) -> None:
        syscalls.mount_setattr(syscalls.AT_FDCWD, RDONLY, path="/")
