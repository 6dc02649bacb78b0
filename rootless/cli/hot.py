"""`run`, `shell` and `exec` as Typer commands, made from the option tables that the reader uses too. Warm."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from rootless import options
from rootless.options import FLAG, LIST, NUMBER, SECONDS, TEXT, Option, Request

_TYPES: dict[str, tuple[Any, Any]] = {
    FLAG: (bool, False),
    TEXT: (str, ""),
    LIST: (list[str], []),
    NUMBER: (int | None, None),
    SECONDS: (float | None, None),
}
_ORDER = "Options come before IMAGE; what comes after it is the command's, options and all."
#: what is called so → what it is
_WORDS = {
    "IMAGE": "a name, as in a registry; host is this machine's own files",
    "SANDBOX": "a name, an id, or the start of an id",
    "COMMAND [ARGUMENT]...": "found in PATH inside",
    "[COMMAND [ARGUMENT]...]": "found in PATH inside; default: the image's",
}
#: command → what it does, what its subject is called, what follows
_COMMANDS = {
    "run": (
        f"Run a command in a new sandbox.\n\n{_ORDER}\n\nFor example: sbx run -v .:/work -w /work alpine ls -l",
        "IMAGE",
        "[COMMAND [ARGUMENT]...]",
    ),
    "shell": ("Open a shell in a new sandbox.\n\nFor example: sbx shell --here alpine", "IMAGE", None),
    "exec": (
        f"Run one more command in a running sandbox.\n\n{_ORDER.replace('IMAGE', 'SANDBOX')}",
        "SANDBOX",
        "COMMAND [ARGUMENT]...",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for name in _COMMANDS:
        # Options end at the subject: what follows is the command's, options and all.
        settings = {"allow_interspersed_args": False}
        app.command(name, context_settings=settings)(_function(name))


def _function(command: str) -> Any:
    """Return a function with the signature of `command`'s table that calls the launch."""
    about, subject, rest = _COMMANDS[command]

    def call(**values: Any) -> int:
        request = Request(command, values.pop("subject"), values.pop("arguments", None) or [], values)
        return carry_out(request)

    parameters = [parameter(option) for option in options.TABLES[command]]
    positional = [_argument("subject", str, subject, inspect.Parameter.empty)]
    if rest:
        positional.append(_argument("arguments", list[str], rest, [] if command == "run" else inspect.Parameter.empty))
    call.__signature__ = inspect.Signature([*positional, *parameters])  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in [*positional, *parameters]}
    call.__doc__ = about
    call.__name__ = command
    return call


def carry_out(request: Request) -> int:
    """Launch what `request` asks for; the reader's requests go the same way without Typer."""
    from rootless import launch

    return launch.execute(request) if request.command == "exec" else launch.run(request)


def parameter(option: Option) -> inspect.Parameter:
    """Return the parameter of a command's function that Typer makes `option` of."""
    kind, default = _TYPES[option.kind]
    about = f"{option.help} (repeatable)" if option.kind == LIST else option.help
    declared = typer.Option(*option.flags, metavar=option.metavar or None, help=about, show_default=False,
                            rich_help_panel=option.group or None)  # fmt: skip
    return _keyword(option.name, Annotated[kind, declared], default)


def _argument(name: str, kind: Any, metavar: str, default: Any) -> inspect.Parameter:
    return _keyword(
        name, Annotated[kind, typer.Argument(metavar=metavar, help=_WORDS[metavar], show_default=False)], default
    )


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
