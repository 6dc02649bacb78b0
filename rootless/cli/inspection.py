"""`inspect`: all about sandboxes and images, as JSON or as a template says. Warm.

The names of our own keys are words_with_underscores; `config` of an image is the image's own document, as it is.
"""

from __future__ import annotations

import signal
from typing import Annotated, Any

import typer

from rootless import capabilities, spec, state
from rootless.cli import limits, listing, running
from rootless.errors import SbxError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("inspect")(inspect)


def inspect(
    names: Annotated[
        list[str],
        typer.Argument(metavar="SANDBOX|IMAGE...", help="names, ids, or the start of ids", show_default=False),
    ],
    form: listing.DocumentFormat = "",
    kind: Annotated[str, typer.Option("--type", metavar="TYPE", help="look only for a sandbox, or for an image")] = "",
) -> None:
    """Show all about running sandboxes, or about images, as JSON.

    A template's names are the keys of that, and docker's, such as {{.State.Pid}} and {{.Config.Labels}}, where they say
    the same.
    """
    if kind not in ("", "image", "sandbox", "container"):
        raise SbxError("option-invalid", f"read --type {kind!r}: it is sandbox or image")
    listing.show_documents(form, [_inspect(name, kind) for name in names], _as_docker)


def _inspect(name: str, kind: str) -> dict[str, Any]:
    try:
        if kind != "image":
            return _details(state.find(name))
    except SbxError as error:
        if error.code != "sandbox-unknown" or kind:
            raise
    from rootless.cli import images

    return dict(images.details(name))


def _details(record: dict[str, Any]) -> dict[str, Any]:
    """Everything about a sandbox that its spec says; the environment too, for it is the caller's own."""
    wanted = spec.unpack(record["spec"])
    return {
        **running.summary(record),
        "hostname": wanted.hostname,
        "user": wanted.user,
        "workdir": wanted.workdir,
        "environment": [f"{_text(name)}={_text(value)}" for name, value in wanted.env.items()],
        "idmap": {
            "mode": wanted.idmap.mode,
            "uids": [m.fields() for m in wanted.idmap.uids],
            "gids": [m.fields() for m in wanted.idmap.gids],
        },
        "namespaces": ["user", *wanted.namespaces],
        "network": {**wanted.network.fields(), "ports": running.ports(record)},
        "rootfs": {**wanted.rootfs.fields(), "folder": wanted.folder},
        "mounts": [mount.fields() for mount in wanted.mounts],
        "masked": wanted.masked,
        "read_only": wanted.read_only,
        "capabilities": capabilities.names(wanted.capabilities),
        "no_new_privileges": wanted.no_new_privileges,
        "seccomp": wanted.filter_name or "unconfined",
        "stop_signal": _signal_name(wanted.stop_signal),
        "stop_timeout": wanted.stop_timeout,
        "limits": {name: {"soft": soft, "hard": hard} for name, (soft, hard) in wanted.limits.items()},
        "resources": wanted.resources,
        "receipt": limits.read_receipt(record),
    }


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


# ── docker's names ────────────────────────────────────────────────────────────────────────────────────────────────────


def _as_docker(found: dict[str, Any]) -> dict[str, Any]:
    """Return what `docker inspect` would call it, as far as it says the same; scripts ask for these."""
    return _image_as_docker(found) if "manifest" in found else _sandbox_as_docker(found)


def _sandbox_as_docker(found: dict[str, Any]) -> dict[str, Any]:
    published: dict[str, list[dict[str, str]]] = {}
    for port in found["network"]["ports"]:
        row = {"HostIp": port["address"], "HostPort": str(port["host"])}
        published.setdefault(f"{port['inside']}/{port['protocol']}", []).append(row)
    return {
        "State": {
            "Status": found["state"],
            "Running": True,
            "Paused": found["state"] == "paused",
            "Pid": found["pid"],
            "StartedAt": found["created"],
        },
        "Path": found["command"][0],
        "Args": found["command"][1:],
        "Config": {
            "Hostname": found["hostname"],
            "User": found["user"],
            "Env": found["environment"],
            "Cmd": found["command"],
            "Image": found["image"],
            "WorkingDir": found["workdir"],
            "Labels": found["labels"],
            "StopSignal": found["stop_signal"],
        },
        "HostConfig": {
            "NetworkMode": found["network"]["peer"] or found["network"]["backend"],
            "ReadonlyRootfs": found["rootfs"]["read_only"],
        },
        "NetworkSettings": {"Ports": published},
    }


def _image_as_docker(found: dict[str, Any]) -> dict[str, Any]:
    system, _, architecture = found["platform"].partition("/")
    return {
        "RepoTags": found["names"],
        "RepoDigests": [f"{found['reference'].rpartition(':')[0]}@{found['digest']}"],
        "Os": system,
        "Architecture": architecture.partition("/")[0],
        "RootFS": {"Type": "layers", "Layers": [layer["diff_id"] for layer in found["layers"]]},
    }
