"""Remove a tree of files that may be hostile. Either side; imports only leaves.

The trees are unpacked layers and upper folders: names in any bytes, folders nested thousands deep, folders without
permission bits, links that point out. So nothing is followed and no path grows longer than one name. Trees as they are
are descended into; what is nested deeper than that, or than there are descriptors for, moves up to the top and waits
there for its turn, so that four descriptors are enough for any depth.
"""

from __future__ import annotations

import errno
import os

from rootless.errors import SbxError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_ACCESS = 0o700
_DEPTH = 12  #: levels that are descended into
_TURNS = 100  #: how often a folder may have something in it again, which others at the same work have moved there


def remove(name: str | bytes, dir_fd: int | None = None) -> None:
    """Remove `name` (below `dir_fd`), whatever it is, with everything in it; a link is removed, not followed.

    Not there is success, so it may be called again after an interruption and by several processes at once. The caller
    owns the files or has CAP_DAC_OVERRIDE and CAP_FOWNER over them. Raises SbxError ``tree-removal`` when something
    resists (a mount point, an immutable file); then whatever could be removed is gone.
    """
    try:
        for turn in range(_TURNS):
            if _remove_leaf(name, dir_fd, is_folder=turn > 0):
                return
            empty(name, dir_fd, again=False)  # what others move there meanwhile is the next turn's
        os.rmdir(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _failed(name, error) from None


def empty(name: str | bytes, dir_fd: int | None = None, again: bool = True) -> None:
    """Remove everything in the folder `name` (below `dir_fd`) and keep the folder itself.

    It is looked at `again` until nothing is left in it. Raises OSError when something resists, after everything else is
    gone.
    """
    top = _open_folder(name, dir_fd)
    try:
        _empty(top, again)
    finally:
        os.close(top)


def _empty(top: int, again: bool) -> None:
    """Remove everything in the open folder `top`. Each round removes _DEPTH levels of each tree in it."""
    fresh = 0
    turns = _TURNS
    while True:
        entries = _entries(top)
        resisting: OSError | None = None
        progress = False
        for name, is_folder in entries:
            try:
                if not _remove_leaf(name, top, is_folder):
                    fresh = _flatten(name, top, top, fresh, _DEPTH)
                    os.rmdir(name, dir_fd=top)
                progress = True
            except FileNotFoundError:
                progress = True  # another process is at the same work
            except OSError as error:
                resisting = error
        if resisting and not progress:
            if resisting.errno != errno.ENOTEMPTY or not turns:
                raise resisting
            turns -= 1
        if not entries or not (again or resisting or fresh):
            return


def _remove_leaf(name: str | bytes, dir_fd: int | None, is_folder: bool = False) -> bool:
    """Remove `name` if it is anything but a folder with something in it; return whether it is gone.

    `is_folder` says what it seems to be, which saves a call.
    """
    try:
        (os.rmdir if is_folder else os.unlink)(name, dir_fd=dir_fd)
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        # unlink(2) of a folder is EISDIR on Linux, EPERM by POSIX
        if error.errno not in (errno.EISDIR, errno.EPERM, errno.ENOTDIR):
            raise
        first = error
    try:
        (os.unlink if is_folder else os.rmdir)(name, dir_fd=dir_fd)
        return True
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if error.errno in (errno.ENOTDIR, errno.EISDIR):
            raise first from None
        raise


def _flatten(name: str | bytes, above: int, top: int, fresh: int, levels: int) -> int:
    """Empty the folder `name` in `above`: everything in it is removed, but folders below `levels` move up into `top`.

    `fresh` is the number to begin with in search of unused names; the next one is returned. What resists is raised once
    the rest is gone.
    """
    resisting: OSError | None = None
    folder = _open_folder(name, above)
    try:
        for entry, is_folder in _entries(folder):
            try:
                if not _remove_leaf(entry, folder, is_folder):
                    fresh = _remove_folder(entry, folder, top, fresh, levels)
            except FileNotFoundError:
                continue  # another process is at the same work
            except OSError as error:
                resisting = error
    finally:
        os.close(folder)
    if resisting:
        raise resisting
    return fresh


def _remove_folder(name: bytes, folder: int, top: int, fresh: int, levels: int) -> int:
    if levels:
        try:
            fresh = _flatten(name, folder, top, fresh, levels - 1)
            os.rmdir(name, dir_fd=folder)
            return fresh
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
    return _move_up(name, folder, top, fresh)


def _move_up(name: bytes, folder: int, top: int, fresh: int) -> int:
    """Move the folder `name` out of `folder` to an unused name in `top`; return the number after that name's."""
    while True:
        fresh += 1
        try:
            os.rename(name, b".%d" % fresh, src_dir_fd=folder, dst_dir_fd=top)
            return fresh
        except OSError as error:
            if error.errno == errno.EACCES:
                # a folder that moves has its '..' rewritten, for which the kernel asks write permission on it
                _permit(name, folder)
            elif error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise


def count(top: int) -> tuple[int, int]:
    """Return how many regular files are below the open folder `top`, each counted once, and their bytes.

    Follows nothing, and opens each folder by its names from the top: for trees that nobody changes meanwhile. Raises
    OSError for a folder that may not be read.
    """
    files = size = 0
    seen = set()
    pending: list[list[bytes]] = [[]]
    while pending:
        way = pending.pop()
        folder = _descend(top, way)
        try:
            for name, _ in _entries(folder):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if status.st_mode & 0o170000 == 0o040000:
                    pending.append([*way, name])
                elif status.st_mode & 0o170000 == 0o100000:
                    if status.st_nlink > 1:
                        if (status.st_dev, status.st_ino) in seen:
                            continue
                        seen.add((status.st_dev, status.st_ino))
                    files += 1
                    size += status.st_size
        finally:
            os.close(folder)
    return files, size


def _descend(top: int, way: list[bytes]) -> int:
    """Open the folder that the names in `way` lead to from `top`, one after the other, following no link."""
    fd = os.open(".", _FOLDER, dir_fd=top)
    for name in way:
        try:
            deeper = os.open(name, _FOLDER, dir_fd=fd)
        finally:
            os.close(fd)
        fd = deeper
    return fd


def _open_folder(name: str | bytes, dir_fd: int | None) -> int:
    """Open the folder `name`, giving its owner access to it first where that is missing; a link is an error."""
    try:
        fd = os.open(name, _FOLDER, dir_fd=dir_fd)
    except PermissionError:
        _permit(name, dir_fd)
        return os.open(name, _FOLDER, dir_fd=dir_fd)
    try:
        # The superuser of a namespace does not need the bits, an owner does; one cheap call finds out.
        if os.fstat(fd).st_mode & _ACCESS != _ACCESS:
            os.fchmod(fd, _ACCESS)
    except PermissionError:
        pass  # not ours to change; what it denies will be told by name
    return fd


def _permit(name: str | bytes, dir_fd: int | None) -> None:
    """Give the owner all access to the folder `name`, never following a link.

    chmod(2) follows links and fchmod(2) refuses O_PATH descriptors, but the descriptor's name in /proc is accepted.
    """
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.chmod(f"/proc/self/fd/{fd}", _ACCESS)
    finally:
        os.close(fd)


def _entries(folder: int) -> list[tuple[bytes, bool]]:
    """Return the names in the open `folder` as bytes, each with whether it seems to be a folder."""
    # Names of a descriptor's entries come as text; the bytes come back exactly. Python rewinds it each time.
    with os.scandir(folder) as entries:
        return [(os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)) for entry in entries]


def _failed(name: str | bytes, error: OSError) -> SbxError:
    return SbxError("tree-removal", f"remove {os.fsdecode(name)}: {error.strerror}")
