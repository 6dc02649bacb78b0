"""Control groups: find a delegated subtree, create, limit, join, freeze, account, kill, remove. Outside.

cgroups(7) and the kernel's Documentation/admin-guide/cgroup-v2.rst. A sandbox that has limits, or whose use is to be
counted, gets one cgroup of its own, ``sbx-ID``, in a part of the v2 tree that was delegated to the caller:

    subtree                    processes may only be in leaves once controllers are enabled for the children
      ├ sbx-ID                 pid 1, the command, and all they start; its files are the limits
      └ where we are           the caller, this parent, the supervisor, the helper programs: none of them is counted

Nothing here is done for a launch that asks for no limit.
"""

from __future__ import annotations

import fcntl
import os
import select

from rootless import paths
from rootless.errors import SbxError, printable
from rootless.steps import OutsideStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from rootless.steps import Undo

PREFIX = "sbx-"
OURS = "sbx-host"  #: the leaf for processes that were in the subtree itself: the caller's shell, and we
ENOENT, EBUSY, EINVAL, ENODEV, ERANGE, EOPNOTSUPP = 2, 16, 22, 19, 34, 95

#: what to say beside "there is no cgroup for it": the weaker means, which is taken only when it is asked for by name
INSTEAD = {
    "memory": "--ulimit as=BYTES limits the address space of each single process",
    "pids": "--ulimit nproc=N limits the processes of the sandbox's user",
    "cpu": "--cpu-time SECONDS and --timeout SECONDS limit how long it runs",
}


# ── finding a subtree ─────────────────────────────────────────────────────────────────────────────────────────────────


class Subtree:
    """A part of the tree in which cgroups can be made: `path`, and `means`, how it was found."""

    __slots__ = ("means", "path")

    def __init__(self, path: str, means: str) -> None:
        self.path = path
        self.means = means

    def controllers(self) -> list[str]:
        """Return the controllers that can be enabled for its children."""
        return read(self.path, "cgroup.controllers").split()


def mount_point() -> str:
    """Return where the v2 tree is mounted, or "" where it is not: proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", "rb") as stream:
        for line in stream:
            before, _, after = line.partition(b" - ")
            if after.startswith(b"cgroup2 "):
                return os.fsdecode(before.split(b" ")[4])
    return ""


def of_process(pid: int | str = "self") -> str:
    """Return the folder of the v2 cgroup that the process is in, "" when it has ended or cannot be seen from here."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as stream:
            name = next((os.fsdecode(line[3:].rstrip(b"\n")) for line in stream if line.startswith(b"0::")), "")
    except OSError:
        return ""
    # Outside of our cgroup namespace it is shown as /../…
    return (mount_point() + name).rstrip("/") if name.startswith("/") and not name.startswith("/..") else ""


def is_sandbox(folder: str) -> bool:
    """Whether a cgroup is one that was made for a sandbox."""
    name = os.path.basename(folder)
    return name.startswith(PREFIX) and name != OURS and not name.endswith(".scope")


def is_hybrid() -> bool:
    """Whether controllers are held by v1 hierarchies: what these hold the v2 tree does not have."""
    with open("/proc/self/cgroup", "rb") as stream:
        return any(line.split(b":")[1] not in (b"", b"name=systemd") for line in stream)


def find(pid: int, name: str) -> Subtree:
    """Return a subtree in which the process `pid` can be given a cgroup: the first that there is of

    the one that SBX_CGROUP names, which must be fit for it; the cgroup that we are in, where it is delegated to us; a
    transient scope of the systemd of the user, called `name`; ``sbx-UID`` at the top, which an administrator made.

    Raises SbxError ``cgroup-missing`` or ``cgroup-unusable`` with the reason, and the cure as its hint.
    """
    found = look()
    if found:
        return found
    paths.allow_packages()
    from rootless import systemd  # D-Bus costs 20 ms, and only those whose limits need it pay for them

    # We too: the scope, and the sandbox's counters with it, would vanish with the last process in it.
    systemd.start_scope(name + ".scope", [pid, os.getpid()])
    return Subtree(of_process(pid), f"the scope {name} of systemd")


