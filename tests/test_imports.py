"""Imports go one way, and the launch path's modules import nothing that costs it time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import needs
import pytest

PACKAGE = needs.CHECKOUT / "rootless"

# Lowest first: a module imports from lower rows, and from its own row where that is listed below. A new module is a
# new word here; a new row is a change of the design.
ROWS = [
    ("the least", "__init__ lean_os"),
    (
        "leaves",
        "errors paths spec reference syscalls options steps capabilities filters bpf trees resources init handover",
    ),
    ("helpers of the host", "programs systemd idfile"),
    ("subjects", "namespaces idmap mounts privileges cgroups network terminal store state seccomp"),
    ("what joins subjects", "processes state build accounting receipt relay"),
    ("what joins sandboxes", "joining"),
    ("plan", "plan"),
    ("child", "child"),
    ("supervisor", "supervisor"),
    ("parent", "parent"),
    ("what the parent becomes", "lost"),
    ("images", "oci"),
    ("what watches a launch", "observe"),
    ("networks of several", "networks"),
    ("launch", "launch"),
    ("checks", "checks"),
    ("command line", "cli"),
    ("the hot modules as one", "bundle"),
    ("entry", "entry"),
    ("the beginning", "unbundle"),
    ("the interpreter's entry", "__main__"),
]
ROW = {module: row for row, (_, modules) in enumerate(ROWS) for module in modules.split()}
#: Rows whose modules may import one another.
OPEN_ROWS = {"leaves"}

#: What stands at the top of a module that a launch loads (costs in ms: re 6, json 7, typing 8, pathlib 11,
#: subprocess 13, dataclasses 14).
CHEAP = {"__future__", "os", "sys", "gc", "errno", "_signal", "fcntl", "select", "termios", "marshal", "time"}
#: One file alone knows ctypes, through its C half; and one stands in for os.
CHEAP_IN = {"syscalls": CHEAP | {"_ctypes", "_struct"}, "lean_os": CHEAP | {"posix"}}
#: What loads the modules works on the import system itself.
CHEAP_IN["unbundle"] = CHEAP | {"posix", "_frozen_importlib", "_frozen_importlib_external"}


class Import(NamedTuple):
    """One imported module: its full name, its line, and whether it is paid for when the importing module is loaded."""

    name: str
    line: int
    at_load: bool


def imports(tree: ast.Module) -> Iterator[Import]:
    """Yield what a module imports, except what only a type checker sees."""

    def walk(node: ast.AST, at_load: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                yield from walk(other, at_load)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_load)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            # `from rootless import mounts` names a module of ours, `from rootless.mounts import Bind` something in it
            for alias in node.names if node.module == "rootless" else node.names[:1]:
                ours = f"rootless.{alias.name}" if node.module == "rootless" else str(node.module)
                yield Import("rootless" if alias.name.startswith("__") else ours, node.lineno, at_load)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, at_load and not inside)

    yield from walk(tree, True)


def subject(name: str) -> str:
    """Return the part of a module's name that has a row: rootless.oci.pull is oci, rootless is __init__."""
    return [*name.split("."), "__init__"][1]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def first_paragraph(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "share" not in path.parts}
#: What a launch never loads may be ordinary Python; its first line says that it is.
WARM = {
    module
    for module, path in MODULES.items()
    if subject(module) in {"oci", "cli"} or "warm" in first_paragraph(path).lower()
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    mine = subject(module)
    assert mine in ROW, f"{module} has no row in ROWS: say which modules it may import by placing it"
    for found in imports(ast.parse(MODULES[module].read_text())):
        if found.name.split(".")[0] != "rootless":
            continue
        other = subject(found.name)
        if other == mine:  # within oci, cli or network
            continue
        where = f"{MODULES[module]}:{found.line}"
        same_row = ROW[mine] == ROW.get(other) and ROWS[ROW[mine]][0] in OPEN_ROWS
        assert same_row or ROW.get(other, len(ROWS)) < ROW[mine], (
            f"{where}: {mine} ({ROWS[ROW[mine]][0]}) imports {other}, which is not below it"
        )


@pytest.mark.parametrize("module", [module for module in MODULES if module not in WARM])
def test_the_launch_path_imports_only_what_is_cheap(module: str) -> None:
    cheap = CHEAP_IN.get(subject(module), CHEAP)
    for found in imports(ast.parse(MODULES[module].read_text())):
        top = found.name.split(".")[0]
        where = f"{MODULES[module]}:{found.line}"
        if found.at_load and top == "rootless":
            assert found.name not in WARM, f"{where}: {found.name} is warm: import it in the function that needs it"
        elif found.at_load:
            assert found.name in cheap, f"{where}: {found.name} costs every launch time: import it where it is needed"


def test_only_one_module_knows_ctypes_and_the_unshare_binding() -> None:
    for module, path in MODULES.items():
        names = {found.name.split(".")[0] for found in imports(ast.parse(path.read_text()))}
        assert subject(module) == "syscalls" or not names & {"ctypes", "_ctypes", "unshare"}, module


def test_each_module_says_which_side_it_is_on() -> None:
    for module, path in MODULES.items():
        said = first_paragraph(path)
        sides = ("outside", "inside", "either side", "both sides", "warm")
        assert not path.read_text() or any(side in said.lower() for side in sides), f"{module}: {said!r}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os", [("os", True)]),
        ("from rootless import mounts, plan", [("rootless.mounts", True), ("rootless.plan", True)]),
        ("from rootless.oci.pull import pull", [("rootless.oci.pull", True)]),
        ("from rootless import __version__", [("rootless", True)]),
        ("def f():\n    import json", [("json", False)]),
        ("class C:\n    import json", [("json", True)]),
        ("try:\n    import json\nexcept ImportError:\n    pass", [("json", True)]),
        ("if TYPE_CHECKING:\n    import typing\nelse:\n    import json", [("json", True)]),
    ],
)
def test_the_reader_of_imports(source: str, expected: list[tuple[str, bool]]) -> None:
    assert [(found.name, found.at_load) for found in imports(ast.parse(source))] == expected
