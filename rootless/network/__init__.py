"""Networks: which back end a sandbox gets, and the parent's steps that attach it. Outside.

A sandbox has a net namespace of its own unless it shares the host's or another sandbox's. A back end is a module with
``steps(spec)``: what the parent does to join that namespace to the world. Modules that few launches need are imported
where they are needed.
"""

from __future__ import annotations

import os

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.network import names
from rootless.spec import Network

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.joining import Peer
    from rootless.networks.member import Member
    from rootless.options import Request
    from rootless.spec import SandboxSpec
    from rootless.steps import OutsideStep, Step


def _slirp4netns(spec: SandboxSpec) -> list[OutsideStep]:
    from rootless.network import slirp4netns

    return slirp4netns.steps(spec)


def _pasta(spec: SandboxSpec) -> list[OutsideStep]:
    from rootless.network import pasta

    return pasta.steps(spec)


def _nothing(spec: SandboxSpec) -> list[OutsideStep]:
    return []


#: name → steps(spec); `none` has loopback alone, `host` no net namespace of its own
BACKENDS = {"slirp4netns": _slirp4netns, "pasta": _pasta, "none": _nothing, "host": _nothing}


def wanted(request: Request) -> tuple[Network, str]:
    """Return the network that `request` asks for, on this host, and a notice for the user, or "".

    Raises SbxError ``network-unknown``, ``network-conflict``, ``port-invalid``.
    """
    shared = [kind for words in request.share for kind in words.split(",")]
    if request.net.startswith("sandbox:") or (request.join and "net" in (shared or ["net"])):
        if request.publish or request.host_loopback or request.net_allow or request.net_learn or request.net_log:
            raise SbxError(
                "network-conflict", "set up the network of another sandbox: that is for the one that it belongs to"
            )
        return Network(backend="sandbox", peer=request.net.partition(":")[2] or request.join), ""
    if is_shared(request.net):
        return _shared(request), ""
    name, notice = _backend("host" if "net" in shared and not request.join else request.net or "auto")
    network = Network(backend=name, host_loopback=request.host_loopback, ipv6=name in names.USER_MODE and has_ipv6(),
                      servers=[names.check_address(address, "set resolver") for address in request.dns])  # fmt: skip
    if request.host_loopback and name not in (*names.USER_MODE, "host"):
        raise SbxError("network-conflict", f"reach the host's loopback with --net {name}: nothing leads there",
                       "use --net slirp4netns")  # fmt: skip
    if request.publish:
        from rootless.network import ports

        if name == "host":
            raise SbxError("network-conflict", "publish with --net host: the command's ports are the host's already",
                           "leave --publish out")  # fmt: skip
        network.ports = [port for text in request.publish for port in ports.parse(text)]
    if name == "host" and request.net_allow and not (request.net_learn or request.net_log):
        from rootless.network import host

        network.tcp_ports = host.ports(request.net_allow)
        notice = host.OPEN
    elif request.net_allow or request.net_learn or request.net_log:
        from rootless.network import guarded

        guarded.fill_in(network, request)
    return network, notice


def _shared(request: Request) -> Network:
    """Return membership in a network of several sandboxes."""
    from rootless.network import ports, records

    if request.join:
        raise SbxError("network-conflict", f"join namespaces and network {request.net}: all of the network have its "
                       "user namespace", "leave --join out")  # fmt: skip
    if request.idmap:
        raise SbxError("network-conflict", f"join network {request.net} with --idmap: all in it have the same ids",
                       "leave --idmap out")  # fmt: skip
    config = records.read(request.net)
    if request.host_loopback and not config["host"]:
        # One helper program carries what all of them send, and cannot tell who sent it
        raise SbxError("network-conflict", f"reach the host's loopback from network {request.net}: its way out is "
                       "everybody's, so all in it do or none",
                       "make it with: sbx network create --host-loopback")  # fmt: skip
    first = config["subnet"].rpartition(".")[0]
    network = Network(backend="network", peer=request.net, host_loopback=bool(config["host"]), host=config["host"],
                      servers=[f"{first}.1"],
                      ports=[port for text in request.publish for port in ports.parse(text)])  # fmt: skip
    if request.net_allow or request.net_learn or request.net_log:
        from rootless.network import guarded

        network.servers = [names.check_address(address, "set resolver") for address in request.dns]
        guarded.fill_in(network, request)
    return network


