"""The part of Go's templates that `--format` is used for, as docker and podman have it. Warm.

    {{.ID}}  {{.State.Pid}}      a field, and a field of a field; names match without regard to case and underscores
    {{json .}}  {{join .Command " "}}  {{.Names | upper}}      the functions below; a pipe passes the last operand
    {{.Label "maintainer"}}      an entry of a field that has entries
    \\t  \\n  {{- ADJACENT SPACE IS LEFT OUT -}}

What branches or repeats is not read: for that there are --json and jq.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from rootless.errors import SbxError, printable

_ACTION = re.compile(r"(?:\s*\{\{- |\{\{)(.*?)(?: -\}\}\s*|\}\})", re.DOTALL)
_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|`[^`]*`|\||(?:\.\w+)+|\.|\w+)\s*')


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value.get(key, "") if isinstance(value, Mapping) else value[int(key)]
    return value


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "json": lambda value: json.dumps(value),
    "join": lambda values, between: between.join(map(show, values)),
    "index": _index,
    "len": len,
    "lower": lambda value: show(value).lower(),
    "upper": lambda value: show(value).upper(),
}


class Template:
    """A template that was read; raises SbxError ``format-invalid`` where it is none of those above."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._parts: list[str | list[list[str]]] = []
        end = 0
        for action in _ACTION.finditer(text):
            self._add_text(text[end : action.start()])
            self._parts.append(self._pipeline(action[1]))
            end = action.end()
        self._add_text(text[end:])

    def _add_text(self, text: str) -> None:
        if "{{" in text or "}}" in text:
            raise self._error("a {{ or }} stands alone")
        if text:
            self._parts.append(text.replace("\\t", "\t").replace("\\n", "\n"))

    def _pipeline(self, source: str) -> list[list[str]]:
        tokens: list[str] = []
        place = 0
        while place < len(source):
            found = _TOKEN.match(source, place)
            if not found:
                raise self._error(f"{{{{{source}}}}} is not understood")
            tokens.append(found[1])
            place = found.end()
        commands: list[list[str]] = [[]]
        for token in tokens:
            if token == "|":
                commands.append([])
            else:
                commands[-1].append(token)
        for command in commands:
            if not command or (command[0][0] not in '."`' and command[0] not in FUNCTIONS):
                raise self._error(f"{{{{{source}}}}} is not understood")
        return commands

    @property
    def fields(self) -> list[str]:
        """The names of the fields of the whole that it shows; "" stands for the whole itself."""
        tokens = [token for part in self._parts if isinstance(part, list) for command in part for token in command]
        return [token.split(".")[1] for token in tokens if token[0] == "."]

    def expand(self, value: Any, otherwise: Any = None) -> str:
        """Return the template with its fields taken from `value`, or else from `otherwise`.

        Raises SbxError ``field-unknown``.
        """
        roots = [root for root in (value, otherwise) if root is not None]
        return "".join(part if isinstance(part, str) else printable(self._run(part, roots)) for part in self._parts)

    def _run(self, commands: list[list[str]], roots: list[Any]) -> str:
        piped: list[Any] = []
        for first, *rest in commands:
            operands = [self._operand(token, roots) for token in rest] + piped
            try:
                if first in FUNCTIONS:
                    piped = [FUNCTIONS[first](*operands)]
                else:
                    piped = [_index(self._operand(first, roots), *operands)]
            except (TypeError, ValueError, LookupError):
                raise self._error(f"{first} does not take these operands") from None
        return show(piped[0])

    def _operand(self, token: str, roots: list[Any]) -> Any:
        if token[0] == '"':
            return token[1:-1].replace('\\"', '"').replace("\\t", "\t").replace("\\n", "\n").replace("\\\\", "\\")
        if token[0] == "`":
            return token[1:-1]
        if token[0] != ".":
            if not token.isdecimal():
                raise self._error(f"{token} is not understood")
            return int(token)
        path = token[1:].split(".") if token != "." else []
        for root in roots:
            if (found := _walk(root, path)) is not _NOTHING:
                return found
        there = " ".join(f".{key}" for key in roots[0]) if isinstance(roots[0], Mapping) else ""
        raise SbxError("field-unknown", f"read --format {self.text!r}: there is no {token}",
                       f"there are {printable(there)}" if there else "")  # fmt: skip

    def _error(self, why: str) -> SbxError:
        hint = 'it is as in {{.Name}}, {{json .}}, {{join .Command " "}}; for more: --json, and jq'
        return SbxError("format-invalid", f"read --format {self.text!r}: {why}", hint)


_NOTHING = object()


def _walk(value: Any, path: list[str]) -> Any:
    """Return the field of a field … of `value`, _NOTHING where there is none."""
    for name in path:
        if not isinstance(value, Mapping):
            return _NOTHING
        if name not in value:
            name = next((key for key in value if plain(key) == plain(name)), "")
        value = value.get(name, _NOTHING)
    return value


def plain(name: str) -> str:
    """Return a field's name as it is compared: docker's NoNewPrivileges is our no_new_privileges."""
    return name.replace("_", "").lower()


def show(value: Any) -> str:
    """Return a value as Go prints it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{key}:{show(found)}' for key, found in sorted(value.items()))}]"
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(show, value))}]"
    return "" if value is None else str(value)
