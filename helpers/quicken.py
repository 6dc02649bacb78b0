"""Let the kernel start the interpreter of a virtual environment's `sbx` itself, and that find at once what it needs.

    ENVIRONMENT/bin/python3 -ISE helpers/quicken.py ENVIRONMENT PACKAGE

Half a millisecond is the shell's that runs the script which pip installs; bin/sbx becomes a script of the interpreter's
instead, that begins with the bundle. The other half is what each start of an interpreter looks for: the one of this
script is ENVIRONMENT/lean/python3, a link, beside which stands where its modules are (the Python manual: "The
initialization of the sys.path module search path", _pth files), lean_encodings.py first of all.

Nothing is changed where the paths can't stand in a first line, or can't be written: then the shell does. The one thing
that it says better is that stdin is a folder.
"""

import fcntl
import os
import py_compile
import sys
from importlib.util import MAGIC_NUMBER

FRONT = """#!{lean}/python3 -ISE
from marshal import loads
package = "{package}"
try:
    file = open("{package}/__pycache__/bundle.{tag}", "rb", 0)
    if file.read(4) == {magic}:
        exec(loads(file.read(int(file.read(8)))))
except (OSError, ValueError, TypeError, EOFError):
    pass
if "begin" in globals():
    begin(package, file)
__file__ = "{package}/__main__.py"
exec(open(__file__).read())
"""
LONGEST = 127  #: bytes of a first line that Linux reads before 5.1
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-")


def quicken(environment: str, package: str) -> None:
    """Write ENVIRONMENT/bin/sbx for the package at that absolute path, and ENVIRONMENT/lean; what is there stays."""
    lean = f"{environment}/lean"
    tag, magic = sys.implementation.cache_tag, repr(MAGIC_NUMBER)
    front = FRONT.format(lean=lean, package=package, tag=tag, magic=magic)
    if len(front.partition("\n")[0]) > LONGEST or set(lean + package) - PLAIN:
        return
    with open(f"{os.path.dirname(os.path.abspath(__file__))}/lean_encodings.py") as file:
        encodings = file.read()
    alone = os.open(environment, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(alone, fcntl.LOCK_EX)  # until the end: one writes at a time
    os.makedirs(f"{lean}/encodings", exist_ok=True)
    replace(f"{lean}/encodings/__init__.py", encodings)
    py_compile.compile(f"{lean}/encodings/__init__.py", doraise=True)
    # By the name that has its version: the next one's modules are elsewhere
    replace(f"{lean}/python3", os.path.realpath(sys.executable), link=True)
    folders = [lean, *(folder for folder in sys.path if os.path.isdir(folder))]
    replace(f"{lean}/python3._pth", "".join(f"{folder}\n" for folder in folders))
    replace(f"{environment}/bin/sbx", front)


def replace(path: str, content: str, link: bool = False) -> None:
    """Make the file at `path`, or the link, all at once, unless it is what it is to be."""
    try:
        if link:
            found = os.readlink(path)
        else:
            with open(path) as file:
                found = file.read() if os.access(path, os.X_OK) else None
    except (OSError, ValueError):
        found = None
    if found == content:
        return
    new = f"{path}.new"
    if os.path.lexists(new):
        os.unlink(new)  # of one that was killed
    if link:
        os.symlink(content, new)
    else:
        with open(new, "w") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o755)
    os.rename(new, path)


if __name__ == "__main__":
    try:
        quicken(*sys.argv[1:])
    except OSError as error:
        print(f"quicken: write {error.filename}: {error.strerror}: sbx starts by the shell", file=sys.stderr)
