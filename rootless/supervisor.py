"""The supervisor that never is an interpreter: what it does before it becomes its program, as lists of calls. Inside.

It takes the first steps of a plan, up to the one that starts pid 1, just as they say it. A supervisor that has more to
do when its pid 1 has ended (a terminal to restore, a cgroup to remove) takes them itself: StartProcess.

And pid 1 gets no interpreter of its own either where the parent has nothing to do until the command runs: it is lent
the parent's memory for so long.
"""

from __future__ import annotations

import _signal
import os
import sys

from rootless import child, handover, init, paths, processes, syscalls
from rootless.errors import SbxError, StepError
from rootless.handover import Handover
from rootless.idmap import WriteMaps
from rootless.namespaces import Unshare, flags, translated
from rootless.processes import BecomeRoot, Ready, StartProcess
from rootless.steps import Child, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rootless.steps import Plan

_F_SETFD = 2
_WRONLY = os.O_WRONLY | os.O_CLOEXEC
_ECHILD = 10
PATIENCE = 1  #: seconds that pid 1's last steps may take when a signal that means "end" has come

#: The steps that it takes
STEPS: list[type[Step]] = [Unshare, Ready, BecomeRoot, StartProcess]


def program_refused(errno: int) -> SbxError:
    """Return the error for a process that could not become a program of ours."""
    return SbxError("program-refused", f"become a small program: {os.strerror(errno)}",
                    "this host lets no file in memory be executed")  # fmt: skip