def look() -> Subtree | None:
    """Return the subtree that is there without being asked for; None where systemd is to be asked. Raises as find()."""
    top = mount_point()
    if not top:
        raise SbxError(
            "cgroup-missing",
            "find a cgroup: there is no cgroup v2 tree on this host",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 on /sys/fs/cgroup",
        )
    own = of_process()
    if named := os.environ.get("SBX_CGROUP", ""):
        return Subtree(_named(named, top, own), "SBX_CGROUP")
    if own and (path := _delegated(own, top)):
        return Subtree(path, "the cgroup that we are in")
    if os.path.isdir("/run/systemd/system"):
        return None
    path = f"{top}/{PREFIX}{os.geteuid()}"
    if _is_ours(path):
        return Subtree(path, "the subtree that an administrator made")
    raise SbxError(
        "cgroup-missing",
        f"find a cgroup: none was delegated to user {os.geteuid()}, and systemd, which could "
        "give one, does not run here",
        "as root: sh helpers/delegate-cgroup PID-OF-YOUR-SHELL",
    )


def _delegated(own: str, top: str) -> str:
    """Return the delegated cgroup that `own` is, or is in: the nearest that systemd marks so, or the topmost of ours.

    What lies directly under the user's own systemd belongs to the user, and yet is systemd's to write.
    """
    found = ""
    folder = own
    while (folder == top or folder.startswith(top + "/")) and _is_ours(folder):
        if os.path.basename(folder).startswith("user@"):
            return ""
        if _is_marked(folder):
            return folder
        found = folder
        if folder == top:
            break
        folder = os.path.dirname(folder)
    # Everything belongs to root: without a mark, and where systemd runs, ownership tells nothing.
    return "" if os.geteuid() == 0 and os.path.isdir("/run/systemd/system") else found


def _is_ours(folder: str) -> bool:
    try:
        if os.stat(folder).st_uid != os.geteuid():
            return False
    except OSError:
        return False
    return all(os.access(f"{folder}{file}", os.W_OK) for file in ("", "/cgroup.procs", "/cgroup.subtree_control"))


def _is_marked(folder: str) -> bool:
    for attribute in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(folder, attribute) == b"1":
                return True
        except OSError:
            continue
    return False


def _named(text: str, top: str, own: str) -> str:
    """Return the folder of the cgroup `text`, a path in the tree or the folder's own; `own` is that of ours.

    Raises SbxError ``cgroup-unusable``: what somebody named is used, or it is told why not.
    """
    path = os.path.normpath(text if text == top or text.startswith(top + "/") else f"{top}/{text}")
    cause, cure = "", "it is named as in /proc/PID/cgroup, or by its folder"
    if not os.path.isdir(path) or not (path + "/").startswith(top + "/"):
        elsewhere = os.path.isabs(text) and os.path.exists(text)
        cause = f"it is not in the cgroup v2 tree, {top}" if elsewhere else "there is no such cgroup"
    elif not _is_ours(path):
        cause = "it is no cgroup that you own"
        cure = "an administrator delegates it: chown it, its cgroup.procs and its cgroup.subtree_control to you"
    elif (kind := read(path, "cgroup.type")) not in ("", "domain"):
        cause, cure = f"it is of the type {kind}, in which no limits can be set", "name one of the type domain"
    elif (pids := read(path, "cgroup.procs").split()) and path != own:
        # Those in our own are moved to a leaf, since they are the caller's shell and we; these are strangers.
        cause = f"processes are in it: {' '.join(pids[:5])}{' …' if len(pids) > 5 else ''}"
        cure = "processes may only be in leaves: name an empty one, or move them to a cgroup below it"
    if cause:
        raise SbxError("cgroup-unusable", f"use SBX_CGROUP {printable(path)}: {cause}", cure)
    return path


