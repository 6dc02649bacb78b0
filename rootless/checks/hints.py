"""Warm: after a failure, the one hint that applies: what failed → the probes that may know why. Outside."""

from __future__ import annotations

import errno as e
import os
import re
from collections.abc import Callable

from rootless import paths
from rootless.checks import files, host, protections, services
from rootless.checks import namespaces as n
from rootless.checks.probing import OK, Finding, run
from rootless.errors import SbxError, StepError

#: what failed (a step's act, or an error's code) → the checks that may know why, the likeliest first
_REASONS: tuple[tuple[str, tuple[Callable[[], Finding], ...]], ...] = (
    ("namespace-limit", (n.has_room, n.can_use_user_namespaces)),
    (
        "create namespaces|start pid 1|bring up the loopback",
        (n.can_use_user_namespaces, n.has_namespaces, n.has_kernel),
    ),
    (
        "idmap-|newuidmap-|supervisor-failed|write the .* id map",
        (n.can_use_user_namespaces, n.can_map_subordinate_ids, n.has_room),
    ),
    ("mount overlay|overlay-", (files.has_data_folder, files.can_mount_overlay)),
    ("data-|system", (files.has_data_folder,)),
    ("create a proc", (n.can_mount_proc,)),
    ("open the devices|device-wrong", (files.has_devices,)),
    ("load the seccomp filter|seccomp-", (protections.can_load_filters,)),
    ("join a new session keyring", (protections.has_keyrings,)),
    ("network-|attach ", (services.has_network,)),
    ("create|open|bind|mount|pivot_root|stop mounts|make|mask", (n.has_kernel, n.can_use_user_namespaces)),
)


def hint_for(error: SbxError, errno: int = 0) -> str:
    """Return the one hint that applies to `error`: the cause that a probe finds and its cure, or "".

    `errno` is the cause's, where the error does not tell it itself.
    """
    errno = error.errno if isinstance(error, StepError) else errno
    what = error.act if isinstance(error, StepError) else error.code
    if what.startswith("execute "):
        return _about_command(errno)
    if errno in (e.EACCES, e.EPERM) and re.match("write /|create folder /|mount .* on /", what):
        return _FOREIGN
    if text := _BY_ERRNO.get(errno, _no_word)():
        return text
    probes = next((probes for pattern, probes in _REASONS if re.match(pattern, what)), ())
    return next((hint for probe in probes if (hint := _word_of(probe))), "")


def _word_of(probe: Callable[[], Finding]) -> str:
    """Return the hint of what `probe` finds, "" when all is well; what it could not try is another's to explain."""
    finding = run(probe)
    return "" if finding.mark == OK or finding.blocked else finding.hint


#: a root filesystem in a folder (--rootfs) that somebody else unpacked
_FOREIGN = (
    "something on the way there belongs to a user that the id map leaves out, or may not be written to; "
    "give the root filesystem to yourself (chown), or import it: tar -c -C FOLDER . | sbx import NAME -"
)


def _no_word() -> str:
    return ""


def _about_command(errno: int) -> str:
    """Return what keeps a command that was found from being executed: execve(2)."""
    if errno == e.EACCES:
        folders = {mounted.point for mounted in host.mounts().values() if "noexec" in mounted.options}
        home = host.existing(paths.home())
        for folder in {os.getcwd(), home}:
            if host.mounted(folder).point in folders:
                return f"{host.mounted(folder).point} is mounted noexec, and so is what a sandbox shows of it"
        return "it is a folder, lacks the x bit, or its filesystem is mounted noexec"
    return {
        e.ENOEXEC: f"it is not a program for {os.uname().machine}, and no script that begins with #!",
        e.ETXTBSY: "somebody has it open for writing",
        e.ELOOP: "its name leads through too many symbolic links, or round in a circle",
    }.get(errno, "")


def _about_space() -> str:
    return _word_of(files.has_data_folder)


def _about_missing_calls() -> str:
    return _word_of(n.has_kernel) or (
        "a seccomp filter around this process, such as a container's, hides a system call that the kernel has"
    )


#: errno → a word on it, whatever the act was
_BY_ERRNO: dict[int, Callable[[], str]] = {
    e.ENOSYS: _about_missing_calls,
    e.EOVERFLOW: lambda: _FOREIGN,
    e.ETXTBSY: lambda: "somebody has the file open for writing, or runs it",
    e.ELOOP: lambda: "a name leads through too many symbolic links, or through one where none is followed",
    e.EMFILE: lambda: "this process may not open more files; raise the limit: ulimit -n",
    e.ENFILE: lambda: "the host may not open more files; raise the sysctl fs.file-max",
    e.EAGAIN: lambda: (
        "you have as many processes as you may; raise the limit (ulimit -u), or that of your cgroup (pids.max)"
    ),
    e.ENOMEM: lambda: "out of memory, or at the limit of your cgroup (memory.max) or of ulimit -v",
    e.ENOSPC: _about_space,
    e.EDQUOT: lambda: "your disk quota is used up; make room with sbx rmi, or set SBX_HOME to a folder elsewhere",
    e.EROFS: _about_space,
    e.ESTALE: _about_space,
}
