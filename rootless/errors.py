"""Errors and exit statuses. Either side; imports nothing.

An error names the act, the object and the cause; its hint names the cure; its code is stable and may be relied upon
by scripts. What is printed is always one line, and a second one when there is a hint.
"""

from __future__ import annotations

# Exit statuses, as docker, podman and coreutils' timeout(1) and env(1) use them.
TIMED_OUT = 124  #: --timeout ended the command
FAILED = 125  #: we failed, the command never ran
NOT_EXECUTABLE = 126  #: the command was found and cannot be executed
NOT_FOUND = 127  #: the command was not found
SIGNALLED = 128  #: plus the number of the signal that ended the command


class SbxError(Exception):
    """One problem, told in one line.

    `code` is a stable word such as ``image-unknown``; `message` is ``act object: cause``, lower case, without a full
    stop; `hint` is the cure, or empty; `status` is the exit status that fits.
    """

    def __init__(self, code: str, message: str, hint: str = "", status: int = FAILED) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint
        self.status = status

    def __str__(self) -> str:
        return self.message


class StepError(SbxError):
    """A step of a plan failed with `errno`; `index` is its place in the plan's list, `act` its describe()."""

    def __init__(self, act: str, errno: int, cause: str, hint: str = "", status: int = FAILED, index: int = -1) -> None:
        super().__init__("step-failed", f"{act}: {cause}", hint, status)
        self.act = act
        self.errno = errno
        self.index = index


def printable(text: str | bytes) -> str:
    """Return `text` safe for a terminal: control characters and undecodable bytes as escapes.

    Whatever comes from an image, an archive, a registry or a command line passes through here before it is printed.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", "surrogateescape")
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def render(error: SbxError, program: str = "sbx") -> str:
    """Return what the user is shown for `error`: one line, or two with its hint, each ended by a newline."""
    text = f"{program}: {printable(error.message)}\n"
    return text + f"hint: {printable(error.hint)}\n" if error.hint else text
