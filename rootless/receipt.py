"""The receipt: for each protection and limit, what was asked for and what is in force, as the kernel has it. Outside.

Nothing here is taken from the plan but what was asked: proc_pid_status(5), proc_pid_mountinfo(5), user_namespaces(7),
namespaces(7) and the files of the cgroup say the rest. Loaded only where a receipt was asked for.
"""

from __future__ import annotations

import os

from rootless import capabilities, cgroups, syscalls
from rootless.errors import SbxError, printable
from rootless.privileges import RLIMITS, confinement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from rootless.spec import IdMapping, SandboxSpec

#: file of a cgroup → its name in the receipt
LIMITS = {
    "memory.max": "memory",
    "memory.swap.max": "swap",
    "memory.high": "memory-high",
    "memory.oom.group": "oom-group",
    "cpu.max": "cpus",
    "cpu.weight": "cpu-weight",
    "cpuset.cpus": "cpuset",
    "pids.max": "pids",
    "io.max": "io",
}
NAMESPACES = ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup", "time")
_LIMIT_NAMES = {  # proc_pid_limits(5) has names of its own
    "cpu": "Max cpu time",
    "fsize": "Max file size",
    "data": "Max data size",
    "stack": "Max stack size",
    "core": "Max core file size",
    "rss": "Max resident set",
    "nproc": "Max processes",
    "nofile": "Max open files",
    "memlock": "Max locked memory",
    "as": "Max address space",
    "locks": "Max file locks",
    "sigpending": "Max pending signals",
    "msgqueue": "Max msgqueue size",
    "nice": "Max nice priority",
    "rtprio": "Max realtime priority",
    "rttime": "Max realtime timeout",
}
_PAGE = os.sysconf("SC_PAGE_SIZE")


def read(
    wanted: SandboxSpec, command: int, namespaces: Mapping[str, int], cgroup: str, warnings: list[str]
) -> dict[str, Any]:
    """Return the receipt of a sandbox whose command is the process `command`.

    `namespaces` are the inode numbers of its namespaces, by name; `cgroup` is its cgroup's folder or "".
    """
    status = _status(command)
    mounts = _mounts(command)
    rows: dict[str, dict[str, Any]] = {}
    rows |= _namespaces(wanted, namespaces)
    rows |= _ids(wanted, command)
    rows |= _privileges(wanted, status)
    rows |= _landlock(wanted)
    rows |= _files(wanted, mounts)
    rows |= _network(wanted, command)
    rows |= _process_limits(wanted, command)
    rows |= _limits(wanted, cgroup)
    return {
        "version": 1,
        "name": wanted.name,
        "id": wanted.id,
        "image": wanted.image,
        "pid": command,
        "cgroup": cgroup or None,
        "rows": rows,
        "warnings": warnings,
    }


def require(receipt: dict[str, Any], names: list[str]) -> None:
    """Raise SbxError ``requirement-missing`` unless every row of the receipt that is in `names` is in force."""
    rows = receipt["rows"]
    for name in (word for text in names for word in text.split(",") if word):
        if name not in rows and name not in LIMITS.values():
            raise SbxError(
                "requirement-unknown",
                f"require {printable(name)}: there is no such protection or limit",
                "there are " + ", ".join(sorted({*rows, *LIMITS.values()})),
            )
        if name not in rows:
            raise SbxError("requirement-missing", f"require {name}: no such limit was asked for")
        if not rows[name]["in_force"]:
            raise SbxError(
                "requirement-missing",
                f"require {name}: it is not in force: {rows[name]['mechanism']} says "
                f"{printable(str(rows[name]['actual']))}",
            )


def _row(mechanism: str, asked: object, actual: object, in_force: bool) -> dict[str, Any]:
    return {"asked": asked, "actual": actual, "in_force": in_force, "mechanism": mechanism}


# ── what the kernel says ──────────────────────────────────────────────────────────────────────────────────────────────


def _namespaces(wanted: SandboxSpec, namespaces: Mapping[str, int]) -> dict[str, Any]:
    rows = {}
    for name in NAMESPACES:
        number = namespaces.get(name)
        try:
            ours = os.stat(f"/proc/self/ns/{name}").st_ino
        except OSError:
            continue  # a kernel without it
        asked = "own" if name == "user" or name in wanted.namespaces else "the host's"
        rows[name] = _row(
            f"{name} namespace", asked, f"{name}:[{number}]" if number else None, number is not None and number != ours
        )
    return rows


def _ids(wanted: SandboxSpec, command: int) -> dict[str, Any]:
    rows = {}
    for name, file, asked in (("uids", "uid_map", wanted.idmap.uids), ("gids", "gid_map", wanted.idmap.gids)):
        actual = [" ".join(line.split()) for line in _lines(f"/proc/{command}/{file}")]
        rows[name] = _row(f"/proc/PID/{file}", _extents(asked), actual, sorted(actual) == sorted(_extents(asked)))
    said = "".join(_lines(f"/proc/{command}/setgroups"))
    asked_groups = "deny" if wanted.deny_groups or wanted.idmap.mode == "single" else "allow"
    rows["setgroups"] = _row("/proc/PID/setgroups", asked_groups, said, said == "deny")
    return rows


def _extents(mappings: list[IdMapping]) -> list[str]:
    return [f"{m.container_id} {m.host_id} {m.size}" for m in mappings]


