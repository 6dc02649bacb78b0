"""`help`: the manual, page by page. Warm."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from rootless import cli, paths
from rootless.cli import output
from rootless.errors import SbxError, printable

_FOLDER = "tests/manual"  #: the pages are transcripts that the tests run


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="help")(show)


def show(
    topic: Annotated[
        str, typer.Argument(metavar="[TOPIC|COMMAND]", help="one of the list, or of sbx --help", show_default=False)
    ] = "",
) -> int:
    """Show a page of the manual, or a command's options; without a topic, the list of pages."""
    folder = paths.shipped(_FOLDER)
    topics = sorted(name.removesuffix(".md") for name in os.listdir(folder) if name.endswith(".md"))
    if not topic:
        output.lines(_title(f"{folder}/{name}.md") for name in topics)
        output.notice("sbx help TOPIC shows one of these, sbx COMMAND --help the options of a command")
        return 0
    if topic not in topics and any(topic in commands.split() for commands in cli.GROUPS.values()):
        return cli.main([topic, "--help"])
    if topic not in topics:
        raise SbxError(
            "topic-unknown",
            f"show help on {printable(topic)}: there is no such page",
            "see: sbx help, and sbx --help for the commands",
        )
    with open(f"{folder}/{topic}.md", encoding="utf-8") as stream:
        page = stream.read()
    if sys.stdout.isatty():
        output.markdown(page)
    else:
        sys.stdout.write(page)
    return 0


def _title(path: str) -> str:
    """Return a page's first line without its mark: ``topic: what it is about``."""
    with open(path, encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").rstrip()
