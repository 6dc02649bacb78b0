"""Networks: a back end is a module with `steps()`, what the parent does to attach it. Outside.

A sandbox has a net namespace of its own unless it shares the host's; the back end joins that to the world.
"""

from __future__ import annotations

from rootless import programs
from rootless.errors import SbxError
from rootless.network import slirp4netns
from rootless.steps import OutsideStep

#: name → steps(); `none` has loopback alone, `host` is no namespace of its own
BACKENDS = {
    "none": lambda: [],
    "host": lambda: [],
    "slirp4netns": slirp4netns.steps,
}


def choose(name: str) -> tuple[str, str]:
    """Return the back end that `name` (or ``auto``) means on this host, and a notice for the user, or "".

    Raises SbxError ``network-unknown``.
    """
    if name == "auto":
        if programs.find("slirp4netns"):
            return "slirp4netns", ""
        return "none", f"no network: slirp4netns is not installed; {programs.install_hint('slirp4netns')}, or say --net none"
    if name not in BACKENDS:
        raise SbxError("network-unknown", f"choose network {name}: there are {', '.join(BACKENDS)} and auto")
    return name, ""


def resolvers(name: str) -> list[str]:
    """Return the addresses of the resolvers that a sandbox on back end `name` asks; empty for those of the host."""
    return [slirp4netns.RESOLVER] if name == "slirp4netns" else []


def steps(name: str) -> list[OutsideStep]:
    """Return the parent's steps that attach back end `name`."""
    return BACKENDS[name]()
