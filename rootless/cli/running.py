"""What `sbx ps` can show of a running sandbox, and choose by: docker's placeholders and filters. Warm."""

from __future__ import annotations

import datetime
import os
import re
import shlex
from collections.abc import Callable
from typing import Any

from rootless import build, cgroups, reference, spec
from rootless.cli.listing import Column, Test, has_label
from rootless.errors import SbxError, printable
from rootless.spec import SandboxSpec

Record = dict[str, Any]


def status(record: Record) -> str:
    """Return running or paused: there are no others."""
    path = record.get("cgroup", "")
    try:
        return "paused" if path and cgroups.is_frozen(path) else "running"
    except (SbxError, OSError):
        return "running"  # it is just ending


def labels(record: Record) -> dict[str, str]:
    """Return what --label and --label-file noted."""
    return _wanted(record).labels


def time_text(created: float) -> str:
    """Return how long ago that was, in one unit, as docker says it."""
    seconds = int(max(0, datetime.datetime.now().timestamp() - created))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}s"
    return f"{seconds} second{'s' * (seconds != 1)}"


def _wanted(record: Record) -> SandboxSpec:
    found: SandboxSpec = spec.unpack(record["spec"])
    return found


def ports(record: Record) -> list[dict[str, Any]]:
    """Return the ports that are published now, with the numbers that were chosen for them."""
    from rootless.cli import network

    return [found.fields() for _, _, found in network.entries(_wanted(record))]


def _ports(record: Record) -> str:
    found = [(f"[{p['address']}]" if ":" in p["address"] else p["address"], p) for p in ports(record)]
    return ", ".join(f"{address}:{p['host']}->{p['inside']}/{p['protocol']}" for address, p in found)


def _mounts(record: Record) -> list[str]:
    return [mount.source for mount in _wanted(record).mounts if mount.kind == "bind"]


def _networks(record: Record) -> list[str]:
    """The network as --net names it, and its back end."""
    found = _wanted(record).network
    return list(filter(None, (found.peer, found.backend)))


COLUMNS = {
    "ID": Column("ID", lambda record: record["id"]),
    "Names": Column("NAME", lambda record: record["name"]),
    "Image": Column("IMAGE", lambda record: record["image"]),
    "Command": Column("COMMAND", lambda record: shlex.join(record["command"])),
    "CreatedAt": Column("CREATED AT", lambda record: _moment(record["created"])),
    "RunningFor": Column("CREATED", lambda record: time_text(record["created"]) + " ago"),
    "Status": Column("STATUS", lambda record: _up(record)),
    "State": Column("STATE", status),
    "Ports": Column("PORTS", _ports),
    "Mounts": Column("MOUNTS", lambda record: ",".join(_mounts(record))),
    "Networks": Column("NETWORKS", lambda record: _networks(record)[0]),
    "Labels": Column("LABELS", lambda record: ",".join(f"{key}={value}" for key, value in labels(record).items())),
    "Label": Column("", lambda record: labels(record)),
    "Pid": Column("PID", lambda record: str(record["pid"])),
}


def _moment(created: float) -> str:
    return datetime.datetime.fromtimestamp(created).astimezone().strftime("%Y-%m-%d %H:%M:%S %z %Z")


def _up(record: Record) -> str:
    return f"Up {time_text(record['created'])}{' (Paused)' if status(record) == 'paused' else ''}"


def summary(record: Record) -> dict[str, Any]:
    """Return what a list tells of a sandbox, for JSON."""
    created = datetime.datetime.fromtimestamp(record["created"], datetime.UTC).isoformat(timespec="seconds")
    return {"id": record["id"], "name": record["name"], "image": record["image"], "command": record["command"],
            "created": created, "pid": record["pid"], "state": status(record),
            "labels": labels(record)}  # fmt: skip


# ── filters ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _matches(field: str) -> Callable[[str], Test]:
    """Return a filter by a regular expression anywhere in a field of the record."""

    def prepare(value: str) -> Test:
        try:
            # docker's names begin with a slash there, and its users write it
            pattern = re.compile(value.replace("^/", "^", 1))
        except re.error as error:
            raise SbxError("filter-invalid", f"read --filter {field}={printable(value)}: {error}") from None
        return lambda record: pattern.search(record[field]) is not None

    return prepare


def _has_status(value: str) -> Test:
    if value not in ("running", "paused", "created", "restarting", "removing", "exited", "dead"):
        raise SbxError("filter-invalid", f"read --filter status={printable(value)}: there is no such status",
                       "sandboxes are running or paused; of one that has ended nothing stays")  # fmt: skip
    return lambda record: status(record) == value


def _has_ancestor(value: str) -> Test:
    """Its image is `value`, or made on top of it; `value` is a name, or the beginning of an id."""
    from rootless.oci import images, layers

    def is_named(record: Record) -> bool:
        return record["image"] == value or _full(record["image"]) == _full(value)

    if value == build.HOST:
        return is_named
    try:
        diff_ids = images.one(value).config.diff_ids
    except SbxError:
        return is_named  # it was removed, or never was one

    def has_layers(record: Record) -> bool:
        wanted = _wanted(record)
        keys = [f"{layers.layer_key(diff_id, wanted.idmap)}/fs" for diff_id in reversed(diff_ids)]
        return is_named(record) or (bool(keys) and wanted.rootfs.layers[-len(keys) :] == keys)

    return has_layers


def _full(name: str) -> str:
    try:
        return str(reference.parse(name))
    except SbxError:
        return name  # a folder, with --rootfs


def _has_volume(value: str) -> Test:
    places = (value, os.path.abspath(value))
    return lambda record: any(mount.source in places or mount.target == value for mount in _wanted(record).mounts)


FILTERS: dict[str, Callable[[str], Test]] = {
    "id": _matches("id"),
    "name": _matches("name"),
    "label": lambda value: has_label(value, labels),
    "status": _has_status,
    "ancestor": _has_ancestor,
    "network": lambda value: lambda record: value in _networks(record),
    "volume": _has_volume,
}
