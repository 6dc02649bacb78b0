"""The guard: a resolver in the sandbox that lets in what it answers, and the record of what was asked for. Warm.

The rules are in the sandbox's own net namespace, so nothing that a program ignores could get around them, and over
which the command has no capability. Names are answered by this resolver alone: what is not allowed is answered "no such
name" without asking anybody, so that no question can carry data out; the addresses of what is allowed are let in
before the answer goes to who asked. Answers come from the host's own resolvers, read anew for each question, and for
members of a network of several from its keeper.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import struct
import sys
import threading
import time
from typing import Any

from rootless import programs
from rootless.errors import SbxError, printable
from rootless.network import dns, lookup, names, nflog, records, resident, resolver, rules
from rootless.network.within import Within

_SHORTEST = 30  #: seconds that an answer stays allowed at least: who got it has to connect
_SHOWN = 20
_UNIQUE_LOCAL = ipaddress.ip_network("fd00::/48")  #: has the IPv6 addresses of every network of ours


def serve(settings: dict[str, Any]) -> None:
    """Set the rules up, then answer and record until ALIVE ends; say then what was refused, or learnt."""
    within = Within()
    guard = Guard(within, settings)
    lookups = lookup.Lookup(settings["names"], guard.upstream())  # answered while the rules are set up
    wanted = rules.from_settings(settings["rules"])
    if said := within.run(programs.require("nft"), rules.script(wanted, settings["everything"])):
        raise SbxError("network-rules", f"set up the network's rules: nft: {printable(said.splitlines()[0])}",
                       "this needs a kernel with nf_tables for user namespaces")  # fmt: skip
    log = within.netlink(nflog.FAMILY)
    nflog.bind(log, rules.LOG_GROUP)
    acts = {**guard.listen(within), log.fileno(): lambda: guard.take_log(log)}
    os.write(resident.READY, b"." + lookups.result(settings["best_effort"]).encode())
    os.close(resident.READY)
    resolver.serve_until_the_end(acts)
    sys.stderr.write(guard.summary())
    sys.stderr.flush()


class Guard(resolver.Resolver):
    """What is known of one sandbox's asking and trying."""

    def __init__(self, within: Within, settings: dict[str, Any]) -> None:
        super().__init__(settings["servers"])
        self._within = within
        self._rules = rules.from_settings(settings["rules"])
        self._everything = bool(settings["everything"])
        self._learn = bool(settings["learn"])
        self._shared: dict[str, Any] = settings["shared"]
        self._ours = {*names.OURS, self._shared.get("host", "")}
        self._subnets = [ipaddress.ip_network(self._shared["subnet"]), _UNIQUE_LOCAL] if self._shared else []
        self._lock = threading.Lock()  # of what is counted
        self._pinning = threading.Lock()  # nft takes its time; who is refused need not wait for it
        self._pinned: dict[tuple[str, str], float] = {}
        self._names: dict[str, str] = {}
        self._refused: dict[str, int] = {}
        self._learnt: dict[str, None] = {}
        self._file = -1
        if settings["log"]:
            try:
                self._file = os.open(settings["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise SbxError(
                    "log-unwritable", f"write {settings['log']}: {error.strerror}", "see: --net-log"
                ) from None

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _answer_question(self, query: bytes, asked: dns.Question) -> bytes:
        about = [rule for rule in self._rules if rule.covers(asked.name)]
        if not about and not self._everything:
            self._record(event="ask", name=asked.name, allowed=False)
            self._count(asked.name)
            return dns.reply(query, asked, dns.NAME_ERROR, dns.BLOCKED)
        known = self._of_member(query, asked)
        found = known or self._from_outside(query, asked)
        if found is None:
            self._record(event="ask", name=asked.name, allowed=True, answer="none: no resolver answers")
            return dns.reply(query, asked, dns.SERVER_FAILURE)
        try:
            answer = dns.answer(found, asked)
        except (ValueError, struct.error):
            return dns.reply(query, asked, dns.SERVER_FAILURE)
        self._record(event="ask", name=asked.name, allowed=True, addresses=answer.addresses)
        self._pin(asked.name, answer, about, trusted=bool(known))
        return found

    def _of_member(self, query: bytes, asked: dns.Question) -> bytes:
        """Return the answer for the name of a member of the sandbox's network, b"" if it is none."""
        for member in records.members(self._shared["folder"]) if self._shared else []:
            if member["name"].lower() == asked.name:
                return dns.of_member(query, asked, member["addresses"])
        return b""

    def _from_outside(self, query: bytes, asked: dns.Question) -> bytes | None:
        """Return the world's answer, as far as there is a way to it; None where no resolver has one."""
        if self._shared and not (self._shared["net"] and "." in asked.name):
            return dns.reply(query, asked, dns.NAME_ERROR)
        return dns.ask(query, asked, self.upstream())

    def _is_sane(self, address: str) -> bool:
        """Whether an answer from outside may let `address` in: not what only a liar would answer.

        That is clouds' metadata, our gateway, which may be the host's loopback, and who else is in the network.
        """
        parsed = ipaddress.ip_address(address)
        return (
            not (parsed.is_link_local or parsed.is_loopback or parsed.is_unspecified or parsed.is_multicast)
            and address not in self._ours
            and not any(parsed in subnet for subnet in self._subnets)
        )

    def _pin(self, name: str, answer: dns.Answer, about: list[rules.Rule], trusted: bool) -> None:
        """Allow what was answered, before anybody hears of it.

        A member's address may soon be somebody else's, so it is not allowed for longer than it was given for.
        """
        seconds = answer.seconds if trusted else max(answer.seconds, _SHORTEST)
        with self._pinning:
            self._names.update(dict.fromkeys(answer.addresses, name))
            end = time.monotonic() + seconds
            fresh = [
                address
                for address in answer.addresses
                if self._pinned.get((name, address), 0) < end - 1 and (trusted or self._is_sane(address))
            ]
            if not fresh or not about:
                return
            if said := self._within.run(programs.require("nft"), rules.pin(fresh, about, seconds)):
                sys.stderr.write(f"sbx: allow {printable(name)}: nft: {printable(said.splitlines()[0])}\n")
                return
            self._pinned.update({(name, address): end for address in fresh})

    # ── connections ───────────────────────────────────────────────────────────────────────────────────────────────

    def take_log(self, link: socket.socket) -> None:
        """Record what the kernel logged."""
        try:
            data = link.recv(1 << 17)
        except OSError:
            return  # ENOBUFS: more was logged than we could read, and is lost
        for packet in nflog.packets(data):
            name = self._names.get(packet.address, "")
            allowed = packet.prefix == rules.ALLOWED
            self._record(
                event="connect",
                name=name,
                allowed=allowed,
                address=packet.address,
                port=packet.port,
                protocol=packet.protocol,
            )
            host = name or (f"[{packet.address}]" if ":" in packet.address else packet.address)
            what = f"{host}:{packet.port}" if packet.port else host
            what += "" if packet.protocol == "tcp" or not packet.port else f"/{packet.protocol}"
            if allowed:
                self._learnt.setdefault(what)
            else:
                self._count(what)

    # ── what is said ──────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self, what: str) -> None:
        with self._lock:
            if what in self._refused or len(self._refused) < 1000:
                self._refused[what] = self._refused.get(what, 0) + 1

    def _record(self, **fields: Any) -> None:
        if self._file >= 0:
            line = json.dumps(
                {"time": round(time.time(), 3), **{key: value for key, value in fields.items() if value != ""}}
            )
            os.write(self._file, line.encode() + b"\n")

    def summary(self) -> str:
        """Return what the user is told at the end."""
        if self._learn:
            return "".join(
                ["sbx: the sandbox reached:\n", *(f"  --net-allow {printable(what)}\n" for what in self._learnt)]
            )
        shown = list(self._refused.items())[:_SHOWN]
        lines = [
            f"sbx: refused {printable(what)}{f' ({count} times)' if count > 1 else ''}: not in --net-allow\n"
            for what, count in shown
        ]
        rest = len(self._refused) - len(shown)
        return "".join([*lines, f"sbx: refused {rest} more\n" if rest else ""])
