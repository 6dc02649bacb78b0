"""The command `sbx`, with a time stamp written at each act: what `bench_profile` runs instead of it.

    python -I -S -E bench_trace.py CHECKOUT FILE run IMAGE …

Appends lines ``NANOSECONDS PID WHAT`` to FILE, each when the act has ended. The functions and steps of the launch are
wrapped from here, so that the product knows nothing of it; a stamp costs some 3 microseconds.
"""

from __future__ import annotations

import marshal
import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

STARTED = time.monotonic_ns()
CHECKOUT, FILE = sys.argv[1:3]
sys.argv[1:3] = []
sys.path.insert(0, CHECKOUT)
_out = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


def stamp(what: str, now: int = 0) -> None:
    """Say that `what` has ended now. Pid 1 closes every descriptor, so its later acts go unseen."""
    try:
        os.write(_out, f"{now or time.monotonic_ns()} {os.getpid()} {what}\n".encode())
    except OSError:
        pass


def wrap(owner: Any, name: str, what: str | None = None) -> None:
    """Make the function or method `name` of `owner` leave a stamp when it returns."""
    function = getattr(owner, name)

    def stamped(*args: Any, **keywords: Any) -> Any:
        result = function(*args, **keywords)
        stamp(what or name)
        return result

    setattr(owner, name, stamped)


def wrap_steps(module: Any, before: Callable[[Any], None]) -> None:
    """Make every step of `module` leave a stamp."""
    for kind in vars(module).values():
        if isinstance(kind, type) and "execute" in vars(kind):
            _wrap_step(kind, before)


def _wrap_step(kind: Any, before: Callable[[Any], None]) -> None:
    execute = kind.execute

    def stamped(step: Any, where: Any) -> Any:
        before(step)
        result = execute(step, where)
        stamp(f"{kind.__name__} {getattr(step, 'target', getattr(step, 'path', getattr(step, 'fstype', '')))}")
        return result

    kind.execute = stamped


stamp("interpreter", STARTED)
with open(f"{CHECKOUT}/rootless/__pycache__/bundle.{sys.implementation.cache_tag}", "rb", 0) as file:
    file.seek(4)
    exec(marshal.loads(file.read(int(file.read(8)))))  # as __main__ does
    load(f"{CHECKOUT}/rootless", file)  # type: ignore[name-defined]  # noqa: F821
stamp("the bundle")
from rootless import (  # noqa: E402
    entry,
    launch,
    mounts,
    namespaces,
    parent,
    plan,
    privileges,
    processes,
    state,
    supervisor,
    syscalls,
    terminal,
)

os = syscalls.os  # lean_os, where the modules have that

wrap(entry.options, "read", "options.read")
wrap(launch.idmap, "for_caller")
wrap(launch, "find_image")
wrap(launch.build, "sandbox", "build.sandbox")
wrap(launch, "_filter")
wrap(launch, "_fresh")
wrap(plan, "for_sandbox")
wrap(state, "create")
wrap(state, "write_atomically")
wrap(state, "debris")
wrap(state, "discard")
wrap(parent, "Signals")
wrap(parent.Sandbox, "_listen", "heard of the child")
wrap(parent.Sandbox, "_open_namespaces")
wrap(parent.Sandbox, "end")
wrap(os, "fork")
wrap(syscalls, "fork_into")
wrap(supervisor.Begun, "__init__", "begin the supervisor")
wrap(supervisor.Begun, "meet", "meet pid 1")
wrap(processes, "_remove", "supervisor removes")
wrap(processes.StartProcess, "_wait", "supervisor saw pid 1 end")


def _before(step: Any) -> None:
    if isinstance(step, privileges.Exec):
        stamp("about to exec")


for module in (mounts, namespaces, privileges, processes, terminal, launch.idmap):
    wrap_steps(module, _before)
stamp("wrapping")

status = entry.main()
stamp("exit")
os._exit(status)
