"""`unshare`, `ns`, `doctor`: the host as the sandboxes need it. Warm."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Annotated

import typer

from rootless import idmap, parent, plan, privileges
from rootless.cli import output


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(context_settings={"allow_interspersed_args": False})(unshare)
    app.command()(ns)
    app.command()(doctor)


def unshare(
    command: Annotated[
        list[str], typer.Argument(metavar="[COMMAND [ARGUMENT]...]", help="default: your shell", show_default=False)
    ] = [],  # noqa: B006
    idmap_mode: Annotated[str, typer.Option("--idmap", metavar="MODE", help="auto, single or keep")] = "",
) -> None:
    """Run a command, or a shell, on the host as it is, but as root of your user namespace.

    So you can look at and remove files that belong to your subordinate ids.
    """
    ids, notice = idmap.for_caller(idmap_mode)
    if notice:
        output.notice(notice)
    argv = [os.fsencode(word) for word in command or [os.environ.get("SHELL", "/bin/sh")]]
    parent.become(plan.for_look_around(ids, privileges.Exec(argv, dict(os.environb))))


def ns(
    whose: Annotated[
        str, typer.Argument(metavar="[PID|SANDBOX]", help="a process, or a sandbox by name or id", show_default=False)
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the namespaces that you can see, who is in them, and how they nest."""
    from rootless.cli import lsns

    if not whose:
        found = lsns.survey()
    elif whose.isdecimal() and len(whose) < 8:  # above the kernel's largest pid; ids of sandboxes are longer
        found = lsns.of_process(int(whose))
    else:
        found = lsns.of_sandbox(whose)
    if json:
        output.json([namespace.summary() for namespace in found])
    else:
        head = ("NAMESPACE", "TYPE", "PROCESSES", "PID", "USER", "SANDBOX", "COMMAND")
        lines = lsns.rows(found)
        output.table(head, lsns.fit(head, lines, shutil.get_terminal_size().columns) if sys.stdout.isatty() else lines)


def doctor(json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> int:
    """Check what sandboxes need of this host; the exit status is 1 if something essential is missing."""
    from rootless import checks

    findings = [(check, check.run()) for check in checks.CHECKS]
    if json:
        output.json([check.summary(finding) for check, finding in findings])
    else:
        for check, finding in findings:
            output.lines([f"{finding.mark:<8}  {check.title}: {finding.found}"])
            output.lines([f"          {finding.fix}"] if finding.fix else [])
    return int(any(finding.mark == checks.MISSING for _, finding in findings))
