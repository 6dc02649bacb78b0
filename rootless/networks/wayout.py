"""How a network of several sandboxes reaches the world: slirp4netns on its bridge, or pasta beside it. Warm.

slirp4netns   its tap device is a port of the bridge, and it answers in the network's own subnet
pasta         has one guest, so that is the keeper: members send to the bridge, and the keeper routes and translates
              to a tap device with a subnet of its own
"""

from __future__ import annotations

import ipaddress
import os
import subprocess
from typing import Any, NamedTuple

from rootless import network, programs, spec
from rootless.errors import SbxError, printable
from rootless.network import names, pasta, resident, slirp4netns

#: Where pasta's tap device may be, beside the network's subnet
_BESIDE = tuple(map(ipaddress.IPv4Network, ("10.0.2.0/24", "10.255.2.0/24")))
_SUBNET6 = {"slirp4netns": "fd00::/64", "pasta": "fd00:0:0:1::/64"}  #: slirp4netns has no other

OWN, GATEWAY, RESOLVER = 1, 2, 3  #: numbers in the subnet: the bridge's, slirp4netns's gateway and resolver


class WayOut(NamedTuple):
    """What the members are told: where to send everything, and what the keeper has to know."""

    gateway: str
    gateway6: str
    resolver: str  #: in the keeper's net namespace: answers as the host does
    host: str  #: what is the host's loopback, where it may be reached
    bridged: bool


def subnet6(config: dict[str, Any]) -> ipaddress.IPv6Network:
    """Return the IPv6 addresses of the network."""
    return ipaddress.IPv6Network(_SUBNET6[config["net"] or "slirp4netns"])


def choose(asked: str) -> str:
    """Return the back end that `asked` means: as for a single sandbox. Raises SbxError."""
    if asked not in ("auto", *names.USER_MODE):
        raise SbxError("network-unknown", f"choose way out {printable(asked)}: there is none of that name",
                       f"it is auto, {', '.join(names.USER_MODE)}; or say --internal")  # fmt: skip
    found = next((name for name in names.USER_MODE if programs.find(name)), names.USER_MODE[0])
    chosen = found if asked == "auto" else asked
    programs.require(chosen)
    if chosen == "pasta":
        programs.require("nft")
    return chosen


def describe(config: dict[str, Any]) -> WayOut | None:
    """Return the way out of the network with `config`, None for one that has none."""
    subnet = ipaddress.IPv4Network(config["subnet"])
    six = subnet6(config)
    if config["net"] == "slirp4netns":
        gateway = str(subnet[GATEWAY])
        return WayOut(gateway, str(six[GATEWAY]), str(subnet[RESOLVER]), gateway, bridged=True)
    if config["net"] == "pasta":
        return WayOut(str(subnet[OWN]), str(six[OWN]), names.LOCAL, str(_beside(subnet)[GATEWAY]), bridged=False)
    return None


def _beside(subnet: ipaddress.IPv4Network) -> ipaddress.IPv4Network:
    return next(other for other in _BESIDE if not other.overlaps(subnet))


def start(config: dict[str, Any], folder: str, keeper: int, ends: int) -> None:
    """Attach the way out to the net namespace of the process `keeper` and return when it is there.

    It ends when that process, which holds the other end of `ends`, does. Raises SbxError.
    """
    if config["net"] == "slirp4netns":
        _start_slirp4netns(config, folder, keeper, ends)
    elif config["net"] == "pasta":
        _start_pasta(config, folder, keeper)


def _start_slirp4netns(config: dict[str, Any], folder: str, keeper: int, ends: int) -> None:
    ready, says_ready = os.pipe2(os.O_CLOEXEC)
    wanted = spec.Network(backend="slirp4netns", ipv6=config["ipv6"], host_loopback=bool(config["host"]))
    target = [f"--cidr={config['subnet']}", "--userns-path", f"/proc/{keeper}/ns/user", str(keeper)]
    argv = slirp4netns.arguments(wanted, target)
    program = programs.spawn(argv, {3: says_ready, 4: ends}, folder)
    os.close(says_ready)
    try:
        answer = program.await_ready(ready)
    finally:
        os.close(ready)
    if not answer:
        raise slirp4netns.failure(program.finish())
    program.leave()


def _start_pasta(config: dict[str, Any], folder: str, keeper: int) -> None:
    pasta.forget(folder)  # one whose keeper was killed
    subnet = _beside(ipaddress.IPv4Network(config["subnet"]))
    wanted = spec.Network(ipv6=config["ipv6"] and network.has_ipv6(), host_loopback=bool(config["host"]))
    # It deletes pasta's link when the keeper has ended
    settings = {"answers": True, "unlink": pasta.LINK}
    user, net = resident.open_namespaces(keeper)
    lives = os.pidfd_open(keeper)
    try:
        resolver = resident.begin("resolver", folder, settings, (user, net), while_lives=lives)
        words = ["--userns", f"/proc/{keeper}/ns/user"]
        pasta.start(wanted, folder, f"/proc/{keeper}/ns/net", words, (str(subnet[100]), str(subnet[GATEWAY])))
        resolver.await_ready()
    finally:
        for fd in (user, net, lives):
            os.close(fd)


def route(config: dict[str, Any]) -> None:
    """Route and translate what the members send to pasta's device; in the keeper's net namespace. Raises SbxError."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        try:
            with open(f"/proc/sys/net/{name}", "w") as stream:
                stream.write("1")
        except FileNotFoundError:
            continue  # a kernel without IPv6
    script = f"""
        table inet sbx {{
          chain postrouting {{
            type nat hook postrouting priority 100
            oifname {names.INTERFACE} masquerade
          }}
        }}
    """
    done = subprocess.run(
        [programs.require("nft"), "-f", "-"], input=script, capture_output=True, text=True, timeout=30
    )
    if done.returncode:
        raise SbxError("network-rules", f"translate addresses: nft: {printable(done.stderr.strip().splitlines()[0])}",
                       "this needs a kernel with nf_tables for user namespaces; or: --net slirp4netns")  # fmt: skip
