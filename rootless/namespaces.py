"""The namespaces: their names, flags and files, and the steps that make and join them. Inside.

namespaces(7); the names are those of /proc/PID/ns.
"""

from __future__ import annotations

import os

from rootless import syscalls
from rootless.errors import SbxError
from rootless.steps import Child, Step

#: name → flag of clone(2), in the order in which an existing sandbox is joined: user first (it gives the right to join
#: the rest), mnt last but one (what follows can no longer see the host's /proc), pid for the children only
FLAGS = {
    "user": syscalls.CLONE_NEWUSER,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "net": syscalls.CLONE_NEWNET,
    "time": syscalls.CLONE_NEWTIME,
    "pid": syscalls.CLONE_NEWPID,
    "mnt": syscalls.CLONE_NEWNS,
}
DEFAULT = ("mnt", "pid", "net", "uts", "ipc", "cgroup")
SHAREABLE = ("pid", "net", "uts", "ipc", "cgroup")  #: a sandbox without its own mnt or user would be none


def flags(names: list[str]) -> int:
    """Return the clone(2) flags of `names`."""
    total = 0
    for name in names:
        total |= FLAGS[name]
    return total


class Unshare(Step):
    """Make new namespaces for this process; a new pid namespace is for its children."""

    __slots__ = ("names",)

    def __init__(self, *names: str) -> None:
        self.names = list(names)

    def describe(self) -> str:
        return f"create namespaces {' '.join(self.names)}"

    def execute(self, child: Child) -> None:
        try:
            syscalls.unshare(flags(self.names))
        except OSError as error:
            raise translated(error, self.describe()) from None


def translated(error: OSError, act: str) -> OSError | SbxError:
    """Return what to raise for `error` from making namespaces: ENOSPC is a limit there, and no disk is full."""
    if error.errno != 28:
        return error
    return SbxError("namespace-limit", f"{act}: the limit on namespaces is reached")


class Join(Step):
    """Join an existing namespace through an open descriptor of it."""

    __slots__ = ("fd", "name")

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    def describe(self) -> str:
        return f"join the {self.name} namespace"

    def execute(self, child: Child) -> None:
        syscalls.setns(self.fd, FLAGS[self.name])


class ClockOffset(Step):
    """Shift a clock of the new time namespace, before any process is in it: time_namespaces(7)."""

    __slots__ = ("clock", "seconds")

    def __init__(self, clock: str, seconds: int) -> None:
        self.clock = clock
        self.seconds = seconds

    def describe(self) -> str:
        return f"set the {self.clock} clock {self.seconds:+d} s off"

    def execute(self, child: Child) -> None:
        fd = os.open("/proc/self/timens_offsets", os.O_WRONLY)
        try:
            os.write(fd, f"{self.clock} {self.seconds} 0\n".encode())
        finally:
            os.close(fd)


class EnterTime(Step):
    """Join the time namespace that this process has made for its children: time_namespaces(7).

    clone(2) cannot make one: its flag is one of the bits that hold the signal of the child's end.
    """

    __slots__ = ()
    alone = True

    def describe(self) -> str:
        return "enter the time namespace"

    def execute(self, child: Child) -> None:
        fd = os.open("/proc/self/ns/time_for_children", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(fd, syscalls.CLONE_NEWTIME)
        finally:
            os.close(fd)
        os.write(child.status, b"time\n")  # the parent has opened the one that we had before


class HostName(Step):
    """Name the sandbox."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def describe(self) -> str:
        return f"set the host name to {self.name}"

    def execute(self, child: Child) -> None:
        syscalls.sethostname(self.name)


class Sysctl(Step):
    """Write a kernel setting of the sandbox's own namespaces, through the fresh /proc."""

    __slots__ = ("name", "value")

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value

    def describe(self) -> str:
        return f"set {self.name} to {self.value}"

    def execute(self, child: Child) -> None:
        # O_NOFOLLOW: /proc is the kernel's own here, but nothing in a root filesystem is ever followed by name
        fd = os.open("/proc/sys/" + self.name.replace(".", "/"), os.O_WRONLY | os.O_NOFOLLOW)
        try:
            os.write(fd, self.value.encode())
        finally:
            os.close(fd)


class LoopbackUp(Step):
    """Bring up lo, so that 127.0.0.1 and ::1 answer: netdevice(7)."""

    __slots__ = ()

    def describe(self) -> str:
        return "bring up the loopback interface"

    def execute(self, child: Child) -> None:
        syscalls.loopback_up()
