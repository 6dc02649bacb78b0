"""Commands whose help reads as manual pages do: `IMAGE`, where Typer writes `{IMAGE}` and `<str>`. Warm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand


class Command(TyperCommand):
    """A command; its arguments are shown by what they are called, and the kind of value that Typer makes is not."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        # Paragraphs flow; otherwise the line ends of our source would stay in the text.
        self.help = "\n\n".join(" ".join(part.split()) for part in (self.help or "").split("\n\n"))
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.type = copy.copy(parameter.type)
                parameter.type.get_metavar = lambda *_, **__: ""  # type: ignore[method-assign]

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line behind the command's name."""
        return [piece.removeprefix("{").removesuffix("}") for piece in super().collect_usage_pieces(ctx)]


class App(typer.Typer):
    """A Typer app of such commands."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Return what registers a function as a command."""
        return super().command(name, **{"cls": Command, **settings})
