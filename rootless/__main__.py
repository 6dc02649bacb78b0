"""`sbx`. The interpreter compiles this file anew at each start, so it is short: `entry` is the program. Outside.

Also run by its path with ``python -I -S -E`` (helpers/sbx does), without the site module and its 3 ms.
"""

import sys

STARVED = b"sbx: start: out of memory\nhint: where ulimit -v is set, 32 MiB of address space will do: ulimit -v 32768\n"


def main() -> None:
    """Carry out the command line and end the process."""
    try:
        bundled = bool(__package__) or load_bundle(__file__.rpartition("/")[0])
        from rootless import entry

        entry.end(entry.main(), bundled)
    except (MemoryError, SystemError, ImportError, OSError) as error:
        # The dynamic loader has words of its own, and the interpreter's C modules may forget which error it was.
        said = str(error)
        if isinstance(error, (ImportError, OSError)) and "failed to map segment" not in said and "Errno 12" not in said:
            raise
        from posix import _exit, write  # nothing is made up here: there is no memory for it

        write(2, STARVED)
        _exit(125)


def load_bundle(package: str) -> bool:
    """Load the hot modules from their bundle, if that is possible: see bundle.py and unbundle.py."""
    import marshal
    from _frozen_importlib_external import MAGIC_NUMBER
    from posix import environ

    sys.path.insert(0, package.rpartition("/")[0])
    if sys._xoptions or b"SBX_DEBUG" in environ:  # such as importtime: somebody wants to see the modules
        return True
    scope = {}  # type: ignore[var-annotated]
    try:
        file = open(f"{package}/__pycache__/bundle.{sys.implementation.cache_tag}", "rb", 0)
        if file.read(4) != MAGIC_NUMBER:  # the cache tag of interpreters that were no release does not tell them apart
            return False
        exec(marshal.loads(file.read(int(file.read(8)))), scope)
    except (OSError, ValueError, TypeError, EOFError):
        return False
    return bool(scope["load"](package, file))


if __name__ == "__main__":
    main()
