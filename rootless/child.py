"""The child: walk the plan's steps, and tell the parent which one failed. Inside.

Nothing is decided here and nothing imported: after the switch of root an import would run the image's files.
"""

from __future__ import annotations

import os

from rootless.errors import FAILED, SbxError
from rootless.steps import Child, Plan

INTERNAL = "internal"
ENOMEM = 12


def walk(plan: Plan, child: Child, trace: bool = False) -> None:
    """Take the steps of `plan` in their order, but those that are done; never returns.

    The last step becomes another program, or does our own work and returns, which is success. A step that fails is
    told to the parent as ``failed NUL index NUL errno NUL code NUL message NUL hint``; end of file without that means
    that the command runs, since the status pipe is close-on-exec.
    """
    index = -1
    status = FAILED
    try:
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
        os._exit(status)


def _report(child: Child, index: int, errno: int, code: str, message: str, hint: str) -> None:
    fields = ("failed", str(index), str(errno), code, message.replace("\0", "?"), hint)
    try:
        os.write(child.status, "\0".join(fields).encode("utf-8", "surrogateescape")[:4000])
    except OSError:
        pass  # the parent is gone
