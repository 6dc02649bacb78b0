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
        self._receipt: ReadBack | None = None
        if wanted.inspected:
            self._receipt = ReadBack(wanted, self._enter, request.receipt, request.require)
            steps.before_exec.append(self._receipt)
        self._output: accounting.Output | None = None
        self.meters: list[accounting.Meter] = [self._run]
        if request.cpu_time is not None:
            self.meters.append(accounting.CpuTime(request.cpu_time, self._enter))
        if request.output_limit:
            self._output = accounting.Output(resources.parse_size(request.output_limit, "--output-limit"))
            self.meters.append(self._output)

    def __enter__(self) -> None:
        if self._output and not self._wanted.terminal:
            self._output.redirect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._output:
            self._output.restore()
        self._warn()
        # Too little memory for the set-up itself: the kernel's word for it is a signal, ours says what it was.
        if isinstance(error, SbxError) and error.code in ("child-lost", "step-failed") and self._enter:
            self._explain_start(error)

    def ours(self) -> list[int]:
        """Return the descriptors that the child must not keep."""
        return self._output.ours() if self._output else []

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
        if self._request.stats_json:
            save(self._request.stats_json, used)
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

    __slots__ = ("enter", "path", "required", "sandbox", "wanted")

    def __init__(self, wanted: SandboxSpec, enter: cgroups.Enter | None, path: str, required: list[str]) -> None:
        self.wanted = wanted
        self.enter = enter
        self.path = path
        self.required = required
        self.sandbox: Sandbox | None = None

    def describe(self) -> str:
        return "read back what is in force"

    def execute(self, pid: int) -> None:
        numbers = {name: os.fstat(fd).st_ino for name, fd in self.sandbox.namespaces.items()} if self.sandbox else {}
        path, warnings = (self.enter.path, self.enter.warnings) if self.enter else ("", [])
        found = receipt.read(self.wanted, pid, numbers, path, warnings)
        if self.path:
            save(self.path, found)
        receipt.require(found, self.required)


def save(path: str, value: object) -> None:
    """Write `value` as one line of JSON to the file `path`, or to stdout for ``-``. Raises SbxError."""
    import json  # 7 ms that only its users pay for

    text = json.dumps(value) + "\n"
    if path == "-":
        os.write(1, text.encode())
        return
    try:
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise SbxError("file-unwritable", f"write {printable(path)}: {error.strerror}") from None
