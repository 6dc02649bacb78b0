"""`import`, `images`, `rmi`, `tag`, `history`: what is in the store. Warm."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rootless import reference
from rootless.cli import listing, output
from rootless.cli.listing import Column
from rootless.errors import SbxError, printable

if TYPE_CHECKING:
    from rootless.oci.images import Stored

ImageName = Annotated[
    str, typer.Argument(metavar="IMAGE", help="a name, or the beginning of an id", show_default=False)
]
IdMapOption = Annotated[str, typer.Option("--idmap", metavar="MODE", help="unpack for auto, single or keep")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="print ids only")]
NoTrunc = Annotated[bool, typer.Option("--no-trunc", help="do not shorten ids and texts")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("import")(import_)
    app.command()(images)
    app.command()(rmi)
    app.command()(tag)
    app.command()(history)


_NAME_FIRST = "the image's name comes first: sbx import NAME SOURCE"


def import_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="what to call the image", show_default=False)],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="a tar of a root filesystem (plain, gzip, xz, zstd; - for stdin), or dir:FOLDER, bin:PROGRAM,…, "
            "oci:FOLDER, oci-archive:FILE, docker-archive:FILE",
            show_default=False,
        ),
    ],
    change: Annotated[
        list[str],
        typer.Option(
            "--change", "-c", metavar="INSTRUCTION", help="CMD, ENTRYPOINT, ENV, WORKDIR, USER … as in a Dockerfile"
        ),
    ] = [],  # noqa: B006
    message: Annotated[
        str, typer.Option("--message", "-m", metavar="TEXT", help="a comment for the image's history")
    ] = "",
    platform: Annotated[
        str, typer.Option("--platform", metavar="OS/ARCH", help="what the programs run on, if not this machine's kind")
    ] = "",
    idmap_mode: IdMapOption = "",
    max_entries: Annotated[
        int, typer.Option("--max-entries", metavar="N", help="refuse archives with more members")
    ] = 1_000_000,
    max_size: Annotated[
        str, typer.Option("--max-size", metavar="BYTES", help="refuse archives that unpack to more, such as 64g")
    ] = "64g",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="tell nothing but the image's id")] = False,
) -> None:
    """Make an image of a root filesystem, or take one in from elsewhere, and print its id."""
    from rootless import idmap
    from rootless.oci import imports, manifest
    from rootless.oci.tar import Limits

    try:
        target = reference.parse(name)
    except SbxError as error:
        if os.path.exists(name):  # docker's order
            error.hint = _NAME_FIRST
        raise
    ids, notice = idmap.for_caller(idmap_mode)
    if notice and not quiet:
        output.notice(notice)
    limits = Limits(entries=max_entries, size=_size(max_size))
    where = manifest.Platform.parse(platform) if platform else None
    if os.path.exists(name) and source != "-" and ":" not in source and not os.path.exists(source):
        raise SbxError("archive-missing", f"read the archive {source}: there is none", _NAME_FIRST)
    stored, summaries = imports.store(target, source, ids, change, message, where, limits)
    if not quiet:
        for summary in summaries:
            _tell_left_out(summary)
    output.lines([stored.id])


def _tell_left_out(summary: dict[str, Any]) -> None:
    """Tell what of an archive could not be kept."""
    if devices := summary["devices"]:
        shown = ", ".join(path.decode("utf-8", "surrogateescape") for path, *_ in devices[:3])
        output.notice(
            f"left out {len(devices)} device nodes, which need root: {shown}{' …' if len(devices) > 3 else ''}"
        )
    if summary["xattrs_dropped"]:
        output.notice(f"left out {summary['xattrs_dropped']} extended attributes that cannot be kept")
    if summary["setid_dropped"]:
        output.notice(
            f"left out {summary['setid_dropped']} set-id bits of files of other owners, as only one id is mapped"
        )


def _size(text: str) -> int:
    """Return a number of bytes; k, m, g and t are powers of 1024."""
    digits = text.lower().removesuffix("b").removesuffix("i")
    factor = {"k": 10, "m": 20, "g": 30, "t": 40}.get(digits[-1:], 0)
    digits = digits[:-1] if factor else digits
    if not (digits.isascii() and digits.isdigit()):
        raise SbxError("option-invalid", f"bad size {text!r}: it is a number with k, m, g or t behind it")
    return int(digits) << factor


def images(
    name: Annotated[
        str, typer.Argument(metavar="[NAME]", help="show images of this repository only", show_default=False)
    ] = "",
    json: Json = False,
    digests: Annotated[bool, typer.Option("--digests", help="show the digests of the manifests")] = False,
    quiet: Quiet = False,
    filter: listing.Filters = [],  # noqa: B006
    form: listing.Format = "",
    no_trunc: NoTrunc = False,
    all: Annotated[bool, typer.Option("--all", "-a", help="accepted for docker's sake: no image is hidden")] = False,
) -> None:
    """List the images in the store.

    Keys of --filter: reference (a pattern), label, dangling.
    Fields of --format: .ID .Repository .Tag .Digest .CreatedAt .CreatedSince .Size
    """
    from rootless.oci import images as store

    wanted = reference.parse(name) if name else None
    found: list[Stored] = []
    for entry in store.listing():
        if isinstance(entry, store.Stored):
            one = reference.parse(entry.reference)
            if wanted is None or (
                one.name == wanted.name and (":" not in name.rpartition("/")[2] or one.tag == wanted.tag)
            ):
                found.append(entry)
        else:
            output.notice(entry.message)
    found = listing.choose(found, filter, FILTERS)
    if json or form == "json":
        output.json([_summary(image) for image in found])
    elif quiet:
        output.lines(dict.fromkeys(image.id for image in found))
    elif form:
        id_column = {"ID": Column("ID", lambda image: image.id)} if no_trunc else {}
        listing.show(form, found, COLUMNS | id_column)
    else:
        head = ["IMAGE", "ID", "CREATED", "SIZE"]
        rows = [
            [
                reference.parse(image.reference).familiar,
                image.id if no_trunc else short(image.id),
                age(image.config.created),
                size_text(image.size),
            ]
            for image in found
        ]
        if digests:
            head.insert(1, "DIGEST")
            for row, image in zip(rows, found, strict=True):
                row.insert(1, image.digest)
        output.table(head, rows)


def _summary(image: Stored) -> dict[str, Any]:
    return {
        "reference": image.reference,
        "id": image.id,
        "digest": image.digest,
        "created": image.config.created,
        "size": image.size,
        "platform": str(image.config.platform),
        "labels": image.config.labels,
    }


def rmi(
    names: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="names, or the beginnings of ids", show_default=False)
    ],
    force: Annotated[
        bool,
        typer.Option("--force", "-f", help="by an id, remove all names of the image; what is not there is no error"),
    ] = False,
    ignore: Annotated[bool, typer.Option("--ignore", "-i", help="an image that is not there is no error")] = False,
) -> None:
    """Remove names of images, and what had only these.

    Layers that a running sandbox uses stay until it has ended and something else is removed.
    """
    from rootless.oci import collect, layout
    from rootless.oci import images as store

    if not layout.exists():
        layout.ensure()
    with layout.Workspace() as work:
        targets: list[str] = []
        for name in names:
            try:
                found = [other for other in store.named(name) if other not in targets]
            except SbxError as error:
                if not ((ignore or force) and error.code == "image-unknown"):
                    raise
                continue
            if len(found) > 1 and not force:
                shown = ", ".join(reference.parse(other).familiar for other in found)
                raise SbxError("image-named-often", f"remove image {name}: it has {len(found)} names: {shown}",
                               "give the names to remove, or --force for all of them")  # fmt: skip
            targets += found
        for target in targets:
            if layout.remove_ref(work, target):
                output.lines([target])
        freed = collect.collect(work)
    if freed.kept:
        output.notice(f"kept {len(freed.kept)} layers that a running sandbox uses")


def tag(
    source: ImageName,
    targets: Annotated[list[str], typer.Argument(metavar="NAME...", help="what else to call it", show_default=False)],
) -> None:
    """Give an image more names."""
    from rootless.oci import images as store
    from rootless.oci import layout

    parsed = [reference.parse(target) for target in targets]
    with layout.Workspace() as work:
        store.tag(work, source, parsed)


def history(
    name: ImageName,
    json: Json = False,
    no_trunc: NoTrunc = False,
) -> None:
    """Show how an image came about, the newest step first."""
    from rootless.oci import images as store

    image = store.one(name)
    steps = store.history(image)
    if json:
        output.json(steps)
        return
    by, comment = (None, None) if no_trunc else (80, 60)
    output.table(
        ["CREATED", "SIZE", "CREATED BY", "COMMENT"],
        [
            [age(step["created"]), size_text(step["size"]), step["created_by"][:by], step["comment"][:comment]]
            for step in steps
        ],
    )


def details(name: str) -> dict[str, Any]:
    """Return all about an image, for `sbx inspect`."""
    from rootless.oci import images as store

    image = store.one(name)
    return {
        **_summary(image),
        "names": [
            other.reference for other in store.listing() if isinstance(other, store.Stored) and other.id == image.id
        ],
        "manifest": {"media_type": image.manifest.media_type, "annotations": image.manifest.annotations},
        "layers": [
            {"digest": layer.digest, "diff_id": diff_id, "media_type": layer.media_type, "size": layer.size}
            for layer, diff_id in zip(image.manifest.layers, image.config.diff_ids, strict=True)
        ],
        "config": image.config.document.get("config") or {},
        "history": image.config.history,
    }


# ── how things are shown ──────────────────────────────────────────────────────────────────────────────────────────────


def short(digest: str) -> str:
    """Return the digits of a digest that people look at."""
    return digest.partition(":")[2][:12]


def size_text(size: float) -> str:
    """Return bytes as people read them, in powers of 1000 as docker shows image sizes."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{int(size)} B"
        size /= 1000
    return f"{size:.3g} TB"


