"""`update`, `pause`, `unpause`, `stats`, `top`: the limits of running sandboxes and what they use. Warm."""

from __future__ import annotations

import inspect
import json as _json
import marshal
import os
import sys
import time as _time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rootless import accounting, cgroups, options, receipt, resources, spec, state
from rootless.accounting import size
from rootless.cli import hot, output
from rootless.errors import SbxError, printable
from rootless.options import Request


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_update(), pause, unpause, stats, top):
        app.command()(command)


Names = Annotated[list[str], typer.Argument(metavar="SANDBOX...", help="names, ids, or the start of ids")]
Some = Annotated[list[str], typer.Argument(metavar="[SANDBOX...]", help="these only", show_default=False)]


def _update() -> Callable[..., None]:
    """Return the command, with the limits of `run`'s own table as its options."""

    def update(**values: Any) -> None:
        """Change the limits of running sandboxes, at once.

        A limit on memory below what is in use takes effect all the same: the kernel frees what it can, then ends it.
        """
        names = values.pop("names")
        _change(names, resources.asked(Request("run", "", [], values)))

    chosen = [hot.parameter(option) for option in options.TABLES["run"] if option.name in resources.OPTIONS]
    named = inspect.Parameter("names", inspect.Parameter.KEYWORD_ONLY, annotation=Names)
    update.__signature__ = inspect.Signature([named, *chosen])  # type: ignore[attr-defined]
    update.__annotations__ = {parameter.name: parameter.annotation for parameter in [named, *chosen]}
    return update


def _change(names: list[str], wanted: dict[str, str]) -> None:
    if not wanted:
        raise SbxError("limit-missing", f"update {printable(names[0])}: no limit was given", "see: sbx update --help")
    for name in names:
        record = state.find(name)
        path = folder(record, "update")
        available = cgroups.read(path, "cgroup.controllers").split()
        for file, value in wanted.items():
            controller = cgroups.controller(file)
            if controller not in available:
                _enable(path, controller)
            cgroups.limit(path, file, value)
        _remember(record, wanted)
        output.lines([name])


def _enable(path: str, controller: str) -> None:
    """Enable one more controller for the sandbox, where its subtree has it."""
    above = os.path.dirname(path)
    if controller not in cgroups.read(above, "cgroup.controllers").split():
        raise SbxError(
            "controller-missing",
            f"limit {controller}: the controller is not delegated to you",
            "as root: sh helpers/setup-host --delegate, then log in again",
        )
    cgroups.write(above, "cgroup.subtree_control", f"+{controller}")


def _remember(record: dict[str, Any], changed: dict[str, str]) -> None:
    """Note in the sandbox's record what is asked for from now on, for the receipt."""
    wanted = spec.unpack(record["spec"])
    wanted.resources = {**wanted.resources, **changed}
    content = marshal.dumps({**record, "spec": spec.pack(wanted)}, 4)
    state.write_atomically(f"{state.sandboxes()}/{record['name']}", "record", content)


def pause(names: Names) -> None:
    """Stop all processes of sandboxes, until `unpause`."""
    for name in names:
        cgroups.freeze(folder(state.find(name), "pause"), True)
        output.lines([name])


def unpause(names: Names) -> None:
    """Let the processes of paused sandboxes go on."""
    for name in names:
        cgroups.freeze(folder(state.find(name), "unpause"), False)
        output.lines([name])


def stats(
    names: Some = [],  # noqa: B006
    once: Annotated[bool, typer.Option("--once", "--no-stream", help="print once, and end")] = False,
    json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each sandbox")] = False,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="time between two looks")] = 1.0,
) -> None:
    """Show what sandboxes use, live; without names, all that run."""
    looks = _looks(names, interval if not once else 0.0)
    if json:
        for rows in looks:
            for row in rows:
                sys.stdout.write(_json.dumps(row) + "\n")
            sys.stdout.flush()
    elif once or not sys.stdout.isatty():
        for rows in looks:
            output.table(HEAD, [_cells(row) for row in rows])
            sys.stdout.flush()
    else:
        output.live(HEAD, ([_cells(row) for row in rows] for rows in looks))


HEAD = ("NAME", "STATE", "CPU %", "MEMORY", "LIMIT", "PIDS", "DISK READ", "WRITTEN", "NET IN", "OUT", "PRESSURE")


def _looks(names: list[str], interval: float) -> Any:
    """Yield a list of accounts, again and again (once without an interval), until no sandbox is left."""
    before: dict[str, tuple[float, float]] = {}
    while True:
        records = [state.find(name) for name in names] if names and not before else state.running()
        records = [record for record in records if not names or _is_named(record, names)]
        rows = [account(record, before) for record in records]
        yield rows
        if not interval or (names and not rows):
            return
        _time.sleep(interval)  # a clock's tick is the event that is waited for here


def _is_named(record: dict[str, Any], names: list[str]) -> bool:
    return any(record["name"] == name or record["id"].startswith(name) for name in names)


