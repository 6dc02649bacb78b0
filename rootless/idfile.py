"""The file of --cidfile, for scripts that want to know which sandbox they have started. Outside."""

from __future__ import annotations

import os

from rootless.errors import SbxError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def holding(path: str, run: Callable[[], int]) -> int:
    """Make the new file `path`, call `run` and return what it returns; where that raises, the file is removed.

    Raises SbxError ``id-file-exists``: whoever has it may still be using it.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        raise SbxError("id-file-exists", f"create id file {printable(path)}: there is one",
                       "if no sandbox uses it any more, remove it") from None  # fmt: skip
    except OSError as error:
        raise SbxError("id-file-unwritable", f"create id file {printable(path)}: {error.strerror}") from None
    try:
        return run()
    except BaseException:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        raise


def write(path: str, identity: str) -> None:
    """Write the id as docker does, without a line end: whoever finds it there finds a sandbox."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, identity.encode())
    finally:
        os.close(fd)
