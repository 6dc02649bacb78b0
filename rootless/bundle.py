"""The hot modules as one file of compiled code. Outside; warm: made once, after the first launch of an installation.

The interpreter finds, checks and reads the thirty modules of a launch one by one, which takes it 4.5 ms; from one file
it is less than 2. Nothing is in it that a launch has no use for: no docstrings, no annotations, no slots, and `import
os` means lean_os. What a usual launch does not call (all but usual.txt) stands apart, and is unmarshalled when it is
first wanted. Of the lines, each function keeps its first; with SBX_DEBUG set, the modules themselves are loaded, and a
traceback is exact.

The file is ``__pycache__/bundle.cpython-311`` in the package (the ending is the interpreter's cache tag), beside the
modules' own compiled files and under the same rules: whoever may write those may write it, and it is used as long as
time and size of every source are what they were when it was made. unbundle.py loads it, or the modules themselves.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import importlib.util
import marshal
import os
import sys
from _imp import source_hash
from collections.abc import Container, Iterator
from importlib.machinery import ExtensionFileLoader
from importlib.util import MAGIC_NUMBER
from types import CodeType

from rootless import paths

#: Where a launch begins. What these import at their top, and what that does, is hot.
ROOTS = ("rootless.entry", "rootless.launch")
#: The full names of the functions that a usual launch calls: helpers/usual.py
USUAL = f"{paths.PACKAGE}/usual.txt"


def hot_modules() -> list[tuple[str, str]]:
    """Return the hot modules and their files, each after what it imports at its top."""
    found: dict[str, str] = {}
    entered: set[str] = set()

    def visit(name: str) -> None:
        if name in entered:
            return
        entered.add(name)
        if above := name.rpartition(".")[0]:
            visit(above)
        for other in _imported(_lean(file := _file(name))):
            visit(other)
        found[name] = file

    for root in ROOTS:
        visit(root)
    return list(found.items())


def compiled(file: str) -> CodeType:
    """Return the code of the module in `file` as the bundle has it."""
    return _compile(_lean(file), file)


def _compile(tree: ast.Module, file: str) -> CodeType:
    return _short(compile(ast.fix_missing_locations(tree), file, "exec", dont_inherit=True, optimize=2))


#: What tables of lines there are, by how much code they are for: equal ones are one object, and so there once
_lines: dict[int, bytes] = {}


def _short(code: CodeType) -> CodeType:
    """Return `code` with one line for all of it, without columns: CPython, Objects/locations.md."""
    constants = tuple(_short(value) if isinstance(value, CodeType) else value for value in code.co_consts)
    units = len(code.co_code) // 2
    # Each entry stands for up to eight units of code; one too many, and whoever traces writes past its memory
    entries = ((0x80 | 13 << 3 | min(8, units - start) - 1, 0) for start in range(0, units, 8))
    table = _lines.setdefault(units, bytes(byte for entry in entries for byte in entry))
    return code.replace(co_consts=constants, co_linetable=table, co_qualname=code.co_name)


def _lean(file: str) -> ast.Module:
    with open(file, encoding="utf-8") as stream:
        tree: ast.Module = _Lean().visit(ast.parse(stream.read(), file))
    return ast.fix_missing_locations(tree)


class _Lean(ast.NodeTransformer):
    """Leaves out what only readers and type checkers need, and puts lean_os in the place of os."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        plain = ast.Assign([node.target], node.value) if node.value else ast.Pass()
        return ast.copy_location(plain, node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        # They save memory where there are many of a kind; here each costs a descriptor, and there are few.
        node.body = [part for part in node.body if not _is_slots(part)] or [ast.copy_location(ast.Pass(), node)]
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.copy_location(ast.Pass(), node) if node.module == "__future__" else node

    def visit_Import(self, node: ast.Import) -> ast.AST:
        if [alias.name for alias in node.names] != ["os"]:
            return node
        return ast.copy_location(ast.ImportFrom("rootless", [ast.alias("lean_os", "os")], 0), node)


class _Split(ast.NodeTransformer):
    """Takes out of a module what a usual launch does not call, and leaves its place in `rare` there: unbundle.Rare."""

    def __init__(self, module: str, file: str, usual: Container[str], values: Container[str], rare: bytearray) -> None:
        self._above = module
        self._file = file
        self._usual = usual
        self._values = values
        self._rare = rare

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        above, self._above = self._above, f"{self._above}.{node.name}"
        names = {f"{self._above}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        is_step = [ast.unparse(base) for base in node.bases] == ["Step"]
        if is_step and node.name not in self._values and not any(name in self._usual for name in names):
            taken: ast.AST = self._take(node)  # what is only ever called may be anything that can be called
        else:
            node.body = [self.visit(part) if isinstance(part, ast.FunctionDef) else part for part in node.body]
            taken = node
        self._above = above
        return taken

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        is_usual = f"{self._above}.{node.name}" in self._usual
        return node if is_usual or not _may_stand_apart(node) else self._take(node)

    def _take(self, node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
        place = ast.parse(f"{node.name} = __rare__(({len(self._rare)},))").body[0]
        self._rare += marshal.dumps(_compile(ast.Module([node], []), self._file))
        return ast.copy_location(place, node)


def _may_stand_apart(node: ast.FunctionDef) -> bool:
    """Whether it means the same outside its class, and is none that the interpreter looks up by itself."""
    names = {part.id if isinstance(part, ast.Name) else part.attr for part in ast.walk(node)
             if isinstance(part, ast.Name | ast.Attribute)}  # fmt: skip
    private = any(name.startswith("__") and not name.endswith("__") for name in names)
    return not (node.name.startswith("__") or private or "super" in names)


def _values(tree: ast.Module) -> Iterator[str]:
    """Yield the names by which something is done in `tree` besides a call."""
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in called:
            yield node.id if isinstance(node, ast.Name) else node.attr


def _is_slots(node: ast.stmt) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else []
    return any(isinstance(target, ast.Name) and target.id == "__slots__" for target in targets)


def _imported(tree: ast.Module) -> Iterator[str]:
    """Yield our own modules that `tree` imports at its top."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "rootless":
            yield node.module
            yield from (name for alias in node.names if _file(name := f"{node.module}.{alias.name}"))


def _file(name: str) -> str:
    """Return the source of our module `name`, or "" if there is none of that name."""
    stem = f"{os.path.dirname(paths.PACKAGE)}/{name.replace('.', '/')}"
    return next((file for file in (f"{stem}.py", f"{stem}/__init__.py") if os.path.exists(file)), "")


def make() -> bytes:
    """Return the bundle: the code of unbundle.py, a table, the code of all modules in the table's order, and the rest.

    In front of all stands the number of the interpreter's bytecode, and in front of the first two eight digits that say
    how long they are. The table has the sources (path below the package, mtime, size), the C modules that are needed,
    each with its file, the modules (name, path, whether it is a package itself, where what is rare of it begins), the
    length of the last two, and a hash of what is rare. All is marshalled; the modules in one go, so that what they have
    in common is there once, and what is rare one by one.
    """
    files = hot_modules()
    loader = _file("rootless.unbundle")
    others = [USUAL, loader, _file("rootless.__main__"), _file("rootless.bundle")]
    # before they are read: what changes meanwhile makes the bundle stale, not wrong
    sources = [_source(file) for file in (*others, *(file for _, file in files))]
    with open(USUAL, encoding="utf-8") as stream:
        usual = frozenset(stream.read().split())
    values = {name for _, file in files for name in _values(_lean(file))}
    modules, hot, rare = [], [], bytearray()
    for name, file in files:
        modules.append((name, _path(file), file.endswith("/__init__.py"), len(rare)))
        hot.append(_compile(_Split(name, file, usual, values, rare).visit(_lean(file)), file))
    codes = marshal.dumps(tuple(hot))
    head = marshal.dumps(compiled(loader))
    table = marshal.dumps((sources, _foreign_modules(), modules, len(codes), len(rare), source_hash(0, rare)))
    return b"".join([MAGIC_NUMBER, b"%08d" % len(head), head, b"%08d" % len(table), table, codes, rare])


def _source(file: str) -> tuple[str, int, int]:
    status = os.stat(file)
    return _path(file), status.st_mtime_ns, status.st_size


def _path(file: str) -> str:
    return file.removeprefix(paths.PACKAGE)


def _foreign_modules() -> list[tuple[str, str]]:
    """Return the C modules that the hot modules import at their top, each with its file, or "" for a built-in one."""
    wanted = {
        alias.name
        for _, file in hot_modules()
        for node in _lean(file).body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    specs = [importlib.util.find_spec(name) for name in sorted(wanted) if not name.startswith("rootless")]
    return [
        (spec.name, "" if spec.origin == "built-in" else str(spec.origin))
        for spec in specs
        if spec and (spec.origin == "built-in" or isinstance(spec.loader, ExtensionFileLoader))
    ]


def path() -> str:
    """Return where the bundle for this interpreter is."""
    return f"{paths.PACKAGE}/__pycache__/bundle.{sys.implementation.cache_tag}"


def write() -> bool:
    """Make the bundle where the interpreter would write compiled modules; return whether it is there now.

    Never raises for a folder that cannot be written, or a full disk: the modules do as well. Of several that are at it
    at once, one does the work. Killed at any moment, it leaves no half a bundle.
    """
    if sys.dont_write_bytecode:
        return False
    try:
        os.makedirs(os.path.dirname(path()), exist_ok=True)
        new = os.open(path() + ".new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError:
        return False
    try:
        fcntl.flock(new, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(new), os.stat(path() + ".new")):
            return False  # another's, finished a moment ago
        _finish(new)
        return True
    except OSError:
        return False
    finally:
        os.close(new)


def _finish(new: int) -> None:
    """Write the bundle to the open file `new`, and give that its name; on failure it is removed."""
    try:
        content = make()
        os.truncate(new, 0)
        if os.write(new, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(new)  # or a power cut leaves zeroes in it
        os.fchmod(new, os.stat(__file__).st_mode & 0o666)  # whoever may read the source
        os.rename(path() + ".new", path())
    except BaseException:
        os.unlink(path() + ".new")
        raise


if __name__ == "__main__":  # for who installs for others: they could not write it
    sys.exit(0 if write() else 1)