def is_shared(name: str) -> bool:
    """Whether `name` is a network of several sandboxes."""
    if not name or name in (*BACKENDS, "auto") or ":" in name:
        return False
    from rootless.network import records

    return records.exists(name)


def check(spec: SandboxSpec) -> None:
    """Raise SbxError where the network of `spec` and its privileges contradict each other."""
    if spec.network.tcp_ports and not spec.landlock:
        raise SbxError("network-conflict", "allow TCP ports with --net host: Landlock, which does it, needs "
                       "no_new_privs and forbids mounts",
                       "leave out --nested, --privileged and --allow-new-privs")  # fmt: skip
    if spec.network.guarded:
        from rootless.network import guarded

        guarded.check_capabilities(spec.capabilities)


def _instead(name: str) -> str:
    """Return what another tool's word for a network is here, or what there is."""
    if name in ("bridge", "default"):
        return "each sandbox has a network of its own: leave it out; one for several: sbx network create NAME"
    if name.startswith("container:"):
        return f"it is: --net sandbox:{printable(name[len('container:') :])}"
    return f"back ends are auto, {', '.join(BACKENDS)}"


def _backend(name: str) -> tuple[str, str]:
    """Return the back end that `name` (or ``auto``) means on this host, and a notice, or ""."""
    if name == "auto":
        for found in names.USER_MODE:
            if programs.find(found):
                return found, ""
        return (
            "none",
            f"no network: slirp4netns is not installed; {programs.install_hint('slirp4netns')}, or say --net none",
        )
    if name not in BACKENDS:
        raise SbxError("network-unknown", f"choose network {printable(name)}: there is none of that name",
                       _instead(name))  # fmt: skip
    if name in names.USER_MODE:
        programs.require(name)
    return name, ""


def has_ipv6() -> bool:
    """Whether the host has an IPv6 address that leads somewhere; without one a sandbox would only try and wait."""
    try:
        fd = os.open("/proc/net/if_inet6", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # address, index, prefix length, scope (00 is global), flags, name
        return any(fields[3:4] == [b"00"] for fields in map(bytes.split, os.read(fd, 65536).splitlines()))
    finally:
        os.close(fd)


def steps(spec: SandboxSpec, peer: Peer | Member | None = None) -> list[OutsideStep]:
    """Return the parent's steps that attach the network of `spec`; `peer` is its membership in one of several."""
    acts: list[OutsideStep] = []
    if spec.network.backend == "sandbox":
        return acts  # attached, guarded and published by the one that it belongs to
    if spec.network.guarded:
        from rootless.network import guarded

        acts += guarded.steps(spec)
    if spec.network.backend == "network":
        acts += peer.steps(spec) if peer else []
    else:
        acts += BACKENDS[spec.network.backend](spec)
    if spec.network.ports:
        from rootless.network import publish

        acts += publish.steps(spec)
    return acts


def inside(spec: SandboxSpec) -> list[Step]:
    """Return pid 1's steps once it is attached."""
    if not spec.network.ipv6:
        return []
    from rootless.network import ipv6

    return [ipv6.Configure(names.INTERFACE, names.OWN6, names.GATEWAY6)]


def hold_sockets(spec: SandboxSpec) -> list[Step]:
    """Return the command's steps about its sockets, which need no_new_privs."""
    if not spec.network.tcp_ports:
        return []
    from rootless.network import sockets

    return [sockets.HoldSockets()]


def sysctls(network: Network) -> dict[str, str]:
    """Return the kernel settings that the back end needs in the sandbox's net namespace."""
    # The address is ours to set: there at once, with no router and no duplicate to wait for.
    return {"net.ipv6.conf.default.accept_ra": "0", "net.ipv6.conf.default.accept_dad": "0"} if network.ipv6 else {}
