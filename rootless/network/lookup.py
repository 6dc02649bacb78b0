"""Whether the names that a sandbox may reach exist: asked once, before its command starts. Warm."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from queue import SimpleQueue

from rootless.errors import SbxError, printable
from rootless.network import dns
from rootless.network.resolver import Workers

_LIMIT = 6.0  #: seconds for all servers together
_CHECK = "check the spelling, or leave it out"
_KINDS = (dns.A, dns.AAAA)
#: What came of a question; of those for one name the highest counts
_UNKNOWN, _BARE, _OUTAGE, _FOUND = range(4)


class Lookup:
    """Questions for the addresses of `names`, all asked at once; `result` waits for the answers."""

    def __init__(self, names: Iterable[str], servers: list[str]) -> None:
        self._servers = servers
        self._names = list(dict.fromkeys(names))
        self._answers: SimpleQueue[tuple[str, int]] = SimpleQueue()
        workers = Workers()
        for name in self._names:
            for kind in _KINDS:
                workers.submit(lambda name=name, kind=kind: self._ask(name, kind))  # type: ignore[misc]

    def result(self, best_effort: bool) -> str:
        """Return a notice about what could not be found out, or "".

        Raises SbxError ``name-unknown`` for names without an address. That nobody answers says nothing about a name:
        it is ``resolver-silent``, or the notice with `best_effort`.
        """
        best = dict.fromkeys(self._names, -1)
        for _ in range(len(self._names) * len(_KINDS)):
            name, outcome = self._answers.get()
            best[name] = max(best[name], outcome)
        said: dict[int, list[str]] = {}
        for name, outcome in best.items():
            said.setdefault(outcome, []).append(printable(name))
        if _UNKNOWN in said:
            raise SbxError("name-unknown", f"allow {', '.join(said[_UNKNOWN])}: no such name", _CHECK)
        if _BARE in said:
            raise SbxError("name-unknown", f"allow {', '.join(said[_BARE])}: no address of that name", _CHECK)
        if _OUTAGE not in said:
            return ""
        asked = ", ".join(map(printable, self._servers)) or "there is none in /etc/resolv.conf"
        message = f"allow {', '.join(said[_OUTAGE])}: no resolver has an answer ({asked})"
        if best_effort:
            return message
        raise SbxError("resolver-silent", message, "name one with --dns; --best-effort starts all the same")

    def _ask(self, name: str, kind: int) -> None:
        outcome = _OUTAGE
        try:
            outcome = self._outcome(dns.query(name, kind))
        except (ValueError, struct.error):
            pass  # an answer that is none
        finally:
            self._answers.put((name, outcome))

    def _outcome(self, query: bytes) -> int:
        asked = dns.question(query)
        found = dns.ask(query, asked, self._servers, _LIMIT / 2 / max(1, len(self._servers)))
        code = found[3] & 15 if found else dns.SERVER_FAILURE
        if found is None or code not in (dns.NO_ERROR, dns.NAME_ERROR):
            return _OUTAGE
        return _FOUND if dns.answer(found, asked).addresses else _UNKNOWN if code == dns.NAME_ERROR else _BARE
