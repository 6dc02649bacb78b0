"""The slirp4netns back end: a user-mode TCP/IP stack on a tap device in the sandbox. Outside.

slirp4netns(1). It runs as the caller, confined by its own sandbox and seccomp filter, and holds nothing of ours but
two pipes: on one it says that it is ready, the other's end of file tells it to end, whatever has ended us.
"""

from __future__ import annotations

import os

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.steps import OutsideStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.steps import Undo

RESOLVER = "10.0.2.3"


class Attach(OutsideStep):
    """Start slirp4netns on the sandbox's net namespace and wait until the interface is up."""

    __slots__ = ()

    def describe(self) -> str:
        return "attach slirp4netns"

    def execute(self, pid: int) -> Undo:
        ready, says_ready = os.pipe2(os.O_CLOEXEC)
        ends, alive = os.pipe2(os.O_CLOEXEC)
        # The host's loopback, which slirp4netns would answer for on 10.0.2.2, stays out of reach.
        argv = ["slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp",
                "--ready-fd=3", "--exit-fd=4", "--userns-path", f"/proc/{pid}/ns/user", str(pid), "tap0"]  # fmt: skip
        try:
            program = programs.spawn(argv, keep={3: says_ready, 4: ends})
        except BaseException:
            os.close(ready)
            os.close(alive)
            raise
        finally:
            os.close(says_ready)
            os.close(ends)

        def undo() -> None:
            os.close(alive)
            program.finish()

        answer = os.read(ready, 1)
        os.close(ready)
        if not answer:
            os.close(alive)
            said = program.finish()
            raise SbxError("network-failed", f"attach slirp4netns: {printable(said.strip().splitlines()[-1:] and said.strip().splitlines()[-1] or 'it ended')}",
                           "is /dev/net/tun there and open to you? or use --net none")  # fmt: skip
        return undo


def steps() -> list[OutsideStep]:
    """Return the parent's steps that attach it."""
    return [Attach()]
