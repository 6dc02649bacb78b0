"""Load the hot modules from their bundle. Outside; imports nothing of ours.

Not imported: its code stands at the head of the bundle, for ``__main__`` to run.
"""

from __future__ import annotations

import gc
import marshal
import sys
from _frozen_importlib import BuiltinImporter, ModuleSpec, module_from_spec
from _frozen_importlib_external import ExtensionFileLoader
from posix import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO
    from types import CodeType, ModuleType
    from typing import Any


def load(package: str, file: FileIO) -> bool:
    """Load the modules of the package at the absolute path `package` from `file`, which is closed, and return True.

    False when one of their sources has changed since the bundle was made, or when it is none; then nothing was loaded.
    """
    gc.disable()  # a launch leaves no garbage worth a search, and the searches take a millisecond
    try:
        with file:
            sources, foreign, modules = marshal.loads(file.read(int(file.read(8))))
            for path, mtime, size in sources:
                found = stat(package + path)
                if found.st_mtime_ns != mtime or found.st_size != size:
                    return False
            codes = marshal.loads(file.read())
    except (OSError, ValueError, TypeError, EOFError):
        return False
    for name, origin in foreign:
        _load_foreign(name, origin)
    for name, path, is_package in modules:
        _make(name, package + path, is_package)
    for (name, _, _), code in zip(modules, codes, strict=True):
        _run(sys.modules[name], code)
    return True


def _load_foreign(name: str, origin: str) -> None:
    """Load a module written in C without a search: from the file `origin`, or the interpreter's own for ""."""
    if name in sys.modules or (origin and origin.rpartition("/")[0] not in sys.path):
        return  # the file of another interpreter with the same tag is not for us
    loader: Any = ExtensionFileLoader(name, origin) if origin else BuiltinImporter
    try:
        module = module_from_spec(ModuleSpec(name, loader, origin=origin or "built-in"))
    except ImportError:
        return  # it has moved: whoever needs it will find it
    sys.modules[name] = module
    loader.exec_module(module)


def _make(name: str, file: str, is_package: bool) -> None:
    module = sys.modules[name] = type(sys)(name)
    module.__file__ = file
    module.__spec__ = ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = module.__spec__.submodule_search_locations = [file.removesuffix("/__init__.py")]


def _run(module: ModuleType, code: CodeType) -> None:
    above, _, own = module.__name__.rpartition(".")
    if above:
        setattr(sys.modules[above], own, module)
    exec(code, module.__dict__)
