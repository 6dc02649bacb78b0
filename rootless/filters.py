"""Which seccomp filter a sandbox needs, and reading it from the cache. Outside; the launch reads bytes and no more.

A filter is compiled once by `seccomp.build` and kept below ``paths.data()/cache/seccomp``. Its name says all that the
program depends on, so a file that exists under the right name is the right one.
"""

from __future__ import annotations

import os

from rootless import __version__, capabilities, paths
from rootless.errors import SbxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    class Variant(TypedDict):
        """What a filter depends on besides the kernel; made by `variant`."""

        profile: str
        nested: bool
        setgroups: str
        chown: str
        capabilities: int


UNCONFINED = "unconfined"
SHIPPED = "helpers/seccomp.json"

#: Bytes of one instruction (struct sock_filter), and the most that a program may have: BPF_MAXINSNS of them, less one.
INSTRUCTION = 8
LARGEST = 4095 * INSTRUCTION

#: The capabilities that the shipped profile asks about; no other makes a difference to its filter.
WIDENING = capabilities.parse(
    ("AUDIT_WRITE", "BPF", "DAC_READ_SEARCH", "PERFMON", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT", "SYS_MODULE",
     "SYS_NICE", "SYS_PACCT", "SYS_PTRACE", "SYS_RAWIO", "SYS_TIME", "SYS_TTY_CONFIG", "SYSLOG")
)  # fmt: skip


def variant(
    profile: str = "",
    nested: bool = False,
    setgroups: str = "fake",
    chown: str = "real",
    caps: int = capabilities.DEFAULT,
) -> Variant:
    """Return what describes a filter.

    `profile` is empty for the shipped one, `UNCONFINED`, or the path of a file in docker's or OCI's shape. `nested`
    opens namespaces and mounts. `setgroups` and `chown` are *real* or *fake* (answered 0, and nothing done). `caps` is
    the sandbox's bounding set.
    """
    for name, value in (("setgroups", setgroups), ("chown", chown)):
        if value not in ("real", "fake"):
            raise ValueError(f"{name}={value!r}")
    return {"profile": profile, "nested": nested, "setgroups": setgroups, "chown": chown, "capabilities": caps}


def needs_none(wanted: Variant) -> bool:
    """Tell whether `wanted` is no filter at all: nothing to refuse, nothing to answer."""
    return wanted["profile"] == UNCONFINED and wanted["setgroups"] == wanted["chown"] == "real"


def profile_path(wanted: Variant) -> str:
    """Return the file that the filter is compiled from; empty when it comes from none."""
    if wanted["profile"] == UNCONFINED:
        return ""
    return wanted["profile"] or paths.shipped(SHIPPED)


def identity(path: str) -> str:
    """Return a word that changes when the file at `path` does; raises SbxError ``seccomp-profile-unreadable``."""
    if not path:
        return "none"
    try:
        info = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return f"{info.st_dev:x}.{info.st_ino:x}.{info.st_size:x}.{info.st_mtime_ns:x}.{info.st_ctime_ns:x}"


def unreadable(path: str, error: OSError) -> SbxError:
    """Return the error for a profile that cannot be read."""
    return SbxError("seccomp-profile-unreadable", f"read seccomp profile {path}: {error.strerror}")


def filter_key(wanted: Variant) -> str:
    """Return the name of `wanted`'s program in the cache: kernel, machine, our version, the profile, the variant."""
    system = os.uname()
    caps = wanted["capabilities"] & (capabilities.EVERY if wanted["profile"] else WIDENING)
    flags = f"{int(wanted['nested'])}{wanted['setgroups'][0]}{wanted['chown'][0]}"
    words = (system.machine, system.release, __version__, identity(profile_path(wanted)), flags, f"{caps:x}")
    return "-".join(words).replace("/", "_")


def cache_path(wanted: Variant) -> str:
    """Return where `wanted`'s program is kept, whether or not it is there yet."""
    return f"{paths.data()}/cache/seccomp/{filter_key(wanted)}.bpf"


def is_sound(program: bytes) -> bool:
    """Tell whether `program` can be one: whole instructions, at least one, no more than the kernel takes."""
    return 0 < len(program) <= LARGEST and len(program) % INSTRUCTION == 0


def cached(wanted: Variant) -> bytes | None:
    """Return `wanted`'s program from the cache; None when it must be built, for whatever reason.

    A file that another user owns or may write, or that was cut short, counts as absent.
    """
    try:
        fd = os.open(cache_path(wanted), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid() or info.st_mode & 0o177777 != 0o100600:
            return None
        program = os.read(fd, LARGEST + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
    return program if is_sound(program) else None
