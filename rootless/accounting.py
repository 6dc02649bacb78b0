"""What a sandbox used, why it ended, and the meters that end it: processor time, output. Outside.

From the counters of its cgroup where it has one, else from what wait4(2) tells of the processes that were waited for;
getrusage(2), proc_pid_stat(5), Documentation/admin-guide/cgroup-v2.rst. Loaded only where one of them was asked for.
"""

from __future__ import annotations

import os
import select
import time

from rootless import cgroups
from rootless.errors import SIGNALLED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from resource import struct_rusage
    from typing import Any

    from rootless.parent import Sandbox
    from rootless.relay import Relay

SIGKILL, SIGXCPU, SIGXFSZ = 9, 24, 25
_TICKS = os.sysconf("SC_CLK_TCK")
_CHUNK = 65536
_ATOMIC = 4096  #: bytes of PIPE_BUF: what a pipe that is ready takes without blocking


# ── counters ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def of_usage(usage: struct_rusage) -> dict[str, Any]:
    """Return what wait4(2) tells: of all processes that were waited for, the set-up of the sandbox included."""
    return {
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "user_seconds": usage.ru_utime,
        "system_seconds": usage.ru_stime,
        "largest_process_bytes": usage.ru_maxrss * 1024,
        "page_faults": usage.ru_minflt + usage.ru_majflt,
        "major_page_faults": usage.ru_majflt,
        "voluntary_switches": usage.ru_nvcsw,
        "involuntary_switches": usage.ru_nivcsw,
        "blocks_read": usage.ru_inblock,
        "blocks_written": usage.ru_oublock,
    }


