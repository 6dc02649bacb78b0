"""The step that publishes a sandbox's ports, once its back end is attached. Outside."""

from __future__ import annotations

import os

from rootless.network import names, ports, resident, slirp4netns
from rootless.steps import OutsideStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.spec import Port, SandboxSpec
    from rootless.steps import Undo


class Publish(OutsideStep):
    """Publish ports through slirp4netns, which goes when the sandbox does, and they with it."""

    __slots__ = ("folder", "ports")

    def __init__(self, folder: str, published: list[Port]) -> None:
        self.folder = folder
        self.ports = published

    def describe(self) -> str:
        return f"publish {', '.join(ports.show(port) for port in self.ports)}"

    def execute(self, pid: int) -> Undo | None:
        for port in self.ports:
            ports.tell(port, ports.publish(self.folder, slirp4netns.SOCKET, port, names.OWN))
        return None


class Forward(Publish):
    """Publish ports through a forwarder of our own."""

    __slots__ = ()

    def execute(self, pid: int) -> Undo | None:
        user, net = resident.open_namespaces(pid)
        try:
            forwarder = resident.start("forwarder", self.folder, {}, (user, net))
        finally:
            os.close(user)
            os.close(net)
        try:
            for port in self.ports:
                ports.tell(port, ports.publish(self.folder, ports.FORWARDER, port, "127.0.0.1"))
        except BaseException:
            forwarder.finish()
            raise
        return forwarder


def steps(spec: SandboxSpec) -> list[OutsideStep]:
    """Return the parent's steps that publish the ports of `spec`."""
    theirs = [port for port in spec.network.ports if ports.by_slirp4netns(spec.network, port)]
    ours = [port for port in spec.network.ports if port not in theirs]
    return [*([Publish(spec.folder, theirs)] if theirs else []), *([Forward(spec.folder, ours)] if ours else [])]
