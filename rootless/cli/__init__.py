"""The Typer app. Warm: reached when the reader declines, and by every command that is not hot.

One file per group of commands; each has ``register(app)``. Its modules import what is heavy inside their functions.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from rootless import __version__
from rootless.cli import pages

#: module → its commands: a command costs the import of its own module, and the signatures of its neighbours, no more
GROUPS = {
    "hot": "run shell exec",
    "sandboxes": "ps kill stop",
    "inspection": "inspect",
    "limits": "update pause unpause stats top",
    "images": "import images rmi tag history",
    "archives": "save load export",
    "system": "system image",
    "registry": "pull push login logout",
    "network": "port network",
    "host": "unshare ns doctor",
    "help": "help",
}

#: what the list of commands is divided into: title → modules
PANELS = {
    "Sandboxes": "hot sandboxes inspection limits",
    "Images": "images archives registry system",
    "Networks": "network",
    "This machine, and help": "host help",
}

app = pages.App(
    name="sbx",
    help="Rootless sandboxes: run programs and images without root, without a daemon, safe by default.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

_registered: set[str] = set()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sbx {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Read the options that stand before the command."""


def main(argv: list[str] | None = None) -> int:
    """Carry out `argv` (default: the process's) through Typer and return the exit status.

    Raises SbxError, for usage errors too: their status is 125, as docker's is.
    """
    words = sys.argv[1:] if argv is None else argv
    build_app(words[0] if words else "")
    if words[1:] == ["-h"]:
        words = [words[0], "--help"]  # of run and shell -h is the host name, as docker has it; but not alone
    try:
        status = app(words, prog_name="sbx", standalone_mode=False)
    except typer.Exit as end:
        return int(end.exit_code)
    except typer.Abort:
        return 130
    except Exception as error:
        # Click's usage errors have this; everything else is not ours to handle.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():
            return 125  # no arguments: the help has been shown instead
        from rootless.cli import mistakes

        raise mistakes.explain(error, words) from None
    return status if isinstance(status, int) else 0


def build_app(command: str = "") -> typer.Typer:
    """Return the app with at least `command` registered, or with all its commands if that is none of them."""
    wanted = [group for group, commands in GROUPS.items() if command in commands.split()]
    for group in wanted or GROUPS:
        if group not in _registered:
            _register(group)
            _registered.add(group)
    return app


def _register(group: str) -> None:
    """Add the commands of a module to the app, under its title."""
    part = pages.App()
    importlib.import_module(f"rootless.cli.{group}").register(part)
    title = next(title for title, groups in PANELS.items() if group in groups.split())
    for command in part.registered_commands:
        command.rich_help_panel = title
    for subgroup in part.registered_groups:
        subgroup.rich_help_panel = title
    app.registered_commands += part.registered_commands
    app.registered_groups += part.registered_groups
