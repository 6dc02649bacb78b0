"""Warm: how long we wait for the other side of a connection, and the HTTP response that holds it to that.

A timeout for each receive is not enough: a registry that sends one byte a minute never meets it, in the head or in the
body. So a deadline counts for the head, and a minimum rate for the body.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """How long we wait, in seconds and bytes."""

    connect: float = 20.0
    head: float = 60.0  #: from the end of the request to the end of the response's head
    window: float = 30.0  #: the time over which the rate of a body is measured
    rate: int = 1024  #: bytes a second, at least
    tries: int = 5  #: of a request, and of a blob without a mebibyte of progress between them
    backoff: float = 0.5  #: before the second try; doubled before each further one
    retry_after: float = 60.0  #: the longest Retry-After that is honoured


class Slow(TimeoutError):
    """The other side sends less than the minimum."""


class _PacedSocket(io.RawIOBase):
    """A socket's reading side that holds the other side to a deadline for the head and to a rate for the body.

    Only time spent waiting for the network counts: a consumer that takes its time does not make the network slow.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, head: float, patience: Patience) -> None:
        self._raw = raw
        self._sock = sock
        self._patience = patience
        self._deadline: float | None = time.monotonic() + head
        self._waited = 0.0
        self._came = 0

    def head_done(self) -> None:
        """From here on, the rate counts."""
        self._deadline = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
        start = time.monotonic()
        limit = self._patience.window - self._waited if self._deadline is None else self._deadline - start
        if limit <= 0:
            raise Slow("timed out")
        self._sock.settimeout(limit)
        count: int | None = self._raw.readinto(buffer)
        if self._deadline is None:
            self._measure(time.monotonic() - start, count or 0)
        return count

    def _measure(self, waited: float, came: int) -> None:
        self._waited += waited
        self._came += came
        if self._came >= self._patience.rate * self._patience.window:
            self._waited, self._came = 0.0, 0

    def close(self) -> None:
        self._raw.close()
        super().close()


class PacedResponse(http.client.HTTPResponse):
    patience = Patience()

    def __init__(self, sock: socket.socket, *args: object, **kwargs: object) -> None:
        super().__init__(sock, *args, **kwargs)  # type: ignore[arg-type]
        # The raw file made by makefile() stays below: it keeps the socket open when the connection is let go.
        raw = self.fp.detach()
        self._paced = _PacedSocket(raw, sock, sock.gettimeout() or self.patience.head, self.patience)
        self.fp = io.BufferedReader(self._paced, 1 << 16)

    def begin(self) -> None:
        super().begin()
        self._paced.head_done()
