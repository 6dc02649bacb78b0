"""What commands print: tables, JSON, lines on stdout; notices on stderr. Warm; the only import of rich.

Everything that may come from an image or a command line is made safe for a terminal here.
"""

from __future__ import annotations

import json as _json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rootless.errors import printable


def lines(texts: Iterable[str]) -> None:
    """Print each text on a line of its own."""
    for text in texts:
        sys.stdout.write(printable(text) + "\n")


def formatted(texts: Iterable[str]) -> None:
    """Print each text, which a template made of the user's own words and of what is printable, on a line of its own."""
    sys.stdout.writelines(text + "\n" for text in texts)


def json(value: Any) -> None:
    """Print `value` as JSON, indented, in ASCII."""
    sys.stdout.write(_json.dumps(value, indent=2) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under a head: a rich table on a terminal, plain columns otherwise."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        widths = [max(len(row[column]) for row in [list(head), *cells]) for column in range(len(head))]
        for row in [list(head), *cells]:
            sys.stdout.write(
                "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
            )
        return
    from rich.console import Console

    Console().print(_rich_table(head, cells))


def live(head: Sequence[str], looks: Iterable[Iterable[Sequence[str]]]) -> None:
    """Show a table on a terminal that changes in its place with each look, until there are no more."""
    from rich.live import Live

    with Live(auto_refresh=False) as shown:
        for rows in looks:
            shown.update(_rich_table(head, [[printable(cell) for cell in row] for row in rows]), refresh=True)


def _rich_table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in cells:
        # Text, not markup, in which an image could write links and errors
        shown.add_row(*map(Text, row))
    return shown


def markdown(text: str) -> None:
    """Show a page of ours on the terminal."""
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def notice(text: str) -> None:
    """Tell the user something on stderr."""
    sys.stderr.write(f"sbx: {printable(text)}\n")
