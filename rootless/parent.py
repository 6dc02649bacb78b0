"""The parent: fork, do the outside steps, pass signals and bytes on, return the exit status, undo. Outside.

    parent (outside)                          child (inside)
      fork, into the user namespace ────────▶
           ◀──────────── "ready" ───────────
      write the id maps; join the cgroup
           ───────────── "." go ────────────▶ become root, drop the supplementary groups,
                                              clone pid 1 into its namespaces; stay as its supervisor
           ◀─────────── "pid N" ────────────
      open pid 1's namespaces                 walk the inside steps
           ◀───────────── "time" ──────────── where it enters a time namespace that it has made
      attach the network
           ───────────── "." go ────────────▶ start the command's process; pid 1 stays as init
           ◀──────────── "complete" ───────── where asked for: wait, just before the end
      read what is in force
           ───────────── "." go ────────────▶
           ◀──── end of file: it runs ─────── execve (the status pipe is close-on-exec)
           ◀──── "failed", which, why ─────── a step failed; it exits with 125

The child's end of the go pipe is also its sign of our life: end of file there, and the supervisor ends everything.

What the child does up to "pid N", the supervisor mostly does without an interpreter (supervisor.py). The conversation
is shorter then: "ready" goes without saying, and pid 1 comes with a copy of our memory as it is when the maps are
written, since we are the only ones who have one. Where we have nothing to do meanwhile, it has that very memory instead
of a copy, and the command after it, and we go on from where they left off.
"""

from __future__ import annotations

import _signal
import fcntl
import os
import select
import time

from rootless import child, programs, syscalls
from rootless.errors import FAILED, NOT_EXECUTABLE, NOT_FOUND, SIGNALLED, TIMED_OUT, SbxError, StepError, printable
from rootless.namespaces import FLAGS, EnterTime, Unshare, flags
from rootless.privileges import Exec
from rootless.processes import SIGKILL, SIGSTOP, StartCommand, StartProcess, end_stragglers, exit_code
from rootless.steps import Child, OutsideStep, Plan, Step, Watched
from rootless.supervisor import PATIENCE, STEPS, Begun, program_refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from resource import struct_rusage

    from rootless.accounting import Meter
    from rootless.relay import Relay, SavedMode
    from rootless.spec import IdMap
    from rootless.steps import Undo

    Started = Callable[["Sandbox"], Callable[[], None]]

SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM, SIGCONT, SIGTSTP, SIGWINCH = 1, 2, 3, 10, 12, 15, 18, 20, 28
SIGALRM = 14
#: Passed on to the command. The rest are our own faults (SEGV…), our own business (CHLD, WINCH) or can't be caught.
FORWARDED = (SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM, SIGCONT, SIGTSTP)
ENDING = (SIGHUP, SIGINT, SIGQUIT, SIGTERM)
CLEARING = 10  #: seconds in which another one of these does not keep us from clearing up
ENOENT = 2


class Signals:
    """Signals as bytes on a pipe, from the fork on: none is lost, none interrupts anything."""

    __slots__ = ("_before", "_last", "_writer", "reader")

    def __init__(self, last: bool = False) -> None:
        self._last = last
        self.reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # What the caller ignores, as nohup(1) does, stays ignored.
        heard = [number for number in (*FORWARDED, SIGWINCH) if _signal.getsignal(number) != _signal.SIG_IGN]
        self._before = {number: _signal.signal(number, _wake) for number in heard}
        _signal.set_wakeup_fd(self._writer)

    def take(self) -> bytes:
        """Return the numbers of the signals that came."""
        try:
            return os.read(self.reader, 512)
        except BlockingIOError:
            return b""

    def ending(self) -> list[int]:
        """Return those that mean "end", and are not ignored."""
        return [number for number in ENDING if number in self._before]

    def restore(self) -> None:
        """Give the signals back to whoever had them; but those that would end us, only when we have cleared up."""
        if self._last:
            _signal.signal(SIGALRM, _hear_again)
            _signal.alarm(CLEARING)
            _signal.pthread_sigmask(_signal.SIG_BLOCK, ENDING)
        _signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            _signal.signal(number, handler)
        os.close(self.reader)
        os.close(self._writer)


