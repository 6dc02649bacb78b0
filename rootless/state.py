"""Records of sandboxes: one folder each below ``sandboxes``; no database, no global lock. Outside.

    sandboxes/NAME/lock      held (flock(2)) by the parent and the supervisor for as long as one of them lives; in it, a
                             line each, the layers in use: what the store must not delete
    sandboxes/NAME/record    who runs there (marshal), from the moment that its command runs
    sandboxes/NAME/upper …   what the sandbox wrote

The lock is the truth about life: the kernel lets it go when the last holder ends, whatever ended it, across crashes,
reused process ids and reboots. A folder whose lock nobody holds is debris. A folder is made and locked under a name of
its own before it gets the sandbox's, and renamed aside before it is deleted: what has a sandbox's name is whole, and
its name is free at once.
"""

from __future__ import annotations

import fcntl
import marshal
import os
import sys
import time

from rootless import paths, trees
from rootless.errors import SbxError, printable
from rootless.namespaces import FLAGS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ENOTEMPTY, EEXIST, ENOSPC = 39, 17, 28
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")
_DEAD = ".dead-"
_NEW = ".new-"
#: What overlayfs makes below its work folder for a volatile upper layer
_WORK = ("", "/work", "/work/incompat", "/work/incompat/volatile")
_TRIES = 64  #: how often a lock that is held for a moment, by one who only looks, is asked for again
_PAUSE = 0.002  #: seconds between the later tries: who looks may be waiting for a processor
_MOMENT = 2  #: seconds
GETFLAGS, _SETFLAGS, TOPDIR = 0x80086601, 0x40086602, 0x20000  # ioctl_iflags(2)
_START = 10.0  #: seconds that a start is waited for
_VERSION = 1


class Folder:
    """A sandbox's folder that this process created and holds; the lock ends with the processes that inherit it."""

    __slots__ = ("_written", "lock", "name", "path")

    def __init__(self, name: str, path: str, lock: int) -> None:
        self._written = ""
        self.name = name
        self.path = path
        self.lock = lock

    def use_layers(self, layers: list[str]) -> None:
        """Tell the store which layers are in use, before the launch record is looked at again. Raises SbxError."""
        names = "".join(f"{layer}\n" for layer in layers).encode()
        if os.write(self.lock, names) < len(names):
            raise SbxError("data-unwritable", f"write {self.path}/lock: {os.strerror(ENOSPC)}")

    def write_record(self, record: dict[str, Any]) -> None:
        """Write what others may know of the sandbox, for publish_record().

        Not synced: a record is worth nothing after the machine it speaks of has gone down.
        """
        # A name of its own: the folder may be gone when it is published, and another sandbox have its path
        self._written = f"{self.path}/.record-{record['id']}"
        fd = os.open(self._written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(marshal.dumps({"version": _VERSION, **record}, 4))
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)

    def publish_record(self) -> None:
        """Let others know of the sandbox, all at once; nothing if it has ended already."""
        try:
            os.rename(self._written, self.path + "/record")
        except FileNotFoundError:
            return


def sandboxes() -> str:
    """Return the folder of the sandboxes' folders (it may not exist)."""
    return paths.data() + "/sandboxes"


def new_id() -> str:
    """Return twelve random hex digits."""
    return os.urandom(6).hex()


def check_name(name: str) -> str:
    """Return `name` if it may name a sandbox: letters, digits, ``_.-``, the first a letter or digit, at most 63."""
    if not name or set(name) - _NAME or not name[0].isalnum() or len(name) > 63:
        raise SbxError("name-invalid", f"bad name {printable(name)!r}: a name is letters, digits, '_', '.' and '-', "
                       "starts with a letter or digit and has at most 63 characters")  # fmt: skip
    return name


def create(name: str) -> Folder:
    """Create and lock the folder of a new sandbox. Raises SbxError ``name-taken`` if one of that name runs."""
    top = sandboxes()
    if not os.path.isdir(top):
        spread(paths.ensure(top))
    folder = Folder(name, f"{top}/{name}", -1)
    while True:
        new = f"{top}/{_NEW}{new_id()}"
        try:
            os.mkdir(new, 0o700)
        except OSError as error:
            raise SbxError("data-unwritable", f"create folder {new}: {error.strerror}",
                           "set SBX_HOME to a folder on a local disk that you may write to") from None  # fmt: skip
        # Between mkdir and lock another process may take it for debris; then it is not ours, and we begin again.
        lock = _try_lock(new)
        if lock is not None:
            break
    folder.lock = lock
    try:
        _give_name(new, folder.path)
    except SbxError:
        trees.remove(new)
        os.close(lock)
        raise
    return folder


