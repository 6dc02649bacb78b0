"""Warm: probes of the kernel, its namespaces, and the ids in them. Outside.

user_namespaces(7), namespaces(7), newuidmap(1).
"""

from __future__ import annotations

import errno as e
import os
import resource
import stat

from rootless import idmap, namespaces, parent, programs, syscalls
from rootless.checks import host
from rootless.checks.probing import (
    DEGRADED,
    MISSING,
    OK,
    Acts,
    Failure,
    Finding,
    attempt,
    fork_on,
    not_tried,
    user_namespace,
    write_map,
)
from rootless.errors import SbxError, StepError

KERNEL = (5, 12)  #: mount_setattr(2)
OVERFLOW_ID = 65534  #: what the kernel shows of an id that is not mapped
FILES = 256  #: descriptors that a pull with several connections may want


def has_kernel() -> Finding:
    """Whether the kernel is new enough."""
    release = os.uname().release
    if host.release() >= KERNEL:
        return Finding(OK, f"Linux {release}")
    return Finding(MISSING, f"Linux {release}, and {KERNEL[0]}.{KERNEL[1]} is needed", "install a newer kernel")


def can_use_user_namespaces() -> Finding:
    """Whether all works that a sandbox begins with; names the first act that does not.

    Each act counts: on Ubuntu a user namespace can be made, and what is done in it fails.
    """
    # With a single id there is one user namespace, otherwise the sandbox's own is nested in it.
    single = idmap.for_caller()[0].mode == "single"
    inner: Acts = [("write the inner id map", lambda: write_map(0, 0))]
    own = namespaces.flags([*namespaces.DEFAULT] if single else ["user", *namespaces.DEFAULT])
    failure = attempt([
        *user_namespace(),
        ("create a sandbox's namespaces in it", lambda: syscalls.unshare(own)),
        *([] if single else inner),
        ("mount a tmpfs", lambda: syscalls.mount("tmpfs", "/", "tmpfs", 0)),
        ("bring up the loopback interface", syscalls.loopback_up),
    ])  # fmt: skip
    if failure is None:
        return Finding(OK, "can be created, mapped, nested and mounted in")
    cause, fix = _why_no_namespaces(failure)
    return Finding(MISSING, f"{failure}: {cause}", fix, cause)


def _why_no_namespaces(failure: Failure) -> tuple[str, str]:
    """Return what forbids user namespaces and the cure: the first of the known causes that is there."""
    nested = host.is_nested()
    apparmor = host.sysctl("kernel.apparmor_restrict_unprivileged_userns") == "1"
    causes: list[tuple[bool, str, str]] = [
        (not os.path.exists("/proc/self/ns/user"), "this kernel was built without user namespaces",
         "use a kernel with CONFIG_USER_NS"),
        (host.sysctl("kernel.unprivileged_userns_clone") == "0" and os.geteuid() != 0,
         "kernel.unprivileged_userns_clone is 0", "sudo sysctl -w kernel.unprivileged_userns_clone=1"),
        *[(host.sysctl(name) == "0", f"{name} is 0", host.OUTER if nested else f"sudo sysctl -w {name}=15000")
          for name in _limits()],
        (nested and os.geteuid() == OVERFLOW_ID, "your own id is not mapped in the user namespace around this process",
         "map it there, as in: unshare --map-current-user"),
        (failure.errno == e.ENOSPC, "the limit on namespaces is reached, here or in a namespace around this one",
         host.OUTER if nested else "end some sandboxes, or raise the sysctls user.max_*_namespaces"),
        (apparmor and host.confinement() in ("", "unprivileged_userns"),
         "AppArmor denies user namespaces to programs without a profile (Ubuntu 23.10 and later)",
         host.setup_command(f" --sbx {programs.find('sbx') or '/path/to/sbx'}")),
        (bool(host.confinement()), f"{host.confinement()} confines this process", host.UNCONFINED),
        (host.status("Seccomp") == "2", "a seccomp filter around this process forbids it",
         host.OUTER + ", or with --security-opt seccomp=unconfined"),
        (not any(mounted.point == "/" for mounted in host.mounts().values()), "this process is in a chroot",
         "start sbx outside of it, or enter it with pivot_root"),
    ]  # fmt: skip
    return next(((cause, fix) for applies, cause, fix in causes if applies), ("the kernel refuses it", "see: dmesg"))


def _limits() -> list[str]:
    """Return the names of the sysctls that limit the kinds of namespaces a sandbox always has."""
    return [f"user.max_{name}_namespaces" for name in ("user", *namespaces.DEFAULT)]


