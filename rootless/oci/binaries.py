"""Warm: a root filesystem of a few host programs and the libraries they load. Outside.

What an article's hand-made chroot jail is: each program, the interpreter that its header names, and the libraries
which that interpreter says it would load. The links on the way to a file (``/bin`` → ``usr/bin``) come along, so that
every name that works on the host works inside.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Iterator

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.oci import tar
from rootless.oci.pack import Entry, Write, Writer

_PT_INTERP = 3
_LINKS = 40  #: links on the way to one file, as the kernel allows
_FOLDERS = {b"dev": 0o755, b"proc": 0o555, b"sys": 0o555, b"run": 0o755, b"root": 0o700, b"tmp": 0o1777, b"etc": 0o755}
_FILES = {
    b"etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    b"etc/group": b"root:x:0:\nnogroup:x:65534:\n",
}
#: where the dynamic linker looks without a cache
_KNOWN_FOLDERS = re.compile(r"^(/usr)?/lib(32|64|x32)?(/[a-z0-9_]+-linux-gnu[a-z0-9]*)?$")


class Collection:
    """Files of the host, and the links that lead to them, by their path inside."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.links: dict[str, str] = {}

    def add(self, path: str) -> str:
        """Add the file that `path` leads to, with the links on the way, and return its real path."""
        real, pending, followed = "", path.strip("/").split("/"), 0
        while pending:
            part = pending.pop(0)
            if part in ("", "."):
                continue
            if part == "..":
                real = real.rpartition("/")[0]
                continue
            here = f"{real}/{part}"
            if os.path.islink(here):
                followed += 1
                if followed > _LINKS:
                    raise SbxError("program-missing", f"follow {printable(path)}: too many links")
                target = os.readlink(here)
                self.links[here] = target
                real = "" if target.startswith("/") else real
                pending = target.strip("/").split("/") + pending
            else:
                real = here
        self.files[real] = real
        return real


def collect(paths: list[str]) -> Collection:
    """Return all files that the programs `paths` (absolute, or names on PATH) need to run.

    Raises SbxError ``program-missing`` or ``program-unreadable``.
    """
    collection = Collection()
    pending = [find(path) for path in paths]
    done: set[str] = set()
    while pending:
        path = pending.pop()
        real = collection.add(path)
        if real in done:
            continue
        done.add(real)
        head = _head(path)
        if head.startswith(b"#!"):
            interpreter = head[2:].split(b"\n")[0].split()
            pending += [find(os.fsdecode(word)) for word in interpreter[:1]]
            if interpreter[:1] == [b"/usr/bin/env"] and len(interpreter) > 1:
                pending.append(find(os.fsdecode(interpreter[-1])))
        elif interpreter_path := _interpreter(path):
            pending.append(interpreter_path)
            for library in libraries(interpreter_path, real):
                collection.add(library)
    folders = {os.path.dirname(path) for path in collection.files if ".so" in os.path.basename(path)}
    if any(not _KNOWN_FOLDERS.match(folder) for folder in folders) and os.path.exists("/etc/ld.so.cache"):
        collection.add("/etc/ld.so.cache")
    return collection


def find(name: str) -> str:
    """Return the absolute path of a program."""
    path = name if name.startswith("/") else programs.find(name)
    if not path or not os.path.isfile(path):
        raise SbxError("program-missing", f"find the program {printable(name)}: there is no such file")
    return path


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError as error:
        raise SbxError("program-unreadable", f"read {printable(path)}: {error.strerror}") from None


def _interpreter(path: str) -> str:
    """Return the dynamic linker that an ELF program names, or an empty text when it needs none: elf(5)."""
    with open(path, "rb") as file:
        header = file.read(64)
        if len(header) < 52 or header[:4] != b"\x7fELF":
            raise SbxError("program-unreadable", f"read {printable(path)}: it is neither an ELF program nor a script")
        wide, order = header[4] == 2, "<" if header[5] == 1 else ">"
        table = struct.unpack_from(order + ("Q" if wide else "I"), header, 32 if wide else 28)[0]
        size, count = struct.unpack_from(order + "HH", header, 54 if wide else 42)
        file.seek(table)
        rows = file.read(size * count)
        for at in range(0, len(rows) - 31, size):
            if struct.unpack_from(order + "I", rows, at)[0] == _PT_INTERP:
                layout, where = ("Q", at + 8) if wide else ("I", at + 4)
                offset = struct.unpack_from(order + layout, rows, where)[0]
                file.seek(offset)
                return os.fsdecode(file.read(4096).partition(b"\0")[0])
    return ""


def libraries(interpreter: str, path: str) -> list[str]:
    """Return the libraries that the dynamic linker `interpreter` would load for `path`: ld.so(8), ``--list``."""
    done = subprocess.run(
        [interpreter, "--list", path],
        capture_output=True,
        text=True,
        errors="replace",
        env={"LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
    )
    if done.returncode:
        raise SbxError(
            "program-unreadable", f"list the libraries of {printable(path)}: {printable(done.stderr.strip())}"
        )
    found = re.findall(r"(?:=> |^\s*)(/\S+) \(0x", done.stdout, re.MULTILINE)
    missing = re.findall(r"(\S+) => not found", done.stdout)
    if missing:
        raise SbxError("program-missing", f"find the libraries of {printable(path)}: {', '.join(missing)} not found")
    return found


def pack(collection: Collection, write: Write) -> None:
    """Write the tar of the collection, owned by root, every parent before what is in it."""
    writer = Writer(write)
    made = set()
    links = {name.strip("/") for name in collection.links}
    for name in sorted([*collection.files, *collection.links]):
        for parent in _parents(name):
            if parent not in made and os.fsdecode(parent) not in links:
                writer.add(Entry(parent, tar.FOLDER, _FOLDERS.get(parent, 0o755)))
                made.add(parent)
        path = os.fsencode(name.strip("/"))
        if name in collection.links:
            writer.add(Entry(path, tar.SYMLINK, 0o777, link=os.fsencode(collection.links[name])))
        else:
            _add_file(writer, path, collection.files[name])
    for folder, mode in _FOLDERS.items():
        if folder not in made:
            writer.add(Entry(folder, tar.FOLDER, mode))
    for file, text in _FILES.items():
        writer.add_bytes(Entry(file), text)
    writer.close()


def _parents(name: str) -> Iterator[bytes]:
    parts = os.fsencode(name.strip("/")).split(b"/")[:-1]
    for count in range(1, len(parts) + 1):
        yield b"/".join(parts[:count])


def _add_file(writer: Writer, path: bytes, source: str) -> None:
    try:
        with open(source, "rb") as file:
            status = os.fstat(file.fileno())
            # a set-id program of the host's root is nothing to give to a sandbox's
            mode = 0o755 if status.st_mode & 0o111 else 0o644
            writer.add(Entry(path, tar.FILE, mode, size=status.st_size, mtime=status.st_mtime_ns))
            left = status.st_size
            while left and (data := file.read(min(left, 1 << 20))):
                writer.data(data)
                left -= len(data)
            writer.pad(status.st_size)
    except OSError as error:
        raise SbxError("program-unreadable", f"read {printable(source)}: {error.strerror}") from None