class Begun:
    """A supervisor in its new user namespace, waiting for the id maps; `pid` is its id.

    `lends` says that its pid 1 waits to be lent our memory.
    """

    __slots__ = ("_child", "_hand", "_held", "_holds", "_mapped", "_plan", "_signals", "_started", "_trace", "lends",
                 "pid")  # fmt: skip

    def __init__(
        self,
        plan: Plan,
        status: tuple[int, int],
        go: tuple[int, int],
        terminal: int,
        ours: Sequence[int],
        trace: bool,
        ending: Sequence[int] | None,
    ) -> None:
        """Clone it. `status` and `go` are the pipes of the conversation, their ends to read from first.

        `terminal` is the child's, or -1, and `ours` what is not for the child. With `ending`, memory may be lent, and a
        signal of those ends a start that does not get on. Raises OSError where that can't be, and nothing has happened
        then: the child is to be forked.
        """
        self._plan, self._trace = plan, trace
        self.lends = ending is not None and _can_borrow(plan)
        unshare, _, root, start = plan.inside[: len(STEPS)]
        assert isinstance(unshare, Unshare)
        assert isinstance(root, BecomeRoot)
        assert isinstance(start, StartProcess)
        null, program, signals = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC), -1, -1
        self._held, self._holds = -1, -1
        try:
            self._held, self._holds = os.pipe()
            program = init.in_memory("supervisor", syscalls.MACHINE, [0, go[0], 0])
            memory = syscalls.CLONE_VM if self.lends else 0
            self._hand = Handover(flags(start.names) | syscalls.SIGCHLD | memory, status[1], processes.LOST)
            if self.lends:
                signals = syscalls.signal_descriptor(ending or ())
                home = os.fsencode(os.path.dirname(os.path.dirname(start.remove[0][0])))
                words = [sys.executable, "-ISE", paths.PACKAGE + "/lost.py", str(status[0])]
                argv = [os.fsencode(word) for word in words]
                self._hand.lends(
                    (self._held, self._holds), go[0], status[0], signals, PATIENCE, argv, [b"SBX_HOME=" + home]
                )
            self._before(root, go[0], (status[0], go[1], *(fd for fd in (signals, *ours) if fd >= 0)))
            self._after(start, status[1], go[0], null, program)
            self.pid = self._clone(flags(unshare.names), go[1], status[0])
            self._signals, signals = signals, -1
        finally:
            # Its own are copies; and pid 1's will be, of those.
            for fd in (null, self._held, self._holds, program, signals):
                if fd >= 0:
                    os.close(fd)
        self._child = Child(status[1], go[0], terminal, len(STEPS))

    def _before(self, root: BecomeRoot, go: int, close: Sequence[int]) -> None:
        """List what it does before it starts pid 1."""
        hand = self._hand
        for fd in close:
            hand.call_first(handover.CLOSE, fd)  # or the end of file on them would never come
        hand.call_first(handover.READ, go, hand.put(b""), 1)
        if root.has_root:
            hand.call_first(handover.SETRESGID, 0, 0, 0)
            if root.drop_groups:
                hand.call_first(handover.SETGROUPS, 0, 0)
            hand.call_first(handover.SETRESUID, 0, 0, 0)
            hand.call_first(handover.PRCTL, syscalls.PR_SET_DUMPABLE, 1)
        self._started = len(hand.first) // 8

    def _after(self, start: StartProcess, status: int, go: int, null: int, program: int) -> None:
        """List what it does when there is a pid 1."""
        hand = self._hand
        if start.idmap:
            hand.call(handover.CHDIR, hand.path)
            for name, content in start.maps(start.idmap):
                hand.call(handover.OPENAT, syscalls.AT_FDCWD, hand.put(name.encode()), _WRONLY, result=hand.argument(1))
                hand.call(handover.WRITE, 0, hand.put(content.encode()), len(content))
            hand.call(handover.CHDIR, hand.put(b"/"))
        self._mapped = (len(hand.first) + len(hand.second)) // 8
        for fd in (status, self._holds):  # the parent, and pid 1, hear of it
            hand.call(handover.WRITE, fd, hand.put(b"."), 1)
        hand.call(handover.SETSID)
        hand.pidfd = hand.argument(0)
        hand.call(handover.FCNTL, 0, _F_SETFD, 0)
        for fd in (go, start.lock, self._holds):
            hand.call(handover.FCNTL, fd, _F_SETFD, 0)
        for fd in (0, 1, 2):
            hand.call(handover.DUP2, null, fd)
        words = [os.fsencode(word) for word in start.cleaning()]
        hand.become("supervisor", program, {0: hand.process, 2: hand.pidfd}, words)

    def _clone(self, flags: int, go: int, status: int) -> int:
        # Whoever has a handler of ours runs it in our memory, which two must not do at once; and it is to be deaf.
        before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
        try:
            return self._hand.begin(flags, go, status)
        finally:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, before)

    def meet(self) -> int:
        """Let it go on, for its id maps are written, and return the id of pid 1; 0 in that one, unless it is to be lent
        our memory. Raises SbxError."""
        try:
            return self._hand.meet()
        except OSError as error:
            raise self._failure(error.errno or 0) from None

    def _failure(self, errno: int) -> SbxError:
        """Return the error for a call that failed: a step's, told as the step would."""
        call = self._hand.failed_call()
        if errno == _ECHILD:
            return SbxError("child-lost", "start the sandbox: its first process was killed")
        if call > self._mapped:
            return program_refused(errno)  # so soon that what it had told us before was not yet read
        if call >= self._started:
            return SbxError("supervisor-failed", f"start pid 1: write the inner id map: {os.strerror(errno)}")
        place = STEPS.index(StartProcess if call < 0 else BecomeRoot)
        act = self._plan.inside[place].describe()
        error = translated(OSError(errno, os.strerror(errno)), act)
        return error if isinstance(error, SbxError) else StepError(act, errno, os.strerror(errno), index=place)

    def walk(self) -> None:
        """Walk the rest of the plan as its pid 1; returns only where memory was lent, in the parent."""
        if not self.lends:
            os.close(self._holds)
        child.walk(self._plan, self._child, self._trace, self._held)

    def lend(self, released: Callable[[], None]) -> None:
        """Let pid 1, and the command, walk the rest of the plan in our memory; return when the command runs, or none.

        `released` is called when signals are not heard any more; what it raises is raised. Where one of them is killed
        meanwhile, we become another program (lost.py).
        """
        before = _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())
        # Nothing is imported inside; and if it were, it would be the image's, and stay in our memory.
        path, sys.path = sys.path, []
        try:
            released()
            # Nobody but us is to look into what is ours, as long as a process of the sandbox is in it
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
            self._child.lender = self._hand
            self._hand.lend()
            self.walk()  # as pid 1, then as the command; and at its end we are the parent again
            for wiped in self._child.wiped:
                syscalls.restore(*wiped)
        finally:
            syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
            sys.path = path
            _signal.pthread_sigmask(_signal.SIG_SETMASK, before)

    def close(self) -> None:
        """Let go of what is held for lend(). Idempotent."""
        if self._signals >= 0:
            os.close(self._signals)
            self._signals = -1


def _can_borrow(plan: Plan) -> bool:
    """Whether pid 1 of `plan` can do with our memory: nothing is to be done meanwhile, nor undone if that is lost."""
    if plan.attach or plan.before_exec or not all(isinstance(step, WriteMaps) for step in plan.before_go):
        return False
    if not sys.executable:
        return False
    return not any(step.alone for step in plan.inside)
