"""What the kernel logs of a net namespace's packets: nfnetlink_log. Warm."""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import NamedTuple

FAMILY = 12  #: NETLINK_NETFILTER
_SUBSYSTEM, _PACKET, _CONFIG = 4, 0, 1
_CFG_CMD, _CFG_MODE, _CFG_QTHRESH, _BIND, _COPY_PACKET = 1, 2, 5, 1, 2
_PAYLOAD, _PREFIX = 9, 10
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


class Packet(NamedTuple):
    """The first packet of what was tried: where to, and which rule said so."""

    prefix: str
    protocol: str
    address: str
    port: int


def bind(link: socket.socket, group: int) -> None:
    """Subscribe to what is logged to `group`. Raises OSError."""
    copy = struct.pack("!IBx", 64, _COPY_PACKET)
    for attribute in (
        _attribute(_CFG_CMD, bytes((_BIND,))),
        _attribute(_CFG_MODE, copy),
        _attribute(_CFG_QTHRESH, struct.pack("!I", 1)),
    ):
        body = struct.pack("!BBH", socket.AF_UNSPEC, 0, group) + attribute
        link.send(struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM << 8 | _CONFIG, 5, 1, 0) + body)  # REQUEST | ACK
        number = -struct.unpack_from("=i", link.recv(4096), 16)[0]
        if number:
            raise OSError(number, "nfnetlink_log")


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def packets(data: bytes) -> list[Packet]:
    """Return the packets in what was received."""
    found, position = [], 0
    while position + 20 <= len(data):
        length, kind = struct.unpack_from("=IH", data, position)
        if length < 20:
            break
        if kind == (_SUBSYSTEM << 8 | _PACKET) and (packet := _packet(data[position + 20 : position + length])):
            found.append(packet)
        position += (length + 3) & ~3
    return found


def _packet(attributes: bytes) -> Packet | None:
    values, position = {}, 0
    while position + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, position)
        if length < 4:
            break
        values[kind & 0x3FFF] = attributes[position + 4 : position + length]
        position += (length + 3) & ~3
    payload = values.get(_PAYLOAD, b"")
    if len(payload) < 20:
        return None
    if payload[0] >> 4 == 4:
        protocol, address, header = payload[9], payload[16:20], (payload[0] & 15) * 4
    elif len(payload) >= 40:
        protocol, address, header = payload[6], payload[24:40], 40
    else:
        return None
    ported = protocol in (6, 17, 132) and len(payload) >= header + 4
    port = struct.unpack_from("!H", payload, header + 2)[0] if ported else 0
    prefix = values.get(_PREFIX, b"").rstrip(b"\0").decode("ascii", "replace")
    return Packet(prefix, _PROTOCOLS.get(protocol, str(protocol)), str(ipaddress.ip_address(address)), port)
