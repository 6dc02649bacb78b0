"""Warm: instructions of a Dockerfile that change an image's configuration: --change of `sbx import`. Pure."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import Any

from rootless.errors import SbxError, printable

Run = dict[str, Any]


def apply(run: Run, instructions: list[str]) -> Run:
    """Return the ``config`` object `run` changed by `instructions` such as ``ENV LANG=C.UTF-8``, in their order.

    Raises SbxError ``change-invalid``.
    """
    result = dict(run)
    for text in instructions:
        word, _, rest = text.strip().partition(" ")
        change = CHANGES.get(word.upper())
        rest = rest.strip()
        if change is None:
            raise _bad(text, f"it begins with none of {', '.join(CHANGES)}")
        if not rest:
            raise _bad(text, "it lacks its value")
        if "\0" in rest:
            raise _bad(text, "it holds a NUL")
        change(result, rest, text)
    return result


def _command(name: str) -> Callable[[Run, str, str], None]:
    def change(run: Run, rest: str, text: str) -> None:
        run[name] = _words(rest) or ["/bin/sh", "-c", rest]

    return change


def _words(rest: str) -> list[str] | None:
    """Return the list of texts that `rest` is as JSON, or None when it is something else."""
    try:
        words = json.loads(rest)
    except ValueError:
        return None
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


def _text(name: str) -> Callable[[Run, str, str], None]:
    def change(run: Run, rest: str, text: str) -> None:
        run[name] = rest

    return change


def _working_dir(run: Run, rest: str, text: str) -> None:
    """A relative folder is below the one before it, as in a Dockerfile."""
    run["WorkingDir"] = rest if rest.startswith("/") else f"{run.get('WorkingDir', '').rstrip('/')}/{rest}"


def _env(run: Run, rest: str, text: str) -> None:
    env = dict(entry.split("=", 1) for entry in run.get("Env", []))
    run["Env"] = [f"{name}={value}" for name, value in {**env, **_pairs(rest, text)}.items()]


def _label(run: Run, rest: str, text: str) -> None:
    run["Labels"] = {**run.get("Labels", {}), **_pairs(rest, text)}


def _pairs(rest: str, text: str) -> dict[str, str]:
    """Read ``NAME=VALUE …`` with a shell's quotes, or the old form ``NAME VALUE``."""
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise _bad(text, str(error).lower()) from None
    if words and "=" not in words[0] and " " in rest:
        name, _, value = rest.partition(" ")
        return {name: value.strip()}
    pairs = dict(word.partition("=")[::2] for word in words if word.find("=") > 0)
    if not words or len(pairs) != len(words):
        raise _bad(text, "it is not NAME=VALUE")
    return pairs


def _members(name: str) -> Callable[[Run, str, str], None]:
    def change(run: Run, rest: str, text: str) -> None:
        members = _words(rest) or rest.split()
        run[name] = {**run.get(name, {}), **{member: {} for member in members}}

    return change


def _expose(run: Run, rest: str, text: str) -> None:
    ports: Run = {port if "/" in port else f"{port}/tcp": {} for port in rest.split()}
    run["ExposedPorts"] = {**run.get("ExposedPorts", {}), **ports}


CHANGES: dict[str, Callable[[Run, str, str], None]] = {
    "CMD": _command("Cmd"),
    "ENTRYPOINT": _command("Entrypoint"),
    "ENV": _env,
    "EXPOSE": _expose,
    "LABEL": _label,
    "STOPSIGNAL": _text("StopSignal"),
    "USER": _text("User"),
    "VOLUME": _members("Volumes"),
    "WORKDIR": _working_dir,
}


def _bad(text: str, why: str) -> SbxError:
    return SbxError("change-invalid", f"bad change {printable(text)[:80]!r}: {why}")
