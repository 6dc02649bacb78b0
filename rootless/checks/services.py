"""Warm: probes of what others do for a sandbox: network helpers, delegated cgroups, the user's systemd. Outside."""

from __future__ import annotations

import errno as e
import os
import re
import subprocess

from rootless import network, programs
from rootless.checks import host
from rootless.checks.probing import DEGRADED, OK, WAIT, Finding


def has_network() -> Finding:
    """Whether sandboxes can reach the network: a helper program, and the device that it needs."""
    there = [f"{name}{_version(name)}" for name in ("slirp4netns", "pasta") if programs.find(name)]
    if not any(name in network.BACKENDS for name in ("slirp4netns", "pasta") if programs.find(name)):
        return Finding(
            DEGRADED, "slirp4netns is not installed, so sandboxes have no network", programs.install_hint("slirp4netns")
        )
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        fix = "sudo modprobe tun" if error.errno in (e.ENOENT, e.ENODEV, e.ENXIO) else "sudo chmod 0666 /dev/net/tun"
        return Finding(DEGRADED, f"/dev/net/tun: {error.strerror}; sandboxes have no network", fix)
    return Finding(OK, ", ".join(there))


def _version(name: str) -> str:
    """Return the version that a helper program tells of, after a space; "" if it tells none."""
    try:
        done = subprocess.run(
            [programs.find(name), "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    found = re.match(rb"\S+ (?:version )?([0-9][\w.~+-]*)", done.stdout)
    return f" {found[1].decode()}" if found else ""


def can_limit() -> Finding:
    """Whether a cgroup is delegated to the caller, and with which controllers: cgroups(7)."""
    point = next((m.point for m in host.mounts().values() if m.fstype == "cgroup2"), "")
    own = re.search(r"^0::(/.*)$", host.text("/proc/self/cgroup"), re.MULTILINE)
    there = host.text(f"{point}/cgroup.controllers").split()
    if not point or not own or not {"memory", "pids"} & set(there):
        return Finding(
            DEGRADED,
            "memory, pids and cpu are not in cgroup v2, so sandboxes cannot be limited",
            "boot with systemd.unified_cgroup_hierarchy=1, or cgroup_no_v1=all without systemd",
        )
    for folder in (point + own[1], _user_cgroup(point)):
        if os.access(folder, os.W_OK) and os.access(f"{folder}/cgroup.procs", os.W_OK):
            return _controllers(folder)
    return Finding(
        DEGRADED,
        f"{point}{own[1]} is not delegated to you, so sandboxes cannot be limited",
        "log in where systemd starts a user manager, or have root give you a cgroup of your own",
    )


def _user_cgroup(point: str) -> str:
    """Return the cgroup of the user's systemd, which has what is delegated to the user."""
    return f"{point}/user.slice/user-{os.getuid()}.slice/user@{os.getuid()}.service"


def _controllers(folder: str) -> Finding:
    there = host.text(f"{folder}/cgroup.controllers").split()
    if lacking := [name for name in ("cpu", "memory", "pids", "io") if name not in there]:
        return Finding(DEGRADED, f"delegated: {' '.join(there) or 'no controller'}; without {' '.join(lacking)}",
                       host.setup_command(" --delegate") + ", and log in again")  # fmt: skip
    return Finding(OK, f"delegated: {' '.join(there)}")


def has_runtime_folder() -> Finding:
    """Whether there is a folder for sockets and the like that ends with the login."""
    folder = os.environ.get("XDG_RUNTIME_DIR", "")
    fix = f"log in through PAM and systemd or elogind, or: sudo loginctl enable-linger {os.getuid()}"
    if not folder:
        return Finding(DEGRADED, "XDG_RUNTIME_DIR is not set, so the user's systemd cannot be reached", fix)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        return Finding(DEGRADED, f"XDG_RUNTIME_DIR is {folder}, which is not a folder that you may write to", fix)
    return Finding(OK, folder)
