"""Inside: write a layer's tar into a folder, as overlayfs wants it. Warm; runs pivoted into the empty folder.

The archive is hostile. What holds, whatever is in it:

- Everything happens below the folder's descriptor. A parent folder is opened by openat2(2) with RESOLVE_IN_ROOT (links
  of the layer's own are followed, inside, as docker and podman do); the last part of a name is never followed, not
  by open, chmod, chown, utime, link, xattr or removal. The caller's pivot_root and Landlock stand behind that.
- Modes with special bits, xattrs and times of folders are set at the end: a set-group-id bit or a default ACL would
  be inherited by what is made later, and making files changes times.
- Whiteouts become overlayfs's own: a character device 0/0, and ``user.overlay.opaque`` (overlayfs.rst, "whiteouts and
  opaque directories", with the mount option userxattr). Everything that an image says in overlayfs's name is dropped.
- Device nodes cannot be made without root: they are counted and left out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from typing import Any

from rootless import syscalls, trees
from rootless.errors import SbxError, printable
from rootless.oci import tar
from rootless.oci.tar import DEFAULT, Limits, Member

OPAQUE = b"user.overlay.opaque"
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PARENT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SPECIAL = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
_WHITEOUT = b".wh."
_OPAQUE_MARK = b".wh..wh..opq"
_PARENTS = 8  #: open parent folders that are kept
#: attributes that are kept, besides user.*; the kernel translates the ids in them to the namespace's
_KEPT_XATTRS = frozenset((b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"))
_TOLD = 20  #: names of left-out things that are kept for the notice

Summary = dict[str, Any]


def unpack(
    read: Callable[[int], bytes], root: int, *, single: bool = False, limits: Limits = DEFAULT, ids: str = ""
) -> Summary:
    """Unpack the tar that `read` gives into the open, empty folder `root`, and return what is to be known of it.

    With `single`, everything belongs to the caller: owners, and modes that had to be widened, are told in the result.
    `ids` names the id map in error messages. The result holds only what marshal can write:

    - ``entries``: members; ``files`` and ``size``: regular files that are there at the end, and their full lengths
    - ``devices``: (path, kind, major, minor, mode, uid, gid) of those that could not be made
    - ``owners``: path → (uid, gid, mode) with `single`, where that differs from 0, 0 and what is on disk
    - ``xattrs_dropped``, ``setid_dropped``: counts
    - ``opaque``: the root hides all layers below

    Raises SbxError (``archive-…``, ``id-unmapped``, ``disk-full``, ``unpack-failed``); then the folder holds anything,
    and is the caller's to remove.
    """
    mask = os.umask(0)
    unpacker = _Unpacker(read, root, single, limits, ids)
    try:
        return unpacker.run()
    finally:
        unpacker.close_parents()
        os.umask(mask)


class _Unpacker:
    def __init__(self, read: Callable[[int], bytes], root: int, single: bool, limits: Limits, ids: str) -> None:
        self.reader = tar.Reader(read, limits)
        self.root = root
        self.single = single
        self.limits = limits
        self.ids = ids
        self.uid, self.gid = os.geteuid(), os.getegid()
        self.total = 0  # bytes of all files at their full length, also of those that were replaced
        self.size = 0  # of those that are there
        self.files = 0
        self.recount = False  # a tree was replaced, so the two above have to be counted at the end
        self.devices: list[tuple[bytes, str, int, int, int, int, int]] = []
        self.left_out: set[bytes] = set()
        self.owners: dict[bytes, tuple[int, int, int]] = {}
        self.xattrs_dropped = 0
        self.setid_dropped = 0
        self.opaque = False
        self.folders: dict[bytes, Member] = {}  # attributes to set at the end
        self.parents: dict[bytes, int] = {}
        self.stale = False  # something was removed, so open parents may not be what their paths say any more
        self.member: bytes = b""  # whose turn it is, for messages

    def run(self) -> Summary:
        """Unpack all members, then finish the folders."""
        make = {
            tar.FILE: self.make_file,
            tar.FOLDER: self.make_folder,
            tar.SYMLINK: self.make_symlink,
            tar.LINK: self.make_link,
            tar.FIFO: self.make_fifo,
            tar.CHARACTER: self.leave_out,
            tar.BLOCK_DEVICE: self.leave_out,
        }
        try:
            for member in self.reader:
                if member.kind == tar.VOLUME:
                    continue
                self.member = member.name
                if self.stale:
                    self.close_parents()
                path = self.clean(member.name)
                if not path:
                    self.root_entry(member)
                    continue
                folder, _, name = path.rpartition(b"/")
                if b".wh." in path and self.is_whiteout(path, folder, name):
                    continue
                make[member.kind](member, path, self.parent(folder), name)
            self.finish_folders()
            if self.recount:
                self.files, self.size = trees.count(self.root)
        except OSError as error:
            raise self.failure(error) from None
        return {
            "entries": self.reader.entries,
            "files": self.files,
            "size": self.size,
            "devices": self.devices,
            "owners": self.owners,
            "xattrs_dropped": self.xattrs_dropped,
            "setid_dropped": self.setid_dropped,
            "opaque": self.opaque,
        }

    # ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def clean(self, name: bytes) -> bytes:
        """Return a member's name as a path below the root, without ``.`` and empty parts; the root itself is empty.

        An absolute name is one below the root, as every tar program reads it. ``..`` is refused: no honest archive
        has it, and what it means after a link is a matter of opinion.
        """
        if not name:
            raise self.unsafe("it has no name")
        if len(name) > self.limits.path:
            raise self.unsafe(f"its name is longer than {self.limits.path} bytes")
        if name[0] in b"./" or b"/." in name or b"//" in name or name[-1] == 0x2F:
            parts = [part for part in name.split(b"/") if part not in (b"", b".")]
            if b".." in parts:
                raise self.unsafe("'..' in its name leads out of the tree")
            name = b"/".join(parts)
        if name.count(b"/") > self.limits.depth:
            raise self.unsafe(f"it is more than {self.limits.depth} folders deep")
        return name

    def parent(self, path: bytes, make: bool = True) -> int:
        """Return a descriptor of the folder `path`, which is made with its parents where it is missing (if `make`).

        It stays open for the next members, and is closed when others have taken its place.
        """
        if not path:
            return self.root
        if (fd := self.parents.get(path)) is not None:
            return fd
        try:
            fd = syscalls.openat2(self.root, path, _PARENT, _RESOLVE)
        except (FileNotFoundError, NotADirectoryError):
            if not make:
                raise
            fd = self.make_parents(path)
        if len(self.parents) >= _PARENTS:
            os.close(self.parents.pop(next(iter(self.parents))))
        self.parents[path] = fd
        return fd

    def make_parents(self, path: bytes) -> int:
        """Make the folders that `path` lacks (root's, mode 0755) and return a descriptor of the last one."""
        fd = os.dup(self.root)
        prefix = b""
        for name in path.split(b"/"):
            prefix += b"/" + name
            try:
                try:
                    deeper = syscalls.openat2(self.root, prefix, _PARENT, _RESOLVE)
                except (FileNotFoundError, NotADirectoryError):
                    self.make_parent(fd, name)
                    deeper = syscalls.openat2(self.root, prefix, _PARENT, _RESOLVE)
            finally:
                os.close(fd)
            fd = deeper
        return fd

    def make_parent(self, folder: int, name: bytes) -> None:
        """Make the folder `name`, also in place of a whiteout: then it hides what lower layers have there."""
        whiteout = self.is_whiteout_node(name, folder)
        if whiteout:
            os.unlink(name, dir_fd=folder)
        try:
            os.mkdir(name, 0o755, dir_fd=folder)
        except FileExistsError:
            raise self.unsafe("a part of its name is a file, or a link that leads nowhere") from None
        if whiteout:
            self.hide_lower(name, folder)

    def close_parents(self) -> None:
        """Forget the open folders: something that a path led through was replaced."""
        for fd in self.parents.values():
            os.close(fd)
        self.parents.clear()
        self.stale = False

    # ── kinds of members ──────────────────────────────────────────────────────────────────────────────────────────

    def make_file(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Write a regular file. Order: chown clears set-id bits, and writing clears capabilities."""
        self.account(member.size)
        mode = member.mode
        try:
            fd = os.open(name, _CREATE, mode & 0o777, dir_fd=folder)
        except FileExistsError:
            self.clear(path, folder, name)
            fd = os.open(name, _CREATE, mode & 0o777, dir_fd=folder)
        try:
            if member.size:
                self.write(fd, member)
            if member.uid != self.uid or member.gid != self.gid or mode & _SPECIAL:
                self.own(fd, member, path)
            if member.xattrs:
                self.set_xattrs(fd, member)
            os.utime(fd, ns=(time := tar.clamp_time(member.mtime), time))
        finally:
            os.close(fd)

    def write(self, fd: int, member: Member) -> None:
        """Write a file's data, leaving holes where a sparse one has them."""
        if member.sparse is not None:
            self.write_sparse(fd, member.sparse, member.size)
            return
        if (data := self.reader.whole()) is not None:
            written = os.write(fd, data)
            if written < len(data):
                _write_all(fd, data[written:])
            return
        for piece in self.reader.pieces():
            _write_all(fd, piece)

    def write_sparse(self, fd: int, extents: list[tuple[int, int]], size: int) -> None:
        """Write each stored extent to its place; the rest are holes."""
        os.ftruncate(fd, size)
        places = iter(extents)
        left = 0
        for piece in self.reader.pieces():
            while piece:
                while not left:
                    offset, left = next(places)
                    os.lseek(fd, offset, os.SEEK_SET)
                take = min(left, len(piece))
                _write_all(fd, piece[:take])
                piece = piece[take:]
                left -= take

    def make_folder(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Make a folder, or take the one that is there; its attributes follow at the end."""
        mode = member.mode & 0o777 | 0o700
        try:
            os.mkdir(name, mode, dir_fd=folder)
        except FileExistsError:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                whiteout = self.is_whiteout_node(name, folder)
                self.clear(path, folder, name)
                os.mkdir(name, mode, dir_fd=folder)
                if whiteout:
                    self.hide_lower(name, folder)
        self.folders[path] = member

    def make_symlink(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Make a symbolic link. Its target is checked for length alone: what it means is known when it is used."""
        if not member.link or len(member.link) > self.limits.path:
            raise self.unsafe("its target is empty or too long")
        try:
            os.symlink(member.link, name, dir_fd=folder)
        except FileExistsError:
            self.clear(path, folder, name)
            os.symlink(member.link, name, dir_fd=folder)
        self.finish_node(member, path, folder, name)

    def make_link(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Make a hard link to a file of this layer."""
        target = self.clean(member.link)
        if target == path:
            return
        if target in self.left_out:
            self.left_out.add(path)
            return
        source, _, source_name = target.rpartition(b"/")
        if not source_name or source_name.startswith(_WHITEOUT):
            raise self.unsafe("it is a hard link to something that is no file")
        # its parent is opened apart: parent() may close `folder`, and must not make folders for a link's sake
        try:
            source_fd = syscalls.openat2(self.root, b"/" + source, _PARENT, _RESOLVE)
        except OSError as error:
            raise self.dangling(target, error) from None
        try:
            self.link(source_name, source_fd, name, folder, path, target)
        finally:
            os.close(source_fd)

    def link(self, source: bytes, source_fd: int, name: bytes, folder: int, path: bytes, target: bytes) -> None:
        if self.is_whiteout_node(source, source_fd):
            raise self.dangling(target, OSError(errno.ENOENT, os.strerror(errno.ENOENT)))
        try:
            try:
                os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=folder, follow_symlinks=False)
            except FileExistsError:
                if self.same_file(source, source_fd, name, folder):
                    return
                self.clear(path, folder, name)  # which may hold the target itself
                os.link(source, name, src_dir_fd=source_fd, dst_dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EPERM, errno.ENOTDIR):
                raise self.dangling(target, error) from None
            raise
        if (owner := self.owners.get(target)) is not None:
            self.owners[path] = owner

    def make_fifo(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Make a named pipe."""
        try:
            os.mkfifo(name, member.mode & 0o777, dir_fd=folder)
        except FileExistsError:
            self.clear(path, folder, name)
            os.mkfifo(name, member.mode & 0o777, dir_fd=folder)
        self.finish_node(member, path, folder, name)

    def leave_out(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Note a device node, which cannot be made; what was there before it is gone all the same."""
        self.clear(path, folder, name)
        kind = "c" if member.kind == tar.CHARACTER else "b"
        self.devices.append((path, kind, member.major, member.minor, member.mode, member.uid, member.gid))
        self.left_out.add(path)

    def root_entry(self, member: Member) -> None:
        """Take the root's own attributes; it can be nothing but a folder."""
        if member.kind != tar.FOLDER:
            raise self.unsafe("the root of the tree can only be a folder")
        self.folders[b""] = member

    # ── whiteouts: OCI image specification, layer.md ──────────────────────────────────────────────────────────────

    def is_whiteout(self, path: bytes, folder: bytes, name: bytes) -> bool:
        """Do what a whiteout asks for and return True; False if `path` is an ordinary name after all."""
        if any(part.startswith(b".wh..wh.") for part in path.split(b"/")) and name != _OPAQUE_MARK:
            return True  # aufs's own book-keeping
        if any(part.startswith(_WHITEOUT) for part in folder.split(b"/")):
            raise self.unsafe("a whiteout stands where a folder should be")
        if not name.startswith(_WHITEOUT):
            return False
        parent = self.parent(folder)
        if name == _OPAQUE_MARK:
            if folder:
                self.set_opaque(parent)
            else:
                self.opaque = True  # overlayfs does not look at a layer's root: the store leaves out what is below
            return True
        hidden = name[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise self.unsafe("a whiteout of no name")
        self.hide(parent, hidden)
        return True

    def hide(self, folder: int, name: bytes) -> None:
        """Hide `name` of the layers below. What this layer itself has of that name stays, whatever the order."""
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=folder)
        except PermissionError as error:
            raise SbxError(
                "whiteout-refused", f"unpack {self.shown()}: make a whiteout: {error.strerror}", "that needs Linux 5.8"
            ) from None
        except FileExistsError:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                self.hide_lower(name, folder)

    def hide_lower(self, name: bytes, folder: int) -> None:
        """Make the folder `name` hide what lower layers have in it."""
        fd = os.open(name, _FOLDER, dir_fd=folder)
        try:
            os.setxattr(fd, OPAQUE, b"y")
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise SbxError(
                "xattrs-unsupported",
                f"unpack {self.shown()}: make a folder opaque: the filesystem has no user attributes",
                "set SBX_HOME to a folder on another filesystem (ext4, xfs, btrfs; tmpfs since Linux 6.6)",
            ) from None
        finally:
            os.close(fd)

    def set_opaque(self, folder: int) -> None:
        """Make `folder` itself opaque; it is an O_PATH descriptor, which takes no xattrs."""
        self.hide_lower(b".", folder)

    def is_whiteout_node(self, name: bytes, folder: int) -> bool:
        """Tell whether `name` is a whiteout that was made here: no other device can be."""
        try:
            return stat.S_ISCHR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    # ── attributes ────────────────────────────────────────────────────────────────────────────────────────────────

    def own(self, fd: int, member: Member, path: bytes) -> None:
        """Set the owner and, after it, the mode's special bits of an open file."""
        mode = member.mode
        if self.single:
            mode = self.without_set_id(member)
            self.record_owner(member, path, mode)
        else:
            self.chown(fd, member)
        if mode & _SPECIAL:
            os.fchmod(fd, mode)

    def chown(self, target: int | bytes, member: Member, folder: int | None = None) -> None:
        """Give an open file, or the name `target` in `folder`, to its owner if it does not have it yet."""
        if member.uid == self.uid and member.gid == self.gid:
            return
        try:
            os.chown(target, member.uid, member.gid, dir_fd=folder, follow_symlinks=folder is None)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise SbxError(
                "id-unmapped",
                f"unpack {self.shown()}: its owner {member.uid}:{member.gid} is not in the id map {self.ids}".rstrip(),
                "give the user more subordinate ids, or use --idmap single",
            ) from None

    def without_set_id(self, member: Member) -> int:
        """Return a file's mode without the set-id bits that would lie where all files have one owner.

        A program that is to run as user 33 would run as the superuser if its bit were kept.
        """
        mode = member.mode
        if member.uid:
            mode &= ~stat.S_ISUID
        if member.gid:
            mode &= ~stat.S_ISGID
        self.setid_dropped += mode != member.mode
        return mode

    def record_owner(self, member: Member, path: bytes, mode: int) -> None:
        """Note what one id, and `mode` on disk, do not tell."""
        if member.uid or member.gid or mode != member.mode:
            self.owners[path] = (member.uid, member.gid, member.mode)

    def finish_node(self, member: Member, path: bytes, folder: int, name: bytes) -> None:
        """Set owner and time of a link or pipe. User attributes exist on files and folders only: they are dropped."""
        self.xattrs_dropped += len(member.xattrs)
        if self.single:
            self.record_owner(member, path, member.mode)
        else:
            self.chown(name, member, folder)
        time = tar.clamp_time(member.mtime)
        os.utime(name, ns=(time, time), dir_fd=folder, follow_symlinks=False)

    def set_xattrs(self, fd: int, member: Member) -> None:
        """Set the attributes that may be kept; count the others."""
        for name, value in member.xattrs:
            kept = name in _KEPT_XATTRS or (name.startswith(b"user.") and not name.startswith(b"user.overlay."))
            if not kept or b"\0" in name or len(name) > 255:
                self.xattrs_dropped += 1
                continue
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                # not for the caller (single id), not known to the filesystem, not well-formed, or too many of them
                if error.errno not in (
                    errno.EPERM,
                    errno.EOPNOTSUPP,
                    errno.EINVAL,
                    errno.ENOSPC,
                    errno.E2BIG,
                    errno.ERANGE,
                ):
                    raise
                self.xattrs_dropped += 1

    def finish_folders(self) -> None:
        """Set what waited for the end: owners, special bits, xattrs and times of the folders."""
        self.close_parents()
        for path, member in self.folders.items():
            self.member = member.name
            fd = self.open_finished(path)
            if fd is None:
                continue
            try:
                self.finish_folder(fd, path, member)
            finally:
                os.close(fd)

    def open_finished(self, path: bytes) -> int | None:
        """Open the folder that was made as `path`, or None if a later member took its place."""
        folder, _, name = path.rpartition(b"/")
        if not path:
            return os.open(b".", _FOLDER, dir_fd=self.root)
        try:
            return os.open(name, _FOLDER, dir_fd=self.parent(folder, make=False))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return None
            raise

    def finish_folder(self, fd: int, path: bytes, member: Member) -> None:
        """Set a folder's attributes; with a single id its owner keeps all access, else it could not be removed."""
        mode = member.mode
        if self.single:
            mode |= 0o700
            self.record_owner(member, path, mode)
        else:
            self.chown(fd, member)
        os.fchmod(fd, mode)
        if member.xattrs:
            self.set_xattrs(fd, member)
        time = tar.clamp_time(member.mtime)
        os.utime(fd, ns=(time, time))

    # ── order and bounds ──────────────────────────────────────────────────────────────────────────────────────────

    def clear(self, path: bytes, folder: int, name: bytes) -> None:
        """Remove what an earlier member made at this place, with everything in it."""
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(status.st_mode):
            trees.remove(name, folder)
            self.recount = True
        else:
            os.unlink(name, dir_fd=folder)
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                self.files -= 1
                self.size -= status.st_size
        self.folders.pop(path, None)
        self.owners.pop(path, None)
        self.left_out.discard(path)
        self.stale = True

    def account(self, size: int) -> None:
        """Count a file's full length; a member that claims more than is allowed is refused before it is read."""
        self.total += size
        self.size += size
        self.files += 1
        if self.total > self.limits.size:
            raise SbxError(
                "archive-limit",
                f"unpack {self.shown()}: the files come to more than {self.limits.size} bytes",
                "--max-size raises the limit",
            )

    def same_file(self, one: bytes, one_fd: int, other: bytes, other_fd: int) -> bool:
        first = os.stat(one, dir_fd=one_fd, follow_symlinks=False)
        second = os.stat(other, dir_fd=other_fd, follow_symlinks=False)
        return (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)

    # ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────

    def shown(self) -> str:
        """Return the current member's name for a message: printable, and of a length that fits a line."""
        text = printable(self.member)
        return text if len(text) <= 120 else f"{text[:60]}…{text[-40:]}"

    def unsafe(self, why: str) -> SbxError:
        return SbxError("archive-unsafe", f"unpack {self.shown()}: {why}")

    def dangling(self, target: bytes, error: OSError) -> SbxError:
        cause = "is not in this layer" if error.errno == errno.ENOENT else f"cannot be linked: {error.strerror}"
        return self.unsafe(f"a hard link to {printable(target)[:120]}, which {cause}")

    def failure(self, error: OSError) -> SbxError:
        """Translate what the kernel said into what it means here."""
        number = error.errno or 0
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return SbxError(
                "disk-full",
                f"unpack {self.shown()}: {error.strerror} (after {self.total} bytes)",
                "free some space, then try again",
            )
        if number in (errno.ELOOP, errno.ENOTDIR, errno.EXDEV, errno.ENAMETOOLONG, errno.ENOENT):
            return self.unsafe(f"{error.strerror} in its path")
        return SbxError("unpack-failed", f"unpack {self.shown()}: {error.strerror}")


def _write_all(fd: int, data: memoryview) -> None:
    """Write all of `data`; one write(2) takes at most 2 GiB and may take less."""
    while data:
        data = data[os.write(fd, data) :]
