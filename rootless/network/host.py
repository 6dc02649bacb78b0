"""The host's own network, of which a sandbox can be denied TCP ports by Landlock, and nothing else. Outside."""

from __future__ import annotations

from rootless import syscalls
from rootless.errors import SbxError, printable

#: What the user has to know
OPEN = "with --net host, --net-allow holds TCP alone: UDP is open"
_HINT = "with --net host only TCP ports can be allowed, of any host: --net-allow '*:443'; or use --net slirp4netns"


def ports(texts: list[str]) -> list[tuple[int, int]]:
    """Return the first and last port of each ``*:PORT[-PORT]``. Raises SbxError ``network-conflict``.

    UDP stays open, since names are asked for by it and landlock(7) has no rule for it; what else there is besides TCP
    is refused (sockets.py).
    """
    found = []
    for text in texts:
        host, _, numbers = text.removesuffix("/tcp").rpartition(":")
        first, _, last = numbers.partition("-")
        if host != "*" or not _is_port(first) or not _is_port(last or first) or int(last or first) < int(first):
            raise SbxError(
                "network-conflict", f"allow {printable(text)!r} with --net host: it is no port of any host", _HINT
            )
        found.append((int(first), int(last or first)))
    if syscalls.landlock_version() < 4:
        raise SbxError("network-conflict", "allow TCP ports with --net host: this kernel has no Landlock of version 4",
                       "it came with Linux 6.7; or use --net slirp4netns")  # fmt: skip
    return found


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6 and 0 < int(text) < 65536
