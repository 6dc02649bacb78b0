"""The processes of a sandbox: supervisor, pid 1, command; and what each does besides the plan. Inside.

pid_namespaces(7), prctl(2). Three steps split the walker in two; each returns in the new process only:

    child, then *supervisor*    root in the outer user namespace, otherwise on the host; it outlives pid 1 by the
        │                       moment that it takes to delete what the sandbox wrote
        └ pid 1                 in all the sandbox's namespaces; sets them up, then is *init*: reaps and forwards
            └ command           what the user asked for

Where the supervisor has nothing else to do, the first of them is supervisor.py's; and pid 1 leaves its memory to the
command instead of copying it (handover.py).

Whoever dies takes those below along: the supervisor kills pid 1 when the parent is gone (end of file on `go`), the
kernel kills pid 1 when the supervisor is gone (the death signal), and everything in the pid namespace when pid 1 is.
"""

from __future__ import annotations

import _signal
import os
import select

from rootless import handover, init, syscalls, trees
from rootless.errors import FAILED, SIGNALLED, SbxError
from rootless.handover import Handover
from rootless.idmap import covers, repeat, text, write
from rootless.namespaces import flags, translated
from rootless.steps import Child, Step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.relay import SavedMode
    from rootless.spec import IdMap

SIGKILL, SIGCHLD, SIGSTOP = 9, 17, 19
EAGAIN = 11
LOST = b"lost X\n"  #: what is told where a process cannot become its program, with the errno + 32 for the X


def exit_code(status: int) -> int:
    """Return what a shell would call the wait(2) `status`: the exit status, or 128 + the signal's number."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else SIGNALLED - code


def await_go(child: Child) -> None:
    """Wait for the parent's word. If the parent is gone there is nobody to tell: end."""
    if os.read(child.go, 1) != b".":
        _end_alone(child)


def _end_alone(child: Child) -> None:
    """End, since the parent or the supervisor is gone."""
    if not child.lender:
        os._exit(FAILED)
    raise SbxError("child-lost", "start the sandbox: its supervisor was killed")  # the parent goes on in this memory


class Ready(Step):
    """Tell the parent that the user namespace exists, and wait until it has written the maps and set the cgroup."""

    __slots__ = ()

    def describe(self) -> str:
        return "wait for the parent"

    def execute(self, child: Child) -> None:
        if not child.done:  # else the parent knows
            os.write(child.status, b"ready\n")
        await_go(child)


class AwaitAttached(Step):
    """Wait until the parent has opened the namespaces and attached the network."""

    __slots__ = ()

    def describe(self) -> str:
        return "wait until the network is attached"

    def execute(self, child: Child) -> None:
        await_go(child)


class AwaitInspected(Step):
    """Wait, with everything given up that is to be given up, until the parent has read what is in force."""

    __slots__ = ()

    def describe(self) -> str:
        return "wait until what is in force has been read"

    def execute(self, child: Child) -> None:
        os.write(child.status, b"complete\n")
        await_go(child)


class BecomeRoot(Step):
    """Become root of the user namespace, and drop the caller's supplementary groups.

    With a single id mapped there are none to drop: setgroups(2) had to be denied before the map could be written. And
    where that id is not 0 there is no root; all capabilities over the namespace are ours without being it.
    """

    __slots__ = ("drop_groups", "has_root")

    def __init__(self, idmap: IdMap) -> None:
        self.drop_groups = idmap.mode != "single"
        self.has_root = covers(idmap.uids, 0) and covers(idmap.gids, 0)

    def describe(self) -> str:
        return "become root" + (" and drop supplementary groups" if self.drop_groups else "")

    def execute(self, child: Child) -> None:
        if not self.has_root:
            return
        os.setresgid(0, 0, 0)
        if self.drop_groups:
            os.setgroups([])
        os.setresuid(0, 0, 0)
        # A change of ids made us "not dumpable": /proc/PID of us and of our children would belong to the host's root,
        # and nobody could write the maps of the next user namespace.
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


