"""Limits as they are asked for → the files of a cgroup and their values. Either side; pure but for the look at devices.

The words are docker's, the values the kernel's: Documentation/admin-guide/cgroup-v2.rst. A dict from file to value is
what the OCI runtime specification calls `linux.resources.unified`.
"""

from __future__ import annotations

import os

from rootless.errors import SbxError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: options whose presence asks for a cgroup, as attributes of a request; `sbx update` has the same
OPTIONS = (
    "memory",
    "memory_swap",
    "memory_high",
    "cpus",
    "cpu_weight",
    "cpuset_cpus",
    "pids",
    "io_read_bps",
    "io_write_bps",
    "io_read_iops",
    "io_write_iops",
    "cgroup_conf",
)
_PERIOD = 100_000  #: microseconds of cpu.max, as docker sets it
_IO = {"io_read_bps": "rbps", "io_write_bps": "wbps", "io_read_iops": "riops", "io_write_iops": "wiops"}
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_size(text: str, option: str) -> int:
    """Return bytes: a number with b, k, m, g or t, as docker spells them (powers of 1024)."""
    number, unit = text.lower().removesuffix("ib"), ""
    if len(number) > 1 and number.endswith("b") and number[-2] in "kmgt":
        number = number[:-1]
    if number and number[-1] in "bkmgt":
        number, unit = number[:-1], number[-1]
    if not (number.isascii() and number.replace(".", "", 1).isdecimal()) or len(number) > 15:
        raise SbxError("size-invalid", f"read size {printable(text)!r} of {option}: it is a number with k, m, g or t")
    return int(float(number) * _UNITS[unit])


def asked(request: Any) -> dict[str, str]:
    """Return the limits that the options of `request` ask for, in the order in which they are to be set.

    Raises SbxError ``limit-invalid`` or ``size-invalid``.
    """
    files = {**_memory(request), **_cpu(request), **_pids(request), **_io(request)}
    for text in request.cgroup_conf:
        file, equals, value = text.partition("=")
        kind = file.partition(".")[0]
        if (
            not equals
            or not value
            or not kind.isalnum()
            or "/" in file
            or "." not in file
            or kind == "cgroup"
            or "\n" in value
        ):
            raise SbxError(
                "limit-invalid", f"set cgroup file {printable(text)!r}: it is FILE=VALUE, such as memory.low=64m"
            )
        files[file] = value
    return files


def _memory(request: Any) -> dict[str, str]:
    files = {}
    memory = parse_size(request.memory, "--memory") if request.memory else 0
    if request.memory_high:
        files["memory.high"] = str(parse_size(request.memory_high, "--memory-high"))
    if memory:
        files["memory.max"] = str(memory)
    swap = request.memory_swap
    if swap == "-1":
        files["memory.swap.max"] = "max"
    elif swap:
        # docker's number is memory and swap together
        total = parse_size(swap, "--memory-swap")
        if not memory or total < memory:
            raise SbxError(
                "limit-invalid",
                f"limit swap to {printable(swap)}: --memory-swap is memory and swap together, "
                "so it needs --memory and is not less",
            )
        files["memory.swap.max"] = str(total - memory)
    elif memory:
        files["memory.swap.max"] = str(memory)
    if memory:
        # Out of memory ends the whole sandbox, and not whichever half of it the kernel finds biggest.
        files["memory.oom.group"] = "1"
    return files


def _cpu(request: Any) -> dict[str, str]:
    files = {}
    if request.cpus:
        text = request.cpus
        if (
            not text.isascii()
            or not text.replace(".", "", 1).isdecimal()
            or len(text) > 9
            or not 0.01 <= float(text) <= 100_000
        ):
            raise SbxError(
                "limit-invalid", f"limit cpus to {printable(text)!r}: it is a number such as 1.5, at least 0.01"
            )
        files["cpu.max"] = f"{round(float(text) * _PERIOD)} {_PERIOD}"
    if request.cpu_weight is not None:
        if not 1 <= request.cpu_weight <= 10_000:
            raise SbxError(
                "limit-invalid", f"set cpu weight {request.cpu_weight}: it is 1 to 10000, and 100 by default"
            )
        files["cpu.weight"] = str(request.cpu_weight)
    if request.cpuset_cpus:
        if set(request.cpuset_cpus) - set("0123456789,-"):
            raise SbxError(
                "limit-invalid", f"choose cpus {printable(request.cpuset_cpus)!r}: it is a list such as 0-3,6"
            )
        files["cpuset.cpus"] = request.cpuset_cpus
    return files


def _pids(request: Any) -> dict[str, str]:
    if request.pids is None or request.pids <= 0:
        return {}  # docker's 0 and -1: no limit
    if request.pids == 1 and not getattr(request, "no_init", True):
        raise SbxError(
            "limit-invalid", "limit processes to 1: pid 1 and the command are two", "--no-init makes the command pid 1"
        )
    return {"pids.max": str(request.pids)}


def _io(request: Any) -> dict[str, str]:
    """All limits of one device share a line of io.max."""
    lines: dict[str, list[str]] = {}
    for option, key in _IO.items():
        flag = "--" + option.replace("_", "-")
        for text in getattr(request, option):
            path, colon, rate = text.rpartition(":")
            if not colon or not path.startswith("/"):
                raise SbxError(
                    "limit-invalid", f"read {flag} {printable(text)!r}: it is DEVICE:RATE, such as /dev/sda:10m"
                )
            if option.endswith("iops") and not (rate.isascii() and rate.isdecimal() and len(rate) < 16):
                raise SbxError("limit-invalid", f"read {flag} {printable(text)!r}: operations are a whole number")
            value = rate if option.endswith("iops") else str(parse_size(rate, flag))
            lines.setdefault(device(path), []).append(f"{key}={value}")
    return {"io.max": "\n".join(f"{number} {' '.join(values)}" for number, values in lines.items())} if lines else {}


def device(path: str) -> str:
    """Return ``MAJOR:MINOR`` of the disk that `path` is, is a part of, or is stored on."""
    try:
        found = os.stat(path)
    except OSError as error:
        raise SbxError("limit-invalid", f"limit input and output of {printable(path)}: {error.strerror}") from None
    number = found.st_rdev if found.st_mode & 0o170000 == 0o060000 else found.st_dev
    name = f"{os.major(number)}:{os.minor(number)}"
    entry = os.path.realpath(f"/sys/dev/block/{name}")
    if not os.path.isdir(entry):
        raise SbxError("limit-invalid", f"limit input and output of {printable(path)}: it is not on a disk")
    if os.path.exists(entry + "/partition"):  # the kernel limits whole disks
        with open(os.path.dirname(entry) + "/dev", encoding="ascii") as stream:
            return stream.read().strip()
    return name
