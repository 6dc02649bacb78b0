"""`ps`, `kill`, `stop`: running sandboxes. Warm."""

from __future__ import annotations

import datetime
import os
import select
import shlex
import signal
import time
from typing import Annotated, Any

import typer

from rootless import build, cgroups, spec, state
from rootless.cli import listing, output, running
from rootless.errors import SbxError
from rootless.parent import FORWARDED


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (ps, kill, stop):
        app.command()(command)


Names = Annotated[
    list[str], typer.Argument(metavar="SANDBOX...", help="names, ids, or the start of ids", show_default=False)
]


def ps(
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print ids only")] = False,
    filter: listing.Filters = [],  # noqa: B006
    form: listing.Format = "",
    all: Annotated[
        bool, typer.Option("--all", "-a", help="accepted for docker's sake: nothing stays of what ended")
    ] = False,
    no_trunc: Annotated[
        bool, typer.Option("--no-trunc", help="accepted for docker's sake: nothing is shortened")
    ] = False,
) -> None:
    """List the sandboxes that run.

    Keys of --filter: id, name (regular expressions), label, status, ancestor (an image), network, volume.
    Fields of --format: .ID .Names .Image .Command .CreatedAt .RunningFor .Status .State .Ports .Mounts .Networks
    .Labels .Label .Pid
    """
    records = listing.choose(state.running(), filter, running.FILTERS)
    if quiet:
        output.lines(record["id"] for record in records)
    elif json or form == "json":
        output.json([running.summary(record) for record in records])
    elif form:
        listing.show(form, records, running.COLUMNS)
    else:
        output.table(("ID", "NAME", "IMAGE", "COMMAND", "UP", "PID"), [_row(record) for record in records])


def kill(
    names: Names,
    signal_name: Annotated[str, typer.Option("--signal", "-s", metavar="SIGNAL", help="name or number")] = "KILL",
) -> None:
    """Send a signal to sandboxes' commands; KILL, the default, ends the whole sandbox."""
    number = build.signal_number(signal_name)
    for name in names:
        record = state.find(name)
        if number == signal.SIGKILL and record.get("cgroup"):
            os.close(state.open_process(record))
            cgroups.kill(record["cgroup"])  # all at once, those that are not below pid 1 too
        else:
            _send(record, number)
        output.lines([name])


def stop(
    names: Names,
    seconds: Annotated[
        float | None, typer.Option("--time", "--timeout", "-t", metavar="SECONDS", help="how long to wait before KILL")
    ] = None,
    signal_name: Annotated[str, typer.Option("--signal", "-s", metavar="SIGNAL", help="name or number")] = "",
) -> None:
    """Tell sandboxes to end, and kill those that have not after some seconds.

    Unless said otherwise, the signal is that of --stop-signal of their run, or of their image, or TERM, and the time
    that of --stop-timeout, or 10 seconds; -1 is for ever.
    """
    number = build.signal_number(signal_name) if signal_name else 0
    records = [state.find(name) for name in names]
    processes = [state.open_process(record) for record in records]
    asked = [spec.unpack(record["spec"]) for record in records]
    for record, wanted in zip(records, asked, strict=True):
        _send(record, number or wanted.stop_signal)
        if (path := record.get("cgroup")) and cgroups.is_frozen(path):
            cgroups.freeze(path, False)  # a paused one could not act on it
    begun = time.monotonic()
    for name, process, wanted in zip(names, processes, asked, strict=True):
        limit = wanted.stop_timeout if seconds is None else seconds
        if not _has_ended(process, max(0.0, begun + limit - time.monotonic()) if limit >= 0 else None):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            _has_ended(process, None)
        output.lines([name])


def _send(record: dict[str, Any], number: int) -> None:
    """Send a signal to the command of a sandbox; nothing if it has just ended."""
    process = state.open_process(record)
    if number in FORWARDED and not spec.unpack(record["spec"]).init:
        # The command is pid 1 and may be deaf to what would end another process: its parent knows what to do then.
        os.close(process)
        process = os.pidfd_open(record["parent"])
        if state.start_time(record["parent"]) != record["parent_start_time"]:
            raise SbxError("sandbox-gone", f"find sandbox {record['name']}: it has just ended")
    try:
        signal.pidfd_send_signal(process, number)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    name = record["name"] if record["name"] != record["id"] else ""
    command = shlex.join(record["command"])
    return record["id"], name, record["image"], command, _age(record["created"]), str(record["pid"])


def _has_ended(process: int, seconds: float | None) -> bool:
    """Wait for the process behind a pidfd, at most `seconds`."""
    return bool(select.select([process], [], [], seconds)[0])


def _age(created: float) -> str:
    seconds = int(max(0, datetime.datetime.now().timestamp() - created))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
