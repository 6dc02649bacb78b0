"""Find and run helper programs: newuidmap, slirp4netns, pasta. Outside.

They are started with posix_spawn(3), which costs 0.14 ms from any process where fork costs 1 to 40, with nothing open
but what is handed to them, and what they say on stderr is kept for the error message.
"""

from __future__ import annotations

import fcntl
import os
import select

from rootless.errors import SbxError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: program → what provides it
PACKAGES = {
    "newuidmap": "uidmap (Debian, Ubuntu), shadow-utils (Fedora), shadow-subids (Alpine), shadow (Arch)",
    "newgidmap": "uidmap (Debian, Ubuntu), shadow-utils (Fedora), shadow-subids (Alpine), shadow (Arch)",
    "slirp4netns": "slirp4netns",
    "pasta": "passt",
    "nft": "nftables",
}
SIGPIPE, SIGXFSZ = 13, 25
#: Searched after PATH: a login without sbin in its PATH still finds them.
STANDARD = ("/usr/bin", "/usr/local/bin", "/bin", "/usr/sbin", "/sbin")


def find(name: str) -> str:
    """Return the absolute path of the program `name`, or "". Relative folders in PATH are not trusted."""
    for folder in (*os.environ.get("PATH", "").split(":"), *STANDARD):
        if folder.startswith("/") and os.access(path := f"{folder}/{name}", os.X_OK) and not os.path.isdir(path):
            return path
    return ""


def install_hint(name: str) -> str:
    """Return the hint that says which package provides `name`."""
    return f"install the package {PACKAGES.get(name, name)}"


def require(name: str) -> str:
    """Return the absolute path of `name`; raises SbxError ``program-missing`` with the package as its hint."""
    if path := name if name.startswith("/") else find(name):
        return path
    raise SbxError("program-missing", f"find {name}: not installed", install_hint(name))


PATIENCE = 30.0  #: seconds that a helper program may take; they need milliseconds
_SIGKILL = 9

#: What ends a wait for a helper program, besides its own end: descriptor → what is to be called when that is readable
#: (or closed), which raises if it means the end. The parent's: a signal, the sandbox's death.
heeded: dict[int, Callable[[], None]] = {}


class Running:
    """A helper program that was started; `status` is its exit status once finish() has returned."""

    __slots__ = ("name", "output", "pid", "status")

    def __init__(self, name: str, pid: int, output: int) -> None:
        self.name = name
        self.pid = pid
        self.output = output
        self.status = 0

    def await_ready(self, ready: int) -> bytes:
        """Wait until the program says something on `ready`, or will never, and return it; b"" if it won't.

        Raises SbxError ``program-stalled`` where it takes too long, or what a heeded descriptor raises: it is killed.
        """
        return self._wait_for(ready)

    def leave(self) -> None:
        """Let the program end on its own; it has been told to. Its exit is collected by the next spawn()."""
        os.close(self.output)
        _left.append(self.pid)
        _collect()

    def finish(self, most: int = 2000) -> str:
        """Wait for the program to end and return what it said on stderr, the first `most` bytes of it.

        Raises as await_ready() does.
        """
        said = b""
        while data := self._wait_for(self.output):
            said += data[: most - len(said)]
        self._wait_for()
        os.close(self.output)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return said.decode("utf-8", "replace")

    def stop(self, most: int = 2000) -> str:
        """Wait for the program, which was told to end, and return what it said; kill it if it takes too long."""
        try:
            return self.finish(most)
        except SbxError:
            return ""

    def _wait_for(self, source: int | None = None) -> bytes:
        """Return what `source` gives, b"" at its end or the program's; whoever inherited it is not waited for."""
        ended = os.pidfd_open(self.pid)
        poll = select.poll()
        for fd in (ended, *heeded, *([] if source is None else [source])):
            poll.register(fd, select.POLLIN)
        try:
            while ready := dict(poll.poll(int(PATIENCE * 1000))):
                if ended in ready:
                    ready = dict(poll.poll(0))  # with what it said just before
                if source in ready:
                    return os.read(source, 4096)
                if ended in ready:
                    return b""
                for fd in ready:
                    heeded[fd]()
            raise SbxError("program-stalled", f"wait for {printable(self.name)}: not a word in {PATIENCE:.0f} seconds",
                           "the machine may be too busy; try again")  # fmt: skip
        except BaseException:
            os.kill(self.pid, _SIGKILL)
            self.status = -_SIGKILL
            self.leave()
            raise
        finally:
            os.close(ended)


#: Ids of programs that were left
_left: list[int] = []


def _collect() -> None:
    """Collect the exits of the programs that were left."""
    for pid in list(_left):
        try:
            ended = os.waitpid(pid, os.WNOHANG)[0]
        except ChildProcessError:
            ended = pid  # somebody else was faster
        if ended:
            _left.remove(pid)


def spawn(argv: list[str], keep: dict[int, int] | None = None, folder: str = "/") -> Running:
    """Start `argv` (its first word is looked up) in `folder`, with /dev/null as stdin and stdout and its stderr kept.

    `keep` maps a descriptor in the new program to one of ours; "" is the folder that we are in. Raises SbxError
    ``program-missing``.
    """
    path = require(argv[0])
    _collect()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)  # nobody reads while it runs: what is too much is lost, and the program never waits
    here = os.open(".", os.O_PATH | os.O_CLOEXEC) if folder else -1
    # Out of the way first, or one of theirs could be overwritten before it was copied to its own place. No higher than
    # that: the limit on descriptors may be low.
    wanted = {2: writer, **(keep or {})}
    above = max(wanted) + 1
    high = {theirs: fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, above) for theirs, ours in wanted.items()}
    try:
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDWR, 0),
            (os.POSIX_SPAWN_DUP2, 0, 1),
            *((os.POSIX_SPAWN_DUP2, ours, theirs) for theirs, ours in high.items()),
        ]
        if folder:
            os.chdir(folder)  # posix_spawn(3) has no portable word for it; we have one thread
        # In a process group of its own, for what the terminal says (^C) is for the command. Signals are as every
        # program expects them: Python ignores SIGPIPE and SIGXFSZ, and that would be inherited.
        env = {"PATH": ":".join(STANDARD), "LC_ALL": "C"}
        pid = os.posix_spawn(
            path, argv, env, file_actions=actions, setpgroup=0, setsigmask=[], setsigdef=[SIGPIPE, SIGXFSZ]
        )
    except OSError as error:
        os.close(reader)
        raise SbxError("program-failed", f"start {path}: {error.strerror}", "") from None
    finally:
        if folder:
            os.fchdir(here)
            os.close(here)
        for fd in (writer, *high.values()):
            os.close(fd)
    return Running(argv[0], pid, reader)