class StartProcess(Step):
    """Go on in a new process in new namespaces; the old one becomes its supervisor.

    With `idmap`, a user namespace is among them and repeats that map, with setgroups(2) denied for good. When the
    new process has ended, the supervisor deletes the folders `remove`, each under the second name that is given with
    it, so that the first is free at once; `debris` it deletes at the start.
    `mode` is the state of the caller's terminal, to be restored if the parent is killed.

    Where `parent_removes` what is left, the supervisor becomes a small program that does so only in the parent's
    place; `lock` is the folder's, which it holds.
    """

    __slots__ = ("debris", "deny_groups", "idmap", "lock", "mode", "names", "parent_removes", "remove")

    def __init__(self, names: list[str], idmap: IdMap | None = None, deny_groups: bool = True) -> None:
        self.names = names
        self.idmap = idmap
        self.deny_groups = deny_groups
        self.remove: list[tuple[str, str]] = []
        self.debris: list[str] = []
        self.mode: SavedMode | None = None
        self.lock = -1
        self.parent_removes = False

    def shares_processes(self) -> bool:
        """Whether the new process is pid 1 of nothing, so that what outlives it has to be looked for."""
        return bool(self.names) and "pid" not in self.names

    def can_be_program(self) -> bool:
        """Whether the supervisor has nothing to do that needs an interpreter: see supervisor.py."""
        return self.parent_removes and not self.debris and not self.shares_processes()

    def describe(self) -> str:
        if not self.names:
            return "start a process"
        return f"start pid 1 in new namespaces {' '.join(self.names)}"

    def execute(self, child: Child) -> None:
        held, holds = os.pipe()  # end of file on `held` means that the supervisor is gone
        try:
            pid = syscalls.fork_into(flags(self.names))
        except OSError as error:
            raise translated(error, self.describe()) from None
        if pid:
            os.close(held)
            self._supervise(pid, holds, child)
        os.close(holds)
        come_to_life(child, held)

    def _supervise(self, pid: int, holds: int, child: Child) -> None:
        tree = -1
        try:
            _ignore_signals()
            if self.idmap:
                self._write_maps(pid, self.idmap)
            if self.shares_processes():
                tree = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            os.write(child.status, b"pid %d\n" % pid)
            os.write(holds, b".")
        except OSError as error:
            said = f"failed\0-1\0{error.errno}\0\0write the inner id map: {error.strerror}\0"
            os.write(child.status, said.encode())
            os.kill(pid, SIGKILL)
        os.close(child.status)  # or its end of file, which says that the command runs, would never come
        release_stdio()
        if self.parent_removes and tree < 0:
            _remove_apart(self.debris)
            init.become_supervisor(syscalls.MACHINE, pid, child.go, (self.lock, holds), self.cleaning())
        _remove(self.debris)
        status = self._wait(pid, child.go)
        end_stragglers(tree)
        for folder, aside in self.remove:
            try:
                os.rename(folder, aside)
            except OSError:
                continue  # gone, or not to be moved; whoever comes next will try again
            _remove([aside])
        os._exit(status)

    def _write_maps(self, pid: int, idmap: IdMap) -> None:
        for name, content in self.maps(idmap):
            write(f"/proc/{pid}/{name}", content)

    def maps(self, idmap: IdMap) -> list[tuple[str, str]]:
        """Return the files of the new process that make its user namespace what it is, each with its content."""
        denied = [("setgroups", "deny")] if self.deny_groups else []
        return [*denied, ("uid_map", text(repeat(idmap.uids))), ("gid_map", text(repeat(idmap.gids)))]

    def cleaning(self) -> list[str]:
        """Return the command that deletes what is left of the sandbox."""
        # Together, and only if the parent can't: the first name is to be free at once, as above.
        script = 'PATH=/usr/bin:/bin; mv "$1" "$2" && rm -rf "$2"'
        return ["/bin/sh", "-c", script, "sh", *self.remove[0]]

    def _wait(self, pid: int, go: int) -> int:
        """Wait for `pid`, or kill it when the parent is gone; return its exit status."""
        poll = select.poll()
        pidfd = os.pidfd_open(pid)
        poll.register(go, 0)  # only the hang-up, which is always reported: the words on it are for the child
        poll.register(pidfd, select.POLLIN)
        cgroup = ""
        if go in dict(poll.poll()):
            if self.names:
                # Nobody waits for us any more. Not after `exec`: its supervisor is inside, and would import from
                # there; nor is the cgroup then its own.
                from rootless import cgroups

                cgroup = cgroups.of_process(pid)
            os.kill(pid, SIGKILL)
        status = exit_code(os.waitpid(pid, 0)[1])
        if self.mode and self.mode.is_orphaned():
            self.mode.restore()
        if cgroup and cgroups.is_sandbox(cgroup):
            cgroups.remove(cgroup)
        return status


