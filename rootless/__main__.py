"""`sbx`. The interpreter compiles this file anew at each start, so it is short: unbundle.py goes on. Outside.

Also run by its path with ``python -I -S -E`` (helpers/sbx does), without the site module and its 3 ms.
"""

import sys


def main() -> None:
    """Carry out the command line and end the process."""
    if __package__:
        from rootless import unbundle

        unbundle.begin()
        return
    from _frozen_importlib_external import MAGIC_NUMBER
    from marshal import loads

    package = __file__.rpartition("/")[0]
    scope = {}  # type: ignore[var-annotated]
    try:
        file = open(f"{package}/__pycache__/bundle.{sys.implementation.cache_tag}", "rb", 0)
        if file.read(4) == MAGIC_NUMBER:  # the cache tag of interpreters that were no release does not tell them apart
            exec(loads(file.read(int(file.read(8)))), scope)
    except (OSError, ValueError, TypeError, EOFError):
        pass
    if "begin" not in scope:
        sys.path.insert(0, package.rpartition("/")[0])
        from rootless import unbundle

        unbundle.begin(package)
        return
    scope["begin"](package, file)


if __name__ == "__main__":
    main()
