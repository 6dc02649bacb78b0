"""DNS messages, as much as a careful forwarder needs: RFC 1035, EDNS (RFC 6891), extended errors (RFC 8914). Warm."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from typing import NamedTuple

A, CNAME, AAAA, OPT = 1, 5, 28, 41
NO_ERROR, FORMAT_ERROR, SERVER_FAILURE, NAME_ERROR = 0, 1, 2, 3
BLOCKED = 15  #: extended error: the operator forbids it
_TRUNCATED = 0x0200
_TIMEOUT = 3.0
_MEMBER = 5  #: seconds that a member of a network is sure to keep its address


class Question(NamedTuple):
    """What is asked: `name` in lower case without the final dot, `raw` as it stands in the message."""

    name: str
    kind: int
    raw: bytes


class Answer(NamedTuple):
    """What was answered: the addresses of the name asked for, and how long they may be used."""

    addresses: list[str]
    seconds: int


def question(message: bytes) -> Question:
    """Return the one question of a query. Raises ValueError."""
    if len(message) < 17:
        raise ValueError("short")
    flags, count = struct.unpack_from("!HH", message, 2)
    if flags & 0x8000 or flags & 0x7800 or count != 1:
        raise ValueError("not a plain query")
    name, end = _name(message, 12)
    if end + 4 > len(message):
        raise ValueError("short")
    return Question(name, struct.unpack_from("!H", message, end)[0], message[12 : end + 4])


def query(name: str, kind: int) -> bytes:
    """Return the question for the records of `kind` that `name`, in ASCII, has."""
    labels = b"".join(bytes((len(label),)) + label.encode() for label in name.split("."))
    return os.urandom(2) + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def reply(query: bytes, asked: Question | None, code: int, extended: int = 0) -> bytes:
    """Return an answer without records to `query`; with `extended` where the query speaks EDNS."""
    flags = 0x8080 | (struct.unpack_from("!H", query, 2)[0] & 0x0110) | code
    body = asked.raw if asked else b""
    edns = asked is not None and extended and _has_edns(query, 12 + len(asked.raw))
    extra = struct.pack("!BHHIHHHH", 0, OPT, 1232, 0, 6, 15, 2, extended) if edns else b""
    return query[:2] + struct.pack("!HHHHH", flags, 1 if asked else 0, 0, 0, 1 if edns else 0) + body + extra


def of_member(query: bytes, asked: Question, addresses: list[str]) -> bytes:
    """Return the answer that the name asked for has `addresses`; of those the ones of the kind asked for are told."""
    kinds = {A: ".", AAAA: ":"}
    texts = [text for text in addresses if asked.kind in kinds and kinds[asked.kind] in text]
    packed = [ipaddress.ip_address(text).packed for text in texts]
    records = b"".join(b"\xc0\x0c" + struct.pack("!HHIH", asked.kind, 1, _MEMBER, len(data)) + data for data in packed)
    return query[:2] + struct.pack("!HHHHH", 0x8580, 1, len(packed), 0, 0) + asked.raw + records


def _has_edns(query: bytes, end: int) -> bool:
    return struct.unpack_from("!H", query, 10)[0] > 0 and query[end : end + 3] == b"\0\0\x29"


def answer(message: bytes, asked: Question) -> Answer:
    """Return the addresses that `message` gives for the name asked for, along its aliases. Raises ValueError."""
    records, position = struct.unpack_from("!H", message, 6)[0], 12 + len(asked.raw)
    aliases: dict[str, tuple[str, int]] = {}
    found: list[tuple[str, str, int]] = []
    for _ in range(records):
        owner, position = _name(message, position)
        if position + 10 > len(message):
            raise ValueError("short")
        kind, _class, seconds, length = struct.unpack_from("!HHIH", message, position)
        position += 10
        data = message[position : position + length]
        if len(data) != length:
            raise ValueError("short")
        if kind == CNAME:
            aliases[owner] = (_name(message, position)[0], seconds)
        elif (kind, length) in ((A, 4), (AAAA, 16)):
            found.append((owner, str(ipaddress.ip_address(data)), seconds))
        position += length
    owners, shortest = {asked.name}, 86400
    name = asked.name
    while name in aliases and aliases[name][0] not in owners:
        name, seconds = aliases[name]
        owners.add(name)
        shortest = min(shortest, seconds)
    # An address of anybody else's is not what was asked for, and would be let in by a lying server
    mine = [(address, seconds) for owner, address, seconds in found if owner in owners]
    return Answer([address for address, _ in mine], min([shortest, *(seconds for _, seconds in mine)]))


def _name(message: bytes, position: int) -> tuple[str, int]:
    """Return the name at `position` and where it ends; pointers lead back only, so it ends."""
    labels: list[bytes] = []
    end, limit = -1, position
    while True:
        if position >= len(message):
            raise ValueError("short")
        length = message[position]
        if length >= 0xC0:
            if position + 1 >= len(message):
                raise ValueError("short")
            target = (length & 0x3F) << 8 | message[position + 1]
            end = position + 2 if end < 0 else end
            if target >= limit:
                raise ValueError("loop")
            position = limit = target
        elif length > 63:
            raise ValueError("label")
        elif length == 0:
            end = position + 1 if end < 0 else end
            break
        else:
            labels.append(message[position + 1 : position + 1 + length])
            position += 1 + length
        if sum(map(len, labels)) > 255:
            raise ValueError("long")
    return b".".join(labels).decode("latin-1").lower(), end


def ask(query: bytes, asked: Question, servers: list[str], seconds: float = _TIMEOUT) -> bytes | None:
    """Pass `query` on to the first of `servers` that answers, and return its answer; None if none does.

    Each is asked twice and given `seconds` each time. A truncated answer is asked for again over TCP.
    """
    for server in servers * 2:
        try:
            found = _ask_udp(query, asked, server, seconds)
            if struct.unpack_from("!H", found, 2)[0] & _TRUNCATED:
                found = _ask_tcp(query, asked, server, seconds)
            return query[:2] + found[2:]
        except (OSError, ValueError):
            continue
    return None


def _family(server: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in server else socket.AF_INET


def _ask_udp(query: bytes, asked: Question, server: str, seconds: float) -> bytes:
    identity = os.urandom(2)
    # connected: only the server's own answers are received; and a port of its own for each question
    with socket.socket(_family(server), socket.SOCK_DGRAM) as link:
        link.settimeout(seconds)
        link.connect((server, 53))
        link.send(identity + query[2:])
        while True:
            found = link.recv(65535)
            if _fits(found, identity, asked):
                return found


def _ask_tcp(query: bytes, asked: Question, server: str, seconds: float) -> bytes:
    identity = os.urandom(2)
    with socket.create_connection((server, 53), seconds) as link:
        link.sendall(struct.pack("!H", len(query)) + identity + query[2:])
        with link.makefile("rb") as stream:
            found = stream.read(struct.unpack("!H", stream.read(2).ljust(2, b"\0"))[0])
    if not _fits(found, identity, asked):
        raise ValueError("not an answer")
    return found


def _fits(found: bytes, identity: bytes, asked: Question) -> bool:
    """Whether `found` answers what was asked: same number, same question."""
    return (
        len(found) >= 12 + len(asked.raw)
        and found[:2] == identity
        and found[12 : 12 + len(asked.raw)].lower() == asked.raw.lower()
    )