def come_to_life(child: Child, held: int) -> None:
    """Wait until the supervisor has written our id maps; from now on die with it."""
    child.held = held
    if not child.lender and os.read(held, 1) != b".":  # a borrower has waited for that before it came here
        _end_alone(child)
    _arm_death_signal(child)


def _arm_death_signal(child: Child) -> None:
    """Die with our parent, which holds the other end of the pipe `held`."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, SIGKILL)
    if _is_closed(child.held):
        _end_alone(child)  # it had died before


class ArmDeathSignal(Step):
    """Die with the supervisor, or with init: prctl(2), PR_SET_PDEATHSIG. A change of ids disarms it."""

    __slots__ = ()

    def describe(self) -> str:
        return "arm the death signal"

    def execute(self, child: Child) -> None:
        _arm_death_signal(child)


class StartCommand(Step):
    """Go on in a new process that will be the command; this one stays as the sandbox's pid 1: reap, and forward.

    What the sandbox can learn of pid 1: nothing. Its memory is hidden (HideMemory comes before), it has no descriptor,
    and of the capabilities only the one to send signals to processes of other users. Then it becomes a program of two
    hundred bytes, where there is one for this machine. In a pid namespace that is not ours it is no pid 1: it stays
    what it is, inherits what the command leaves behind, and ends that.
    """

    __slots__ = ()

    def describe(self) -> str:
        return "start the command's process; pid 1 stays as init"

    def execute(self, child: Child) -> None:
        everything = _signal.valid_signals()
        _signal.pthread_sigmask(_signal.SIG_BLOCK, everything)
        if os.getpid() == 1 and _leave_to_command(child):
            return
        if child.lender:
            raise OSError(EAGAIN, os.strerror(EAGAIN))  # for want of a process; and no copy may stay in that memory
        pid = os.fork()
        if pid == 0:
            return
        release_stdio()
        syscalls.close_from(3)
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        if os.getpid() != 1:
            syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        syscalls.capset(_CAP_KILL, _CAP_KILL, 0)
        if os.getpid() == 1:
            init.become_init(syscalls.MACHINE, pid)
        status = _be_init(pid, everything)
        if os.getpid() != 1:
            _end_children()
        os._exit(status)


_CAP_KILL = 1 << 5


def _leave_to_command(child: Child) -> bool:
    """Return True in a new process, which has our memory, and become init without it; False where that can't be."""
    try:
        program = init.in_memory("init", syscalls.MACHINE, [0])
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        hand = Handover(syscalls.SIGCHLD | syscalls.CLONE_VM, child.status, LOST)
        for fd in (0, 1, 2):
            hand.call(handover.DUP2, null, fd)
        hand.call(handover.CLOSE_RANGE, 3, syscalls.LAST_FD, syscalls.CLOSE_RANGE_CLOEXEC)
        hand.call(handover.PRCTL, syscalls.PR_SET_NO_NEW_PRIVS, 1)
        hand.call(handover.CAPSET, *(hand.put(data) for data in syscalls.capability_sets(_CAP_KILL, _CAP_KILL, 0)))
        hand.become("init", program, {0: hand.process}, [])
        hand.split()
    except OSError:
        return False  # no memory, or no file, that may be executed
    return True


