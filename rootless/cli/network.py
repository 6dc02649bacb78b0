"""`port`: the published ports of running sandboxes; `network`: networks of several. Warm."""

from __future__ import annotations

import ipaddress
import json as _json
import marshal
import os
import shutil
from typing import Annotated, Any

import typer

from rootless import paths, spec, state
from rootless.cli import listing, output, pages
from rootless.cli.listing import Column
from rootless.errors import SbxError
from rootless.network import names, ports, records, resident, slirp4netns
from rootless.networks import wayout
from rootless.spec import Port, SandboxSpec


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(port)
    group = pages.App(name="network", help="Networks of several sandboxes.", no_args_is_help=True)
    for command in (create, rm, inspect):
        group.command()(command)
    group.command("ls")(list_networks)
    app.add_typer(group)


def port(
    name: Annotated[
        str, typer.Argument(metavar="SANDBOX", help="a name, an id, or the start of an id", show_default=False)
    ],
    inside: Annotated[
        str, typer.Argument(metavar="[PORT[/tcp|udp]]", help="show this one alone", show_default=False)
    ] = "",
    add: Annotated[list[str], typer.Option("--add", metavar="[[IP:]HOST:]PORT[/udp]", help="publish one more")] = [],  # noqa: B006
    remove: Annotated[
        list[str], typer.Option("--remove", metavar="[IP:]HOST[/udp]", help="publish this one no longer")
    ] = [],  # noqa: B006
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
    published = [found for _, _, found in entries(wanted)]
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


def entries(wanted: SandboxSpec) -> list[tuple[str, int, Port]]:
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
        raise SbxError("network-conflict", f"publish ports of sandbox {record['name']}: its network is not its own",
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
            opened.append(os.open(state.held_namespaces(record)[name], os.O_RDONLY | os.O_CLOEXEC))
        resident.start("forwarder", wanted.folder, {}, (opened[1], opened[2]), while_lives=opened[0])
    except (ProcessLookupError, FileNotFoundError):
        raise SbxError("sandbox-gone", f"publish ports of sandbox {record['name']}: it has just ended") from None
    finally:
        for fd in opened:
            os.close(fd)


def _remove(wanted: SandboxSpec, text: str) -> None:
    """Stop publishing the host port that `text` names; a sandbox's port after it, as for --add, is ignored."""
    body, _, protocol = text.partition("/")
    parts = body.rpartition(":")[0] if body.rpartition(":")[0].rpartition(":")[0] else body
    address, _, number = parts.rpartition(":")
    address = address.strip("[]")
    if not number.isdecimal():
        raise SbxError("port-invalid", f"remove port {text!r}: it is [IP:]HOST[/tcp|udp]")
    for socket, entry, found in entries(wanted):
        if (found.host, found.protocol) == (int(number), protocol or "tcp") and address in ("", found.address):
            answer = ports.ask(
                wanted.folder, socket, f'{{"execute": "remove_hostfwd", "arguments": {{"id": {entry}}}}}'
            )
            if '"error"' in answer:
                raise SbxError("port-failed", f"remove port {text}: {answer.strip()}")
            return
    raise SbxError("port-unknown", f"remove port {text}: it is not published", f"see: sbx port {wanted.name}", 1)


# ── networks ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Networks = Annotated[list[str], typer.Argument(metavar="NAME...", help="names of networks", show_default=False)]
_POOL = ipaddress.IPv4Network("10.89.0.0/16")


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="what to call it", show_default=False)],
    subnet: Annotated[
        str, typer.Option(metavar="CIDR", help="IPv4 addresses (default: a free part of 10.89.0.0/16)")
    ] = "",
    ipv6: Annotated[bool, typer.Option("--ipv6", help="IPv6 addresses as well")] = False,
    internal: Annotated[bool, typer.Option("--internal", help="no way out: members reach each other alone")] = False,
    net: Annotated[str, typer.Option(metavar="NAME", help="the way out: auto, slirp4netns, pasta")] = "auto",
    host_loopback: Annotated[
        bool, typer.Option("--host-loopback", help="members reach the host's loopback interface")
    ] = False,
) -> None:
    """Make a network that sandboxes can share with --net NAME."""
    folder = records.folder(name)
    if internal and host_loopback:
        raise SbxError(
            "network-conflict", f"create network {name}: with --internal nothing leads to the host's loopback"
        )
    chosen = _check_subnet(subnet) if subnet else _free_subnet()
    way_out = "" if internal else wayout.choose(net)
    paths.ensure(os.path.dirname(folder))
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        raise SbxError(
            "name-taken", f"create network {name}: there is one of that name", "see: sbx network ls"
        ) from None
    config = {"subnet": str(chosen), "ipv6": ipv6, "internal": internal, "net": way_out, "host": ""}
    if host_loopback and (found := wayout.describe(config)):
        config["host"] = found.host
    state.write_atomically(folder, "config", marshal.dumps(config, 4))
    output.lines([name])