def age(created: str) -> str:
    """Return how long ago an RFC 3339 time was, in one unit; a time that is none, as nothing."""
    import datetime

    try:
        then = datetime.datetime.fromisoformat(created)
        seconds = (
            datetime.datetime.now(datetime.UTC) - (then if then.tzinfo else then.replace(tzinfo=datetime.UTC))
        ).total_seconds()
    except (ValueError, OverflowError):
        return ""
    for unit, length in (("year", 31_557_600), ("month", 2_629_800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            number = int(seconds // length)
            return f"{number} {unit}{'s' * (number > 1)} ago"
    return "just now" if seconds > -60 else "in the future"


def _matches(pattern: str) -> listing.Test:
    """Return the test of a filter ``reference=PATTERN``, of the name with or without its tag, as docker shows it."""
    import fnmatch

    def test(image: Stored) -> bool:
        name = _name(image)
        names = (name.familiar, f"{_repository(image)}:{name.tag}", _repository(image), name.name, str(name))
        return any(fnmatch.fnmatchcase(one, pattern) for one in names)

    return test


def _is_dangling(value: str) -> listing.Test:
    """An image is in the store by its names, so that none is without one."""
    if value not in ("true", "false", "1", "0"):
        raise SbxError("filter-invalid", f"read --filter dangling={printable(value)}: it is true or false")
    return lambda image: value in ("false", "0")


def _name(image: Stored) -> reference.Reference:
    return reference.parse(image.reference)


def _repository(image: Stored) -> str:
    name = _name(image)
    return reference.Reference(name.registry, name.repository, reference.DEFAULT_TAG).familiar


COLUMNS = {
    "ID": Column("ID", lambda image: short(image.id)),
    "Repository": Column("REPOSITORY", _repository),
    "Tag": Column("TAG", lambda image: _name(image).tag or "<none>"),
    "Digest": Column("DIGEST", lambda image: image.digest),
    "CreatedAt": Column("CREATED AT", lambda image: image.config.created),
    "CreatedSince": Column("CREATED", lambda image: age(image.config.created)),
    "Size": Column("SIZE", lambda image: size_text(image.size)),
    "Label": Column("", lambda image: image.config.labels),
}
FILTERS: dict[str, Callable[[str], listing.Test]] = {
    "reference": _matches,
    "label": lambda value: listing.has_label(value, lambda image: image.config.labels),
    "dangling": _is_dangling,
}
