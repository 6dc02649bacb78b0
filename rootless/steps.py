"""What a plan is made of: steps, in a list that both sides share. Either side; imports nothing.

A step is a small class: its data in ``__init__``, one imperative line in ``describe()`` and the system calls in
``execute()``. `describe()` serves --dry-run, --debug, the error message and the planner's tests.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rootless.handover import Handover

    Undo = Callable[[], None]


class Child:
    """What the inside knows besides its plan: the descriptors that lead outside, and what earlier steps made.

    `status` is written to the parent, `go` read from it; `terminal` is a unix socket, or -1. End of file on `go` means
    that the parent is gone, on `held` (-1 before there is one) that the supervisor is. `creatable` are the ids of the
    mounts in which a missing mount point may be made: ours, never the user's. `done` is the number of the plan's steps
    that had been done when the child came to be. `lender` is whose memory it has borrowed from the parent, if it has;
    `wiped` what it wiped there, to be put back: from where to where, and where the copy is. `program` is the file of
    the program that becomes the command (init.py), if it was made before it was needed, or -1.
    """

    __slots__ = ("creatable", "done", "go", "held", "lender", "program", "status", "terminal", "wiped")

    def __init__(self, status: int, go: int, terminal: int = -1, done: int = 0) -> None:
        self.done = done
        self.status = status
        self.go = go
        self.terminal = terminal
        self.held = -1
        self.lender: Handover | None = None
        self.program = -1
        self.wiped: list[tuple[int, int, int]] = []
        self.creatable: set[int] = set()


class Step:
    """One act of the child. `execute` raises OSError, or SbxError where the errno would mislead.

    `alone` says that the kernel allows it only in a process with memory of its own.
    """

    __slots__ = ()
    alone = False

    def describe(self) -> str:
        """Return the act as one imperative line, lower case, without a full stop."""
        raise NotImplementedError

    def execute(self, child: Child) -> None:
        """Do it. A step that forks returns in the new process only; the old one never comes back from it."""
        raise NotImplementedError


class OutsideStep:
    """One act of the parent on the process `pid`; what it returns undoes it, and undos run in reverse."""

    __slots__ = ()

    def describe(self) -> str:
        """Return the act as one imperative line, lower case, without a full stop."""
        raise NotImplementedError

    def execute(self, pid: int) -> Undo | None:
        """Do it. `pid` is an id in the caller's pid namespace."""
        raise NotImplementedError


class Watched:
    """An undo with something to tell: once `fd` is readable, `lost` returns what the user should know, or ""."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __call__(self) -> None:
        raise NotImplementedError

    def lost(self) -> str:
        """Return one line about what was lost; `fd` is not watched any longer."""
        raise NotImplementedError


class Call(Step):
    """The last step of a plan of our own work, such as unpacking a layer: call `function`."""

    __slots__ = ("act", "function")

    def __init__(self, act: str, function: Callable[[], None]) -> None:
        self.act = act
        self.function = function

    def describe(self) -> str:
        return self.act

    def execute(self, child: Child) -> None:
        self.function()


class Plan:
    """All acts of one launch, in their order; data only, made before the fork.

    `inside` is walked by the child; a failure is a position in it. `before_go` is what the parent does between the
    child's ready and its go, `attach` what it does to the finished pid 1 while the rest of `inside` runs, `before_exec`
    what it does to the command's process while that waits for its last step.
    """

    __slots__ = ("attach", "before_exec", "before_go", "inside")

    def __init__(self) -> None:
        self.before_go: list[OutsideStep] = []
        self.attach: list[OutsideStep] = []
        self.before_exec: list[OutsideStep] = []
        self.inside: list[Step] = []

    def describe(self) -> list[str]:
        """Return a line for each act, those of the parent marked."""
        outside = {"Ready": self.before_go, "StartProcess": self.attach, "AwaitInspected": self.before_exec}
        lines = []
        for step in self.inside:
            lines.append(step.describe())
            acts = outside.get(type(step).__name__, [])
            lines.extend(f"  outside: {act.describe()}" for act in acts)
        return lines
