"""Find and run helper programs: newuidmap, slirp4netns, pasta. Outside.

They are started with posix_spawn(3), which costs 0.14 ms from any process where fork costs 1 to 40, with nothing open
but what is handed to them, and what they say on stderr is kept for the error message.
"""

from __future__ import annotations

import fcntl
import os

from rootless.errors import SbxError

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


class Running:
    """A helper program that was started; `status` is its exit status once finish() has returned."""

    __slots__ = ("name", "output", "pid", "status")

    def __init__(self, name: str, pid: int, output: int) -> None:
        self.name = name
        self.pid = pid
        self.output = output
        self.status = 0

    def leave(self) -> None:
        """Let the program end on its own; it has been told to. Its exit is collected by the next spawn()."""
        os.close(self.output)
        _left.append(self.pid)
        _collect()

    def finish(self, most: int = 2000) -> str:
        """Wait for the program to end and return what it said on stderr, the first `most` bytes of it."""
        said = b"".join(iter(lambda: os.read(self.output, 4096), b""))
        os.close(self.output)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return said[:most].decode("utf-8", "replace")


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

    `keep` maps a descriptor in the new program to one of ours. Raises SbxError ``program-missing``.
    """
    path = require(argv[0])
    _collect()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)  # nobody reads while it runs: what is too much is lost, and the program never waits
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
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
        os.fchdir(here)
        for fd in (writer, here, *high.values()):
            os.close(fd)
    return Running(argv[0], pid, reader)
