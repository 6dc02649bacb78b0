"""Warm: do work of our own in a child that is root in a user namespace, while the caller goes on. Outside.

The same plan and the same walk as a sandbox's; only the parent's side is another: it feeds the child while that works,
may do so in several threads at once, and takes no signals over, so that Ctrl-C stays what Python makes of it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from rootless import child, plan, syscalls
from rootless.errors import SbxError, StepError
from rootless.spec import IdMap
from rootless.steps import Child, Plan

_START = threading.Lock()  #: from the making of pipes until the child has its own: no other child may inherit them
_feeds: set[int] = (
    set()
)  #: write ends that children read from; a child that holds another's would delay its end of file


class Worker:
    """A child that works. `finish()` must be called; until then the child may be fed through `feed`."""

    def __init__(self, work: Plan, pid: int, status: int, go: int, feed: int) -> None:
        self._work = work
        self._pid = pid
        self._status = status
        self._go = go
        self.feed = feed

    def end_feed(self) -> None:
        """Let the child see the end of what it is fed. Idempotent."""
        if self.feed >= 0:
            _feeds.discard(self.feed)
            os.close(self.feed)
            self.feed = -1

    def finish(self) -> None:
        """Wait for the child; raises the SbxError that ended it. Calling it again does nothing."""
        self.end_feed()
        if not self._pid:
            return
        said = b""
        while data := os.read(self._status, 4096):
            said += data
        os.close(self._status)
        os.close(self._go)
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._pid = 0
        if said:
            raise _failure(said, self._work)
        if status:
            raise SbxError("internal", f"work in a user namespace: the child ended with {status}")


def start(idmap: IdMap, function: Callable[[int], None], root: str | None = None) -> Worker:
    """Start `function(reader)` in a child that is root with `idmap`; `reader` is the end of a pipe that `feed` fills.

    With `root`, the child sees nothing but that folder, as its root; open descriptors stay open. `function` must
    import nothing: the file system is a stranger's by then. Raises SbxError when the child cannot be set up.
    """
    with _START:
        reader, feed = os.pipe2(os.O_CLOEXEC)
        status_reader, status_writer = os.pipe2(os.O_CLOEXEC)
        go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
        parent = os.getpid()

        def work_until_orphaned() -> None:
            # As root at last: a change of ids would have cleared it. It speaks of the thread that forked, which waits.
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                function(reader)

        work = plan.for_call(idmap, work_until_orphaned, root, True)
        _feeds.add(feed)
        pid = os.fork()
        if pid == 0:
            for fd in (*_feeds, status_reader, go_writer):
                os.close(fd)
            child.walk(work, Child(status_writer, go_reader))
        for fd in (reader, status_writer, go_reader):
            os.close(fd)
    worker = Worker(work, pid, status_reader, go_writer, feed)
    try:
        _await_ready(status_reader, work)
        for step in work.before_go:
            step.execute(pid)
        os.write(go_writer, b".")
    except BaseException:
        os.close(go_writer)  # the child waits for it, and ends without it
        worker._go = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            worker.finish()
        except SbxError:
            pass  # what went wrong out here comes first
        raise
    return worker


def call(idmap: IdMap, function: Callable[[], None], root: str | None = None) -> None:
    """Call `function` in a child as `start` does, and return when it has returned; raises its SbxError."""
    start(idmap, lambda reader: function(), root).finish()


def _await_ready(status: int, work: Plan) -> None:
    """Return when the child has its user namespace; raises the SbxError it reports instead."""
    said = b""
    while not said.endswith(b"ready\n"):
        data = os.read(status, 4096)
        said += data
        if not data or said.startswith(b"failed\0"):
            while data := os.read(status, 4096):
                said += data
            raise _failure(said, work)


def _failure(said: bytes, work: Plan) -> SbxError:
    """Return the error in a child's report: ``failed NUL index NUL errno NUL code NUL message NUL hint``."""
    fields = said.decode("utf-8", "surrogateescape").split("\0")
    if len(fields) < 6:
        return SbxError("internal", "work in a user namespace: the child ended without a word")
    code, message, hint = fields[3:6]
    if code:
        return SbxError(code, message, hint)
    index = int(fields[1])
    return StepError(work.inside[index].describe(), int(fields[2]), message, hint, index=index)
