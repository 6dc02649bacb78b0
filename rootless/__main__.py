"""`sbx`: a hot command that the reader understands goes straight to the launch, everything else to Typer. Outside.

Also run by its path with ``python -I -S -E`` (helpers/sbx does), without the site module and its 3 ms.
"""

from __future__ import annotations

import gc
import os
import sys

if not __package__:
    gc.disable()  # a launch leaves no garbage worth a search, and the searches take a millisecond
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

ENOMEM = 12
STARVED = b"sbx: start: out of memory\nhint: where ulimit -v is set, 32 MiB of address space will do: ulimit -v 32768\n"


def _end_if_starved(error: Exception) -> None:
    """Tell in one line that there is no memory, and end, if that is what `error` comes of.

    Nothing is made up here: there is no memory for it. The dynamic loader has words of its own, and the interpreter's C
    modules may forget which error it was.
    """
    if isinstance(error, MemoryError | SystemError) or "failed to map segment" in str(error):
        os.write(2, STARVED)
        os._exit(125)


try:
    from rootless import errors, options, paths
except (MemoryError, SystemError, ImportError) as error:
    _end_if_starved(error)
    raise

HOT = {"run": "run", "shell": "run", "exec": "execute"}


def main() -> int:
    """Carry out the command line and return the exit status; never raises."""
    argv = sys.argv[1:]
    try:
        if argv and argv[0] in HOT and (request := options.read(argv[0], argv[1:])):
            from rootless import launch

            return int(getattr(launch, HOT[argv[0]])(request))
        return _slow_way()
    except errors.SbxError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return errors.SIGNALLED + 2
    except OSError as error:
        if error.errno == ENOMEM:
            _end_if_starved(MemoryError())
        where = f": {error.filename}" if error.filename else ""
        return _fail(errors.SbxError("system", f"{error.strerror or error}{where}"), error.errno or 0)
    except (MemoryError, SystemError, ImportError) as error:
        _end_if_starved(error)
        raise


def _slow_way() -> int:
    paths.allow_packages()
    from rootless import cli

    return cli.main()


def _fail(error: errors.SbxError, errno: int = 0) -> int:
    """Tell the user of `error`, with a hint if there is one to be found, and return the exit status."""
    if os.environ.get("SBX_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    error.hint = error.hint or _find_hint(error, errno)
    os.write(2, errors.render(error).encode("utf-8", "replace"))
    return error.status


def _find_hint(error: errors.SbxError, errno: int) -> str:
    """Return the cause that a probe of the host finds for `error`, or "": now there is time for it.

    Whatever a strange host does to a probe, the error itself must still be told.
    """
    try:
        paths.allow_packages()
        from rootless import checks

        return checks.hint_for(error, errno)
    except (Exception, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:  # None when it was closed before we began
                stream.flush()
        except OSError:
            pass
    os._exit(status)  # nothing is left to be torn down: saves a millisecond
