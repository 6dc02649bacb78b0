"""The part of `os` that a launch uses. Either side; imports nothing but posix.

`os` is posix(3)'s calls, and 0.6 ms of what else it offers: the abstract base classes, walk(), fdopen(), a mapping that
calls putenv(3). In the bundle of the hot modules (bundle.py) `import os` means this module. Each name does here what it
does there; what is missing is noticed by the tests, which look up every `os.…` of the hot modules.
"""

from __future__ import annotations

import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from posix import O_CLOEXEC, O_PATH, close, getcwd, open, readlink, stat, stat_result

# `from posix import *`, in a fifth of the time
globals().update({**vars(posix), **globals()})
_started_with = posix.environ

_CODEC = sys.getfilesystemencoding()
_ERRORS = sys.getfilesystemencodeerrors()


def fsencode(name: str | bytes) -> bytes:
    """Return `name` as the bytes that the kernel knows it by."""
    return name if isinstance(name, bytes) else name.encode(_CODEC, _ERRORS)


def fsdecode(name: str | bytes) -> str:
    """Return `name` as text, from which fsencode() makes the same bytes."""
    return name if isinstance(name, str) else name.decode(_CODEC, _ERRORS)


class _Environment:
    """The variables that the process was started with."""

    __slots__ = ()

    def get(self, name: str, otherwise: str | None = None) -> str | None:
        value = _started_with.get(fsencode(name))
        return otherwise if value is None else fsdecode(value)

    def __getitem__(self, name: str) -> str:
        return fsdecode(_started_with[fsencode(name)])

    def __contains__(self, name: str) -> bool:
        return fsencode(name) in _started_with


environ = _Environment()


class path:
    """What is needed of os.path, for text."""

    @staticmethod
    def dirname(name: str) -> str:
        head = name[: name.rfind("/") + 1]
        return head.rstrip("/") or head

    @staticmethod
    def basename(name: str) -> str:
        return name[name.rfind("/") + 1 :]

    @staticmethod
    def join(folder: str, name: str) -> str:
        if name.startswith("/") or not folder:
            return name
        return folder + name if folder.endswith("/") else f"{folder}/{name}"

    @staticmethod
    def normpath(name: str) -> str:
        root = "//" if name.startswith("//") and not name.startswith("///") else "/" if name.startswith("/") else ""
        kept: list[str] = []
        for part in name.split("/"):
            if part == ".." and (kept[-1] != ".." if kept else root):
                del kept[-1:]
            elif part not in ("", "."):
                kept.append(part)
        return root + "/".join(kept) or "."

    @staticmethod
    def abspath(name: str) -> str:
        return path.normpath(name if name.startswith("/") else f"{getcwd()}/{name}")

    @staticmethod
    def relpath(name: str, start: str) -> str:
        way, base = ([part for part in path.abspath(text).split("/") if part] for text in (name, start))
        common = 0
        while common < min(len(way), len(base)) and way[common] == base[common]:
            common += 1
        return "/".join([*[".."] * (len(base) - common), *way[common:]]) or "."

    @staticmethod
    def realpath(name: str) -> str:
        try:
            fd = open(name, O_PATH | O_CLOEXEC)
        except OSError:
            if name == path.normpath(name) != "/" and name.startswith("/") and not path.islink(name):
                return path.join(path.realpath(path.dirname(name)), path.basename(name))
            from posixpath import realpath  # what is left is subtle, and rare

            return realpath(name)
        try:
            return readlink(f"/proc/self/fd/{fd}")
        finally:
            close(fd)

    @staticmethod
    def exists(name: str) -> bool:
        return _look(name, True) is not None

    @staticmethod
    def lexists(name: str) -> bool:
        return _look(name, False) is not None

    @staticmethod
    def isdir(name: str) -> bool:
        found = _look(name, True)
        return found is not None and found.st_mode & 0o170000 == 0o040000

    @staticmethod
    def islink(name: str) -> bool:
        found = _look(name, False)
        return found is not None and found.st_mode & 0o170000 == 0o120000

    @staticmethod
    def samestat(one: stat_result, other: stat_result) -> bool:
        return one.st_ino == other.st_ino and one.st_dev == other.st_dev


def _look(name: str, follow: bool) -> stat_result | None:
    try:
        return stat(name, follow_symlinks=follow)
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None