def list_networks(
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print names only")] = False,
    form: listing.Format = "",
) -> None:
    """List the networks.

    Fields of --format: .Name .Subnet .Internal .IPv6 .Members
    """
    if quiet:
        output.lines(records.names())
    elif json or form == "json":
        output.json([_details(name) for name in records.names()])
    elif form:
        listing.show(form, [_details(name) for name in records.names()], _COLUMNS)
    else:
        rows = [
            (d["name"], d["subnet"], d["net"] or "internal", str(len(d["members"])))
            for d in map(_details, records.names())
        ]
        output.table(("NAME", "SUBNET", "WAY OUT", "MEMBERS"), rows)


def inspect(networks: Networks, form: listing.DocumentFormat = "") -> None:
    """Show all about networks, and who is in them, as JSON."""
    listing.show_documents(form, [_details(name) for name in networks])


def rm(networks: Networks) -> None:
    """Remove networks that nobody is in."""
    for name in networks:
        records.read(name)
        with records.Lock(name):
            if inside := records.members(records.folder(name)):
                raise SbxError(
                    "network-busy", f"remove network {name}: {inside[0]['name']} is in it", "stop its sandboxes first"
                )
            shutil.rmtree(records.folder(name))
        output.lines([name])


def _details(name: str) -> dict[str, Any]:
    return {"name": name, **records.read(name), "members": records.members(records.folder(name))}


_COLUMNS = {
    "Name": Column("NAME", lambda found: found["name"]),
    "ID": Column("", lambda found: found["name"]),
    "Subnet": Column("SUBNET", lambda found: found["subnet"]),
    "Internal": Column("INTERNAL", lambda found: found["internal"]),
    "IPv6": Column("IPV6", lambda found: found["ipv6"]),
    "Members": Column("MEMBERS", lambda found: len(found["members"])),
}


def _taken() -> list[ipaddress.IPv4Network]:
    """Return what is in use: our networks, and what the host has routes to."""
    found = [ipaddress.IPv4Network(records.read(name)["subnet"]) for name in records.names()]
    with open("/proc/net/route") as stream:
        for line in list(stream)[1:]:
            words = line.split()
            address, mask = (int.from_bytes(bytes.fromhex(words[column])[::-1], "big") for column in (1, 7))
            if mask:
                found.append(ipaddress.IPv4Network((address, mask.bit_count()), strict=False))
    return found


def _free_subnet() -> ipaddress.IPv4Network:
    taken = _taken()
    for subnet in _POOL.subnets(new_prefix=24):
        if not any(subnet.overlaps(other) for other in taken):
            return subnet
    raise SbxError("subnet-taken", f"choose a subnet: all of {_POOL} are in use", "give one with --subnet")


def _check_subnet(text: str) -> ipaddress.IPv4Network:
    try:
        subnet = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise SbxError("subnet-invalid", f"read subnet {text!r}: {error}", "as in 10.90.0.0/24") from None
    if not 16 <= subnet.prefixlen <= 25 or not subnet.network_address.packed[3] == 0:
        raise SbxError(
            "subnet-invalid",
            f"read subnet {text!r}: it has 16 to 25 bits of network and ends in .0",
            "as in 10.90.0.0/24",
        )
    for other in _taken():
        if subnet.overlaps(other):
            raise SbxError("subnet-taken", f"use subnet {subnet}: {other} is in use here", "choose another one")
    return subnet