def spread(folder: str) -> None:
    """Tell the filesystem that what is made in `folder` does not belong together: chattr(1), T; no harm where it can't.

    ext4 makes a new folder near its parent, where it passes over each inode that was deleted in the last minute. Of
    sandboxes that come and go by the hundred that makes thousands, and a sixth of a launch.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, GETFLAGS, bytes(8))[:4], sys.byteorder)  # an int, whatever its name says
        fcntl.ioctl(fd, _SETFLAGS, (flags | TOPDIR).to_bytes(4, sys.byteorder) + bytes(4))
    except OSError:
        pass
    finally:
        os.close(fd)


def _give_name(new: str, path: str) -> None:
    """Rename the locked folder `new` to `path`, once what had that name is out of the way."""
    for turn in range(_TRIES):
        try:
            os.rename(new, path)  # fails where there is a folder that is not empty
            return
        except OSError as error:
            if error.errno not in (ENOTEMPTY, EEXIST):
                raise SbxError("data-unwritable", f"create folder {path}: {error.strerror}") from None
        if _set_aside(os.path.basename(path)) is None:
            time.sleep(_PAUSE if turn > _TRIES // 2 else 0)
    name = os.path.basename(path)
    raise SbxError("name-taken", f"create sandbox {name}: one of that name is running",
                   f"stop it with: sbx stop {name}, or choose another name")  # fmt: skip


def discard(folder: Folder) -> str:
    """Delete what is left of the sandbox's folder, and let its lock go.

    The supervisor has deleted it already if all went well, and another sandbox may have the name by now. Returns the
    path, renamed aside, of what resists because it belongs to subordinate ids; else "".
    """
    dead = ""
    if _holds(folder.lock, folder.path):
        dead = aside(new_id())
        os.rename(folder.path, dead)
        _remove_work(f"{dead}/work")
        try:
            trees.remove(f"{dead}/upper")
            trees.remove(f"{dead}/record")
            trees.remove(dead)  # with the lock, by which others see that they need not do it
            dead = ""
        except SbxError:
            pass
    os.close(folder.lock)
    return dead


def _remove_work(folder: str) -> None:
    """Delete overlayfs's work folder, where what is left in it is what we know: folders, one in the other.

    Nobody may enter them; by their names it takes a tenth of the calls. No link is followed, which somebody who was
    given our data folder could have put there.
    """
    try:
        for name in _WORK:
            if os.lstat(folder + name).st_mode & 0o170000 != 0o040000:
                return
            os.chmod(folder + name, 0o700)
        os.unlink(f"{folder}{_WORK[-1]}/dirty")
        for name in reversed(_WORK):
            os.rmdir(folder + name)
    except OSError:
        return


def _try_lock(path: str) -> int | None:
    """Return a descriptor that holds the lock of the folder `path`, or None: it is held, or the folder is gone."""
    try:
        lock = os.open(path + "/lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _holds(lock, path):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _holds(lock: int, path: str) -> bool:
    """Whether the open `lock` is that of the folder that is now at `path`."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path + "/lock", follow_symlinks=False))
    except OSError:
        return False


def aside(identity: str) -> str:
    """Return the path that the folder of the dead sandbox with that id is renamed to."""
    return f"{sandboxes()}/{_DEAD}{identity}"


def _set_aside(name: str) -> str | None:
    """Rename the folder of a dead sandbox; return its new path, "" if there is none any more, None if it is alive.

    Never the path that it had: that may be a new sandbox's by now.
    """
    path = f"{sandboxes()}/{name}"
    lock = _try_lock(path)
    if lock is None:
        return None if os.path.exists(path) else ""
    try:
        dead = aside(new_id())
        os.rename(path, dead)
        return dead
    except FileNotFoundError:
        return ""
    finally:
        os.close(lock)


def debris(limit: int = 64) -> list[str]:
    """Set the folders of dead sandboxes aside and return the paths of at most `limit` that should be deleted."""
    found: list[str] = []
    try:
        names = os.listdir(sandboxes())
    except OSError:
        return found
    for name in names:
        if len(found) == limit:
            break
        if _is_locked(name) or _is_in_the_making(name):
            continue  # it lives, or whoever set it aside is deleting it
        if dead := f"{sandboxes()}/{name}" if name.startswith(_DEAD) else _set_aside(name):
            found.append(dead)
    return found