def processes(pid: int) -> list[int]:
    """Return `pid` and all its descendants, which a pid 1 is the ancestor of: proc_pid_task(5)."""
    found = [pid]
    for process in found:
        try:
            for task in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{task}/children", "rb") as stream:
                    found += [int(child) for child in stream.read().split()]
        except OSError:
            continue
    return found


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, its descendants, and those of them that were waited for."""
    ticks = 0
    for process in processes(pid):
        try:
            with open(f"/proc/{process}/stat", "rb") as stream:
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
    return ticks / _TICKS


class Traffic:
    """Bytes that went through a sandbox's network interfaces; its own net namespace is held until it has been read."""

    __slots__ = ("_fd",)

    def __init__(self, pid: int) -> None:
        try:
            self._fd = os.open(f"/proc/{pid}/net/dev", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def read(self) -> dict[str, int]:
        """Return the bytes in and out, the loopback interface's left out."""
        if self._fd < 0:
            return {}
        totals = [0, 0]
        for line in os.pread(self._fd, 1 << 20, 0).decode().split("\n")[2:]:
            name, _, counters = line.partition(":")
            fields = counters.split()
            if fields and name.strip() != "lo":
                totals = [totals[0] + int(fields[0]), totals[1] + int(fields[8])]
        return {"net_received_bytes": totals[0], "net_sent_bytes": totals[1]}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


# ── why it ended ──────────────────────────────────────────────────────────────────────────────────────────────────────


def reason(status: int, cut_short: str, used: dict[str, Any]) -> str:
    """Return why a sandbox ended, as one word or two."""
    if cut_short:
        return cut_short
    if status == SIGNALLED + SIGKILL and used.get("out_of_memory"):
        return "out of memory"
    return "signal" if status > SIGNALLED else "exit"


def explanation(why: str, used: dict[str, Any]) -> list[str]:
    """Return what the user has to be told in any case, a line each."""
    lines = []
    if why == "out of memory":
        limit, peak = used.get("memory_limit_bytes"), used.get("memory_peak_bytes")
        lines.append(
            "out of memory: "
            + (f"limit {size(limit)}" if limit else "the host's, or a limit above the sandbox's")
            + (f", peak {size(peak)}" if peak else "")
        )
    if used.get("pids_limit_hits"):
        times = used["pids_limit_hits"]
        lines.append(f"the limit of {used.get('pids_limit')} processes was reached {times} time{'s' * (times != 1)}")
    return lines


def size(count: float) -> str:
    """Return bytes as people read them, in powers of 1024: ``64 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if count == int(count) or count >= 100 else f"{count:.1f} {unit}"


def summary(used: dict[str, Any]) -> list[str]:
    """Return what --stats prints, a line each."""
    lines = [
        f"ended: {used['reason']}, status {used['status']}",
        f"wall {used['wall_seconds']:.2f} s, user {used['user_seconds']:.2f} s, system {used['system_seconds']:.2f} s",
    ]
    if peak := used.get("memory_peak_bytes"):
        lines.append(
            f"memory: peak {size(peak)}"
            + (f" of {size(used['memory_limit_bytes'])}" if "memory_limit_bytes" in used else "")
        )
    else:
        lines.append(f"memory: largest process {size(used.get('largest_process_bytes', 0))}")
    lines.append(f"page faults: {used.get('page_faults', 0)}, {used.get('major_page_faults', 0)} from disk")
    lines.append(f"context switches: {used['voluntary_switches']} voluntary, {used['involuntary_switches']} not")
    if "pids_peak" in used:
        lines.append(
            f"processes: peak {used['pids_peak']}" + (f" of {used['pids_limit']}" if "pids_limit" in used else "")
        )
    if "io_read_bytes" in used:
        lines.append(
            f"disk: read {size(used['io_read_bytes'])} in {used['io_reads']} operations, "
            f"wrote {size(used['io_write_bytes'])} in {used['io_writes']}"
        )
    if "net_received_bytes" in used:
        lines.append(f"network: received {size(used['net_received_bytes'])}, sent {size(used['net_sent_bytes'])}")
    return lines


# ── meters ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Meter:
    """Watches a running sandbox for the parent, and says when it has used too much of something.

    `due` is the moment (time.monotonic) at which it wants to look next, or None.
    """

    name = ""
    signal = 0  #: the status is that of a process which the kernel had ended for the same reason
    due: float | None = None

    def start(self, sandbox: Sandbox, relay: Relay | None) -> list[int]:
        """Begin; return the descriptors to be watched for input."""
        raise NotImplementedError

    def is_passed(self, ready: list[tuple[int, int]], poll: select.poll) -> bool:
        """Do what there is to do; return True once, when the limit is passed."""
        raise NotImplementedError

    def finish(self, status: int, cut_short: str) -> int:
        """Called when the sandbox has ended with `status`; return the status to report."""
        return SIGNALLED + self.signal if cut_short == self.name else status


class CpuTime(Meter):
    """A limit on processor time, in seconds, of all processes together.

    It looks when the limit could have been reached at the earliest, so it looks seldom and is late by milliseconds.
    """

    name = "processor time"
    signal = SIGXCPU

    def __init__(self, seconds: float, enter: cgroups.Enter | None) -> None:
        self._limit = seconds
        self._enter = enter
        self._processors = len(os.sched_getaffinity(0))
        self._pid = 0

    def start(self, sandbox: Sandbox, relay: Relay | None) -> list[int]:
        self._pid = sandbox.pid
        self.due = time.monotonic()
        return []

    def is_passed(self, ready: list[tuple[int, int]], poll: select.poll) -> bool:
        if self.due is None or time.monotonic() < self.due:
            return False
        left = self._limit - self._used()
        self.due = time.monotonic() + max(left / self._processors, 0.01) if left > 0 else None
        return left <= 0

    def _used(self) -> float:
        if self._enter and (table := cgroups.read_table(self._enter.path, "cpu.stat")):
            return table["usage_usec"] / 1e6
        return cpu_seconds(self._pid)


class Output(Meter):
    """A limit on the bytes that the command writes to stdout and stderr together.

    Without a terminal these are pipes of ours from `redirect` on, which this copies to the caller's; `restore` gives
    the caller's own back to this process. What is beyond the limit is not passed on.
    """

    name = "output"
    signal = SIGXFSZ

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._relay: Relay | None = None
        self._pairs: dict[int, int] = {}  # the pipe's end that we read → the caller's stdout or stderr
        self._pending: dict[int, bytes] = {}
        self._passed = False

    def redirect(self) -> None:
        """Put pipes in the places of stdout and stderr, for the child to inherit."""
        for fd in (1, 2):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self._pairs[reader] = _duplicate(fd)
            os.dup2(writer, fd)
            os.close(writer)

    def ours(self) -> list[int]:
        """Return the descriptors that nobody else may hold, or the command would not see that its reader is gone."""
        return [*self._pairs, *self._pairs.values()]

    def restore(self) -> None:
        """Put the caller's stdout and stderr back in their places."""
        for fd, ours in zip((1, 2), self._pairs.values(), strict=False):
            os.dup2(ours, fd)

    def start(self, sandbox: Sandbox, relay: Relay | None) -> list[int]:
        self._relay = relay
        return list(self._pairs)

    def is_passed(self, ready: list[tuple[int, int]], poll: select.poll) -> bool:
        if self._relay:
            return not self._passed and self._pass(self._relay.taken > self._left)
        for fd, events in ready:
            if fd in self._pairs and events:
                self._take(fd, poll)
            elif fd in self._pending:
                self._give(fd, poll)
        return False if self._passed else self._pass(self._left < 0)

    def _pass(self, passed: bool) -> bool:
        self._passed = passed
        return passed

    def _take(self, reader: int, poll: select.poll) -> None:
        data = os.read(reader, _CHUNK)
        target = self._pairs[reader]
        kept = data[: max(0, self._left)]
        self._left -= len(data)
        if not data or not kept:
            poll.unregister(reader)
        if kept:
            # One buffer at a time: the command waits while the caller does not read.
            poll.unregister(reader)
            self._pending[target] = kept
            poll.register(target, select.POLLOUT)

    def _give(self, target: int, poll: select.poll) -> None:
        reader = next(key for key, value in self._pairs.items() if value == target)
        try:
            rest = self._pending[target][os.write(target, self._pending[target][:_ATOMIC]) :]
        except BrokenPipeError:
            # Nobody reads any more: let the command find out as it would have without us.
            poll.unregister(target)
            del self._pending[target], self._pairs[reader]
            os.close(reader)
            os.close(target)
            return
        self._pending[target] = rest
        if not rest:
            del self._pending[target]
            poll.unregister(target)
            poll.register(reader, select.POLLIN)

    def finish(self, status: int, cut_short: str) -> int:
        """Pass on what is still in the pipes, whose writers have ended."""
        for reader, target in self._pairs.items():
            rest = self._pending.pop(target, b"")
            try:
                while rest:
                    rest = rest[os.write(target, rest) :]
                    if not rest and self._left > 0:
                        rest = self._rest(reader)
                if self._left > 0:
                    rest = self._rest(reader)
                    while rest:
                        rest = rest[os.write(target, rest) :] or self._rest(reader)
            except BrokenPipeError:
                pass
            os.close(reader)
            os.close(target)
        self._pairs = {}
        if not cut_short and self._left < 0:
            cut_short = self.name
        return super().finish(status, cut_short)

    def _rest(self, reader: int) -> bytes:
        data = os.read(reader, _CHUNK)
        kept = data[: max(0, self._left)]
        self._left -= len(data)
        return kept


def _duplicate(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)


# ── one run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Run(Meter):
    """The account of one run: begun before its start, closed with its exit status. A meter without a limit."""

    def __init__(self, enter: cgroups.Enter | None) -> None:
        self._began = time.monotonic()
        self._enter = enter
        self._traffic: Traffic | None = None
        self._bytes: dict[str, int] = {}

    def follow(self, sandbox: Sandbox, own_network: bool) -> None:
        """Hold what has to be held while the sandbox runs to be read when it has ended."""
        if own_network:
            self._traffic = Traffic(sandbox.pid)

    def start(self, sandbox: Sandbox, relay: Relay | None) -> list[int]:
        return []

    def is_passed(self, ready: list[tuple[int, int]], poll: select.poll) -> bool:
        return False

    def finish(self, status: int, cut_short: str) -> int:
        """Read what is lost when the network is taken down."""
        if self._traffic:
            self._bytes = self._traffic.read()
            self._traffic.close()
        return status

    def close(self, status: int, sandbox: Sandbox) -> dict[str, Any]:
        """Return the whole account; the sandbox has ended and been undone."""
        used = of_usage(sandbox.usage) if sandbox.usage else {}
        counted = self._enter.used if self._enter else {}
        used |= counted
        used |= self._bytes
        used["source"] = "cgroup" if counted else "wait4"
        used["wall_seconds"] = time.monotonic() - self._began
        used["status"] = status
        used["reason"] = reason(status, sandbox.cut_short, used)
        if used["reason"] == "signal":
            used["signal"] = status - SIGNALLED
        return used
