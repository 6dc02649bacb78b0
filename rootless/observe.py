"""Limits, account and receipt of one launch, bound to its plan. Outside; loaded only where one was asked for."""

from __future__ import annotations

import os

from rootless import accounting, cgroups, receipt, resources
from rootless.errors import SbxError, printable
from rootless.steps import OutsideStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from rootless.options import Request
    from rootless.parent import Sandbox
    from rootless.spec import SandboxSpec
    from rootless.steps import Plan


class Observed:
    """A launch that is watched. As a context manager it surrounds the start, from before the fork to the exec.

    Adds the reading of the receipt to the plan where it is wanted.
    """

    def __init__(self, steps: Plan, wanted: SandboxSpec, request: Request) -> None:
        self._wanted = wanted
        self._request = request
        self._enter = next((step for step in steps.before_go if isinstance(step, cgroups.Enter)), None)
        self._told = 0
        self._run = accounting.Run(self._enter)
        self._targets: list[Target] = []
        self._account: Target | None = None
        self._receipt: ReadBack | None = None
        self._output: accounting.Output | None = None
        self.meters: list[accounting.Meter] = [self._run]
        if request.cpu_time is not None:
            self.meters.append(accounting.CpuTime(request.cpu_time, self._enter))
        if request.output_limit:
            self._output = accounting.Output(resources.parse_size(request.output_limit, "--output-limit"))
            self.meters.append(self._output)
        try:
            self._open(steps, request)
        except BaseException:
            self._forget()
            raise

    def _open(self, steps: Plan, request: Request) -> None:
        if self._wanted.inspected:
            receipt = self._target(request.receipt) if request.receipt else None
            self._receipt = ReadBack(self._wanted, self._enter, receipt, request.require)
            steps.before_exec.append(self._receipt)
        if request.stats_json:
            self._account = self._target(request.stats_json)

    def _target(self, path: str) -> Target:
        self._targets.append(Target(path))
        return self._targets[-1]

    def _forget(self) -> None:
        for target in self._targets:
            target.close()

    def __enter__(self) -> None:
        if self._output and not self._wanted.terminal:
            self._output.redirect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._output:
            self._output.restore()
        if error:
            self._forget()
        self._warn()
        # Too little memory for the set-up itself: the kernel's word for it is a signal, ours says what it was.
        if isinstance(error, SbxError) and error.code in ("child-lost", "step-failed") and self._enter:
            self._explain_start(error)

    def ours(self) -> list[int]:
        """Return the descriptors that the child must not keep."""
        return [*(self._output.ours() if self._output else []), *(t.fd for t in self._targets if t.fd > 2)]

    def follow(self, sandbox: Sandbox) -> str:
        """Called when pid 1 has an id; return its cgroup, or ""."""
        if self._receipt:
            self._receipt.sandbox = sandbox
        self._run.follow(sandbox, self._wanted.accounted and "net" in self._wanted.namespaces)
        if self._request.debug and self._enter and self._enter.path:
            _say(f"cgroup {self._enter.path}, made in {self._enter.means}")
        return self._enter.path if self._enter else ""

    def close(self, status: int, sandbox: Sandbox) -> int:
        """Tell what has to be told of the end, write what was asked for, and return the exit status."""
        used = self._run.close(status, sandbox)
        why = used["reason"]
        for meter in self.meters:
            if meter.name and why == meter.name:
                limit = (
                    f"{self._request.cpu_time:g} s"
                    if isinstance(meter, accounting.CpuTime)
                    else self._request.output_limit
                )
                _say(f"limit of {meter.name} reached: {limit}")
        for line in accounting.explanation(why, used):
            _say(line)
        if self._request.stats:
            for line in accounting.summary(used):
                _say(line)
        if self._account:
            self._account.write(used)
        return status

    def _warn(self) -> None:
        for line in self._enter.warnings if self._enter else []:
            _say(f"warning: {line}")

    def _explain_start(self, error: SbxError) -> None:
        used = self._enter.used if self._enter else {}
        if used.get("out_of_memory"):
            error.message = "start the sandbox: " + accounting.explanation("out of memory", used)[0]
            error.hint = "pid 1 and the start of a command need about 4 MiB"
        elif used.get("pids_limit_hits"):
            error.hint = f"pid 1 and the command count too: more than --pids {used.get('pids_limit')}"


def _say(line: str) -> None:
    os.write(2, f"sbx: {printable(line)}\n".encode("utf-8", "replace"))


class ReadBack(OutsideStep):
    """Read the receipt while the command's process waits, complete, for its last step; write it, and judge it."""

    __slots__ = ("enter", "required", "sandbox", "target", "wanted")

    def __init__(
        self, wanted: SandboxSpec, enter: cgroups.Enter | None, target: Target | None, required: list[str]
    ) -> None:
        self.wanted = wanted
        self.enter = enter
        self.target = target
        self.required = required
        self.sandbox: Sandbox | None = None

    def describe(self) -> str:
        return "read back what is in force"

    def execute(self, pid: int) -> None:
        numbers = {name: os.fstat(fd).st_ino for name, fd in self.sandbox.namespaces.items()} if self.sandbox else {}
        path, warnings = (self.enter.path, self.enter.warnings) if self.enter else ("", [])
        found = receipt.read(self.wanted, pid, numbers, path, warnings)
        if self.target:
            self.target.write(found)
        receipt.require(found, self.required)


class Target:
    """The file that a line of JSON will go to, or stdout for ``-``; open from the start, so that a bad name is told.

    What is there stays as it is until it is written. Raises SbxError ``file-unwritable``.
    """

    __slots__ = ("_is_new", "_path", "fd")

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_new = False
        if path == "-":
            self.fd = 1
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            try:
                self.fd = os.open(path, flags | os.O_EXCL, 0o666)
                self._is_new = True
            except FileExistsError:
                self.fd = os.open(path, flags, 0o666)
        except (OSError, ValueError) as error:
            raise self._failure(error) from None

    def write(self, value: object) -> None:
        """Write `value`, and be done with it."""
        import json  # 7 ms that only its users pay for

        rest = memoryview((json.dumps(value) + "\n").encode())
        try:
            if os.fstat(self.fd).st_mode & 0o170000 == 0o100000 and self.fd != 1:
                os.ftruncate(self.fd, 0)
            while rest:
                rest = rest[os.write(self.fd, rest) :]
        except OSError as error:
            raise self._failure(error) from None
        self._is_new = False
        self.close()

    def close(self) -> None:
        """Close it; what was never written is not left behind. Idempotent."""
        if self.fd > 2:
            if self._is_new:
                os.unlink(self._path)
            os.close(self.fd)
        self.fd = -1

    def _failure(self, error: OSError | ValueError) -> SbxError:
        cause = error.strerror if isinstance(error, OSError) else "not a path"
        return SbxError("file-unwritable", f"write {printable(self._path)}: {cause}")
