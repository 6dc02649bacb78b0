"""The slirp4netns back end: a user-mode TCP/IP stack on a tap device in the sandbox. Outside.

slirp4netns(1). It runs as the caller, confined by its own sandbox and seccomp filter, and holds nothing of ours but
two pipes: on one it says that it is ready, the other's end of file tells it to end, whatever has ended us.
"""

from __future__ import annotations

import os

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.network import names
from rootless.steps import OutsideStep, Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.spec import Network, SandboxSpec
    from rootless.steps import Undo

SOCKET = "slirp4netns"  #: its control socket, in the sandbox's folder


def arguments(network: Network, target: list[str]) -> list[str]:
    """Return the command line for `network` on the namespaces in `target`; descriptors 3 and 4 are ready and exit."""
    return [
        "slirp4netns", "--mtu=65520", "--enable-sandbox", "--enable-seccomp", "--ready-fd=3", "--exit-fd=4",
        # The host's loopback, for which it would answer on the gateway's address
        *([] if network.host_loopback else ["--disable-host-loopback"]),
        *(["--enable-ipv6"] if network.ipv6 else []),
        f"--api-socket={SOCKET}", *target, names.INTERFACE,
    ]  # fmt: skip


class Attach(OutsideStep):
    """Start slirp4netns on the sandbox's net namespace and wait until the interface is up."""

    __slots__ = ("folder", "network")

    def __init__(self, network: Network, folder: str) -> None:
        self.network = network
        self.folder = folder

    def describe(self) -> str:
        return "attach slirp4netns"

    def execute(self, pid: int) -> Undo:
        target = ["--configure", "--userns-path", f"/proc/{pid}/ns/user", str(pid)]
        helper = start(arguments(self.network, target), self.folder)
        # Whoever publishes the same port next must find it free
        helper.holds = bool(self.network.ports)
        return helper


def start(argv: list[str], folder: str) -> Helper:
    """Start slirp4netns in `folder`, where its control socket will be, and return it when it is ready."""
    ready, says_ready = os.pipe2(os.O_CLOEXEC)
    ends, alive = os.pipe2(os.O_CLOEXEC)
    if os.geteuid() == 0:
        # Its own sandbox makes / private and no mount below: what it then mounts on a shared /tmp covers the host's.
        argv = ["unshare", "--mount", "--propagation", "private", programs.require(argv[0]), *argv[1:]]
    # Where root inside is not the caller, neither is the owner of its socket, which we must be able to connect to; to
    # everybody else the folder is closed.
    umask = os.umask(0)
    try:
        program = programs.spawn(argv, {3: says_ready, 4: ends}, folder)
    except BaseException:
        os.close(ready)
        os.close(alive)
        raise
    finally:
        os.umask(umask)
        os.close(says_ready)
        os.close(ends)
    helper = Helper(program, alive)
    try:
        answer = program.await_ready(ready)
    except BaseException:
        helper.forget()
        raise
    finally:
        os.close(ready)
    if not answer:
        raise failure(helper.finish())
    return helper


class Helper(Watched):
    """slirp4netns at work; called, it ends it. Where it `holds` ports that takes 20 ms: until it has ended."""

    __slots__ = ("_alive", "_program", "holds")

    def __init__(self, program: programs.Running, alive: int) -> None:
        super().__init__(os.pidfd_open(program.pid))
        self._program: programs.Running | None = program
        self._alive = alive
        self.holds = False

    def __call__(self) -> None:
        if self.holds or self._program is None:
            self.finish()
            return
        program = self._program
        self.forget()
        program.leave()

    def forget(self) -> None:
        """Tell it to end, if it has not, and be done with it."""
        os.close(self._alive)
        os.close(self.fd)
        self._program = None

    def finish(self) -> str:
        """Tell it to end, wait until it has, and return what it said. Idempotent."""
        if self._program is None:
            return ""
        program = self._program
        self.forget()
        return program.stop()

    def lost(self) -> str:
        program = self._program
        said = _last_line(self.finish())
        how = f"signal {-program.status}" if program and program.status < 0 else said or "it ended"
        return f"the network is gone: slirp4netns ended before the sandbox ({printable(how)})"


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("WARNING: Support for")]
    return lines[-1].strip() if lines else ""


def failure(said: str) -> SbxError:
    """Return the error for a slirp4netns that ended before it was ready, with the cure that fits this host."""
    cause = _last_line(said) or "it ended without a word"
    for mark in ("unrecognized option", "invalid option", "unknown option"):
        if mark in said:
            cause = next(line for line in said.splitlines() if mark in line).strip()
            return SbxError(
                "network-helper-old", f"attach slirp4netns: {printable(cause)}", "it is too old: version 1.0 is needed"
            )
    return SbxError("network-failed", f"attach slirp4netns: {printable(cause)}", tun_hint() or "or use --net none")


def tun_hint() -> str:
    """Return what is wrong with /dev/net/tun and how to mend it, or ""."""
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
        if os.stat("/dev/net/tun").st_rdev != os.makedev(10, 200):
            return "/dev/net/tun is not the tun device: as root, mknod it as character device 10 200; or use --net none"
    except FileNotFoundError:
        return "/dev/net/tun is missing: as root, modprobe tun; or use --net none"
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}; as root, chmod 0666 /dev/net/tun; or use --net none"
    return ""


def steps(spec: SandboxSpec) -> list[OutsideStep]:
    """Return the parent's steps that attach it."""
    return [Attach(spec.network, spec.folder)]
