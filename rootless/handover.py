"""Processes that part without a copy of the interpreter: who stays behind makes its last calls from a list. Inside.

After fork(2) each side pays for every page that it touches, and an interpreter touches four hundred to do next to
nothing: a millisecond of a launch for each process. But the supervisor and pid 1 have only a few system calls left
before they become programs of two hundred bytes (init.py), and for these no interpreter is needed.

    split()     The caller clones a process that goes on in the very memory that both were in (CLONE_VM, as vfork(2)
                does), while the caller makes the calls of its list and becomes a program. So pid 1 starts the command.

    begin()     The caller clones a process in its own memory, which makes the calls of its first list, and then waits
    … meet()    to be met. When it is, it clones another, with a copy of the caller's memory, which goes on as if it had
                returned from meet() too. Itself it makes the calls of its second list and becomes a program. So the
                parent starts the supervisor, and that pid 1.

    lend()      With begin(…, lends), the process that is cloned has no copy: it waits to be lent the memory, and goes
    … hand_back()  on as if it had returned from lend(). The caller waits, and runs nothing, until it gets its memory
                back; then it goes on as if it had returned from hand_back(), by which the borrower became another
                program, or ended. Meanwhile there is one line of thought, which two processes take turns at, three
                with split(). If one of them is killed in the middle of it, it is not to be taken up again: the caller
                becomes a program that clears up. So the parent's memory does for pid 1 and the command.

A list is data, 64 bytes for each call: its number, six arguments, and where its result goes, which may be an argument
of a later one. It is walked by eight hundred bytes of machine code that keep off the stack, for that is in use. Their
source is helpers/handover-x86_64.s; the tests assemble it and compare. On other machines, and where the host has no
memory that may be executed, processes are forked; and where a shadow stack is kept of return addresses.
"""

from __future__ import annotations

import os

from rootless import init, syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: machine → its code
CODE = {
    "x86_64": bytes.fromhex(
        "83fe010f829f01000048891f48896f084c8967104c896f184c8977204c897f28488967304889fb0f842501000083fe030f82"
        "9b0100000f848300000048c783c000000001000000b80e000000bf02000000488db34001000031d241ba080000000f05488b"
        "8300010000488bbb08010000488bb310010000488b93180100004c8b93200100004c8b83280100000f054989c4b80e000000"
        "bf02000000488db34801000031d241ba080000000f054c89e048c783c000000000000000e95f020000b801000000488b7b70"
        "488db380000000ba020000000f05be0200000031d2b80f010000488dbbc80000004531d20f054885c078eaf683ce00000010"
        "751383fe01741ebe01000000488d93d8000000ebce488b83c00000004885c00f85ff010000b848000000488b7b78be020000"
        "0031d20f05b83b000000488bbbe8000000488bb3f0000000488b93f80000000f05e9c0010000b801000000488b7b70488db3"
        "80000000ba010000000f0531c0488b7b78488db380000000ba010000000f054883f8fc74e64889c2488b43384885d20f8f8b"
        "0100004885c00f888201000048c7c0f6ffffffe9760100004989f9498bb9a8000000498bb1b000000031d24531d24531c0b8"
        "380000000f054885c07401c34c89cb4c8b63484c8d2d05000000e9ac000000488b7b5831f6488b53684531d24531c0b83800"
        "00000f054885c0741879664883bba8000000000f84110100004531e4e9cb000000488bbb300100004885ff0f84f9000000b8"
        "030000000f05488bbb38010000488db380000000ba0100000031c00f0548ffc80f85c6000000488bbbb800000031c00f0548"
        "ffc80f84be000000e9ad00000048894338488b7b60b90a00000031d2f7f180c23048ffcf881785c075f04c8b63504c8d2d85"
        "000000498b04244885c0790341ffe5498b7c2408498b742410498b5424184d8b5424204d8b4424284d8b4c24300f05483d01"
        "f0ffff731f4885c0750749833c24007445498b4c24384885c974034889014983c440ebad4c89634048894338488b8ba00000"
        "00f7d883c0208801b801000000488bbb88000000488bb390000000488b93980000000f05b8e7000000bf7d0000000f05488b"
        "6b084c8b63104c8b6b184c8b73204c8b7b28488b6330488b1bc3"
    ),
}
#: The calls that lists are made of: their numbers on x86_64
READ, WRITE, CLOSE, PWRITE, DUP2, FCNTL, CHDIR, SETSID, SETGROUPS = 0, 1, 3, 18, 33, 72, 80, 112, 116
SETRESUID, SETRESGID, CAPSET, PRCTL, OPENAT, EXECVEAT, CLOSE_RANGE = 117, 119, 126, 157, 257, 322, 436
EXECVE, EXIT_GROUP = 59, 231

