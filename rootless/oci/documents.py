"""Warm: JSON that strangers wrote, read within bounds."""

from __future__ import annotations

import json
from typing import Any

from rootless.errors import SbxError

LIMIT = 4 << 20  #: bytes of a manifest, an index or a config
_CONTAINERS = 1 << 16  #: objects and arrays in one document: an empty one takes three bytes there and 72 in memory
_DIGITS = 19  #: of a number; the largest that a descriptor may hold is 2**63 - 1


def decode(data: bytes, what: str, code: str = "document-invalid") -> Any:
    """Return the JSON value in `data`; `what` names it in errors, and `code` is theirs.

    Refused: more than LIMIT bytes, other encodings than UTF-8, deep nesting, long numbers, NaN, a key that stands
    twice in one object (readers differ on which one counts).
    """
    if len(data) > LIMIT:
        raise SbxError("document-limit", f"read {what}: it is larger than {LIMIT} bytes")
    if data.count(b"{") + data.count(b"[") > _CONTAINERS:
        raise SbxError(code, f"read {what}: more than {_CONTAINERS} objects and arrays")
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_real,
            parse_constant=_constant,
        )
    except RecursionError:
        raise SbxError(code, f"read {what}: nested too deeply") from None
    except ValueError as error:
        raise SbxError(code, f"read {what}: not valid JSON: {_reason(error)}") from None


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}"
    return str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return result


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > _DIGITS:
        raise ValueError("a number has too many digits")
    return int(text)


def _real(text: str) -> float:
    if len(text) > 2 * _DIGITS:
        raise ValueError("a number has too many digits")
    return float(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")
