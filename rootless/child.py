"""The child: walk the plan's steps, and tell the parent which one failed. Inside.

Nothing is decided here and nothing imported: after the switch of root an import would run the image's files.
"""

from __future__ import annotations

import os

from rootless.errors import FAILED, SbxError
from rootless.handover import EXIT_GROUP
from rootless.processes import come_to_life
from rootless.steps import Child, Plan

INTERNAL = "internal"
ENOMEM = 12


def walk(plan: Plan, child: Child, trace: bool = False, held: int = -1) -> None:
    """Take the steps of `plan` in their order, but those that are done; never returns, but where memory was lent.

    The last step becomes another program, or does our own work and returns, which is success. A step that fails is
    told to the parent as ``failed NUL index NUL errno NUL code NUL message NUL hint``; end of file without that means
    that the command runs, since the status pipe is close-on-exec. With a `lender`, it is the parent that this returns
    in, when the command runs or the last process that walked has ended; and pid 1 still has to meet its supervisor,
    by the pipe `held`.
    """
    index = -1
    status = FAILED
    try:
        if held >= 0:
            come_to_life(child, held)
        for index, step in enumerate(plan.inside):
            if trace:
                os.write(2, f"sbx: step {index + 1}: {step.describe()}\n".encode("utf-8", "replace"))
            if index >= child.done:
                step.execute(child)
        status = 0
    except SbxError as error:
        _report(child, index, 0, error.code, error.message, error.hint)
        status = error.status
    except OSError as error:
        _report(child, index, error.errno or 0, "", error.strerror or str(error), "")
    except MemoryError:
        _report(child, index, ENOMEM, "", "Cannot allocate memory", "see: ulimit -v")
    except BaseException as error:
        _report(child, index, 0, INTERNAL, f"{type(error).__name__}: {error}", "")
    finally:
        if not child.lender:
            os._exit(status)
        if not child.lender.is_back():
            child.lender.hand_back(EXIT_GROUP, status)


def _report(child: Child, index: int, errno: int, code: str, message: str, hint: str) -> None:
    fields = ("failed", str(index), str(errno), code, message.replace("\0", "?"), hint)
    try:
        os.write(child.status, "\0".join(fields).encode("utf-8", "surrogateescape")[:4000])
    except OSError:
        pass  # the parent is gone