def has_namespaces() -> Finding:
    """Whether the kernel has all kinds of namespaces."""
    lacking = [name for name in namespaces.FLAGS if not os.path.exists(f"/proc/self/ns/{name}")]
    if not lacking:
        return Finding(OK, " ".join(namespaces.FLAGS))
    mark = DEGRADED if lacking == ["time"] else MISSING
    fix = "Linux 5.6 has time namespaces" if lacking == ["time"] else "use a kernel of a distribution"
    return Finding(mark, f"this kernel has no {' '.join(lacking)} namespaces", fix)


def has_room() -> Finding:
    """Whether limits leave room for sandboxes."""
    values = {name: host.sysctl(name) for name in _limits()}
    if none := [name for name, value in values.items() if value == "0"]:
        return Finding(MISSING, f"{none[0]} is 0", _why_no_namespaces(Failure("", 0))[1])
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < FILES:
        return Finding(
            DEGRADED, f"a process may open {files} files only", f"ulimit -n {FILES}, or a higher limit in limits.conf"
        )
    least = min((int(value) for value in values.values() if value.isdecimal()), default=0)
    return Finding(OK, f"{least or 'any number of'} namespaces of each kind, {files} open files")


def can_mount_proc() -> Finding:
    """Whether the kernel mounts a fresh /proc: not where parts of the visible one are covered."""
    namespace = user_namespace()
    failure = attempt([
        *namespace,
        ("create a pid namespace", lambda: syscalls.unshare(syscalls.CLONE_NEWPID)),
        ("start its first process", fork_on),
        ("mount a fresh /proc", lambda: syscalls.new_mount("proc", {}, 0)),
    ])  # fmt: skip
    if failure is None:
        return Finding(OK, "each sandbox sees its own processes only")
    if failure.act != "mount a fresh /proc":
        return not_tried(DEGRADED, failure, "user namespaces")
    covered = sorted({m.point for m in host.mounts().values() if m.point.startswith("/proc/")})
    cause = f"{covered[0]} is covered, as in a container" if covered else "there is no /proc that is wholly visible"
    return Finding(DEGRADED, f"{failure}: {cause}; sandboxes see all processes",
                   "start the container around this process with --security-opt systempaths=unconfined (docker), "
                   "unmask=ALL (podman) or --nested (sbx)", cause)  # fmt: skip


# ── ids ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def can_map_subordinate_ids() -> Finding:
    """Whether the caller has subordinate ids, and a map with them can be written: one is."""
    try:
        ids, _ = idmap.for_caller("auto")
        parent.call_inside(ids, _nothing)
    except SbxError as error:
        if error.code == "namespace-limit" or (isinstance(error, StepError) and error.act.startswith("create ")):
            return not_tried(DEGRADED, error.message, "user namespaces")
        cause, fix = _why_no_map() if error.code in _MAP_ERRORS else ("", error.hint)
        found = error.message if cause in ("", _UNKNOWN) else cause
        return Finding(DEGRADED, f"{found}; sandboxes have one user only", fix, cause)
    return Finding(
        OK, f"{sum(m.size for m in ids.uids)} users and {sum(m.size for m in ids.gids)} groups can be mapped"
    )


_UNKNOWN = "this host refuses the map"
#: what a helper program's failure is called, whose reason the program does not tell
_MAP_ERRORS = ("idmap-refused", "newuidmap-powerless", "step-failed")


def _nothing() -> None:
    """The work of a child that only has to come to be."""


def _why_no_map() -> tuple[str, str]:
    """Return why newuidmap(1) or newgidmap(1) failed, and the cure."""
    if host.status("NoNewPrivs") == "1":
        return ("no_new_privs is set, so newuidmap gains no privilege",
                "start sbx outside of the service (systemd: NoNewPrivileges=no) or sandbox that sets it")  # fmt: skip
    for name in ("newuidmap", "newgidmap"):
        path = os.path.realpath(programs.find(name))
        status = os.stat(path)
        if "nosuid" in host.mounted(path).options:
            return f"{path} is on {host.mounted(path).point}, which is mounted nosuid", "mount it without nosuid"
        if not status.st_mode & stat.S_ISUID and "security.capability" not in os.listxattr(path):
            return f"{path} is neither setuid root nor has file capabilities", f"sudo chmod u+s {path}"
        if status.st_mode & stat.S_ISUID and status.st_uid != 0:
            return (f"{path} is not root's in the user namespace that we are in",
                    "start sbx outside, or with more ids mapped in the container around it")  # fmt: skip
    return _UNKNOWN, "compare your lines in /etc/subuid and /etc/subgid, and the ids that this host lets you have"
