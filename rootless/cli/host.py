"""`unshare`, `ns`, `doctor`: the host as the sandboxes need it. Warm."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from rootless import idmap, parent, plan, privileges, state
from rootless.cli import output


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command(context_settings={"allow_interspersed_args": False})(unshare)
    app.command()(ns)
    app.command()(doctor)


def unshare(
    command: Annotated[list[str], typer.Argument(metavar="[COMMAND [ARGUMENT]...]", show_default=False)] = [],  # noqa: B006
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
    pid: Annotated[
        int | None, typer.Argument(metavar="[PID]", help="show the namespaces of one process", show_default=False)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """List the namespaces that you can see, who is in them, and how they nest."""
    from rootless.cli import lsns

    found = lsns.of_process(pid) if pid is not None else lsns.survey()
    names = {record["pid"]: record["name"] for record in state.running()}
    if json:
        output.json([namespace.summary(names) for namespace in found])
        return
    rows = [namespace.row(names) for namespace in lsns.as_tree(found)]
    output.table(("NAMESPACE", "TYPE", "PROCESSES", "PID", "USER", "COMMAND"), rows)


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
