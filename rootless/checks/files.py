"""Warm: probes of the data folder, of overlayfs on its filesystem, and of the device nodes. Outside.

Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno as e
import os
import tempfile

from rootless import mounts, paths, syscalls, trees
from rootless.checks import host
from rootless.checks.probing import DEGRADED, MISSING, OK, Acts, Failure, Finding, attempt, not_tried, user_namespace

FREE_BYTES, FREE_FILES = 100 << 20, 1000  #: what a data folder should have left
#: filesystems of other machines: no overlayfs on top of them, and locks that may not hold
REMOTE = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "virtiofs", "fuse.sshfs",
    "fuse.glusterfs",
))  # fmt: skip
#: types that overlayfs cannot write to
UNFIT = REMOTE | {"overlay", "ecryptfs", "vfat", "exfat", "msdos", "fuseblk", "ntfs3", "aufs"}
WRITE = "write to the data folder"
ELSEWHERE = "set SBX_HOME to a folder on a local ext4, xfs, btrfs or tmpfs"


def has_data_folder() -> Finding:
    """Whether images and sandboxes can be kept: a folder of our own, on a local disk, with room."""
    folder = paths.data()
    existing = host.existing(folder)
    mounted = host.mounted(existing)
    space = os.statvfs(existing)
    free = space.f_bavail * space.f_frsize
    where = f"{folder} on {mounted.fstype}"
    if "ro" in mounted.options:
        return Finding(
            MISSING, f"{where}, mounted read-only", "set SBX_HOME to a folder on a local disk that you may write to"
        )
    if not os.path.isdir(existing) or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            MISSING,
            f"{existing} cannot be written to",
            "set SBX_HOME to a folder on a local disk that you may write to",
        )
    if mounted.fstype in REMOTE:
        return Finding(DEGRADED, f"{where}, a network filesystem", ELSEWHERE)
    if free < FREE_BYTES or (space.f_files and space.f_favail < FREE_FILES):
        return Finding(DEGRADED, f"{where}, {free >> 20} MiB and {space.f_favail} files free",
                       "make room with sbx rmi, or set SBX_HOME to a folder elsewhere")  # fmt: skip
    return Finding(OK, f"{where}, {free / (1 << 30):.0f} GiB free")


def can_mount_overlay() -> Finding:
    """Whether overlayfs works as sandboxes use it, on the data folder's filesystem: one is made and written to."""
    try:
        scratch = tempfile.mkdtemp(prefix=".sbx-check-", dir=host.existing(paths.data()))
    except OSError as error:
        return not_tried(MISSING, f"{error.filename}: {error.strerror}", "data folder")
    namespace = user_namespace()
    try:
        failure = attempt([*namespace, *_overlay(scratch)])
        fstype = host.mounted(scratch).fstype
    finally:
        trees.remove(scratch)
    if failure is None:
        return Finding(OK, f"works on {fstype}")
    if failure.act in [act for act, _ in namespace]:
        return not_tried(MISSING, failure, "user namespaces")
    if failure.act == WRITE:
        return not_tried(MISSING, failure, "data folder")
    cause, fix = _why_no_overlay(failure, fstype)
    # Mounted, but not all of it works: deleting or replacing what an image has will fail
    mark = DEGRADED if failure.act.endswith(" in it") else MISSING
    return Finding(mark, f"{failure}: {cause}", fix, cause)


def _overlay(scratch: str) -> Acts:
    """Return the acts that mount an overlay in the folder `scratch`, and change what is in it in each way there is."""

    def prepare() -> None:
        os.chdir(scratch)
        for name in ("lower", "upper", "work", "root", "lower/folder"):
            os.mkdir(name)
        for name in ("lower/file", "lower/folder/file"):
            with open(name, "x") as stream:
                stream.write(name)

    def replace() -> None:
        os.rmdir("root/folder")
        os.mkdir("root/folder")

    def change() -> None:
        with open("root/file", "a") as stream:
            stream.write("more")

    # as mounts.Overlay does
    options = "lowerdir=lower,upperdir=upper,workdir=work,userxattr,volatile"
    return [
        (WRITE, prepare),
        ("mount an overlay", lambda: syscalls.mount("overlay", "root", "overlay", 0, options)),
        ("change a file in it", change),
        ("delete a file in it", lambda: os.unlink("root/folder/file")),
        ("replace a folder in it", replace),
    ]


def _why_no_overlay(failure: Failure, fstype: str) -> tuple[str, str]:
    """Return why overlayfs fails, and the cure."""
    release = os.uname().release
    causes = [
        (failure.errno == e.ENODEV, "this kernel has no overlayfs, or has not loaded it", "sudo modprobe overlay"),
        (host.release() < (5, 11), f"overlayfs in a user namespace needs Linux 5.11; this is {release}",
         "install a newer kernel"),
        (fstype == "overlay", "the data folder is itself on overlayfs, as in a container",
         f"{ELSEWHERE}, such as a volume of the container's"),
        (fstype in UNFIT, f"overlayfs does not work on {fstype}, where the data folder is", ELSEWHERE),
        (fstype == "tmpfs" and host.release() < (6, 6),
         "tmpfs has the attributes that overlayfs needs from Linux 6.6 on", ELSEWHERE),
        (bool(host.confinement()), f"{host.confinement()} confines this process", host.UNCONFINED),
    ]  # fmt: skip
    return next(((cause, fix) for applies, cause, fix in causes if applies),
                (f"overlayfs does not work on this {fstype}", ELSEWHERE))  # fmt: skip


def has_devices() -> Finding:
    """Whether the device nodes that every sandbox gets are there, and are what their names say."""
    wrong = [f"/dev/{name}" for name, number in mounts.DEVICES.items() if _number(f"/dev/{name}") != number]
    if not wrong:
        return Finding(OK, " ".join(mounts.DEVICES))
    return Finding(
        MISSING, f"{' '.join(wrong)}: not the device of that name", "mount a devtmpfs, or make the nodes with mknod"
    )


def _number(path: str) -> int:
    try:
        return os.stat(path).st_rdev
    except OSError:
        return 0