def _is_locked(name: str) -> bool:
    """Whether a live process holds the lock, without ever taking it for long."""
    try:
        lock = os.open(f"{sandboxes()}/{name}/lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return not name.startswith(_DEAD)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(lock)


def _is_starting(name: str) -> bool:
    """Whether the sandbox lives and has no record yet."""
    return not os.path.lexists(f"{sandboxes()}/{name}/record") and _is_locked(name)


def _is_in_the_making(name: str) -> bool:
    """Whether the folder has no lock but had one a moment ago, or will have one in a moment."""
    folder = f"{sandboxes()}/{name}"
    try:
        return not os.path.exists(folder + "/lock") and abs(time.time() - os.lstat(folder).st_ctime) < _MOMENT
    except FileNotFoundError:
        return True


def running() -> list[dict[str, Any]]:
    """Return the records of the sandboxes that run, oldest first."""
    try:
        names = os.listdir(sandboxes())
    except OSError:
        return []
    records = [record for name in names if not name.startswith(".") and (record := _read(name)) is not None]
    return sorted(records, key=lambda record: record["created"])


def find(name: str) -> dict[str, Any]:
    """Return the record of the running sandbox whose name or id (or the start of it) is `name`.

    One that is just starting is waited for: nobody is let in before it is complete. Raises SbxError
    ``sandbox-unknown``, ``sandbox-ambiguous`` when several ids begin with `name`, ``sandbox-starting`` after a while.
    """
    if name and not set(name) - _NAME and not name.startswith("."):
        late = time.monotonic() + _START
        while _is_starting(name):
            if time.monotonic() > late:
                raise SbxError("sandbox-starting", f"find sandbox {name}: it is still starting",
                               "end the sbx that starts it, or try again")  # fmt: skip
            time.sleep(0.005)
        if record := _read(name):
            return record
    matches = [record for record in running() if record["id"].startswith(name)] if name else []
    if len(matches) > 1:
        raise SbxError("sandbox-ambiguous", f"find sandbox {name}: {len(matches)} ids begin with it", "give more of it")
    if not matches:
        raise SbxError("sandbox-unknown", f"find sandbox {printable(name)}: none of that name or id is running",
                       "see: sbx ps")  # fmt: skip
    return matches[0]


def _read(name: str) -> dict[str, Any] | None:
    """Return the record of `name` if its sandbox is alive, else None."""
    if not _is_locked(name):
        return None
    try:
        fd = os.open(f"{sandboxes()}/{name}/record", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        record = marshal.loads(b"".join(iter(lambda: os.read(fd, 65536), b"")))
    except (ValueError, EOFError, TypeError):
        return None
    finally:
        os.close(fd)
    return record if isinstance(record, dict) and record.get("version") == _VERSION else None


def write_atomically(folder: str, name: str, content: bytes) -> None:
    """Write `folder`/`name` so that a reader sees the old content or the new; not synced to disk."""
    temporary = f"{folder}/.{name}-{new_id()}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.rename(temporary, f"{folder}/{name}")
    except OSError:
        os.unlink(temporary)
        raise
    finally:
        os.close(fd)


def namespaces_in_order(names: list[str]) -> list[str]:
    """Return `names` in the order in which they have to be joined."""
    return [name for name in FLAGS if name in names]


def start_time(pid: int) -> int:
    """Return when the process `pid` started, in clock ticks since boot, or 0 if there is none: proc_pid_stat(5)."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int(os.read(fd, 4096).rpartition(b")")[2].split()[19])
    except OSError:
        return 0
    finally:
        os.close(fd)


def held_namespaces(record: dict[str, Any]) -> dict[str, str]:
    """Return the paths by which the namespaces of a running sandbox can be opened, by name: its parent holds them."""
    return {name: f"/proc/{record['parent']}/fd/{fd}" for name, fd in record["namespaces"].items()}


def open_process(record: dict[str, Any]) -> int:
    """Return a pidfd of the sandbox's pid 1, certain to be that process and not a later one with its number.

    Raises SbxError ``sandbox-gone``.
    """
    try:
        pidfd = os.pidfd_open(record["pid"])
    except OSError:
        pidfd = -1
    if pidfd >= 0 and start_time(record["pid"]) == record["start_time"]:
        return pidfd
    if pidfd >= 0:
        os.close(pidfd)
    raise SbxError("sandbox-gone", f"find sandbox {record['name']}: it has just ended")