def _wake(number: int, frame: object) -> None:
    """Do nothing; that there is a handler is what makes the byte on the pipe."""


def _hear_again(number: int, frame: object) -> None:
    """Clearing up takes too long, and whoever wants us to end may have waited enough."""
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, ENDING)


class Sandbox:
    """A sandbox that was started: `pid` is its pid 1 in our pid namespace, `pidfd` refers to it safely.

    `namespaces` are open descriptors by name, for `sbx exec`, which finds them through our /proc/PID/fd: pid 1 itself
    cannot be joined once its memory is hidden. `usage` is what getrusage(2) tells when it has ended, and `cut_short` by
    which limit of ours that was.
    """

    __slots__ = ("_begun", "_early", "_ended_by", "_enters_time", "_go", "_is_command", "_plan", "_released", "_runs",
                 "_signals", "_status", "_supervisor", "_terminal", "_tree", "_undo", "cut_short", "master",
                 "namespaces", "pid", "pidfd", "usage")  # fmt: skip

    def __init__(
        self, plan: Plan, supervisor: int, status: int, go: int, terminal: int, signals: Signals, begun: Begun | None
    ) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._status = status
        self._go = go
        self._terminal = terminal
        self._signals = signals
        self._begun = begun
        self._released = False
        self._runs: Callable[[], None] | None = None
        self._early: list[int] = []
        self._undo: list[Callable[[], None]] = []
        self._enters_time = any(isinstance(step, EnterTime) for step in plan.inside)
        self._is_command = not any(isinstance(step, StartCommand) for step in plan.inside)
        self._ended_by = 0
        self._tree = -1
        self.pid = 0
        self.pidfd = -1
        self.master = -1
        self.namespaces: dict[str, int] = {}
        self.usage: struct_rusage | None = None
        self.cut_short = ""

    # ── starting ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _converse(self, started: Started | None, said: bytes) -> None:
        """Hold the conversation drawn above, up to the end of file; `said` is what the child need not say any more."""
        while True:
            while not said.startswith(b"failed\0") and b"\n" in said:
                line, _, said = said.partition(b"\n")
                if line.startswith(b"lost "):
                    raise program_refused(line[5] - 32)
                try:
                    self._answer(line, started)
                except (SbxError, OSError) as error:
                    # What acts on a child that has just failed fails too; what the child said is the reason.
                    said += self._last_words()
                    if said.startswith(b"lost "):
                        raise program_refused(said[5] - 32) from None
                    if not said.startswith(b"failed\0"):
                        if isinstance(error, BrokenPipeError | ProcessLookupError):
                            raise lost() from None
                        raise
            if not (data := self._listen()):
                break
            said += data
        if said:
            raise self._failure(said)
        if not self.pid and any(isinstance(step, StartProcess) for step in self._plan.inside):
            raise lost()
        if self._terminal >= 0 and (master := syscalls.receive_fd(self._terminal)) is not None:
            # What a killed process had open is closed from the lowest number on: the other end of `go` first, so that
            # the supervisor knows, and restores our terminal, before the hang-up of its own ends the sandbox.
            self.master = fcntl.fcntl(master, fcntl.F_DUPFD_CLOEXEC, self._go + 1)
            os.close(master)
        if self._runs:
            self._runs()

    def _answer(self, line: bytes, started: Started | None) -> None:
        """Do what is due outside when the child says `line`, and let it go on."""
        if line == b"ready":
            self._do(self._plan.before_go, self._supervisor)
            if self._begun:
                self._meet(self._begun, started)
                return
        elif line.startswith(b"refused "):
            raise self._refused(line[8] - 32)
        elif line == b"complete":
            self._do(self._plan.before_exec, self._command())
        elif line == b"time":
            self._open_time()
        else:
            self._greet(int(line.split()[1]), started)
            if self._enters_time:
                return
        self._let_go(line)

    def _meet(self, begun: Begun, started: Started | None) -> None:
        """Let the supervisor start pid 1, which is in this very place, then: with a copy of our memory, or lent it."""
        pid = begun.meet()
        if not pid:
            begun.walk()
        self._greet(pid, started)
        if begun.lends:
            begun.lend(self._release)
            begun.close()
        elif not self._enters_time:
            self._let_go(b"pid")

    def _release(self) -> None:
        """Hear for the last time what ends the start at once."""
        self._hear()
        self._released = True

    def _let_go(self, said: bytes) -> None:
        """Let the child go on. When nothing is left for us to do, the command may run at any moment."""
        last = b"complete" if self._plan.before_exec else b"time" if self._enters_time else b"pid"
        self._released = said.startswith(last)
        os.write(self._go, b".")

    def _greet(self, pid: int, started: Started | None) -> None:
        """Do what is due outside when there is a pid 1."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._open_namespaces()
        if any(isinstance(step, StartProcess) and step.shares_processes() for step in self._plan.inside):
            self._tree = os.dup(self.namespaces["mnt"])
        if started:
            self._runs = started(self)
        self._do(self._plan.attach, pid)

    def _last_words(self) -> bytes:
        """Return what the child has said already."""
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        return os.read(self._status, 4096) if poll.poll(0) else b""

    def _listen(self) -> bytes:
        """Return what the child says, b"" at its end of file; a signal that means "end" ends the start."""
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        poll.register(self._signals.reader, select.POLLIN)
        while True:
            ending = [number for number in self._early if number in ENDING]
            ready = dict(poll.poll(PATIENCE * 1000 if ending else None))
            # The child's word first: when the command runs already, the signal is for that.
            if self._status in ready:
                return os.read(self._status, 4096)
            if not ready:
                raise interrupted(ending[0])
            self._hear()

    def _hear(self) -> None:
        """Take the signals that came during the start; one that means "end" ends it, at once or soon."""
        for number in self._signals.take():
            if number in ENDING and not self._released:
                raise interrupted(number)
            # The command's: it may even run by now, and pid 1 not yet have closed its copy of the status pipe.
            self._early.append(number)

    def _command(self) -> int:
        """Return the id of the command's process, which pid 1 is or has made as its first child."""
        if self._is_command:
            return self.pid
        with open(f"/proc/{self.pid}/task/{self.pid}/children", "rb") as stream:
            return int(stream.read().split()[0])

    def _do(self, steps: list[OutsideStep], pid: int) -> None:
        # The child waits for us: what it says or closes meanwhile can only be its end
        programs.heeded = {self._signals.reader: self._hear, self._status: _lose}
        try:
            for step in steps:
                undo = _do_outside(step, pid)
                if undo:
                    self._undo.append(undo)
        finally:
            programs.heeded = {}

    def _open_namespaces(self) -> None:
        for name in FLAGS:
            try:
                self.namespaces[name] = os.open(f"/proc/{self.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # a kernel without it, or a sandbox that shares it with the host

    def _open_time(self) -> None:
        """Open pid 1's time namespace, in the place of the one that it was born in."""
        fd = os.open(f"/proc/{self.pid}/ns/time", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(fd, self.namespaces["time"], inheritable=False)
        os.close(fd)

    def _close_namespaces(self) -> None:
        for fd in self.namespaces.values():
            os.close(fd)
        self.namespaces = {}

    def _refused(self, errno: int) -> SbxError:
        """Return the error for a last step that failed after the interpreter was gone: `errno` is all that was told."""
        step, index = self._plan.inside[-1], len(self._plan.inside) - 1
        return StepError(step.describe(), errno, os.strerror(errno), "", _status(step, errno), index)

    def _failure(self, said: bytes) -> SbxError:
        """Return the error for the child's report."""
        fields = said.decode("utf-8", "surrogateescape").split("\0")
        index, errno, code, message, hint = int(fields[1]), int(fields[2]), *fields[3:6]
        if index < 0:
            return SbxError(code or "supervisor-failed", message if code else f"start pid 1: {message}", hint)
        step = self._plan.inside[index]
        if code == child.INTERNAL:
            message = f"{step.describe()}: {message}"
        if code:
            return SbxError(code, message, hint, _status(step, errno))
        return StepError(step.describe(), errno, message, hint, _status(step, errno), index)

    # ── running ───────────────────────────────────────────────────────────────────────────────────────────────────

    def signal(self, number: int) -> None:
        """Send a signal to pid 1, which passes it on to the command; nothing if it has ended."""
        try:
            if self._is_deaf_to(number):
                self._ended_by, number = number, SIGKILL
            _signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass

    def _is_deaf_to(self, number: int) -> bool:
        """Whether pid 1 is the command itself and does nothing about `number`, a signal that would end another process.

        The kernel spares pid 1 what it has no handler for; a user who sends SIGTERM expects an end all the same.
        """
        if number not in (SIGHUP, SIGINT, SIGQUIT, SIGUSR1, SIGUSR2, SIGTERM) or not self._is_command:
            return False
        try:
            with open(f"/proc/{self.pid}/status", "rb") as stream:
                masks = dict(line.split(b":", 1) for line in stream.read().splitlines())
        except OSError:
            return False
        handled = int(masks[b"SigCgt"], 16) | int(masks[b"SigIgn"], 16) | int(masks[b"SigBlk"], 16)
        return not handled >> (number - 1) & 1

    def wait(
        self,
        timeout: float | None = None,
        stop_timeout: float = 10.0,
        mode: SavedMode | None = None,
        meters: Sequence[Meter] | None = None,
        stop_signal: int = SIGTERM,
    ) -> int:
        """Serve the sandbox until it ends and return its exit status; everything is undone then.

        After `timeout` seconds it gets `stop_signal`, `stop_timeout` later it is killed, and the status is 124.
        With a terminal, bytes are carried between it and stdin and stdout; `mode` is what to restore these to. A meter
        that finds its limit passed kills the sandbox, and the status is the meter's. Without meters (an empty list is
        one) nobody asks for `usage`.
        """
        measured = meters is not None
        meters = meters or ()
        poll = select.poll()
        relay = _relay(self.master, mode, poll)
        ended = os.pidfd_open(self._supervisor)
        poll.register(ended, select.POLLIN)
        poll.register(self._signals.reader, select.POLLIN)
        if self.pidfd >= 0:
            poll.register(self.pidfd, select.POLLIN)
        watched = {undo.fd: undo for undo in self._undo if isinstance(undo, Watched)}
        for fd in watched:
            poll.register(fd, select.POLLIN)
        for meter in meters:
            for fd in meter.start(self, relay):
                poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + timeout if timeout is not None else None
        timed_out = False
        try:
            while self._early:
                self._pass_on(self._early.pop(0), relay)
            while True:
                due = [moment for moment in (deadline, *(meter.due for meter in meters)) if moment is not None]
                ready = poll.poll(max(0, int((min(due) - time.monotonic()) * 1000) + 1) if due else None)
                if deadline is not None and time.monotonic() >= deadline:
                    self.signal(SIGKILL if timed_out else stop_signal)
                    deadline = None if timed_out else deadline + stop_timeout
                    timed_out = True
                    self.cut_short = "timeout"
                for meter in meters:
                    if meter.is_passed(ready, poll):
                        self.cut_short = meter.name
                        self.signal(SIGKILL)
                for fd, _ in ready:
                    if fd == self._signals.reader:
                        for number in self._signals.take():
                            self._pass_on(number, relay)
                    elif fd == self.pidfd:
                        # Ours is the last hold on the mounts: they go while the supervisor deletes what was below.
                        self._close_namespaces()
                        poll.unregister(fd)
                    elif fd == ended:
                        status = self._reap(measured)
                        self._supervisor = 0
                        if self._ended_by and status == SIGNALLED + SIGKILL:
                            status = SIGNALLED + self._ended_by  # as if the default action had ended it
                        for meter in meters:
                            status = meter.finish(status, self.cut_short)
                        return TIMED_OUT if timed_out else status
                    elif fd in watched:
                        poll.unregister(fd)
                        _tell(watched.pop(fd).lost(), raw=relay is not None)
                    elif relay and fd in (0, 1, relay.master):
                        relay.serve(fd)
        finally:
            if relay:
                relay.finish()
            os.close(ended)
            self.end()

    def _reap(self, measured: bool) -> int:
        """Take the exit status of the supervisor, which has ended, and its use of resources if that was `measured`."""
        if measured:
            _, raw, self.usage = os.wait4(self._supervisor, 0)
        else:
            _, raw = os.waitpid(self._supervisor, 0)  # the other one imports a module for its answer: 0.4 ms
        return exit_code(raw)

    def _pass_on(self, number: int, relay: Relay | None) -> None:
        if number == SIGWINCH:
            if relay:
                relay.resize()
            return
        if number != SIGTSTP:
            self.signal(number)
            return
        # The caller's shell expects us to stop, with all that is ours; it will send SIGCONT to go on.
        self._signal_group(SIGSTOP)
        if relay:
            relay.leave()
        os.kill(os.getpid(), SIGSTOP)
        if relay:
            relay.enter()
        self._signal_group(SIGCONT)

    def _signal_group(self, number: int) -> None:
        """Send a signal to the command's process group. SIGTSTP could not stop it: no shell inside looks after it."""
        try:
            os.killpg(self._command(), number)
        except (OSError, IndexError):
            pass  # it has just ended

    def end(self) -> None:
        """Kill the sandbox if it still runs, wait for it, undo what was done outside. Idempotent."""
        if self._go >= 0:
            os.close(self._go)  # the supervisor's sign to kill pid 1
            self._go = -1
        if self._supervisor:
            os.waitpid(self._supervisor, 0)
            self._supervisor = 0
        if self.pidfd >= 0:
            try:
                # The supervisor has seen it end; unless it was killed itself, and pid 1 had freed itself from its fate.
                _signal.pidfd_send_signal(self.pidfd, SIGKILL)
            except ProcessLookupError:
                pass
        end_stragglers(self._tree)  # the supervisor has done so, unless it was killed
        self._tree = -1
        while self._undo:
            self._undo.pop()()
        self._close_namespaces()
        if self._begun:
            self._begun.close()
        for fd in (self._status, self._terminal, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self._status = self._terminal = self.pidfd = -1
        if self._signals:
            self._signals.restore()
            self._signals = None  # type: ignore[assignment]


def interrupted(number: int) -> SbxError:
    """Return the error for a start that the signal `number` ended."""
    return SbxError("interrupted", "start the sandbox: interrupted", status=SIGNALLED + number)


def lost() -> SbxError:
    """Return the error for a child that ended before the command ran."""
    return SbxError("child-lost", "start the sandbox: its first process was killed")


def _lose() -> None:
    """Raise for a child that ended while it was being served."""
    raise lost()


def _relay(master: int, mode: SavedMode | None, poll: select.poll) -> Relay | None:
    if master < 0:
        return None
    from rootless.relay import Relay

    return Relay(master, mode, poll)


def _tell(notice: str, raw: bool) -> None:
    """Tell the user something on stderr; nothing for an empty text. `raw` is a terminal in raw mode."""
    if notice:
        os.write(2, f"sbx: {printable(notice)}{chr(13) if raw else ''}\n".encode("utf-8", "replace"))


def start(
    plan: Plan,
    terminal: bool = False,
    trace: bool = False,
    started: Started | None = None,
    ours: Sequence[int] = (),
    last: bool = False,
    lends: bool = False,
) -> Sandbox:
    """Carry out `plan` and return its sandbox, whose command runs.

    `started` is called as soon as pid 1 has an id, and what it returns when the command runs: what others may see of
    a sandbox before that is half made. The child does not keep the descriptors `ours`. `lends` allows that our memory
    is lent to it; should it be lost, then with all that is to be undone besides what `plan` knows. The process must
    have one thread. `last` says that it has only to clear up when the sandbox has ended: for ten seconds no signal but
    KILL keeps it from that.

    On failure SbxError (StepError for a step of the child's) is raised, everything has been undone and no process is
    left.
    """
    signals = Signals(last)
    status_reader, status_writer = os.pipe2(os.O_CLOEXEC)
    go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
    outside, inside = syscalls.socketpair() if terminal else (-1, -1)
    kept = [fd for fd in (outside, signals.reader, *ours) if fd >= 0]
    begun = None
    if _needs_no_interpreter(plan):
        status, go = (status_reader, status_writer), (go_reader, go_writer)
        try:
            begun = Begun(plan, status, go, inside, kept, trace, signals.ending() if lends else None)
        except OSError:
            pass  # no memory, or no file, that may be executed
    pid, born = (begun.pid, 1) if begun else _fork(plan)
    if pid == 0:
        # The child must not hold our ends: it waits for their end of file.
        for fd in (status_reader, go_writer, *kept):
            os.close(fd)
        child.walk(plan, Child(status_writer, go_reader, inside, born), trace)
    for fd in (status_writer, go_reader, inside):
        if fd >= 0:
            os.close(fd)
    sandbox = Sandbox(plan, pid, status_reader, go_writer, outside, signals, begun)
    try:
        sandbox._converse(started, b"ready\n" if born else b"")
    except BaseException:
        sandbox.end()
        raise
    return sandbox


def _needs_no_interpreter(plan: Plan) -> bool:
    """Whether `plan` asks no more of a supervisor than supervisor.py has."""
    steps = plan.inside[: len(STEPS)]
    last = steps[-1]
    return [type(step) for step in steps] == STEPS and isinstance(last, StartProcess) and last.can_be_program()


def _fork(plan: Plan) -> tuple[int, int]:
    """Fork and return the child's id, which is 0 in the child, and how many steps of `plan` clone(2) has done already.

    That is the first, if it makes a user namespace: its maps can be written while the child is still coming to itself.
    Where clone(2) fails, the child is to try by itself, and to tell.
    """
    first = plan.inside[0]
    if isinstance(first, Unshare):
        try:
            return syscalls.fork_into(flags(first.names)), 1
        except OSError:
            pass
    return os.fork(), 0


def _do_outside(step: OutsideStep, pid: int) -> Undo | None:
    """Do `step` and return its undo; raises SbxError."""
    try:
        return step.execute(pid)
    except OSError as error:
        raise StepError(step.describe(), error.errno or 0, error.strerror or str(error)) from None


def _status(step: Step, errno: int) -> int:
    """Return the exit status for a failure of `step`, as a shell's for a command that it could not run."""
    if not isinstance(step, Exec):
        return FAILED
    return NOT_FOUND if errno == ENOENT else NOT_EXECUTABLE


def become(plan: Plan) -> None:
    """Walk `plan` in this very process, which so becomes the plan's last step, a command; never returns.

    For a command that belongs to the caller's terminal: process id, process group, signals and exit status are its own
    and nothing has to be passed on. A child does the outside steps and has ended when the command begins; where they
    fail, SbxError is raised in that child, to be told outside, and this process ends with 125 after it. Where a step of
    the inside fails, SbxError (or StepError) is raised here.
    """
    status_reader, status_writer = os.pipe2(os.O_CLOEXEC)
    go_reader, go_writer = os.pipe2(os.O_CLOEXEC)
    pid = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(status_writer)
        os.close(go_reader)
        if os.read(status_reader, 16) == b"ready\n":
            for act in plan.before_go:
                _do_outside(act, pid)
            os.write(go_writer, b".")
        os._exit(0)
    os.close(status_reader)
    os.close(go_writer)
    inside = Child(status_writer, go_reader)
    for index, step in enumerate(plan.inside):
        if step is plan.inside[-1]:
            os.waitpid(helper, 0)  # a command does not expect children that it never had
        try:
            step.execute(inside)
        except OSError as error:
            number, cause = error.errno or 0, error.strerror or str(error)
            raise StepError(step.describe(), number, cause, status=_status(step, number), index=index) from None


def call_inside(idmap: IdMap, function: Callable[[], None], root: str | None = None, landlock: bool = True) -> None:
    """Call `function` in a child that is root in a user namespace with `idmap`; return when it has.

    With `root`, the child's root is that folder, and nothing else of the host can be reached by name (by Landlock too,
    where there is it); open descriptors stay open. An SbxError that `function` raises is raised here.
    """
    from rootless import plan

    sandbox = start(plan.for_call(idmap, function, root, landlock))
    if status := sandbox.wait():
        raise SbxError("child-lost", f"work as root of the user namespace: the process was ended (status {status})")
