"""Listings as docker's and podman's are asked for: `--filter` and `--format`. Warm.

A listing is a table of columns, docker's placeholder → its head and its value, and a table of filters, key → what makes
a test of the value that was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import typer

from rootless.cli import output
from rootless.cli.templates import Template, plain
from rootless.errors import SbxError

Format = Annotated[
    str, typer.Option("--format", metavar="TEMPLATE", help="print {{.Name}} … of each, table {{.Name}}\\t…, or json")
]
DocumentFormat = Annotated[
    str, typer.Option("--format", "-f", metavar="TEMPLATE", help="print {{.name}} … of each, instead of JSON")
]
Filters = Annotated[list[str], typer.Option("--filter", "-f", metavar="KEY=VALUE", help="list only these")]

Test = Callable[[Any], bool]


class Column(NamedTuple):
    """What a placeholder stands for. Without a head it is no column: only what {{.Label "key"}} asks."""

    head: str
    value: Callable[[Any], Any]


def choose(rows: Iterable[Any], words: Sequence[str], filters: Mapping[str, Callable[[str], Test]]) -> list[Any]:
    """Return the rows that all keys of `words` let pass: of a key's values one is enough, but of labels all must be.

    Raises SbxError ``filter-invalid``, also where there is no row.
    """
    tests: dict[str, list[Test]] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise SbxError("filter-invalid", f"read --filter {word!r}: it is KEY=VALUE",
                           f"keys are {', '.join(filters)}")  # fmt: skip
        if key not in filters:
            raise SbxError("filter-invalid", f"read --filter {word!r}: there is no {key!r}",
                           f"keys are {', '.join(filters)}")  # fmt: skip
        tests.setdefault(key, []).append(filters[key](value))
    kept = list(rows)
    for key, several in tests.items():
        enough = all if key == "label" else any
        kept = [row for row in kept if enough(test(row) for test in several)]
    return kept


def has_label(word: str, labels: Callable[[Any], Mapping[str, str]]) -> Test:
    """Return the test of a filter ``label=KEY[=VALUE]``."""
    key, equals, value = word.partition("=")
    return lambda row: key in labels(row) and (not equals or labels(row)[key] == value)


def show(form: str, rows: Sequence[Any], columns: Mapping[str, Column]) -> None:
    """Print each row by the template `form`, as a table if that is ``table TEMPLATE``. Raises ``format-invalid``."""
    is_table = form.split(" ", 1)[0] == "table"
    template = Template(form.removeprefix("table").strip() if is_table else form)
    if is_table and not template.text:
        template = Template("\t".join(f"{{{{.{name}}}}}" for name, column in columns.items() if column.head))
    wanted = _wanted(template, columns)
    lines = [template.expand({name: columns[name].value(row) for name in wanted}) for row in rows]
    if is_table:
        head = template.expand({name: columns[name].head or _Names() for name in wanted})
        output.table(head.split("\t"), [line.split("\t") for line in lines])
    else:
        output.formatted(lines)


def show_documents(
    form: str, found: Sequence[Mapping[str, Any]], otherwise: Callable[[Any], Any] = lambda one: None
) -> None:
    """Print documents as JSON, or each by the template `form`; `otherwise` makes what else the template may name."""
    if form in ("", "json"):
        output.json(found)
    else:
        template = Template(form)
        output.formatted([template.expand(one, otherwise(one)) for one in found])


class _Names(dict[str, str]):
    """The head of a column of entries, which is whichever entry is asked for."""

    def get(self, key: str, default: object = None) -> str:
        return key.upper()


def _wanted(template: Template, columns: Mapping[str, Column]) -> list[str]:
    """Return the names of the columns that `template` shows; nothing else is asked for their values."""
    by_name = {plain(name): name for name in columns}
    for field in template.fields:
        if field and plain(field) not in by_name:
            raise SbxError("format-invalid", f"read --format {template.text!r}: there is no .{field}",
                           f"there are {' '.join('.' + name for name in columns)}")  # fmt: skip
    if "" in template.fields:
        return [name for name, column in columns.items() if column.head]
    return list(dict.fromkeys(by_name[plain(field)] for field in template.fields))
