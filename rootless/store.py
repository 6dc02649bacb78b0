"""The read side of the image store: which reference is which unpacked layers. Outside; hot: nothing but os, marshal.

A *launch record* answers in one read what the long way (index, manifest, config, layer folders) would answer:

    launch/MAP/REFERENCE    marshal of (FORMAT, reference, manifest digest, boot, layers, env, entrypoint, cmd,
                            working folder, user, stop signal)

It is derived; who changes what it was derived from removes it first, and `find` gives None where anything is odd: then
the long way (oci.images.prepare) runs. `boot` is empty, or the boot in which the layers were unpacked: until the
kernel has been seen to have kept them over a reboot, another boot's record does not count.
"""

from __future__ import annotations

import marshal
import os

from rootless import paths
from rootless.reference import Reference, parse
from rootless.spec import IdMap, Image

FORMAT = 1
_NAME = 200  #: characters of a file's name; a longer one goes on in a folder


def layers() -> str:
    """Return the folder that the names in `Image.layers` are below."""
    return paths.data() + "/layers"


def escape(text: str) -> str:
    """Return `text` (a reference, or an id map's key) as a relative path, another one for each text.

    Neither alphabet has ``%``, ``+`` or ``~``, so that nothing can be meant twice.
    """
    name = text.replace("/", "%").replace(" ", "~")
    if len(name) <= _NAME:
        return name
    return "+/".join(name[at : at + _NAME] for at in range(0, len(name), _NAME))


def unescape(path: str) -> str:
    """Return the text that `escape` made `path` of."""
    return path.replace("+/", "").replace("%", "/").replace("~", " ")


def record_path(reference: str, idmap: IdMap) -> str:
    """Return where the launch record of `reference` (in full) for `idmap` is."""
    return f"{paths.data()}/launch/{escape(idmap.key)}/{escape(reference)}"


def boot_id() -> str:
    """Return the kernel's name for this boot."""
    try:
        # The kernel clears as much memory as a read of one of these files asks for
        return _read("/proc/sys/kernel/random/boot_id", 64).decode("ascii").strip()
    except OSError:
        return "unknown"


def find(reference: Reference, idmap: IdMap) -> Image | None:
    """Return the image that is stored as `reference`, unpacked for `idmap`; None when there is none, or any doubt."""
    name = str(reference)
    folder = paths.data()
    path = record_path(name, idmap)
    _read_at[path] = stamp(path)
    try:
        fields = marshal.loads(_read(path))
        form, stored, digest, boot, names, env, entrypoint, cmd, working_dir, user, stop_signal = fields
        if form != FORMAT or stored != name or (boot and boot != boot_id()):
            return None
        for layer in names:
            os.stat(f"{folder}/layers/{layer}")
    except (OSError, EOFError, ValueError, TypeError):
        return None
    return Image(
        reference=name,
        digest=digest,
        layers=list(names),
        env=list(env),
        entrypoint=list(entrypoint),
        cmd=list(cmd),
        working_dir=working_dir,
        user=user,
        stop_signal=stop_signal,
    )


#: launch record → what it was when it was read
_read_at: dict[str, tuple[int, ...]] = {}


def is_current(image: Image, idmap: IdMap) -> bool:
    """Whether the launch record that find() made `image` of is still there, and the same."""
    path = record_path(image.reference, idmap)
    return stamp(path) == _read_at.get(path) != ()


#: what decides, besides the files themselves, which files say where a short name leads
VARIABLES = ("CONTAINERS_REGISTRIES_CONF", "XDG_CONFIG_HOME", "HOME")


def find_alias(text: str, idmap: IdMap) -> Image | None:
    """Return the image that the short name `text` stands for by registries.conf; None where there is any doubt.

    Where it leads was remembered by oci.registries with a stamp of each file that says so, or could: they still hold.
    """
    try:
        told, target, variables, stamps = marshal.loads(_read(alias_path(text)))
        if told != text or variables != alias_variables() or any(stamp(path) != was for path, was in stamps):
            return None
        return find(parse(target), idmap)
    except (OSError, EOFError, ValueError, TypeError):
        return None


def alias_path(text: str) -> str:
    """Return where it is remembered what the short name `text` (a reference that can be read) stands for."""
    return f"{paths.data()}/cache/aliases/{escape(text)}"


def alias_variables() -> tuple[str | None, ...]:
    """Return what must be the same for what was remembered to hold: the variables, and which copy of us asks."""
    return (*map(os.environ.get, VARIABLES), paths.PACKAGE)


def stamp(path: str) -> tuple[int, ...]:
    """Return what changes when the file or folder at `path` does; the same for all that are not there."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def encode(image: Image, boot: str) -> bytes:
    """Return the launch record of `image`."""
    return marshal.dumps(
        (
            FORMAT,
            image.reference,
            image.digest,
            boot,
            tuple(image.layers),
            tuple(image.env),
            tuple(image.entrypoint),
            tuple(image.cmd),
            image.working_dir,
            image.user,
            image.stop_signal,
        ),
        4,
    )


def _read(path: str, most: int = 1 << 14) -> bytes:
    """Return what is in a file; `most` bytes are read at once, and fewer are the last."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = more = os.read(fd, most)
        while len(more) == most:
            data += (more := os.read(fd, most))
        return data
    finally:
        os.close(fd)
