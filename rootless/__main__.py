"""`sbx`: a hot command that the reader understands goes straight to the launch, everything else to Typer. Outside.

Also run by its path with ``python -I -S -E`` (helpers/sbx does), without the site module and its 3 ms.
"""

from __future__ import annotations

import os
import sys

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from rootless import errors, options, paths

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
        return _fail(
            errors.SbxError(
                "system", f"{error.strerror or error}{': ' + str(error.filename) if error.filename else ''}"
            )
        )


def _slow_way() -> int:
    paths.allow_packages()
    from rootless import cli

    return cli.main()


def _fail(error: errors.SbxError) -> int:
    if os.environ.get("SBX_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    os.write(2, errors.render(error).encode("utf-8", "replace"))
    return error.status


if __name__ == "__main__":
    status = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:  # None when it was closed before we began
                stream.flush()
        except OSError:
            pass
    os._exit(status)  # nothing is left to be torn down: saves a millisecond