def _be_init(command: int, everything: set[int]) -> int:
    """Reap whatever ends and forward every signal to `command`, until that ends; return its exit status.

    Blocked signals are never dropped, even for pid 1, and sigwait(3) takes them one by one: no handler, no race.
    """
    while True:
        number = _signal.sigwait(everything)
        if number != SIGCHLD:
            try:
                os.kill(command, number)
            except ProcessLookupError:
                pass  # it has ended; its SIGCHLD is on the way
            continue
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == command:
                return exit_code(status)


def _end_children() -> None:
    """Kill what the command left behind, which has become ours: in a pid namespace of its own the kernel does that."""
    fd = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
    while children := os.pread(fd, 65536, 0).split():
        for pid in children:
            os.kill(int(pid), SIGKILL)
        os.waitpid(-1, 0)


def end_stragglers(tree: int) -> None:
    """Kill what is in the mount namespace that `tree` is open on, and close that; nothing for -1.

    For a sandbox that shares its pids, where nobody else does. What is killed may fork meanwhile, so it is done until
    nothing is left, or a hundred times. Numbers of namespaces are used again at once, but not while one is open.
    """
    if tree < 0:
        return
    number = os.fstat(tree).st_ino
    for _ in range(100 if number != os.stat("/proc/self/ns/mnt").st_ino else 0):
        found = [int(name) for name in os.listdir("/proc") if name.isdecimal() and _is_in(name, number)]
        if not found:
            break
        for pid in found:
            try:
                os.kill(pid, SIGKILL)
            except ProcessLookupError:
                continue
    os.close(tree)


def _is_in(pid: str, number: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/mnt").st_ino == number
    except OSError:
        return False  # it has ended, or is none of ours


def _remove(folders: list[str]) -> None:
    """Delete `folders`; what resists stays, for the parent to report or the next launch to try again."""
    for folder in folders:
        try:
            trees.remove(folder)
        except SbxError:
            continue


def _remove_apart(folders: list[str]) -> None:
    """Delete `folders` in a process that nobody waits for, so that none is left as a zombie."""
    if not folders:
        return
    if (pid := os.fork()) == 0:
        if os.fork() == 0:
            _remove(folders)
        os._exit(0)
    os.waitpid(pid, 0)


def read_nothing() -> None:
    """Make stdin empty."""
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)


def release_stdio() -> None:
    """Let go of stdin, stdout and stderr, so that a pipe's other end sees when the command closes them."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def _ignore_signals() -> None:
    """Be deaf to what the terminal or a group's signal says: the supervisor ends when its charge has."""
    _signal.set_wakeup_fd(-1)
    os.setsid()
    _signal.pthread_sigmask(_signal.SIG_BLOCK, _signal.valid_signals())


def _is_closed(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return bool(poll.poll(0))


class HideMemory(Step):
    """Forbid that others look into this process or write to it, by ptrace(2) or through /proc/PID.

    Before anything of the sandbox can see it: its memory and environment are the caller's, and so is the interpreter
    behind /proc/PID/exe. Its command line needs wiping: /proc/PID/cmdline asks for no permission. execve(2) ends it.
    """

    __slots__ = ("name",)

    def __init__(self, name: bytes) -> None:
        self.name = name

    def describe(self) -> str:
        return "hide this process's memory and command line"

    def execute(self, child: Child) -> None:
        _wipe_words(child)
        syscalls.prctl(syscalls.PR_SET_NAME, self.name)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


class HideWords(Step):
    """Wipe this process's command line and environment, before it is seen in a pid namespace that others live in.

    What else there is to hide they cannot reach while they may not trace what has more capabilities than they.
    """

    __slots__ = ()

    def describe(self) -> str:
        return "hide this process's command line"

    def execute(self, child: Child) -> None:
        _wipe_words(child)


def _wipe_words(child: Child) -> None:
    fd = os.open("/proc/self/stat", os.O_RDONLY | os.O_CLOEXEC)
    fields = os.read(fd, 4096).rpartition(b")")[2].split()
    os.close(fd)
    # proc_pid_stat(5) counts from 1 and the name was cut off with its two first fields
    arg_start, arg_end, env_start, env_end = (int(field) for field in fields[45:49])
    for start, end in ((arg_start, arg_end), (env_start, env_end)):
        child.wiped.append((start, end, syscalls.wipe(start, end)))
