"""What the parent becomes when the memory that it had lent is lost: clear up, and tell. Outside; warm.

Run by its path. Its memory is lost when a process that had borrowed it (handover.py) is killed in the middle of what it
does there, or does not give it back in time when a signal means "end". No word of ours is needed for the sandbox to
end: the pipe to its supervisor is closed, as it is when a parent is killed, and the supervisor ends everything.
"""

import sys

if not __package__:
    sys.path[:0] = [__file__.rpartition("/rootless/")[0]]

import contextlib
import os
import signal
from types import FrameType

from rootless import parent, state, trees
from rootless.errors import SbxError, render
from rootless.processes import LOST
from rootless.supervisor import program_refused


def main(status: int) -> int:
    """Wait until the sandbox has ended, delete what is left of it, tell why, and return the exit status.

    `status` is the pipe that its processes had told the parent their failures on. Our children are the parent's, and
    so are the signals that wait for us; SBX_HOME is set. After CLEARING seconds we end all the same.
    """
    ending = [number for number in parent.ENDING if number in signal.sigpending() and _is_heard(number)]
    error = parent.interrupted(ending[0]) if ending else parent.lost()

    def give_up(number: int, frame: FrameType | None) -> None:
        os._exit(_tell(error))

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(parent.CLEARING)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    said = os.read(status, 4096)
    if said[:5] == LOST[:5] and not ending:
        error = program_refused(said[5] - 32)
    for folder in state.debris():
        with contextlib.suppress(SbxError):  # what belongs to subordinate ids: the next launch deletes it
            trees.remove(folder)
    return _tell(error)


def _is_heard(number: int) -> bool:
    """Whether the caller had not told us to ignore the signal, as nohup(1) does."""
    return signal.getsignal(number) != signal.SIG_IGN


def _tell(error: SbxError) -> int:
    """Print the error and return the exit status."""
    with contextlib.suppress(OSError):
        os.write(2, render(error).encode("utf-8", "replace"))
    return error.status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
