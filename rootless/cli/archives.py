"""`save`, `load`, `export`: images as files. Warm."""

from __future__ import annotations

from typing import Annotated

import typer

from rootless.cli import output

Output = Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="write there instead of stdout")]
FORMATS = ("oci-archive", "docker-archive", "oci")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(save)
    app.command()(load)
    app.command()(export)


def save(
    names: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="names, or the beginnings of ids", show_default=False)
    ],
    out: Output = "-",
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help=", ".join(FORMATS))] = "oci-archive",
) -> None:
    """Write images to an archive that keeps their digests.

    With --format docker-archive it is what `docker save` writes and every docker loads; with --format oci it is a
    folder, an OCI layout, to which the images are added. FILE may name the image inside: FILE:NAME.
    """
    from rootless.errors import SbxError
    from rootless.oci import images, layout, sinks

    if format not in FORMATS:
        raise SbxError("option-invalid", f"bad format {format!r}: it is {', '.join(FORMATS)}")
    if format == "oci" and out == "-":
        raise SbxError("option-invalid", "save as oci: that is a folder", "name it with --output")
    chosen = list(dict.fromkeys(reference for name in names for reference in images.named(name)))
    with layout.Workspace() as work:
        stored = [images.pinned(work, reference) for reference in chosen]
        sinks.SINKS[format](out).put(work, stored)


def load(
    source: Annotated[
        str, typer.Option("--input", "-i", metavar="SOURCE", help="an archive, or oci:FOLDER, instead of stdin")
    ] = "-",
    idmap_mode: Annotated[str, typer.Option("--idmap", metavar="MODE", help="unpack for auto, single or keep")] = "",
    platform: Annotated[
        str, typer.Option("--platform", metavar="OS/ARCH", help="which image of an index to take")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print ids only")] = False,
) -> None:
    """Take in the images of an archive (from `save`, docker or podman, compressed or not), under their own names."""
    from rootless import idmap
    from rootless.oci import manifest, sources
    from rootless.oci.layout import Workspace

    ids, notice = idmap.for_caller(idmap_mode)
    if notice and not quiet:
        output.notice(notice)
    scheme, colon, rest = source.partition(":")
    with Workspace() as work:
        taking = sources.Taking(work, ids, platform=manifest.Platform.parse(platform) if platform else None)
        if colon and scheme in sources.IMAGES:
            taken = sources.IMAGES[scheme](rest).take(taking, [])
        else:
            taken = sources.take_any(taking, source)
    output.lines(image.id if quiet else image.reference for image in taken)


def export(
    name: Annotated[str, typer.Argument(metavar="IMAGE", help="a name, or the beginning of an id", show_default=False)],
    out: Output = "-",
    idmap_mode: Annotated[
        str, typer.Option("--idmap", metavar="MODE", help="see the files as with auto, single or keep")
    ] = "",
) -> None:
    """Write an image's root filesystem, all layers merged, as a tar."""
    from rootless import idmap
    from rootless.oci import export as exporting
    from rootless.oci import images, layout, sinks
    from rootless.reference import parse

    ids, _ = idmap.for_caller(idmap_mode)
    reference = parse(images.one(name).reference)
    with layout.Workspace() as work:
        image = images.prepare_in(work, reference, ids)
        if image is None:
            images.get(reference)
            return
        sinks.write_fd(out, lambda fd: exporting.image(work, image, ids, fd))
