"""Addresses and names in a sandbox: /etc/hosts and /etc/resolv.conf, by back end. Either side.

slirp4netns's addresses (slirp4netns(1)) serve for pasta too, so a sandbox looks the same on both.
"""

from __future__ import annotations

from rootless import syscalls
from rootless.errors import SbxError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.spec import Network

USER_MODE = ("slirp4netns", "pasta")  #: back ends that are a user-mode stack, the preferred one first
INTERFACE = "tap0"
OWN, GATEWAY, RESOLVER = "10.0.2.100", "10.0.2.2", "10.0.2.3"
OWN6, GATEWAY6, RESOLVER6 = "fd00::100", "fd00::2", "fd00::3"
LOCAL = "127.0.0.53"  #: where a resolver of ours answers, in the sandbox
OURS = (GATEWAY, RESOLVER, GATEWAY6, RESOLVER6)
HOST_NAMES = "host.containers.internal host.docker.internal"
_BLANK = frozenset(" \t\n\r\0")


def check_address(text: str, what: str) -> str:
    """Return `text` if it is an IPv4 or IPv6 address; else raise SbxError ``address-invalid``."""
    if not syscalls.packed_address(text):
        raise SbxError("address-invalid", f"{what} {printable(text)!r}: it is no IP address")
    return text


def hosts(network: Network, hostname: str, added: list[str]) -> str:
    """Return the sandbox's /etc/hosts; `added` are NAME:ADDRESS, where ``host-gateway`` is the host's loopback."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback", f"127.0.1.1 {hostname}"]
    gateway = network.host or GATEWAY
    host = "127.0.0.1" if network.backend == "host" else gateway if network.host_loopback else ""
    if host:
        lines.append(f"{host} {HOST_NAMES}")
    for text in added:
        name, colon, address = text.partition(":")
        if not colon or not name or set(name) & _BLANK:
            raise SbxError("host-invalid", f"add host {printable(text)!r}: it is NAME:ADDRESS")
        if address == "host-gateway" and not host:
            raise SbxError("host-invalid", f"add host {printable(text)!r}: the host's loopback cannot be reached",
                           "allow it with --host-loopback")  # fmt: skip
        address = (
            host
            if address == "host-gateway"
            else check_address(address.strip("[]"), f"add host {printable(name)}: address")
        )
        lines.append(f"{address} {name}")
    return "\n".join(lines) + "\n"


def resolv_conf(network: Network, servers: list[str], domains: list[str], host: str) -> str:
    """Return the sandbox's resolv.conf(5); `host` is the host's.

    Its search list and options are taken over. Its servers are not, where a back end passes questions on to whatever
    the host asks at that moment: so a resolver on the host's loopback serves, and a VPN that comes or goes is followed.
    """
    for word in domains:
        if not word or set(word) & _BLANK:
            raise SbxError("dns-invalid", f"set search domain {printable(word)!r}: it is one domain")
    servers = [check_address(address, "set resolver") for address in servers]
    if network.backend == "none":
        servers = []  # nobody could be asked: an address here would only be waited for
    elif network.guarded:
        servers = [LOCAL]  # it asks whom --dns names
    elif network.backend == "network":
        servers = servers or network.servers  # the network's own, which knows its members
    elif not servers:
        servers = resolvers(network, host)
    return "".join(f"{line}\n" for line in [*_search(domains, host), *(f"nameserver {server}" for server in servers)])


def resolvers(network: Network, host: str) -> list[str]:
    """Return what the sandbox asks unless it was told whom."""
    theirs = [words[1] for words in map(str.split, host.splitlines()) if len(words) > 1 and words[0] == "nameserver"]
    if network.backend not in USER_MODE:
        return theirs
    if network.backend == "pasta":
        return [LOCAL]  # pasta itself passes questions on to whom the host asked when it started
    # slirp4netns has one address for the host's first IPv4 resolver and one for its first IPv6 resolver. Where
    # the host has none at this moment, it may have one later.
    four = [RESOLVER] if not theirs or any(":" not in server for server in theirs) else []
    return four + ([RESOLVER6] if network.ipv6 and any(":" in server for server in theirs) else [])


def _search(domains: list[str], host: str) -> list[str]:
    lines = [line.strip() for line in host.splitlines() if line.split()[:1] in (["search"], ["domain"], ["options"])]
    if domains:
        lines = [f"search {' '.join(domains)}", *(line for line in lines if line.startswith("options"))]
    # The local stub's own: edns0 and trust-ad are about the link to it, which we are not
    return [line for line in lines if line.isprintable()]
