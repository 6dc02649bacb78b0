"""The pasta back end: a user-mode stack that passes sockets on instead of packets. Outside.

pasta(1). It goes to the background when it is ready, confines itself, and ends when the name of the net namespace that
it was given is deleted: a link in the sandbox's folder. The parent does that, or the supervisor, or, if both were
killed, the resolver beside it: pasta reads the host's resolv.conf when it starts and never again, so ours follows that.
"""

from __future__ import annotations

import _signal
import os

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.network import names, resident, slirp4netns
from rootless.steps import OutsideStep, Watched

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.spec import Network, SandboxSpec
    from rootless.steps import Undo

#: Alone in a folder: pasta watches that, and of several things that vanish at once it may notice the first only.
_WATCHED = "net"
LINK = f"{_WATCHED}/netns"
_NUMBER = "pasta.pid"
_SIGTERM = 15


class StartResolver(OutsideStep):
    """Start the resolver; it gets ready beside pasta. Where others were asked to answer it only waits for our end."""

    __slots__ = ("folder", "network", "resolver")

    def __init__(self, network: Network, folder: str) -> None:
        self.network = network
        self.folder = folder
        self.resolver: resident.Resident | None = None

    def describe(self) -> str:
        return f"start a resolver on {names.LOCAL}" if self._answers() else "start what ends pasta after us"

    def execute(self, pid: int) -> Undo:
        user, net = resident.open_namespaces(pid)
        try:
            settings = {"answers": self._answers(), "unlink": LINK}
            self.resolver = resident.begin("resolver", self.folder, settings, (user, net))
        finally:
            os.close(user)
            os.close(net)
        return self.resolver

    def _answers(self) -> bool:
        return not self.network.servers


class AwaitResolver(OutsideStep):
    """Wait until the resolver answers."""

    __slots__ = ("started",)

    def __init__(self, started: StartResolver) -> None:
        self.started = started

    def describe(self) -> str:
        return "wait for the resolver"

    def execute(self, pid: int) -> None:
        assert self.started.resolver
        self.started.resolver.await_ready()


class Attach(OutsideStep):
    """Start pasta on the sandbox's net namespace and wait until it is ready."""

    __slots__ = ("folder", "network")

    def __init__(self, network: Network, folder: str) -> None:
        self.network = network
        self.folder = folder

    def describe(self) -> str:
        return "attach pasta"

    def execute(self, pid: int) -> Undo:
        start(self.network, self.folder, f"/proc/{pid}/ns/net", ["--userns", f"/proc/{pid}/ns/user"])
        return Helper(self.folder)


def start(
    network: Network, folder: str, net: str, user: list[str], own: tuple[str, str] = (names.OWN, names.GATEWAY)
) -> None:
    """Start pasta on the net namespace `net` and return when it is ready; the link to `net` is made in `folder`.

    `user` are the words about the user namespace, `own` the address of its device and that of its gateway.
    """
    link = f"{folder}/{LINK}"
    os.mkdir(f"{folder}/{_WATCHED}", 0o700)
    os.symlink(net, link)
    program = programs.spawn([*_arguments(network, folder, own), *user, "--netns", link], folder=folder)
    try:
        said = program.finish()
    except BaseException:
        os.unlink(link)  # if it went to the background just before it was killed, it ends with this
        raise
    if program.status:
        raise _failure(said)


def forget(folder: str) -> None:
    """Delete what one that was started in `folder` before left there; it ends with that."""
    for delete, name in ((os.unlink, LINK), (os.rmdir, _WATCHED)):
        try:
            delete(f"{folder}/{name}")
        except FileNotFoundError:
            continue


def _arguments(network: Network, folder: str, own: tuple[str, str]) -> list[str]:
    words = ["pasta", "--quiet", "--config-net", "--ns-ifname", names.INTERFACE, "--pid", f"{folder}/{_NUMBER}"]
    words += ["-a", own[0], "-n", "24", "-g", own[1]]
    words += ["-a", names.OWN6, "-g", names.GATEWAY6] if network.ipv6 else ["--ipv4-only"]
    # The gateway's address is the host's loopback to it, unless told otherwise
    words += [] if network.host_loopback else ["--no-map-gw"]
    # Ports of the sandbox and of the host's loopback are forwarded when asked for, and not because they are there
    return [*words, "-t", "none", "-u", "none", "-T", "none", "-U", "none"]


class Helper(Watched):
    """pasta at work; called, it ends it."""

    __slots__ = ("_folder",)

    def __init__(self, folder: str) -> None:
        self._folder = folder
        fd = os.open(f"{folder}/{_NUMBER}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            super().__init__(os.pidfd_open(int(os.read(fd, 32))))
        except (ProcessLookupError, ValueError):
            raise SbxError("network-failed", "attach pasta: it ended at once") from None
        finally:
            os.close(fd)

    def __call__(self) -> None:
        if self.fd < 0:
            return
        try:
            os.unlink(f"{self._folder}/{LINK}")
        except FileNotFoundError:
            pass
        try:
            _signal.pidfd_send_signal(self.fd, _SIGTERM)
        except ProcessLookupError:
            pass
        os.close(self.fd)
        self.fd = -1

    def lost(self) -> str:
        # The supervisor deletes the link when the sandbox ends, a moment before we hear of that
        expected = not os.path.lexists(f"{self._folder}/{LINK}")
        self()
        return "" if expected else "the network is gone: pasta ended before the sandbox"


def _failure(said: str) -> SbxError:
    lines = [line.strip() for line in said.splitlines() if line.strip() and "syslog" not in line]
    if any("unrecognized option" in line or "invalid option" in line for line in lines):
        cause = next(line for line in lines if "option" in line)
        return SbxError(
            "network-helper-old", f"attach pasta: {printable(cause)}", "it is too old: a version of 2023 is needed"
        )
    cause = lines[-1] if lines else "it ended without a word"
    return SbxError(
        "network-failed",
        f"attach pasta: {printable(cause)}",
        slirp4netns.tun_hint() or "use --net slirp4netns, or none",
    )


def steps(spec: SandboxSpec) -> list[OutsideStep]:
    """Return the parent's steps that attach it."""
    attach = Attach(spec.network, spec.folder)
    if spec.network.guarded:
        return [attach]  # the guard answers
    start = StartResolver(spec.network, spec.folder)
    return [start, attach, AwaitResolver(start)]
