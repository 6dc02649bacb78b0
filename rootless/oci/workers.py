"""Warm: several jobs at once, each in a process of its own. Outside.

Processes and not threads, because each job forks a child of its own to unpack in, and nothing forks after threads; and
because hashing, decompressing and reading headers then use all cores without one interpreter's lock between them.
"""

from __future__ import annotations

import marshal
import os
import selectors
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from rootless import syscalls
from rootless.errors import SbxError

Report = Callable[[int], None]  #: a job tells how many bytes it has done
Job = Callable[[Report], Any]  #: what it returns is made of what marshal knows
TICK = 0.1  #: seconds between two looks at the display

_REPORT, _RESULT, _ERROR = range(3)


def run(
    jobs: Sequence[Job],
    at_once: int,
    progress: Callable[[int, int], None],
    done: Callable[[int, Any], None],
    tick: Callable[[], None] | None = None,
) -> list[Any]:
    """Run `jobs`, so many `at_once`, in their order, and return their results in the same order.

    `progress(place, bytes)` and `done(place, result)` tell how the job at `place` goes on; `tick` is called some times
    a second. The first error, or an exception here (Ctrl-C), ends the other jobs, which clean up after themselves, and
    is raised when they have.
    """
    waiting = deque(enumerate(jobs))
    results: list[Any] = [None] * len(jobs)
    with selectors.DefaultSelector() as selector:
        workers: list[_Worker] = []
        try:
            while waiting or workers:
                while waiting and len(workers) < at_once:
                    worker = _Worker(*waiting.popleft(), workers)
                    workers.append(worker)
                    selector.register(worker.pipe, selectors.EVENT_READ, worker)
                for key, _ in selector.select(TICK if tick else None):
                    worker = key.data
                    for kind, value in worker.messages():
                        if kind == _REPORT:
                            progress(worker.place, value)
                        elif kind == _RESULT:
                            results[worker.place] = value
                            done(worker.place, value)
                        else:
                            raise SbxError(*value)
                    if worker.ended:
                        selector.unregister(worker.pipe)
                        workers.remove(worker)
                        worker.reap()
                if tick:
                    tick()
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.reap()
    return results


class _Worker:
    """One job in its process, as the parent sees it."""

    def __init__(self, place: int, job: Job, others: Sequence[_Worker]) -> None:
        self.place = place
        self.ended = False
        self._pending = b""
        self._said = False
        self.pipe, writer = os.pipe2(os.O_CLOEXEC)
        # a line of ours left in a buffer would be printed by both
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # SIGTERM must not come between the fork and the handler
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._pid = os.fork()
            if self._pid == 0:
                for fd in (self.pipe, *(other.pipe for other in others)):
                    os.close(fd)
                _work(job, writer, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(writer)

    def messages(self) -> list[tuple[int, Any]]:
        """Return what has come from the job; at its end `ended` is set."""
        data = os.read(self.pipe, 1 << 16)
        self._pending += data
        found = []
        while len(self._pending) >= 4 and len(self._pending) >= (end := 4 + int.from_bytes(self._pending[:4], "big")):
            found.append(marshal.loads(self._pending[4:end]))
            self._pending = self._pending[end:]
        self._said = self._said or any(kind != _REPORT for kind, _ in found)
        self.ended = not data
        if self.ended and not self._said:
            found.append((_ERROR, ("internal", "fetch a layer: the process that did it was ended", "", 125)))
        return found

    def stop(self) -> None:
        """Ask the job to end."""
        os.kill(self._pid, signal.SIGTERM)

    def reap(self) -> None:
        """Wait until the job has ended."""
        os.close(self.pipe)
        os.waitpid(self._pid, 0)


def _work(job: Job, writer: int, parent: int) -> None:
    """Do the job in this new process, and end. A parent that dies ends it, too."""
    status = 1
    try:
        # the terminal sends Ctrl-C to all of us; the parent is the one to decide
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _end)
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        if os.getppid() == parent:
            _send(writer, (_RESULT, job(lambda count: _send(writer, (_REPORT, count)))))
            status = 0
    except SbxError as error:
        _trace()
        _send(writer, (_ERROR, (error.code, error.message, error.hint, error.status)))
    except BrokenPipeError:
        pass  # the parent is gone, and so is what it wanted
    except Exception as error:
        _trace()
        _send(writer, (_ERROR, ("internal", f"fetch a layer: {type(error).__name__}: {error}", "", 125)))
    finally:
        os._exit(status)


def _end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _send(writer: int, message: tuple[int, Any]) -> None:
    data = marshal.dumps(message)
    data = len(data).to_bytes(4, "big") + data
    while data:
        data = data[os.write(writer, data) :]


def _trace() -> None:
    if os.environ.get("SBX_DEBUG") == "1":
        traceback.print_exc()
