"""Whether the names that a sandbox may reach exist: asked once, before its command starts. Warm."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from rootless.errors import SbxError, printable
from rootless.network import dns

_LIMIT = 6.0  #: seconds for all servers together
_CHECK = "check the spelling, or leave it out"
#: What came of a question; of two for one name the higher counts, unless one was found
_UNKNOWN, _BARE, _OUTAGE, _FOUND = range(4)


class Lookup:
    """Questions for the addresses of `names`, all asked at once; `result` waits for the answers."""

    def __init__(self, names: Iterable[str], servers: list[str]) -> None:
        self._servers = servers
        self._found: dict[str, list[Future[int]]] = {}
        names = dict.fromkeys(names)
        if names:
            pool = ThreadPoolExecutor(min(2 * len(names), 32))
            self._found = {name: [pool.submit(self._ask, name, kind) for kind in (dns.A, dns.AAAA)] for name in names}
            pool.shutdown(wait=False)

    def result(self, best_effort: bool) -> str:
        """Return a notice about what could not be found out, or "".

        Raises SbxError ``name-unknown`` for names without an address. That nobody answers says nothing about a name:
        it is ``resolver-silent``, or the notice with `best_effort`.
        """
        said: dict[int, list[str]] = {}
        for name, pending in self._found.items():
            answers = [answer.result() for answer in pending]
            if _FOUND not in answers:
                said.setdefault(max(answers), []).append(printable(name))
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

    def _ask(self, name: str, kind: int) -> int:
        query = dns.query(name, kind)
        asked = dns.question(query)
        found = dns.ask(query, asked, self._servers, _LIMIT / 2 / max(1, len(self._servers)))
        code = found[3] & 15 if found else dns.SERVER_FAILURE
        if found is None or code not in (dns.NO_ERROR, dns.NAME_ERROR):
            return _OUTAGE
        try:
            return _FOUND if dns.answer(found, asked).addresses else _UNKNOWN if code == dns.NAME_ERROR else _BARE
        except (ValueError, struct.error):
            return _OUTAGE