def account(record: dict[str, Any], before: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Return what a running sandbox uses; `before` remembers processor time from look to look, for the percentage."""
    path, pid = record.get("cgroup", ""), record["pid"]
    used = cgroups.account(path) if path else {}
    if "cpu_seconds" not in used:
        used["cpu_seconds"] = accounting.cpu_seconds(pid)
    used.setdefault("pids", len(accounting.processes(pid)))
    traffic = accounting.Traffic(pid)
    used |= traffic.read() if "net" in spec.unpack(record["spec"]).namespaces else {}
    traffic.close()
    now = _time.monotonic()
    then, seconds = before.get(record["id"], (now - max(0.001, _time.time() - record["created"]), 0.0))
    before[record["id"]] = (now, used["cpu_seconds"])
    paused = bool(path) and cgroups.is_frozen(path)
    return {
        "name": record["name"],
        "id": record["id"],
        "source": "cgroup" if path else "processes",
        "state": "paused" if paused else "running",
        "cpu_percent": round(100 * (used["cpu_seconds"] - seconds) / max(now - then, 0.001), 1),
        **used,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(key: str) -> str:
        return size(row[key]) if key in row else "-"

    pressure = " ".join(f"{name} {value:.0f}" for name, value in row.get("pressure", {}).items() if value >= 0.5)
    return [
        row["name"],
        row["state"],
        f"{row['cpu_percent']:.1f}",
        shown("memory_bytes"),
        shown("memory_limit_bytes"),
        str(row["pids"]),
        shown("io_read_bytes"),
        shown("io_write_bytes"),
        shown("net_received_bytes"),
        shown("net_sent_bytes"),
        pressure or "-",
    ]


def top(
    name: Annotated[str, typer.Argument(metavar="SANDBOX", help="a name, an id, or the start of an id")],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the processes in a sandbox."""
    record = state.find(name)
    pids = _pids(record)
    rows = [row for pid in pids if (row := _process(pid))]
    if json:
        output.json(rows)
        return
    cells = [
        (
            str(r["pid"]),
            str(r["inside"]),
            r["user"],
            r["state"],
            size(r["memory_bytes"]),
            f"{r['cpu_seconds']:.2f}",
            r["command"],
        )
        for r in rows
    ]
    output.table(("PID", "INSIDE", "USER", "STATE", "MEMORY", "CPU S", "COMMAND"), cells)


def _pids(record: dict[str, Any]) -> list[int]:
    """Return the host's ids of its processes: of the cgroup, with those of `exec`, else those that pid 1 started."""
    if path := record.get("cgroup", ""):
        return sorted(int(pid) for pid in cgroups.read(path, "cgroup.procs").split())
    return accounting.processes(record["pid"])


def _process(pid: int) -> dict[str, Any] | None:
    """Return what /proc tells of a process; None when it has just ended: proc_pid_status(5)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as stream:
            status = {name: value.strip() for name, _, value in (line.partition(b":") for line in stream)}
        with open(f"/proc/{pid}/stat", "rb") as stream:
            fields = stream.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            words = stream.read(4096).replace(b"\0", b" ").strip()
    except OSError:
        return None
    return {
        "pid": pid,
        "inside": int(status[b"NSpid"].split()[-1]),
        "user": status[b"Uid"].split()[0].decode(),
        "state": status[b"State"].split()[0].decode(),
        "memory_bytes": int(status.get(b"VmRSS", b"0").split()[0]) * 1024,
        "cpu_seconds": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "command": printable(words or b"[" + status[b"Name"] + b"]"),
    }


# ── for the other commands ────────────────────────────────────────────────────────────────────────────────────────────


def folder(record: dict[str, Any], act: str) -> str:
    """Return the folder of a running sandbox's cgroup, for `act`. Raises SbxError ``cgroup-none``, with the cure."""
    if path := record.get("cgroup", ""):
        return str(path)
    cure = "start it with --stats, or with a limit such as --pids 10000"
    try:
        cgroups.look()
        cause = "it was started without limits"
    except SbxError as error:  # this host would give it none
        cause = error.message.removeprefix("find a cgroup: ")
        cure = "; then ".join(filter(None, [error.hint, cure]))
    raise SbxError("cgroup-none", f"{act} {record['name']}: it has no cgroup of its own: {cause}", cure)


def read_receipt(record: dict[str, Any]) -> dict[str, Any]:
    """Return the receipt of a running sandbox, read now: its command is pid 1, or pid 1's first child."""
    wanted = spec.unpack(record["spec"])
    numbers = {}
    for name, path in state.held_namespaces(record).items():
        try:
            numbers[name] = os.stat(path).st_ino
        except OSError:
            continue
    pids = accounting.processes(record["pid"])
    return receipt.read(
        wanted, pids[1] if wanted.init and len(pids) > 1 else pids[0], numbers, record.get("cgroup", ""), []
    )
