"""What the parent becomes when the memory that it had lent is lost: clear up, and tell. Outside; warm.

Run by its path. Its memory is lost when a process that had borrowed it (handover.py) is killed in the middle of what it
does there, or does not give it back in time when a signal means "end". No word of ours is needed for the sandbox to
end: the pipe to its supervisor is closed, as it is when a parent is killed, and the supervisor ends everything.
"""

import sys

if not __package__:
    sys.path[:0] = [__file__.rpartition("/rootless/")[0]]

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
    so are the signals that wait for us; SBX_HOME is set.
    """
    error = _reason(os.read(status, 4096))

    def give_up(number: int, frame: FrameType | None) -> None:
        os._exit(error.status)

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(parent.CLEARING)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    for folder in state.debris():
        try:
            trees.remove(folder)
        except SbxError:
            continue  # what belongs to subordinate ids; the next launch deletes it
    os.write(2, render(error).encode("utf-8", "replace"))
    return error.status


def _reason(said: bytes) -> SbxError:
    """Return why the memory was lost."""
    if ending := [number for number in parent.ENDING if number in signal.sigpending()]:
        return parent.interrupted(ending[0])
    if said[:5] == LOST[:5]:
        return program_refused(said[5] - 32)
    return parent.lost()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
