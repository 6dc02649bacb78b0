"""`system df`, `system check`, `image prune`: the store as a whole. Warm."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from rootless.cli import output, pages

Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    system = pages.App(help="Look after what sbx keeps on the disk.", no_args_is_help=True)
    system.command()(df)
    system.command()(check)
    app.add_typer(system, name="system")
    image = pages.App(
        help="Look after images; the commands for one image stand alone, as `sbx rmi`.", no_args_is_help=True
    )
    image.command()(prune)
    app.add_typer(image, name="image")


def df(json: Json = False) -> None:
    """Show what images take on the disk.

    Another id map has layers of its own: files cannot belong to two owners.
    """
    from rootless.cli.images import size_text
    from rootless.oci import usage

    found = usage.survey()
    if json:
        output.json([asdict(entry) for entry in found])
        return
    rows = [[entry.kind, str(entry.count), size_text(entry.size), size_text(entry.reclaimable)] for entry in found]
    output.table(["KIND", "COUNT", "SIZE", "RECLAIMABLE"], rows)


def check(
    quick: Annotated[bool, typer.Option("--quick", help="compare sizes, read no blob")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="remove what is damaged")] = False,
    json: Json = False,
) -> int:
    """Check that all images are whole; the exit status is 1 if one is not."""
    from rootless.oci import usage

    problems = list(usage.check(quick))
    if json:
        output.json([asdict(problem) for problem in problems])
    else:
        output.lines(problem.what for problem in problems)
    if problems and repair:
        usage.repair(problems)
        output.notice(f"removed what was damaged: {len(problems)} problems; pull or import the images again")
        return 0
    if not problems and not json:
        output.lines(["the store is whole"])
    return int(bool(problems))


def prune(
    every: Annotated[
        bool, typer.Option("--all", "-a", help="also remove all images that no running sandbox uses")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="accepted for docker's sake: nothing is ever asked")
    ] = False,
) -> None:
    """Remove what no image needs: layers and blobs, and beginnings of blobs that were never finished."""
    from rootless.cli.images import size_text
    from rootless.oci import collect, layout, usage

    if not layout.exists():
        return
    with layout.Workspace() as work:
        for name in usage.unused() if every else ():
            if layout.remove_ref(work, name):
                output.lines([name])
        freed = collect.collect(work, partials=True)
    output.notice(f"removed {freed.blobs} blobs and {freed.layers} layers, {size_text(freed.size)}")
    if freed.kept:
        output.notice(f"kept {len(freed.kept)} layers that a running sandbox uses")
