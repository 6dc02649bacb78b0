"""Measure commands, one after the other or many at once; they take turns, so that a busy machine slows all alike."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Command = Sequence[str]  #: argv; UNIQUE in it becomes a name that no other launch has
UNIQUE = "{unique}"
WARM_UP = 2  #: rounds that do not count: they fill caches


class Failed(Exception):
    """A command ended with another status than 0."""

    def __init__(self, command: Command, status: int) -> None:
        super().__init__(f"{' '.join(command)}: status {os.waitstatus_to_exitcode(status)}")


class Times(NamedTuple):
    """Milliseconds of each launch: from before the process is made until it has been waited for, and its CPU time."""

    wall: list[float]
    cpu: list[float]


class Launcher:
    """Starts commands with posix_spawn: 0.2 ms, whatever the size of this process, the same for all."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._count = 0

    def start(self, command: Command) -> int:
        """Start `command` with /dev/null for stdin, stdout and stderr; return its process id."""
        self._count += 1
        argv = [word.replace(UNIQUE, f"bench-{os.getpid()}-{self._count}") for word in command]
        actions = [(os.POSIX_SPAWN_DUP2, self._null, fd) for fd in (0, 1, 2)]
        return os.posix_spawnp(argv[0], argv, self._environment, file_actions=actions)

    def time(self, command: Command) -> tuple[float, float]:
        """Return milliseconds of wall clock and of CPU for one launch. Raises Failed."""
        started = time.perf_counter()
        _, status, usage = os.wait4(self.start(command), 0)
        wall = time.perf_counter() - started
        if status:
            raise Failed(command, status)
        return wall * 1000, (usage.ru_utime + usage.ru_stime) * 1000

    def rate(self, command: Command, at_once: int, total: int) -> float:
        """Return launches per second, with `at_once` running at any time until `total` have been started."""
        started = time.perf_counter()
        running = 0
        for _ in range(total):
            if running == at_once:
                self._wait(command)
                running -= 1
            self.start(command)
            running += 1
        for _ in range(running):
            self._wait(command)
        return total / (time.perf_counter() - started)

    def _wait(self, command: Command) -> None:
        status = os.wait()[1]
        if status:
            raise Failed(command, status)


def taking_turns(names: Sequence[str], rounds: int) -> list[str]:
    """Return `rounds` rounds of `names`, each in another order, the same each time.

    For what one leaves behind (a program that still clears up, memory to be freed) is work while the next one runs, and
    that is not to be always the same one.
    """
    shuffled = random.Random(0)
    return [name for _ in range(rounds) for name in shuffled.sample(names, len(names))]


def sequential(launcher: Launcher, commands: Mapping[str, Command], rounds: int) -> dict[str, Times]:
    """Time each command once in each round."""
    times = {name: Times([], []) for name in commands}
    warm_up = WARM_UP * len(commands)
    for number, name in enumerate(taking_turns(list(commands), WARM_UP + rounds)):
        wall, cpu = launcher.time(commands[name])
        if number >= warm_up:
            times[name].wall.append(wall)
            times[name].cpu.append(cpu)
    return times


def parallel(
    launcher: Launcher, commands: Mapping[str, Command], at_once: int, total: int, rounds: int
) -> dict[str, list[float]]:
    """Take the rate of each command once in each round."""
    rates: dict[str, list[float]] = {name: [] for name in commands}
    for name in taking_turns(list(commands), rounds):
        rates[name].append(launcher.rate(commands[name], at_once, total))
    return rates


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {cells[0].ljust(widths[0])} | {' | '.join(padded[1:])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heads), line(rule), *(line(row) for row in rows)])


def median(values: Sequence[float]) -> float:
    """Return the median of `values`."""
    return statistics.median(values)


def lower_quartile(values: Sequence[float]) -> float:
    """Return what a quarter of `values` are below: the launch that nobody else's work disturbed."""
    return sorted(values)[len(values) // 4]
