"""`pull`, `push`, `login`, `logout`: images to and from registries. Warm."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rootless.cli import output
from rootless.errors import SbxError

if TYPE_CHECKING:
    from rootless.oci.credentials import Credential


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (pull, push, login, logout):
        app.command()(command)


Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print the digest and nothing else")]


def pull(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="names, with a tag or a digest", show_default=False)
    ],
    platform: Annotated[str, typer.Option(metavar="OS/ARCH[/VARIANT]", help="for another machine than this one")] = "",
    policy: Annotated[
        str, typer.Option("--pull", metavar="POLICY", help="missing, always, newer (if the registry answers) or never")
    ] = "always",
    idmap: Annotated[str, typer.Option(metavar="MODE", help="unpack for this id map: auto, single or keep")] = "",
    quiet: Quiet = False,
) -> None:
    """Fetch images from registries; what is here already is not fetched again."""
    from rootless import idmap as idmaps
    from rootless.oci import progress
    from rootless.oci import pull as puller

    ids, notice = idmaps.for_caller(idmap)
    if notice and not quiet:
        output.notice(notice)
    for name in images:
        tell = progress.choose(quiet)
        pulled = puller.ensure(name, ids, policy, platform, tell)
        if not quiet:
            output.notice(f"{pulled.reference.familiar}: {'pulled' if pulled.fresh else 'up to date'}")
        output.lines([pulled.digest])


def push(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="an image in the store", show_default=False)],
    target: Annotated[str, typer.Argument(metavar="[TARGET]", help="where to, if not where its name says")] = "",
    chunk_size: Annotated[int, typer.Option(metavar="MIB", min=0, help="upload in pieces of this size")] = 0,
    quiet: Quiet = False,
) -> None:
    """Send an image to a registry; what is there already is not sent."""
    from rootless import reference
    from rootless.oci import progress, registries
    from rootless.oci import push as pusher

    stored = registries.load().resolve(image)[0]
    there = reference.parse(target.removeprefix("docker://")) if target else stored
    digest = pusher.push(stored, there, progress.choose(quiet), chunk_size << 20)
    if not quiet:
        output.notice(f"{there.familiar}: pushed")
    output.lines([digest])


Registry = Annotated[str, typer.Argument(metavar="[REGISTRY]", help="host, or host:port")]


def login(
    registry: Registry = "docker.io",
    username: Annotated[str, typer.Option("--username", "-u", metavar="NAME", help="who you are there")] = "",
    password_stdin: Annotated[bool, typer.Option("--password-stdin", help="read the password from stdin")] = False,
) -> None:
    """Log in at a registry: check the password, and keep it for pull and push (readable by you alone)."""
    from rootless.oci import credentials

    host = _host(registry)
    user = username or _ask("Username: ", False)
    credential = credentials.Credential(user, _password(password_stdin))
    if not user or ":" in user:
        raise SbxError("credentials-invalid", f"log in at {host}: a user name is not empty and has no colon")
    _check(host, credential)
    path = credentials.store(host, credential)
    output.notice(f"logged in at {host} as {user}; kept in {path}")


def logout(
    registry: Registry = "docker.io",
    all: Annotated[bool, typer.Option("--all", "-a", help="forget all registries")] = False,
) -> None:
    """Forget the password for a registry."""
    from rootless.oci import credentials

    host = "" if all else _host(registry)
    if not credentials.erase(host):
        output.notice(f"not logged in{'' if all else ' at ' + host}")
    elif host and (other := credentials.find(host)):
        output.notice(f"logged out; {other.source} still has a login for {host}")
    else:
        output.notice(f"logged out{'' if all else ' at ' + host}")


def _host(text: str) -> str:
    """Return the registry that `text` names: HOST or HOST:PORT, or docker's spelling of it as a URL."""
    from rootless import reference

    bare = text.removeprefix("https://").removeprefix("http://").removesuffix("/")
    bare = bare.removesuffix("/v1").removesuffix("/v2")
    if "/" in bare or "@" in bare:
        raise SbxError("reference-invalid", f"bad registry {text!r}: it is HOST or HOST:PORT")
    # a reference has a grammar for hosts; a bare word is one here as well
    name = bare if "." in bare or ":" in bare or bare == "localhost" else f"{bare}:443"
    parsed = reference.parse(f"{name}/x").registry
    return parsed if name == bare else bare


def _check(host: str, credential: Credential) -> None:
    """Ask the registry whether the credential is good."""
    from rootless.oci import registries
    from rootless.oci.registry import Registry as Client

    configuration = registries.load()
    Client(configuration.itself(host), configuration, credential).log_in()


def _password(from_stdin: bool) -> str:
    password = sys.stdin.readline().rstrip("\r\n") if from_stdin else _ask("Password: ", True)
    if not password:
        raise SbxError("credentials-invalid", "log in: the password is empty", "give it on stdin: --password-stdin")
    return password


def _ask(prompt: str, secret: bool) -> str:
    """Ask on the terminal; a secret is not shown."""
    import getpass

    if not sys.stdin.isatty():
        raise SbxError(
            "credentials-missing", "log in: there is no terminal to ask on", "use --username and --password-stdin"
        )
    if secret:
        return getpass.getpass(prompt)
    sys.stderr.write(prompt)
    sys.stderr.flush()
    return sys.stdin.readline().strip()
