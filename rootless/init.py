"""The programs that pid 1, its supervisor and commands become when all is set up: two hundred bytes each. Inside.

    init         reaps, forwards signals to the command, ends with the command's status
    supervisor   waits for pid 1 and ends with its status; when the parent is gone first, kills pid 1 and becomes
                 the program that cleans up
    start        becomes the command; for a file of the sandbox may say ``#!/proc/self/exe``, and what that is just
                 before, the command can open for as long as it lives: not the interpreter, which may be the caller's

An interpreter that only waits holds 2 MB of its own, such a program a page or two. And the sandbox can learn nothing
from init: there is no memory of ours in it, no environment, and no file of the host's behind /proc/1/exe.

Their source is helpers/*-MACHINE.s; the tests assemble it and compare. Where there is none for a machine, or the host
forbids such files, the interpreter goes on instead, and does the same.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: program → machine → its code, up to the words that are filled in: numbers, then the name
CODE = {
    "init": {
            "x86_64": bytes.fromhex(
            "b89d000000bf0f000000488d35830000000f058b1d770000004883ec10b880000000488d3d5f00000031f631d241ba080000"
            "000f0583f811740d89c6b83e00000089df0f05ebd6b83d00000048c7c7ffffffff4889e6ba010000004531d20f0585c07eb9"
            "39d875df0fb67c24018b042483e07f74068db880000000b8e70000000f05660f1f440000ffffffffffffffff"
        ),
            "aarch64": bytes.fromhex(
            "e81480d2e00180d2a1040010010000d453040018ff4300d1281180d2a0030010010080d2020080d2030180d2010000d41f44"
            "0071c0000054e103002ae003132a281080d2010000d4f4ffff17882080d200008092e1030091220080d2030080d2010000d4"
            "1f0000718dfdff541f00136be1feff54e10340b9203c0853211800724000005420000211c80b80d2010000d4ffffffffffff"
            "ffff"
        ),
    },
    "supervisor": {
            "x86_64": bytes.fromhex(
            "b89d000000bf0f000000488d35ae0000000f058b1d9a0000004883ec208b0594000000488904248b058e0000004889442408"
            "66c744240c0100b8070000004889e7be0200000048c7c2ffffffff0f0585c07ee6440fb76424064585e4740eb83e00000089"
            "dfbe090000000f05b83d0000004889df488d74241031d24531d20f054585e47413b83b000000488b7c2430488d74243031d2"
            "0f050fb67c24118b44241083e07f74068db880000000b8e70000000f05"
        ),
            "aarch64": bytes.fromhex(
            "e81480d2e00180d2c1050010010000d433050018ff8300d101050018e10300f9e1040018210060b2e10700f9280980d2e003"
            "0091410080d2020080d2030080d2040180d2010000d41f0000710dffff54f40f4079b4000034281080d2e003132a210180d2"
            "010000d4882080d2e003132ae1430091020080d2030080d2010000d4d4000034a81b80d2e01b40f9e1c30091020080d20100"
            "00d4e11340b9203c0853211800724000005420000211c80b80d2010000d4"
        ),
    },
    "start": {
            "x86_64": bytes.fromhex(
            "b89d000000bf0400000031f60f05b8480000008b3d67000000be02000000ba010000000f0585c0753f488b0424488b7c2410"
            "488d742418488d54c410b83b0000000f05f7d805200a000050488b052600000050b8010000008b3d220000004889e6ba0a00"
            "00000f05b8e7000000bf7f0000000f050f1f40007265667573656420"
        ),
            "aarch64": bytes.fromhex(
            "e81480d2800080d2010080d2010000d4280380d2a0030018410080d2220080d2010000d480020035e90340f9a81b80d2e00b"
            "40f9e1630091e2430091420c098b010000d4e003004b00800011014081520000010b61010058ff4300d1e10300a9080880d2"
            "20010018e1030091420180d2010000d4c80b80d2e00f80d2010000d47265667573656420"
        ),
    },
}  # fmt: skip
_MACHINES = {"x86_64": 62, "aarch64": 183}  # as elf(5) counts them

_FORBIDDEN = (1, 13, 22, 38)  # EPERM, EACCES, EINVAL, ENOSYS
_ADDRESS = 0x400000
_HEADERS = 64 + 56  # bytes of ELF's header and of its one program header


def program(name: str, machine: str, numbers: Sequence[int]) -> bytes:
    """Return a whole program with `numbers` filled in: elf(5), a header and one segment."""

    def words(width: int, *values: int) -> bytes:
        return b"".join(value.to_bytes(width, sys.byteorder) for value in values)

    image = CODE[name][machine] + words(4, *numbers) + process_name(name) + b"\0"
    size = _HEADERS + len(image)
    return b"".join((
        b"\x7fELF\2\1\1".ljust(16, b"\0"),  # 64 bits, little-endian
        words(2, 2, _MACHINES[machine]), words(4, 1), words(8, _ADDRESS + _HEADERS, 64, 0),  # starts behind the headers
        words(4, 0), words(2, 64, 56, 1, 0, 0, 0),
        words(4, 1, 5), words(8, 0, _ADDRESS, _ADDRESS, size, size, 4096),  # all of it, to be read and executed
        image,
    ))  # fmt: skip


def become_init(machine: str, command: int) -> None:
    """Become the init that waits for the process `command`; return where that can't be.

    All signals are blocked, and no descriptors open but stdin, stdout and stderr, beforehand.
    """
    _become("init", machine, [command], [])


def become_supervisor(machine: str, process: int, go: int, keep: Sequence[int], cleaning: Sequence[str]) -> None:
    """Become the supervisor of `process`, with the parent at the other end of `go`; return where that can't be.

    `cleaning` is the command that cleans up if the parent can't; `keep` are descriptors that stay open. All signals are
    blocked beforehand.
    """
    pidfd = os.pidfd_open(process)
    for fd in (go, pidfd, *keep):
        os.set_inheritable(fd, True)
    _become("supervisor", machine, [process, go, pidfd], cleaning)
    os.close(pidfd)


def prepare_start(machine: str, status: int) -> int:
    """Return a descriptor of the program *start* for become_start(); -1 where the host forbids such files.

    Raises OSError for any other reason: the sandbox may have taken us something away, to see the interpreter instead.
    """
    if machine not in CODE["start"]:
        return -1
    try:
        return in_memory("start", machine, [status])
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        return -1


def become_start(
    program: int,
    machine: str,
    path: bytes,
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
    status: int,
    execute: Callable[..., None],
) -> bool:
    """Become, by `execute`, the program that becomes the one at `path`, or says on `status` why not.

    `program` is that of prepare_start(), or -1; `status` is close-on-exec for what it becomes. Returns False where that
    can't be, and True where `execute` returns; raises as prepare_start() does.
    """
    if program < 0:
        program = prepare_start(machine, status)
    if program < 0:
        return False
    os.set_inheritable(status, True)
    try:
        execute(program, [process_name("start"), path, *argv], env)
    except OSError as error:
        os.set_inheritable(status, False)
        if error.errno not in _FORBIDDEN:
            raise
        return False
    return True


def _become(name: str, machine: str, numbers: Sequence[int], words: Sequence[str]) -> None:
    if machine not in CODE[name]:
        return
    try:
        fd = in_memory(name, machine, numbers)
    except OSError:
        return
    try:
        os.execve(fd, [process_name(name), *map(os.fsencode, words)], {})
    except OSError:
        os.close(fd)


def in_memory(name: str, machine: str, numbers: Sequence[int]) -> int:
    """Return a descriptor of the program in a file that has no name: memfd_create(2). Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.write(fd, program(name, machine, numbers))
        # A program that may be executed but not read makes a process that can't be looked into: execve(2).
        os.fchmod(fd, 0o111)
    except OSError:
        os.close(fd)
        raise
    return fd


def place_of(name: str, machine: str, number: int) -> int:
    """Return where in the program's file the number is that comes as the `number`th, from 0."""
    return _HEADERS + len(CODE[name][machine]) + 4 * number


def process_name(program: str) -> bytes:
    """Return what the process is called that `program` becomes."""
    return f"sbx-{program}".encode()
