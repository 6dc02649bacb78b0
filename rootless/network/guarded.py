"""The step that puts a sandbox's network under guard, before it is attached. Outside."""

from __future__ import annotations

import os

from rootless.errors import SbxError
from rootless.network import resident
from rootless.steps import OutsideStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from rootless.options import Request
    from rootless.spec import Network, SandboxSpec
    from rootless.steps import Undo

_NET_ADMIN, _NET_RAW = 1 << 12, 1 << 13


def fill_in(network: Network, request: Request) -> None:
    """Set what `request` says about the guard. Raises SbxError ``allow-invalid``, ``network-conflict``."""
    from rootless import programs
    from rootless.network import rules

    programs.require("nft")
    for text in request.net_allow:
        rules.parse(text)
    if network.backend in ("host", "none"):
        why = "the host's own cannot be" if network.backend == "host" else "there is none"
        raise SbxError("network-conflict", f"guard the network with --net {network.backend}: {why}",
                       "use --net slirp4netns")  # fmt: skip
    network.guarded = True
    network.allow, network.learn = request.net_allow, request.net_learn
    network.log = os.path.abspath(request.net_log) if request.net_log else ""


def check_capabilities(capabilities: int) -> None:
    """Raise SbxError unless a command with `capabilities` is held by the rules."""
    if capabilities & (_NET_ADMIN | _NET_RAW):
        raise SbxError("network-conflict", "guard the network: NET_ADMIN or NET_RAW would let it around the rules",
                       "leave --net-allow out, or --privileged and --cap-add NET_ADMIN or NET_RAW")  # fmt: skip


class Guard(OutsideStep):
    """Start the guard and wait until the rules hold and names are answered."""

    __slots__ = ("best_effort", "folder", "hosts", "network")

    def __init__(self, network: Network, folder: str, hosts: str, best_effort: bool) -> None:
        self.network = network
        self.folder = folder
        self.hosts = hosts
        self.best_effort = best_effort

    def describe(self) -> str:
        return f"allow the network {', '.join(self.network.allow) or 'everything, and record it'}"

    def execute(self, pid: int) -> Undo:
        user, net = resident.open_namespaces(pid)
        try:
            return resident.start("guard", self.folder, self._settings(), (user, net))
        finally:
            os.close(user)
            os.close(net)

    def _settings(self) -> dict[str, object]:
        from rootless.network import pasta, rules

        parsed = [rules.parse(text) for text in self.network.allow]
        everything = self.network.learn or not parsed
        known_inside = {name.lower() for line in self.hosts.splitlines() for name in line.split()[1:]}
        # A name in the sandbox's /etc/hosts is never asked for: what it says there is allowed as it stands
        for line in self.hosts.splitlines():
            address, *known = line.split()
            parsed += [
                rule._replace(name="", network=address)
                for rule in parsed
                if any(rule.covers(name.lower()) for name in known)
            ]
        exact = [rule.name for rule in parsed if rule.name and not rule.name.startswith("*.")]
        shared = self._shared()
        if shared:  # members come and go; where there is no way out, there are no others
            exact = [name for name in exact if "." in name and shared["net"]]
        return {
            "rules": rules.to_settings(parsed), "everything": everything, "learn": self.network.learn,
            "log": self.network.log, "servers": self.network.servers, "best_effort": self.best_effort,
            "shared": shared, "unlink": pasta.LINK if self.network.backend == "pasta" else "",
            "names": [] if everything else [name for name in exact if name not in known_inside],
        }  # fmt: skip

    def _shared(self) -> dict[str, Any]:
        """Return what the guard has to know of the network of several sandboxes, {} where there is none."""
        if self.network.backend != "network":
            return {}
        from rootless.network import records

        config = records.read(self.network.peer)
        return {"folder": records.folder(self.network.peer), **config}


def steps(spec: SandboxSpec) -> list[OutsideStep]:
    """Return the parent's step."""
    return [Guard(spec.network, spec.folder, spec.files.get("/etc/hosts", ""), spec.best_effort)]
