"""Warm: what the host says of itself, in /proc and in our own mounts. Outside; nothing here raises but `mounted`."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from rootless import paths, syscalls

#: what an outer sandbox or container has to do
OUTER = "start the sandbox or container around this one so that it allows it (sbx run --nested)"
#: what frees a container of AppArmor or SELinux
UNCONFINED = "start the container around it with --security-opt apparmor=unconfined or label=disable"


def text(path: str) -> str:
    """Return the content of a small file, "" when it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 20)
    except OSError:
        return ""


def sysctl(name: str) -> str:
    return text("/proc/sys/" + name.replace(".", "/")).strip()


def status(field: str) -> str:
    """Return a field of this process's /proc/PID/status: proc_pidstatus(5)."""
    found = re.search(rf"^{field}:\s*(.*)$", text("/proc/self/status"), re.MULTILINE)
    return found[1] if found else ""


def release() -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def is_nested() -> bool:
    """Whether we are in a user namespace already: a container's, or a sandbox's."""
    fields = text("/proc/self/uid_map").split()
    return fields[:3] != ["0", "0", "4294967295"]


def confinement() -> str:
    """Return the profile or context that a security module holds this process to, "" for none."""
    label = text("/proc/self/attr/apparmor/current") or text("/proc/self/attr/current")
    label = label.strip("\0\n ")
    return "" if label in ("unconfined", "kernel") or ":unconfined_t:" in label else label


class Mounted(NamedTuple):
    """What a path is on: the mount point, the filesystem's type and the mount's options."""

    point: str
    fstype: str
    options: list[str]


def mounts() -> dict[int, Mounted]:
    """Return this process's mounts by their ids: proc_pid_mountinfo(5)."""
    found = {}
    for line in text("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split(" ")
        # spaces and the like in a path are octal escapes
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), words[4])
        options = words[5].split(",") + rest.split(" ")[-1].split(",")
        found[int(words[0])] = Mounted(point, rest.split(" ")[0], options)
    return found


def mounted(path: str) -> Mounted:
    """Return the mount that `path` is on; raises OSError."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return mounts().get(syscalls.mount_id(fd), Mounted("/", "unknown", []))
    finally:
        os.close(fd)


def existing(path: str) -> str:
    """Return `path`, or the nearest folder above it that exists: there it would be made."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def setup_command(arguments: str = "") -> str:
    """Return the command that prepares a host."""
    return f"sudo sh {paths.shipped('helpers/setup-host')}{arguments}"
