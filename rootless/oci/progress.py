"""Warm: what a pull or a push tells while it goes on: bars on a terminal, single lines elsewhere, or nothing.

Drawn here and not by rich, because a launch pulls as well, and what it loads lies below the command line.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from rootless.errors import printable

_BAR = 24  #: characters of a bar
_UP, _CLEAR = "\x1b[{}A", "\x1b[K"


class Progress:
    """Tells nothing. What all have in common: the parts of the whole, and how far each is."""

    live = False  #: whether tick() wants to be called some times a second

    def say(self, text: str) -> None:
        """Tell something that is neither begin nor end."""

    def begin(self, what: str, parts: Sequence[tuple[str, int]]) -> None:
        """Start to tell of `what`, whose `parts` have a name and a size in bytes each."""

    def update(self, part: int, count: int) -> None:
        """Note that `count` bytes of a part are done."""

    def done(self, part: int, how: str) -> None:
        """Note that a part is finished: `how` says whether it was fetched, or there already."""

    def tick(self) -> None:
        """Show how things stand."""

    def end(self) -> None:
        """Stop telling."""


class Lines(Progress):
    """A line for each event: for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._parts: Sequence[tuple[str, int]] = ()

    def say(self, text: str) -> None:
        self._stream.write(f"sbx: {printable(text)}\n")
        self._stream.flush()

    def begin(self, what: str, parts: Sequence[tuple[str, int]]) -> None:
        self._parts = parts
        self.say(f"{what}: {len(parts)} layer{'' if len(parts) == 1 else 's'}, {size(sum(n for _, n in parts))}")

    def done(self, part: int, how: str) -> None:
        name, count = self._parts[part]
        self.say(f"layer {part + 1}/{len(self._parts)} {name}: {how}, {size(count)}")


class Bars(Progress):
    """A bar for each part and one for the whole, drawn anew in place."""

    live = True

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._what = ""
        self._parts: Sequence[tuple[str, int]] = ()
        self._counts: list[int] = []
        self._first: list[int | None] = []
        self._how: list[str] = []
        self._drawn = 0
        self._start = 0.0
        self._last = 0.0

    def say(self, text: str) -> None:
        self._erase()
        self._stream.write(f"sbx: {printable(text)}\n")
        self._draw()

    def begin(self, what: str, parts: Sequence[tuple[str, int]]) -> None:
        self._what, self._parts = what, parts
        self._counts, self._how, self._first = [0] * len(parts), [""] * len(parts), [None] * len(parts)
        self._start = time.monotonic()
        self._draw()

    def update(self, part: int, count: int) -> None:
        if self._first[part] is None:
            self._first[part] = count  # what an earlier transfer had left says nothing of today's rate
        self._counts[part] = count

    def done(self, part: int, how: str) -> None:
        self._counts[part], self._how[part] = self._parts[part][1], how
        if self._first[part] is None:
            self._first[part] = self._counts[part]

    def tick(self) -> None:
        if time.monotonic() - self._last >= 0.1:
            self._erase()
            self._draw()

    def end(self) -> None:
        """Leave the bars as they are now."""
        self._erase()
        self._draw()
        self._drawn, self._parts = 0, ()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(_UP.format(self._drawn) + "\x1b[J")
        self._drawn = 0

    def _draw(self) -> None:
        if not self._parts:
            self._stream.flush()
            return
        columns, rows = _terminal_size(self._stream)
        lines = self._lines()
        # more lines than the terminal has could not be erased again: the ones at work are what counts
        if len(lines) > rows - 1:
            shown = [line for line, how in zip(lines, self._how, strict=False) if not how][: max(rows - 2, 0)]
            lines = [*shown, lines[-1]]
        self._stream.write("".join(f"{line[: columns - 1]}{_CLEAR}\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)
        self._last = time.monotonic()

    def _lines(self) -> list[str]:
        lines = [
            f"  {name} {_bar(count, total)} {size(count)} / {size(total)} {how}"
            for (name, total), count, how in zip(self._parts, self._counts, self._how, strict=True)
        ]
        count, total = sum(self._counts), sum(n for _, n in self._parts)
        return [
            *lines,
            f"{printable(self._what)} {_bar(count, total)} {size(count)} / {size(total)} {self._rate(count, total)}",
        ]

    def _rate(self, count: int, total: int) -> str:
        fetched = sum(
            count - first for count, first in zip(self._counts, self._first, strict=True) if first is not None
        )
        rate = fetched / max(time.monotonic() - self._start, 0.001)
        left = f", {_duration((total - count) / rate)} left" if rate >= 1 and count < total else ""
        return f"{size(int(rate))}/s{left}"


def choose(quiet: bool = False) -> Progress:
    """Return what fits: nothing when `quiet`, bars on a terminal that can move its cursor, lines elsewhere."""
    if quiet:
        return Progress()
    dumb = os.environ.get("TERM", "dumb") == "dumb"
    return Bars(sys.stderr) if sys.stderr.isatty() and not dumb else Lines(sys.stderr)


def size(count: int) -> str:
    """Return a number of bytes as people read it, in units of 1000."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes all")


def _bar(count: int, total: int) -> str:
    filled = _BAR * min(count, total) // total if total else _BAR
    return f"[{'#' * filled}{'.' * (_BAR - filled)}]"


def _duration(seconds: float) -> str:
    whole = min(int(seconds) + 1, 99 * 3600)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _terminal_size(stream: TextIO) -> tuple[int, int]:
    try:
        found = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return 80, 24
    return found.columns or 80, found.lines or 24