# ── a cgroup's files ──────────────────────────────────────────────────────────────────────────────────────────────────


def read(folder: str, file: str) -> str:
    """Return the text of a cgroup's file, "" where there is none (a controller that is not enabled)."""
    try:
        fd = os.open(f"{folder}/{file}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.read(fd, 65536).decode("utf-8", "replace").strip()
    except OSError:  # ENODEV: the cgroup was removed in between
        return ""
    finally:
        os.close(fd)


def read_table(folder: str, file: str) -> dict[str, int]:
    """Return a file of lines ``NAME NUMBER`` as a dict, empty where there is none."""
    return {
        name: int(value)
        for name, _, value in (line.partition(" ") for line in read(folder, file).split("\n"))
        if value.isdigit()
    }


def write(folder: str, file: str, text: str) -> None:
    """Write to a cgroup's file; each line is one write(2), as the kernel wants it. Raises OSError."""
    fd = os.open(f"{folder}/{file}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        for line in text.split("\n"):
            os.write(fd, line.encode())
    finally:
        os.close(fd)


def controller(file: str) -> str:
    """Return the controller that a cgroup's file belongs to, "" for the core's own."""
    name = file.partition(".")[0]
    return "" if name == "cgroup" else name


def limit(folder: str, file: str, value: str) -> None:
    """Set one limit of a cgroup. Raises SbxError ``limit-refused``."""
    try:
        write(folder, file, value)
    except OSError as error:
        if error.errno == ENOENT and file == "memory.swap.max" and not _has_swap():
            return  # nothing can be swapped out, so this limit holds by itself
        cause = {
            ENOENT: "this kernel has no such limit",
            EINVAL: "not a value for it",
            ERANGE: "out of range",
            ENODEV: "no such device",
            EOPNOTSUPP: "not supported here",
        }.get(error.errno or 0, error.strerror)
        raise SbxError("limit-refused", f"set {printable(file)} to {printable(value)}: {cause}") from None


def _has_swap() -> bool:
    with open("/proc/swaps", "rb") as stream:
        return len(stream.readlines()) > 1


# ── making and removing ───────────────────────────────────────────────────────────────────────────────────────────────


def create(subtree: Subtree, name: str, pid: int, controllers: Iterable[str]) -> tuple[str, int]:
    """Make the cgroup `name` in `subtree`, with the process `pid` in it and `controllers` enabled.

    Return its folder, and a descriptor that holds its lock: as long as that is open nobody takes it for debris, not
    even when no process is in it any more. Processes that are in the subtree itself are moved to a leaf, once: a cgroup
    with controllers for its children holds none. Raises SbxError ``cgroup-denied`` or ``cgroup-failed``.
    """
    path = f"{subtree.path}/{name}"
    lock = -1
    try:
        clear(subtree.path)
        while True:
            lock = _make(path)
            try:
                write(path, "cgroup.procs", str(pid))
                break
            except OSError as error:
                if error.errno not in (ENOENT, ENODEV):
                    raise
                os.close(lock)  # another launch took it for debris before it was locked: make it again
        _enable(subtree.path, controllers)
    except OSError as error:
        remove(path)
        if lock >= 0:
            os.close(lock)
        if not isinstance(error, PermissionError):
            raise SbxError("cgroup-failed", f"make cgroup {path}: {error.strerror}") from None
        raise SbxError(
            "cgroup-denied",
            f"join {path}: this needs write permission in the cgroup above both it and ours, {of_process()}",
            "start from a shell in that subtree (see helpers/delegate-cgroup), or log in where systemd runs",
        ) from None
    return path, lock


def _make(path: str) -> int:
    """Make a cgroup if there is none, and return a descriptor that holds its lock."""
    while True:
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:
            pass
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock


def _enable(folder: str, controllers: Iterable[str]) -> None:
    missing = set(controllers) - set(read(folder, "cgroup.subtree_control").split())
    if not missing:
        return
    words = " ".join(f"+{name}" for name in sorted(missing))
    while True:
        try:
            write(folder, "cgroup.subtree_control", words)
            return
        except OSError as error:
            if error.errno != EBUSY or not _empty(folder):
                raise


def _empty(folder: str) -> bool:
    """Move the processes in `folder` itself to a leaf; return whether there were any."""
    pids = read(folder, "cgroup.procs").split()
    leaf = f"{folder}/{OURS}"
    if pids and not os.path.isdir(leaf):
        try:
            os.mkdir(leaf, 0o755)
        except FileExistsError:
            pass
    for pid in pids:
        try:
            write(leaf, "cgroup.procs", pid)
        except ProcessLookupError:
            continue
    return bool(pids)


def clear(folder: str) -> None:
    """Remove the cgroups of sandboxes in `folder` whose parent and supervisor were killed: empty, and not locked."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if is_sandbox(entry.name) and entry.is_dir()]
    for name in names:
        try:
            fd = os.open(f"{folder}/{name}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rmdir(f"{folder}/{name}")
        except OSError:
            continue  # EWOULDBLOCK: its parent lives; EBUSY: somebody is in it
        finally:
            os.close(fd)


def remove(path: str) -> None:
    """End what is still in the cgroup, wait for that, and remove it with those below it. Idempotent."""
    try:
        if is_populated(path):
            kill(path)
            _await_event(path, "populated", "0")
        for name in [entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]:
            remove(f"{path}/{name}")
        os.rmdir(path)
    except OSError:
        pass  # it is gone; or somebody joined it meanwhile: then the next launch clears it


def is_populated(path: str) -> bool:
    """Whether a live process is in the cgroup or below."""
    return "populated 1" in read(path, "cgroup.events")


def kill(path: str) -> None:
    """Kill all processes in the cgroup at once (Linux 5.14), or one by one. Raises OSError."""
    try:
        write(path, "cgroup.kill", "1")
    except FileNotFoundError:
        for pid in read(path, "cgroup.procs").split():
            try:
                os.kill(int(pid), 9)
            except ProcessLookupError:
                continue


def is_frozen(path: str) -> bool:
    """Whether the processes in the cgroup are stopped."""
    return "frozen 1" in read(path, "cgroup.events")


def freeze(path: str, frozen: bool) -> None:
    """Stop all processes in the cgroup, or let them go on; return when they have. Raises SbxError."""
    try:
        write(path, "cgroup.freeze", "1" if frozen else "0")
    except FileNotFoundError:
        if os.path.isdir(path):
            raise SbxError("kernel-old", "stop a cgroup: this kernel cannot; Linux 5.2 can") from None
        raise SbxError("sandbox-gone", "stop a sandbox: it has just ended") from None
    _await_event(path, "frozen", "1" if frozen else "0")


def _await_event(path: str, name: str, value: str) -> None:
    """Wait until cgroup.events says so: the kernel reports each change as an exceptional condition."""
    fd = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLPRI)
        while f"{name} {value}" not in os.pread(fd, 4096, 0).decode().split("\n"):
            poll.poll(5000)  # an upper bound, for kernels that lose the notice
    finally:
        os.close(fd)


def account(path: str) -> dict[str, Any]:
    """Return the counters of a cgroup: only those that the kernel keeps for it."""
    used: dict[str, Any] = {name: int(text) for name, file in _NUMBERS.items() if (text := read(path, file)).isdigit()}
    if cpu := read_table(path, "cpu.stat"):
        used["cpu_seconds"] = cpu["usage_usec"] / 1e6
        used["user_seconds"] = cpu["user_usec"] / 1e6
        used["system_seconds"] = cpu["system_usec"] / 1e6
        if cpu.get("throttled_usec"):
            used["throttled_seconds"] = cpu["throttled_usec"] / 1e6
    if events := read_table(path, "memory.events"):
        used |= {"out_of_memory": events.get("oom_kill", 0), "memory_limit_hits": events.get("max", 0)}
    if statistics := read_table(path, "memory.stat"):
        used |= {"page_faults": statistics.get("pgfault", 0), "major_page_faults": statistics.get("pgmajfault", 0)}
    if "max" in (hits := read_table(path, "pids.events")):
        used["pids_limit_hits"] = hits["max"]
    return used | _account_io(path) | _account_pressure(path)


#: counter → the file that is nothing but its number
_NUMBERS = {
    "memory_bytes": "memory.current",
    "memory_peak_bytes": "memory.peak",
    "memory_limit_bytes": "memory.max",
    "swap_peak_bytes": "memory.swap.peak",
    "pids": "pids.current",
    "pids_peak": "pids.peak",
    "pids_limit": "pids.max",
}


def _account_io(path: str) -> dict[str, int]:
    """Sum up the lines of io.stat, one for each device."""
    if "io" not in read(path, "cgroup.controllers").split():
        return {}
    sums = dict.fromkeys(("rbytes", "wbytes", "rios", "wios"), 0)
    for word in read(path, "io.stat").split():
        name, _, value = word.partition("=")
        if name in sums and value.isdigit():
            sums[name] += int(value)
    return {
        "io_read_bytes": sums["rbytes"],
        "io_write_bytes": sums["wbytes"],
        "io_reads": sums["rios"],
        "io_writes": sums["wios"],
    }


def _account_pressure(path: str) -> dict[str, dict[str, float]]:
    """Return the share of the last ten seconds in which some process waited for a resource, in percent."""
    pressure = {}
    for name in ("cpu", "memory", "io"):
        words = read(path, f"{name}.pressure").split()
        if len(words) > 1 and words[0] == "some":
            pressure[name] = float(words[1].partition("=")[2])
    return {"pressure": pressure} if pressure else {}


# ── the parent's steps ────────────────────────────────────────────────────────────────────────────────────────────────


class Enter(OutsideStep):
    """Put the first process into a cgroup of its own with limits in force, before it makes pid 1 or runs anything.

    `limits` are file → value. With `best_effort` what cannot be enforced becomes one of the `warnings`; so does the
    lack of any cgroup where there are no limits and it would only have counted. When undone, `last` is called with the
    cgroup's folder, while its counters can still be read; then the cgroup is removed.
    """

    __slots__ = ("best_effort", "limits", "lock", "means", "name", "path", "supervisor", "used", "warnings")

    def __init__(self, identity: str, limits: dict[str, str], best_effort: bool = False) -> None:
        self.name = PREFIX + identity
        self.limits = dict(limits)
        self.best_effort = best_effort
        self.path = ""
        self.lock = -1
        self.means = ""
        self.supervisor = 0
        self.used: dict[str, Any] = {}
        self.warnings: list[str] = []

    def describe(self) -> str:
        return f"join the cgroup {self.name}" + "".join(
            f", {file}={value}" for file, value in self.limits.items()
        ).replace("\n", "; ")

    def execute(self, pid: int) -> Undo | None:
        self.supervisor = pid
        try:
            if is_hybrid() and (top := mount_point()):
                self._drop_unavailable(Subtree(top, "the v2 tree"))  # nobody could delegate what is not there
            if not self.limits and self.warnings:
                return None
            subtree = find(pid, self.name)
            self._drop_unavailable(subtree)
            counted = [name for name in ("memory", "pids", "io") if name in subtree.controllers()]
            wanted = {controller(file) for file in self.limits} - {""}
            self.means = subtree.means
            self.path, self.lock = create(subtree, self.name, pid, {*wanted, *counted})
        except SbxError as error:
            if error.code == "cgroup-unusable" and not self.best_effort:
                raise  # somebody meant a certain one
            if self.limits and not self.best_effort:
                raise SbxError(error.code, f"{self._act()}: {error.message}", self._cure(error.hint)) from None
            self.warnings += [f"{self._act()}: {error.message}"] if self.limits else []
            self.limits = {}
            return None
        try:
            for file in list(self.limits):
                # The supervisor is still in here, and must be able to make pid 1 whatever the limit on processes.
                if file != "pids.max":
                    self.set(file)
        except BaseException:
            self._undo()
            raise
        return self._undo

    def set(self, file: str) -> None:
        """Put one of the limits in force."""
        try:
            limit(self.path, file, self.limits[file])
        except SbxError as error:
            if not self.best_effort:
                raise
            self.warnings.append(error.message)
            del self.limits[file]

    def _drop_unavailable(self, subtree: Subtree) -> None:
        """Raise for limits whose controller is not there, or warn of them."""
        available = subtree.controllers()
        for file in list(self.limits):
            name = controller(file)
            if not name or name in available:
                continue
            held = "it is held by the v1 tree on this host" if is_hybrid() else "it is not delegated to you"
            message = f"no controller {name} in {subtree.means}: {held}"
            if not self.best_effort:
                cure = (
                    "boot with systemd.unified_cgroup_hierarchy=1"
                    if is_hybrid()
                    else ("as root: sh helpers/setup-host --delegate, then log in again")
                )
                raise SbxError("controller-missing", message, cure)
            self.warnings += [told] if (told := f"limit {name}: {message}") not in self.warnings else []
            del self.limits[file]

    def _act(self) -> str:
        return "limit " + ", ".join(dict.fromkeys(controller(file) for file in self.limits))

    def _cure(self, hint: str) -> str:
        """Return `hint`, the weaker means for each limit, and the option that makes this a warning."""
        names = dict.fromkeys(controller(file) for file in self.limits)
        others = [INSTEAD[name] for name in names if name in INSTEAD]
        return "; ".join(filter(None, [hint, *others, "--best-effort runs it without"]))

    def _undo(self) -> None:
        self.used = account(self.path)
        remove(self.path)
        os.close(self.lock)


class Leave(OutsideStep):
    """Take the supervisor out of the sandbox's cgroup: what it does and needs is not the sandbox's.

    Only now, since pid 1 was to be born in the cgroup, and its cgroup namespace rooted there.
    """

    __slots__ = ("enter",)

    def __init__(self, enter: Enter) -> None:
        self.enter = enter

    def describe(self) -> str:
        return "take the supervisor out of the cgroup" + (
            f", pids.max={self.enter.limits['pids.max']}" if "pids.max" in self.enter.limits else ""
        )

    def execute(self, pid: int) -> None:
        if not self.enter.path:
            return
        try:
            write(of_process(), "cgroup.procs", str(self.enter.supervisor))
        except OSError:
            # From another part of the tree (a login session's scope, say) nobody but root may be put back.
            leaf = os.path.dirname(self.enter.path) + "/" + OURS
            try:
                os.mkdir(leaf, 0o755)
            except FileExistsError:
                pass
            write(leaf, "cgroup.procs", str(self.enter.supervisor))
        if "pids.max" in self.enter.limits:
            self.enter.set("pids.max")


class Join(OutsideStep):
    """Put one more process, that of `sbx exec`, into a running sandbox's cgroup before it can run anything."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    def describe(self) -> str:
        return f"join the cgroup {os.path.basename(self.path)}"

    def execute(self, pid: int) -> None:
        try:
            write(self.path, "cgroup.procs", str(pid))
        except PermissionError:
            unit = os.path.basename(os.path.dirname(self.path))
            if not unit.endswith(".scope"):
                raise SbxError(
                    "cgroup-denied",
                    f"join {self.path}: not from here",
                    "start it from the shell that started the sandbox",
                ) from None
            paths.allow_packages()
            from rootless import systemd

            systemd.attach(unit, "/" + os.path.basename(self.path), pid)
