"""`port`: the published ports of running sandboxes. Warm."""

from __future__ import annotations

import json as _json
import os
from typing import Annotated, Any

import typer

from rootless import spec, state
from rootless.cli import output
from rootless.errors import SbxError
from rootless.network import names, ports, resident, slirp4netns
from rootless.spec import Port, SandboxSpec


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(port)


def port(
    name: Annotated[str, typer.Argument(metavar="SANDBOX", show_default=False)],
    inside: Annotated[
        str, typer.Argument(metavar="[PORT[/tcp|udp]]", help="show this one alone", show_default=False)
    ] = "",
    add: Annotated[list[str], typer.Option("--add", metavar="[[IP:]HOST:]SANDBOX[/udp]", help="publish")] = [],  # noqa: B006
    remove: Annotated[list[str], typer.Option("--remove", metavar="[IP:]HOST[/udp]", help="publish no longer")] = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the published ports of a running sandbox, or change them."""
    record = state.find(name)
    wanted = spec.unpack(record["spec"])
    for text in remove:
        _remove(wanted, text)
    for text in add:
        for asked in ports.parse(text):
            ports.tell(asked, _add(record, wanted, asked))
    published = [found for _, _, found in _published(wanted)]
    if inside:
        published = [
            found
            for found in published
            if f"{found.inside}/{found.protocol}" == (inside if "/" in inside else f"{inside}/tcp")
        ]
        if not published:
            raise SbxError(
                "port-unknown", f"find port {inside} of sandbox {name}: it is not published", f"see: sbx port {name}", 1
            )
    if json:
        output.json([found.fields() for found in published])
    elif inside:
        output.lines(ports.show(found).partition(" -> ")[2] for found in published)
    elif not (add or remove):
        output.lines(ports.show(found) for found in published)


def _published(wanted: SandboxSpec) -> list[tuple[str, int, Port]]:
    """Return the control socket, number and meaning of each published port, in the order of the ports inside."""
    found = []
    for socket in (slirp4netns.SOCKET, ports.FORWARDER):
        try:
            answer = _json.loads(ports.ask(wanted.folder, socket, '{"execute": "list_hostfwd"}'))
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        # slirp4netns 1.2 answers this one without the "return" that its manual shows
        for entry in answer.get("return", answer).get("entries", []):
            published = Port(
                address=entry["host_addr"], host=entry["host_port"], inside=entry["guest_port"], protocol=entry["proto"]
            )
            found.append((socket, entry["id"], published))
    return sorted(found, key=lambda item: (item[2].inside, item[2].protocol, item[2].host))


def _add(record: dict[str, Any], wanted: SandboxSpec, asked: Port) -> Port:
    if "net" not in wanted.namespaces:
        raise SbxError("network-conflict", f"publish ports of sandbox {record['name']}: it has no net namespace of its own",
                       "with --net host its ports are the host's already")  # fmt: skip
    if ports.by_slirp4netns(wanted.network, asked):
        return ports.publish(wanted.folder, slirp4netns.SOCKET, asked, names.OWN)
    if not os.path.exists(f"{wanted.folder}/{ports.FORWARDER}"):
        _start_forwarder(record, wanted)
    return ports.publish(wanted.folder, ports.FORWARDER, asked, "127.0.0.1")


def _start_forwarder(record: dict[str, Any], wanted: SandboxSpec) -> None:
    """Start one that lives as long as the sandbox's parent, through which its namespaces are reached."""
    opened: list[int] = []
    try:
        opened = [os.pidfd_open(record["parent"])]
        if state.start_time(record["parent"]) != record["parent_start_time"]:
            raise ProcessLookupError
        for name in ("user", "net"):
            opened.append(
                os.open(f"/proc/{record['parent']}/fd/{record['namespaces'][name]}", os.O_RDONLY | os.O_CLOEXEC)
            )
        resident.start("forwarder", wanted.folder, {}, (opened[1], opened[2]), while_lives=opened[0])
    except (ProcessLookupError, FileNotFoundError):
        raise SbxError("sandbox-gone", f"publish ports of sandbox {record['name']}: it has just ended") from None
    finally:
        for fd in opened:
            os.close(fd)


def _remove(wanted: SandboxSpec, text: str) -> None:
    """Stop publishing the host port that `text` names; with a sandbox's port after it, as for --add, that is ignored."""
    body, _, protocol = text.partition("/")
    parts = body.rpartition(":")[0] if body.rpartition(":")[0].rpartition(":")[0] else body
    address, _, number = parts.rpartition(":")
    address = address.strip("[]")
    if not number.isdecimal():
        raise SbxError("port-invalid", f"remove port {text!r}: it is [IP:]HOST[/tcp|udp]")
    for socket, entry, found in _published(wanted):
        if (found.host, found.protocol) == (int(number), protocol or "tcp") and address in ("", found.address):
            answer = ports.ask(
                wanted.folder, socket, f'{{"execute": "remove_hostfwd", "arguments": {{"id": {entry}}}}}'
            )
            if '"error"' in answer:
                raise SbxError("port-failed", f"remove port {text}: {answer.strip()}")
            return
    raise SbxError("port-unknown", f"remove port {text}: it is not published", f"see: sbx port {wanted.name}", 1)
