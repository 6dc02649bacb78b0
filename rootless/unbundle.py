"""The beginning: load the hot modules from their bundle, and hand over to `entry`. Outside.

Its code stands at the head of the bundle, for ``__main__`` to run; it is imported only where there is no bundle.
"""

from __future__ import annotations

import gc
import marshal
import sys
from _frozen_importlib import BuiltinImporter, ModuleSpec, module_from_spec
from _frozen_importlib_external import ExtensionFileLoader
from posix import O_CLOEXEC, O_PATH, _exit, close, environ, fstat, stat, unlink, write
from posix import open as open_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO
    from types import CodeType, ModuleType
    from typing import Any


STARVED = b"sbx: start: out of memory\nhint: where ulimit -v is set, 32 MiB of address space will do: ulimit -v 32768\n"


def begin(package: str = "", file: FileIO | None = None) -> None:
    """Carry out the command line and end the process.

    `package` is the absolute path of the package, if it was run by that, and `file` its bundle, where that can be used.
    """
    if package and (folder := package.rpartition("/")[0]) not in sys.path:
        sys.path.insert(0, folder)
    try:
        # Somebody wants to see the modules (importtime), or their lines
        plain = not package or bool(sys._xoptions) or b"SBX_DEBUG" in environ
        bundled = plain or bool(file and load(package, file))
        if file:
            file.close()
        from rootless import entry

        entry.end(entry.main(), bundled)
    except KeyboardInterrupt:
        _exit(130)
    except (MemoryError, SystemError, ImportError, OSError) as error:
        # The dynamic loader has words of its own, and the interpreter's C modules may forget which error it was.
        said = str(error)
        if isinstance(error, (ImportError, OSError)) and "failed to map segment" not in said and "Errno 12" not in said:
            raise
        write(2, STARVED)  # nothing is made up here: there is no memory for it
        _exit(125)


def load(package: str, file: FileIO) -> bool:
    """Load the modules of the package at the absolute path `package` from `file`, which is closed, and return True.

    False when one of their sources has changed since the bundle was made, or when it is none; then nothing was loaded.
    """
    gc.disable()  # a launch leaves no garbage worth a search, and the searches take a millisecond
    try:
        with file:
            sources, foreign, modules, length, rest, hashed = marshal.loads(file.read(int(file.read(8))))
            folder = open_file(package, O_PATH | O_CLOEXEC)
            try:
                for path, mtime, size in sources:
                    found = stat(path[1:], dir_fd=folder)
                    if found.st_mtime_ns != mtime or found.st_size != size:
                        return False
            finally:
                close(folder)
            codes = marshal.loads(file.read(length))
            Rare.codes = file.read()
            if len(Rare.codes) != rest:
                return False
            found = fstat(file.fileno())
            Rare.sound = hashed, str(file.name), found.st_dev, found.st_ino
    except (OSError, ValueError, TypeError, EOFError):
        return False
    for name, origin in foreign:
        _load_foreign(name, origin)
    for name, path, is_package, start in modules:
        _make(name, package + path, is_package, start)
    for (name, *_), code in zip(modules, codes, strict=True):
        _run(sys.modules[name], code)
    return True


class Rare(tuple):  # type: ignore[type-arg]
    """What a usual launch does without: a function, or a step. Its place in `codes`, until it is first wanted."""

    codes = b""
    #: what source_hash() is to say of `codes`, and of which file they are: its path, device and inode
    sound: tuple[bytes, str, int, int]
    #: where each module's begin
    modules: dict[str, int] = {}
    itself: Any

    def __getattr__(self, name: str) -> Any:
        if name != "itself":
            return getattr(self.itself, name)
        if Rare.sound:
            from _imp import source_hash  # the interpreter's own, and there

            if source_hash(0, Rare.codes) != Rare.sound[0]:
                _end_damaged(*Rare.sound[1:])
            Rare.sound = ()  # type: ignore[assignment]
        (place,) = self
        module = [module for module, start in Rare.modules.items() if start <= place][-1]
        found: dict[str, Any] = {}
        exec(marshal.loads(memoryview(Rare.codes)[place:]), sys.modules[module].__dict__, found)
        (self.itself,) = found.values()
        return self.itself

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self.itself(*args, **keywords)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self.itself.__get__(instance, owner)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, self.itself)


def _end_damaged(path: str, device: int, inode: int) -> None:
    """End the process, for its code is not what was written, and remove that; where it is in reach, and no other."""
    try:
        found = stat(path)
        if (found.st_dev, found.st_ino) == (device, inode):
            unlink(path)
    except OSError:
        pass
    write(2, f"sbx: load {path}: it is damaged\nhint: it is removed now, try again; and see to the disk\n".encode())
    _exit(125)


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


def _make(name: str, file: str, is_package: bool, start: int) -> None:
    module = sys.modules[name] = type(sys)(name)
    module.__rare__ = Rare  # type: ignore[attr-defined]
    Rare.modules[name] = start
    module.__file__ = file
    module.__spec__ = ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = module.__spec__.submodule_search_locations = [file.removesuffix("/__init__.py")]


def _run(module: ModuleType, code: CodeType) -> None:
    above, _, own = module.__name__.rpartition(".")
    if above:
        setattr(sys.modules[above], own, module)
    exec(code, module.__dict__)
