"""`sbx`: a hot command that the reader understands goes straight to the launch, everything else to Typer. Outside."""

from __future__ import annotations

import os
import sys

from rootless import errors, options, paths

ENOMEM = 12
HOT = {"run": "run", "shell": "run", "exec": "execute"}


def main() -> int:
    """Carry out the command line and return the exit status. Raises only for want of memory, as it comes."""
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
            raise
        where = f": {error.filename}" if error.filename else ""
        return _fail(errors.SbxError("system", f"{error.strerror or error}{where}"), error.errno or 0)


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


def end(status: int, bundled: bool = True) -> None:
    """End the process with `status`, by the short way: nothing is left to be torn down, which saves a millisecond.

    Where the modules did not come from their bundle, it is made for the next time. Whatever comes of that, even of
    sources that were replaced meanwhile, the status is the command's.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:  # None when it was closed before we began
                stream.flush()
        except OSError:
            pass
    if not bundled and os.access(paths.PACKAGE + "/__pycache__", os.W_OK):
        try:
            from rootless import bundle

            bundle.write()
        except (Exception, KeyboardInterrupt):
            pass
    os._exit(status)