def _privileges(wanted: SandboxSpec, status: dict[str, str]) -> dict[str, Any]:
    bounding = int(status.get("CapBnd", "0"), 16)
    effective = int(status.get("CapEff", "0"), 16)
    hidden = int(status.get("CapInh", "0"), 16) | int(status.get("CapAmb", "0"), 16)
    filters = int(status.get("Seccomp_filters", status.get("Seccomp", "0")))
    return {
        "seccomp": _row(
            "seccomp filter",
            wanted.filter_name or "unconfined",
            f"mode {status.get('Seccomp')}, {filters} filters",
            status.get("Seccomp") == "2" and wanted.filter_name not in ("", "unconfined"),
        ),
        "no_new_privs": _row(
            "no_new_privs", wanted.no_new_privileges, status.get("NoNewPrivs") == "1", status.get("NoNewPrivs") == "1"
        ),
        "capabilities": _row(
            "capability sets",
            capabilities.names(wanted.capabilities),
            {"bounding": capabilities.names(bounding), "effective": capabilities.names(effective)},
            not (bounding | effective | hidden) & ~wanted.capabilities,
        ),
        "groups": _row(
            "supplementary groups", [], status.get("Groups", "").split(), not status.get("Groups", "").split()
        ),
    }


def _landlock(wanted: SandboxSpec) -> dict[str, Any]:
    """Rows for the first command and for those that come in by `exec`: whether the tree is all that they reach."""
    # The kernel shows nobody its domains; but a launch whose step fails ends there, so what it can do it has done.
    version = syscalls.landlock_version()
    rows = {}
    for name, entering in (("landlock", False), ("landlock-exec", True)):
        files, scoped = confinement(wanted, entering)
        held = ["files"] if files and version >= 2 else []
        held += [scope for scope in scoped if version >= 6]
        held += ["TCP ports (UDP is open)"] if scoped and wanted.network.tcp_ports else []
        words = f"version {version}: {', '.join(held) or 'nothing'}"
        rows[name] = _row("Landlock, by its step's success", wanted.landlock, words, files and version >= 2)
    return rows


def _files(wanted: SandboxSpec, mounts: dict[str, list[str]]) -> dict[str, Any]:
    # What the running kernel does not have needs no cover; /proc and /sys are the same kernel's on the host.
    masked = [path for path in wanted.masked if os.path.lexists(path)]
    read_only = [path for path in wanted.read_only if os.path.lexists(path)]
    covered = [path for path in masked if path in mounts]
    protected = [path for path in read_only if "ro" in mounts.get(path, [])]
    root = "ro" in mounts.get("/", [])
    return {
        "masked": _row("mounts over them", masked, covered, bool(masked) and covered == masked),
        "read-only": _row("read-only mounts", read_only, protected, bool(read_only) and protected == read_only),
        "read-only-root": _row("mount flags of /", wanted.rootfs.read_only, root, root),
        "nosuid": _row(
            "mount flags of /",
            wanted.no_new_privileges,
            "nosuid" in mounts.get("/", []),
            "nosuid" in mounts.get("/", []),
        ),
    }


def _network(wanted: SandboxSpec, command: int) -> dict[str, Any]:
    names = [line.partition(":")[0].strip() for line in _lines(f"/proc/{command}/net/dev")[2:]]
    own = "net" in wanted.namespaces
    return {"network": _row("interfaces", wanted.network.backend, names if own else "the host's", own)}


def _process_limits(wanted: SandboxSpec, command: int) -> dict[str, Any]:
    rows = {}
    lines = _lines(f"/proc/{command}/limits")
    for name, (soft, hard) in wanted.limits.items():
        if name not in RLIMITS:
            continue
        title = _LIMIT_NAMES[name]
        values = next((line[len(title) :].split()[:2] for line in lines if line.startswith(title + " ")), [])
        asked = ["unlimited" if number < 0 else str(number) for number in (soft, hard)]
        rows[f"ulimit-{name}"] = _row("resource limit", asked, values, values == asked)
    if wanted.oom_score:
        score = "".join(_lines(f"/proc/{command}/oom_score_adj")) or "0"
        rows["oom-score"] = _row("oom_score_adj", wanted.oom_score, int(score), int(score) >= wanted.oom_score)
    return rows


def _limits(wanted: SandboxSpec, cgroup: str) -> dict[str, Any]:
    rows = {}
    for file, asked in wanted.resources.items():
        actual = cgroups.read(cgroup, file) if cgroup else ""
        rows[LIMITS.get(file, file)] = _row(f"cgroup {file}", asked, actual or None, _holds(asked, actual))
    return rows


def _holds(asked: str, actual: str) -> bool:
    """Whether the limit read back is the one asked for; the kernel rounds bytes down to pages, and fills lines up."""
    if asked.isdigit() and actual.isdigit():
        return 0 <= int(asked) - int(actual) < _PAGE
    lines = [line.split() for line in actual.split("\n") if line]
    wanted = [line.split() for line in asked.split("\n")]
    return all(any(words[0] == line[0] and set(words) <= set(line) for line in lines) for words in wanted)


def _status(pid: int) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in _lines(f"/proc/{pid}/status"))}


def _mounts(pid: int) -> dict[str, list[str]]:
    """Return mount point → flags, the topmost mount's: proc_pid_mountinfo(5)."""
    return {
        fields[4]: fields[5].split(",")
        for line in _lines(f"/proc/{pid}/mountinfo")
        if len(fields := line.split(" ")) > 5
    }


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read().splitlines()
    except OSError:
        return []
