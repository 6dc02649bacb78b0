"""What --net-allow says: hosts, ports, protocols; and the nftables rules that hold a sandbox to it. Warm."""

from __future__ import annotations

import ipaddress
import re
from typing import Any, NamedTuple

from rootless.errors import SbxError, printable

TABLE = "inet sbx"
LOG_GROUP = 7
ALLOWED, REFUSED = "sbx-allowed", "sbx-refused"  #: prefixes of what the kernel logs
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)


class Rule(NamedTuple):
    """One thing that may be reached. `network` is text like 10.0.0.0/8, or "" for a name; `ports` (0, 0) is all."""

    name: str
    network: str
    ports: tuple[int, int]
    protocol: str

    def covers(self, name: str) -> bool:
        """Whether this rule is about the host `name` (lower case, without a final dot)."""
        if self.name.startswith("*."):
            return name.endswith(self.name[1:]) and len(name) > len(self.name) - 1
        return bool(self.name) and name == self.name


def parse(text: str) -> Rule:
    """Return the rule for ``HOST[:PORT[-PORT]][/tcp|udp]``: a name, ``*.`` and a name, an address or a CIDR block.

    An IPv6 address with a port is written in brackets. Raises SbxError ``allow-invalid``.
    """
    body, protocol = text, ""
    for known in ("tcp", "udp"):
        if body.endswith("/" + known):
            body, protocol = body[: -len(known) - 1], known
    host, ports = _split(body, text)
    if host.startswith("[") or ":" in host or "/" in host or host.replace(".", "").isdecimal():
        try:
            network = ipaddress.ip_network(host.strip("[]"), strict="/" in host)
        except ValueError as error:
            raise SbxError("allow-invalid", f"allow {printable(text)!r}: {printable(str(error))}", _HINT) from None
        return Rule("", str(network), ports, protocol)
    try:
        name = host.encode("idna").decode() if not host.isascii() else host
    except UnicodeError:
        raise _invalid(text) from None
    name = name.lower().removesuffix(".")
    labels = name.removeprefix("*.").split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _invalid(text)
    return Rule(name, "", ports, protocol)


def _split(body: str, text: str) -> tuple[str, tuple[int, int]]:
    """Return host and ports; more than one colon without brackets is an IPv6 address."""
    if body.startswith("["):
        host, closed, rest = body.partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise _invalid(text)
        host, colon, port = host[1:], rest[:1], rest[1:]
        if "/" in port:
            raise _invalid(text)
    elif body.count(":") > 1:
        return body, (0, 0)
    else:
        host, colon, port = body.partition(":")
    if not colon:
        return host, (0, 0)
    low, _, high = port.partition("-")
    if not re.fullmatch(r"[0-9]{1,5}(-[0-9]{1,5})?", port, re.ASCII):
        raise _invalid(text)
    first, last = int(low), int(high or low)
    if not 0 < first <= last <= 65535:
        raise _invalid(text)
    return host, (first, last)


_HINT = "as in example.com, *.example.com:443, 192.0.2.0/24:22, [2001:db8::1]:53/udp"


def _invalid(text: str) -> SbxError:
    return SbxError("allow-invalid", f"allow {printable(text)!r}: it is HOST[:PORT[-PORT]][/tcp|udp]", _HINT)


def script(rules: list[Rule], everything: bool) -> str:
    """Return the nftables script for nft(8): what the sandbox sends is accepted by a rule, or refused at once.

    Refused connections are reset, so a program sees "connection refused" where an outage would make it wait.
    """
    static = [f"    {_target(rule.network)}{_transport(rule)} goto allowed" for rule in rules if rule.network]
    default = ["    goto allowed"] if everything else [
        f'    log prefix "{REFUSED}" group {LOG_GROUP}',
        "    meta l4proto tcp reject with tcp reset",
        "    reject with icmpx type admin-prohibited",
    ]  # fmt: skip
    sets = [
        f"  set {name} {{ type {kind}; flags timeout,interval; }}"
        for name, kind in (
            ("ports4", "ipv4_addr . inet_proto . inet_service"), ("ports6", "ipv6_addr . inet_proto . inet_service"),
        )
    ]  # fmt: skip
    sets += [
        f"  set {name} {{ type {kind}; flags timeout; }}"
        for name, kind in (("any4", "ipv4_addr"), ("any6", "ipv6_addr"))
    ]
    return "\n".join([
        f"table {TABLE} {{",
        *sets,
        f'  chain allowed {{ log prefix "{ALLOWED}" group {LOG_GROUP}',
        "    accept",
        "  }",
        # The resolver's questions and answers are accepted as they are: nothing has to be kept about them, nor can an
        # answer be lost over that
        "  chain local_out { type filter hook output priority raw",
        '    oif "lo" notrack',
        "  }",
        "  chain local_in { type filter hook prerouting priority raw",
        '    iif "lo" notrack',
        "  }",
        "  chain output {",
        "    type filter hook output priority 0; policy drop;",
        '    oif "lo" accept',
        "    ct state established,related accept",
        "    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept",
        "    ip daddr . meta l4proto . th dport @ports4 goto allowed",
        "    ip6 daddr . meta l4proto . th dport @ports6 goto allowed",
        "    ip daddr @any4 goto allowed",
        "    ip6 daddr @any6 goto allowed",
        *static,
        *default,
        "  }",
        "}",
        "",
    ])  # fmt: skip


def _target(network: str) -> str:
    return f"{'ip6' if ':' in network else 'ip'} daddr {network}"


def _transport(rule: Rule) -> str:
    if rule.ports == (0, 0):
        return f" meta l4proto {rule.protocol}" if rule.protocol else ""
    protocol = rule.protocol or "{ tcp, udp }"
    return f" meta l4proto {protocol} th dport {rule.ports[0]}-{rule.ports[1]}"


def pin(addresses: list[str], rules: list[Rule], seconds: int) -> str:
    """Return the script that allows `addresses`, the answers for a name, to the ports of its `rules` for a while."""
    lines = []
    for address in addresses:
        family = 6 if ":" in address else 4
        for rule in rules:
            if rule.ports == (0, 0) and not rule.protocol:
                lines += _renew(f"any{family}", address, seconds)
                continue
            ports = f"{rule.ports[0]}-{rule.ports[1]}" if rule.ports[0] != rule.ports[1] else str(rule.ports[0])
            ports = "0-65535" if rule.ports == (0, 0) else ports
            for protocol in [rule.protocol] if rule.protocol else ["tcp", "udp"]:
                lines += _renew(f"ports{family}", f"{address} . {protocol} . {ports}", seconds)
    return "\n".join([*lines, ""])


def _renew(name: str, element: str, seconds: int) -> list[str]:
    # Adding what is there leaves its end as it was: so it is removed first, and to be removed it has to be there.
    timed = f"add element {TABLE} {name} {{ {element} timeout {seconds}s }}"
    return [timed, f"delete element {TABLE} {name} {{ {element} }}", timed]


def to_settings(rules: list[Rule]) -> list[Any]:
    """Return `rules` as plain data."""
    return [tuple(rule) for rule in rules]


def from_settings(data: list[Any]) -> list[Rule]:
    """Return the rules in `data`."""
    return [Rule(*fields) for fields in data]
