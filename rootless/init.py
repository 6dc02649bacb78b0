"""The program that pid 1 becomes when a sandbox is set up: reap, forward, end with the command's status. Inside.

An interpreter that only waits for signals holds 2 MB of its own, this program a page or two. And the sandbox can learn
nothing from it: there is no memory of ours in it, no environment, and no file of the host's behind /proc/1/exe.

Its source is helpers/init-MACHINE.s; the tests assemble it and compare. Where there is none for a machine, pid 1 stays
an interpreter.
"""

from __future__ import annotations

import os
import sys

NAME = b"sbx-init"

#: machine → its number in ELF's table, and its code up to the words that are filled in: the command's id, the name
CODE = {
    "x86_64": (62, bytes.fromhex(
        "b89d000000bf0f000000488d35830000000f058b1d770000004883ec10b880000000488d3d5f00000031f631d241ba080000"
        "000f0583f811740d89c6b83e00000089df0f05ebd6b83d00000048c7c7ffffffff4889e6ba010000004531d20f0585c07eb9"
        "39d875df0fb67c24018b042483e07f74068db880000000b8e70000000f05660f1f440000ffffffffffffffff"
    )),
    "aarch64": (183, bytes.fromhex(
        "e81480d2e00180d2a1040010010000d453040018ff4300d1281180d2a0030010010080d2020080d2030180d2010000d41f44"
        "0071c0000054e103002ae003132a281080d2010000d4f4ffff17882080d200008092e1030091220080d2030080d2010000d4"
        "1f0000718dfdff541f00136be1feff54e10340b9203c0853211800724000005420000211c80b80d2010000d4ffffffffffff"
        "ffff"
    )),
}  # fmt: skip

_ADDRESS = 0x400000
_HEADERS = 64 + 56  # bytes of ELF's header and of its one program header


def program(machine: str, command: int) -> bytes:
    """Return the whole program for the command with the id `command`: elf(5), a header and one segment."""
    number, code = CODE[machine]
    image = code + command.to_bytes(4, sys.byteorder) + NAME + b"\0"
    size = _HEADERS + len(image)

    def words(width: int, *values: int) -> bytes:
        return b"".join(value.to_bytes(width, sys.byteorder) for value in values)

    return b"".join((
        b"\x7fELF\2\1\1".ljust(16, b"\0"),  # 64 bits, little-endian
        words(2, 2, number), words(4, 1), words(8, _ADDRESS + _HEADERS, 64, 0),  # starts behind the headers
        words(4, 0), words(2, 64, 56, 1, 0, 0, 0),
        words(4, 1, 5), words(8, 0, _ADDRESS, _ADDRESS, size, size, 4096),  # all of it, to be read and executed
        image,
    ))  # fmt: skip


def become(machine: str, command: int) -> None:
    """Become the program; return where that can't be: no code for `machine`, or the host forbids such files.

    All signals are blocked, and descriptors but stdin, stdout and stderr closed, beforehand.
    """
    if machine not in CODE:
        return
    try:
        fd = os.memfd_create(NAME.decode(), os.MFD_CLOEXEC)
        os.write(fd, program(machine, command))
        # A program that may be executed but not read makes a process that can't be looked into: execve(2).
        os.fchmod(fd, 0o111)
        os.execve(fd, [NAME], {})
    except OSError:
        return
