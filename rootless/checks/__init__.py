"""Warm: what sandboxes need of a host: a table of checks (probe, meaning, cure), and hints after a failure. Outside.

A probe tries the real thing where it can, never raises and changes nothing: what it makes is made in a forked child, in
namespaces that end with it, or in a folder that it deletes. `sbx doctor` asks them all; after a failure `hint_for` asks
those that could be its reason, and gives the first cause that it finds with its cure.

A new check is a probe in one of the modules here and a row in CHECKS; where it can be the reason of a failure, its name
stands in `hints` too.
"""

from __future__ import annotations

from rootless.checks import files, namespaces, protections, services
from rootless.checks.hints import hint_for
from rootless.checks.probing import DEGRADED, MISSING, OK, Check, Finding

__all__ = ["CHECKS", "DEGRADED", "MISSING", "OK", "Check", "Finding", "hint_for"]

#: in the order in which one explains the next
CHECKS = (
    Check("kernel", "kernel", "mounts are prepared unattached and made read-only as a tree", namespaces.has_kernel),
    Check("userns", "user namespaces", "every sandbox is made in one", namespaces.can_use_user_namespaces),
    Check("namespaces", "kinds of namespaces", "what a sandbox has of its own", namespaces.has_namespaces),
    Check("limits", "limits", "how many sandboxes there can be, and how large a pull", namespaces.has_room),
    Check("subids", "subordinate ids", "more than one user in a sandbox", namespaces.can_map_subordinate_ids),
    Check("data", "data folder", "where images and sandboxes are kept", files.has_data_folder),
    Check("overlay", "overlayfs", "a sandbox's changes go to a layer of their own", files.can_mount_overlay),
    Check("proc", "fresh /proc", "a sandbox sees its own processes only", namespaces.can_mount_proc),
    Check("devices", "devices", "the nodes of every sandbox's /dev", files.has_devices),
    Check("seccomp", "seccomp", "system calls that sandboxes do not need are refused", protections.can_load_filters),
    Check("landlock", "Landlock", "a second wall around what unpacks images", protections.has_landlock),
    Check("keyrings", "keyrings", "the caller's keys are out of a sandbox's reach", protections.has_keyrings),
    Check("network", "network", "sandboxes reach the network", services.has_network),
    Check("cgroups", "cgroup delegation", "limits on memory, processor and processes", services.can_limit),
    Check("runtime", "runtime folder", "the way to the user's systemd", services.has_runtime_folder),
)