_BEGIN, _MEET, _SPLIT, _LEND, _HAND_BACK = range(5)
_CALL = 64  #: bytes of a call
_CALLS = 44  #: how many there may be, in both lists together
_FRAME = 336  #: bytes of the frame, which is what the machine code knows
_SIZE = 8192  #: of all of it
_RESULT, _FAILED, _BACK, _LAST = 7, 8, 24, 32  #: their places in the frame, in words
_POLLIN = 1
_CLONE_PIDFD = 0x1000
_ECHILD, _ENOMEM = 10, 12


class Handover:
    """One process that stays behind, and its lists of calls: `first`, before it clones the other process, and `second`.

    `process`, `path` and `pidfd` are the addresses of what it knows of that one when it makes the calls of its second
    list: the id, /proc/ID, and the pidfd, which goes where it is told.
    """

    __slots__ = ("_code", "_data", "_flags", "_given", "_lending", "_memory", "_report", "_text", "_top", "base",
                 "first", "path", "pidfd", "process", "second")  # fmt: skip

    def __init__(self, flags: int, report: int, text: bytes) -> None:
        """Prepare to clone with `flags` (clone(2)). A call that fails is told on the descriptor `report` by `text`.

        The last byte but one of that is the errno + 32 then, and the process ends with 125. Raises OSError where the
        host has no memory that may be executed, or no machine code is known for it.
        """
        self._code = _load()
        self._memory = syscalls.buffer(_SIZE)
        self.base = syscalls.address(self._memory)
        self._lending = [0] * 17
        self._given: tuple[Sequence[bytes], syscalls.Words, syscalls.Words] | None = None
        self.first: list[int] = []
        self.second: list[int] = []
        self._data: list[bytes] = []
        self._top = self.base + _FRAME + _CALLS * _CALL
        self._flags = flags
        self._report = report
        self._text = (self.put(text), len(text))
        self.process = self.base + _RESULT * 8
        self.path = self.put(b"/proc/" + b"/" * 10)  # no process has a longer number
        self.pidfd = 0

    def put(self, data: bytes) -> int:
        """Return the address of `data`, with a NUL behind it."""
        place = self._top
        data = data.ljust(len(data) + 8 & ~7, b"\0")
        self._data.append(data)
        self._top += len(data)
        return place

    def put_words(self, words: Sequence[bytes]) -> int:
        """Return the address of the addresses of `words`, up to a NULL, as execve(2) wants them."""
        return self.put(syscalls.words(*(self.put(word) for word in words), 0))

    def lends(
        self,
        held: tuple[int, int],
        go: int,
        status: int,
        signals: int,
        patience: int,
        argv: Sequence[bytes],
        env: Sequence[bytes],
    ) -> None:
        """Prepare to lend our memory: the process that is cloned waits for it on its descriptor `go`.

        Before that it waits on the pipe `held`, whose other end it closes, for a word of the one that clones it. The
        memory is ours again at the hang-up of `status`. When there is something to be read on `signals` before that,
        it is waited for `patience` seconds more. Where it does not come back whole we become the program `argv`, with
        the environment `env` and with `status` open.
        """
        program = self.put(argv[0]), self.put_words(argv), self.put_words(env)
        self._lending = [go, 0, status, signals | _POLLIN << 32, patience, 0, *program, *[0] * 6, *held[::-1]]

    def call(self, number: int, *arguments: int, result: int = 0) -> None:
        """Add a call to the second list; `result` is the address where its result goes, or 0."""
        self.second += (number, *arguments, *(0,) * (6 - len(arguments)), result)

    def call_first(self, number: int, *arguments: int) -> None:
        """Add a call to the first list."""
        self.first += (number, *arguments, *(0,) * (7 - len(arguments)))

    def argument(self, ahead: int, number: int = 1) -> int:
        """Return the address of an argument (1 to 6) of the second list's next call, or of one `ahead` of that."""
        return self._second() + (len(self.second) // 8 + ahead) * _CALL + 8 * number

    def become(self, name: str, program: int, numbers: dict[int, int], words: Sequence[bytes]) -> None:
        """Add the calls that fill in numbers (place → address) and execute the program.

        `program` is its file: init.in_memory(). The words are what follows its name.
        """
        for place, number in numbers.items():
            self.call(PWRITE, program, number, 4, init.place_of(name, syscalls.MACHINE, place))
        argv = self.put_words([init.process_name(name), *words])
        self.call(EXECVEAT, program, self.put(b""), argv, self.put_words([]), syscalls.AT_EMPTY_PATH)

    def _second(self) -> int:
        """Return where the second list begins; the first must be complete."""
        return self.base + _FRAME + len(self.first) * 8 + 8

    def _finish(self, begun: int = 0, go: int = -1, status: int = -1) -> None:
        """Put everything where it was said to be."""
        lists = [*self.first, -1, *self.second, -1]
        if len(lists) > _CALLS * 8 or self._top > self.base + _SIZE:
            raise OSError(_ENOMEM, "the list of calls is too long")
        frame = [0] * (_FRAME // 8)
        frame[_RESULT] = -_ECHILD
        frame[9:14] = (
            self.base + _FRAME, self._second(), self._flags | (_CLONE_PIDFD if self.pidfd else 0), self.path + 16,
            self.pidfd,
        )  # fmt: skip
        frame[14:23] = (
            go, status, ord(".") * 0x101, self._report, *self._text, sum(self._text) - 2, begun, self.base + _SIZE
        )  # fmt: skip
        frame[23:40] = self._lending
        frame[41] = -1  # all signals, and before that none
        head = syscalls.words(*frame, *lists).ljust(_FRAME + _CALLS * _CALL, b"\0")
        self._memory.raw = b"".join((head, *self._data))
        _kept.append(self)

    # ── what is done with it ──────────────────────────────────────────────────────────────────────────────────────

    def split(self) -> None:
        """Return in a new process, which has all memory from now on; this one goes the way of its lists.

        Raises OSError where there is no new process.
        """
        self._finish()
        if failed := syscalls.enter(self._code, self.base, _SPLIT, divides=True):
            raise OSError(-failed, "clone")

    def begin(self, flags: int, go: int, status: int) -> int:
        """Clone the process that stays behind with `flags`, in our memory, and return its id.

        All signals must be blocked. When it is met, it is told to go on by a byte on the descriptor `go`, and it must
        say when it has a process for us by one on what `status` is the other end of. Raises OSError.
        """
        self._finish(flags | syscalls.CLONE_VM | syscalls.SIGCHLD, go, status)
        pid = syscalls.enter(self._code, self.base, _BEGIN, divides=False)
        if pid < 0:
            raise OSError(-pid, "clone")
        return pid

    def meet(self) -> int:
        """Let the process that was begun go on, and return the id of the one that it cloned; 0 in that one.

        Raises OSError where a call of a list or the clone failed; failed_call() tells which. Signals wait meanwhile.
        """
        pid = syscalls.enter(self._code, self.base, _MEET, divides=True)
        if pid < 0:
            raise OSError(-pid, "")
        return pid

    def lend(self) -> None:
        """Return in the process that was cloned, which has our memory then, until it hands that back.

        Here, all signals must be blocked, and wait.
        """
        syscalls.enter(self._code, self.base, _LEND, divides=False)

    def hand_back(self, number: int, *arguments: int) -> None:
        """Make the system call `number`, with which this process leaves the memory, and return where that was lent.

        No signal is blocked any more then. Raises OSError if the call fails; then we are still where we were.
        """
        last = syscalls.words(number, *arguments, *(0,) * (5 - len(arguments)))
        self._memory[_LAST * 8 : _LAST * 8 + len(last)] = last
        failed = syscalls.enter(self._code, self.base, _HAND_BACK, divides=False)
        if failed < 0:
            raise OSError(-failed, os.strerror(-failed))

    def is_back(self) -> bool:
        """Whether the memory that was lent is the lender's again, so that it is the lender who asks."""
        return bool(self._memory[_BACK * 8] != b"\0")

    def execve(self, program: bytes | int, argv: Sequence[bytes], env: Mapping[bytes, bytes]) -> None:
        """Become the program at a path, or in an open file, as os.execve() does; return where our memory was lent."""
        if not self._given or self._given[0] is not argv:  # who looks for the program comes again and again
            pairs = [b"%b=%b" % pair for pair in env.items()]
            self._given = (argv, syscalls.Words(*argv), syscalls.Words(*pairs))
        _, words, variables = self._given
        path = syscalls.Words(b"" if isinstance(program, int) else program)
        given = path.first, words.address, variables.address
        if isinstance(program, int):
            self.hand_back(EXECVEAT, program, *given, syscalls.AT_EMPTY_PATH)
        else:
            self.hand_back(EXECVE, *given)

    def failed_call(self) -> int:
        """Return which call failed, counting both lists from 0; -1 for the clone."""
        place = int.from_bytes(self._memory.raw[_FAILED * 8 : _FAILED * 8 + 8], "little")
        return (place - self.base - _FRAME) // _CALL if place else -1


#: What other processes may be working from
_kept: list[Handover] = []
_loaded = 0


def _load() -> int:
    """Return the address of the machine code. Raises OSError where there can be none."""
    global _loaded
    if not _loaded:
        if syscalls.MACHINE not in CODE or syscalls.has_shadow_stack():
            raise OSError(38, "no code for this machine")
        _loaded = syscalls.load_code(CODE[syscalls.MACHINE])
    return _loaded
