"""Find out what a usual launch calls: the list that rootless/bundle.py goes by.

    python3 -ISE helpers/usual.py IMAGE FOLDER >rootless/usual.txt

Launches `true` in IMAGE, and on the root filesystem in FOLDER, from the modules themselves with sys.setprofile(), and
prints the full name of each function of theirs that was called, in whichever process: pid 1 and the command have the
same memory. To be run as an ordinary user with subordinate ids, when the tests say that the list is old.
"""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "rootless"


def called(words: list[str]) -> set[str]:
    """Return the full names of the functions that a launch calls, made by a child. Exits where the launch fails."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        names, status = _called(words)
        os.write(writer, "\n".join(names).encode())
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as stream:
        names = set(stream.read().split())
    if os.waitpid(pid, 0)[1]:
        sys.exit(f"usual: launch {' '.join(words)}: it failed")
    return names


def _called(words: list[str]) -> tuple[set[str], int]:
    sys.path.insert(0, str(PACKAGE.parent))
    sys.argv = ["sbx", "run", "--net", "none", *words, "true"]
    if os.fork() == 0:  # the first one may have to compile the filter, and to clear up
        from rootless import entry

        os._exit(entry.main())
    os.wait()
    from rootless import lean_os

    sys.modules["os"] = lean_os  # type: ignore[assignment]  # as in the bundle
    from rootless import entry, launch  # noqa: F401  # what is loaded is not what is called

    codes = set()
    sys.setprofile(lambda frame, event, _: codes.add(frame.f_code) if event == "call" else None)
    status = entry.main()
    lean_os._exit = lambda _: None  # type: ignore[attr-defined]
    entry.end(status)
    sys.setprofile(None)
    ours = [code for code in codes if code.co_filename.startswith(f"{PACKAGE}/")]
    return {_name(code.co_filename, code.co_qualname) for code in ours}, status


def _name(file: str, function: str) -> str:
    module = ".".join(["rootless", *Path(file).relative_to(PACKAGE).with_suffix("").parts])
    return f"{module.removesuffix('.__init__')}.{function}"


if __name__ == "__main__":
    image, folder = sys.argv[1:]
    names = called([image]) | called(["--rootfs", folder])
    print("\n".join(sorted(name for name in names if "<" not in name)))
