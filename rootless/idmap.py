"""Id maps: /etc/subuid and /etc/subgid → IdMap, and writing the maps of a new user namespace. Outside.

subuid(5), newuidmap(1), user_namespaces(7). The arithmetic is pure; `for_caller` gathers, `WriteMaps` writes.
"""

from __future__ import annotations

import os

from rootless import programs, syscalls
from rootless.errors import SbxError, printable
from rootless.spec import IdMap, IdMapping
from rootless.steps import OutsideStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Range = tuple[int, int]  # first id outside, how many

LAST_ID = 4294967294  #: 2**32 - 1 means "no change" to the kernel, so it is no id
EXTENTS = 340  #: lines that a map may have
#: What root maps when /etc/subuid gives it nothing: far above the ids that distributions hand out.
ROOT_RANGE = (2147483648, 65536)
FIX = "add a line with: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER"


def parse(text: str, name: str, number: int) -> list[Range]:
    """Return the ranges that a subuid(5) `text` gives to the user `name` (may be empty) or its `number`.

    Lines of others, and lines that are no lines of that format, are passed over, as newuidmap(1) does.
    """
    ranges = []
    for line in text.splitlines():
        owner, _, rest = line.strip().partition(":")
        first, _, size = rest.partition(":")
        if (owner == str(number) or (name and owner == name)) and first.isdecimal() and size.isdecimal() and int(size):
            ranges.append((int(first), int(size)))
    return ranges


def check(ranges: Sequence[Range], own: int, file: str) -> None:
    """Raise SbxError ``subids-invalid`` if `ranges` overlap, hold the caller's id `own`, or go past the last id."""
    previous = (-1, 0)
    for first, size in sorted(ranges):
        if first + size - 1 > LAST_ID:
            raise SbxError(
                "subids-invalid", f"read {file}: {first}:{size} goes past the last id, {LAST_ID}", "correct the line"
            )
        if first < previous[0] + previous[1]:
            raise SbxError(
                "subids-invalid",
                f"read {file}: {previous[0]}:{previous[1]} and {first}:{size} overlap",
                "correct one of the lines",
            )
        if first <= own < first + size:
            raise SbxError(
                "subids-invalid", f"read {file}: {first}:{size} contains your own id, {own}", "choose another range"
            )
        previous = (first, size)
    if len(ranges) > EXTENTS - 3:
        raise SbxError(
            "subids-invalid",
            f"read {file}: {len(ranges)} ranges are more than a map can have",
            "use fewer, larger ranges",
        )


def auto(own: int, ranges: Sequence[Range]) -> list[IdMapping]:
    """Return the map with the caller's id `own` as 0 and all of `ranges` after it."""
    return [IdMapping(container_id=0, host_id=own, size=1), *_lay_out(1, ranges)]


def keep(own: int, ranges: Sequence[Range]) -> list[IdMapping]:
    """Return the map with the caller's id `own` as itself, and `ranges` below and above it, 0 first."""
    below, above = _split(ranges, own)
    return [*_lay_out(0, below), IdMapping(container_id=own, host_id=own, size=1), *_lay_out(own + 1, above)]


def _lay_out(start: int, ranges: Sequence[Range]) -> list[IdMapping]:
    mappings = []
    for first, size in ranges:
        mappings.append(IdMapping(container_id=start, host_id=first, size=size))
        start += size
    return mappings


def _split(ranges: Sequence[Range], count: int) -> tuple[list[Range], list[Range]]:
    """Return the first `count` ids of `ranges`, and the rest."""
    below: list[Range] = []
    above: list[Range] = []
    for first, size in ranges:
        taken = min(size, count)
        if taken:
            below.append((first, taken))
        if size > taken:
            above.append((first + taken, size - taken))
        count -= taken
    return below, above


def repeat(mappings: Sequence[IdMapping]) -> list[IdMapping]:
    """Return the map of a user namespace nested in one with `mappings` that has the same ids.

    Extent by extent: one extent of the inner map may not span two of the outer.
    """
    return [IdMapping(container_id=m.container_id, host_id=m.container_id, size=m.size) for m in mappings]


def covers(mappings: Sequence[IdMapping], number: int) -> bool:
    """Whether the id `number` inside exists outside."""
    return any(m.container_id <= number < m.container_id + m.size for m in mappings)


def text(mappings: Sequence[IdMapping]) -> str:
    """Return `mappings` in the format of /proc/PID/uid_map."""
    return "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)


def for_caller(mode: str = "") -> tuple[IdMap, str]:
    """Return the caller's IdMap for `mode` (auto, single, keep; empty is auto, or single where auto can't be), and a
    notice for the user, empty if there is none.

    Without subordinate ids, *keep* is a map of one id too: the caller's, as itself. Raises SbxError ``subids-missing``
    or ``subids-invalid`` when *auto* was asked for and can't be had, ``idmap-unknown`` for another word.
    """
    uid, gid = os.geteuid(), os.getegid()
    if mode not in ("", "auto", "single", "keep"):
        raise SbxError("idmap-unknown", f"choose id map {printable(mode)!r}: there are auto, single and keep")
    if mode == "single":
        return _single(0, 0), ""
    try:
        uid_ranges, gid_ranges = _available(uid, gid)
    except SbxError as error:
        if mode == "auto":
            raise
        notice = f"{error.message}; only your own id is mapped"
        return (_single(uid, gid) if mode == "keep" else _single(0, 0)), notice
    if mode == "keep":
        return IdMap(mode="keep", uids=keep(uid, uid_ranges), gids=keep(gid, gid_ranges)), ""
    return IdMap(mode="auto", uids=auto(uid, uid_ranges), gids=auto(gid, gid_ranges)), ""


def _single(uid: int, gid: int) -> IdMap:
    """Return the map of the caller's own ids alone, as `uid` and `gid` inside."""
    users = IdMapping(container_id=uid, host_id=os.geteuid(), size=1)
    return IdMap(mode="single", uids=[users], gids=[IdMapping(container_id=gid, host_id=os.getegid(), size=1)])


def _available(uid: int, gid: int) -> tuple[list[Range], list[Range]]:
    """Return the subordinate ids of the caller; raises SbxError when there are none or they can't be used."""
    name = user_name(uid)
    both = []
    for file, own in (("/etc/subuid", uid), ("/etc/subgid", gid)):
        ranges = _of_root(file) if uid == 0 else []
        # In a user namespace around us the file speaks of ids that need not exist there.
        if uid != 0 or ranges == [ROOT_RANGE]:
            ranges = parse(_read(file), name, uid) or ranges
        if not ranges:
            raise SbxError(
                "subids-missing",
                f"read {file}: no subordinate ids for {name or uid}",
                FIX.replace("USER", name or str(uid)),
            )
        check(ranges, own, file)
        both.append(ranges)
    if uid != 0 and syscalls.prctl(syscalls.PR_GET_NO_NEW_PRIVS):
        raise SbxError(
            "newuidmap-powerless", "write a map of several ids: set-user-id programs have no effect here (no_new_privs)"
        )
    if uid != 0 and not (programs.find("newuidmap") and programs.find("newgidmap")):
        raise SbxError(
            "newuidmap-missing", "find newuidmap and newgidmap: not installed", programs.install_hint("newuidmap")
        )
    return both[0], both[1]


def _of_root(file: str) -> list[Range]:
    """Return what root may map without an entry in `file`: in a nested user namespace, all the ids that it has."""
    own = [
        tuple(map(int, line.split()))
        for line in _read(f"/proc/self/{'uid' if file.endswith('uid') else 'gid'}_map").splitlines()
    ]
    if own and own[0][0] == 0 and own[0][2] > LAST_ID:
        return [ROOT_RANGE]
    return [(max(inside, 1), size - (inside == 0)) for inside, _, size in own if size - (inside == 0) > 0]


def is_root_of_host() -> bool:
    """Whether we are user 0 and not in a user namespace that somebody has made for us."""
    return os.geteuid() == 0 and _read("/proc/self/uid_map").split() == ["0", "0", str(LAST_ID + 1)]


def user_name(uid: int) -> str:
    """Return the login name of `uid`, or "" for a user known only by number."""
    for line in _read("/etc/passwd").splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2] == str(uid):
            return fields[0]
    import pwd  # rare: a user of a directory service; asking it costs a millisecond or more

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def user_home(uid: int) -> str:
    """Return the home folder of `uid` as /etc/passwd has it, or ""."""
    for line in _read("/etc/passwd").splitlines():
        fields = line.split(":")
        if len(fields) > 5 and fields[2] == str(uid):
            return fields[5]
    return ""


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return b"".join(iter(lambda: os.read(fd, 65536), b"")).decode("utf-8", "replace")
    finally:
        os.close(fd)


class WriteMaps(OutsideStep):
    """Write the id maps of the child's new user namespace.

    Several ids need newuidmap(1) and newgidmap(1), unless the caller is root; one id needs setgroups denied first.
    """

    __slots__ = ("idmap",)

    def __init__(self, idmap: IdMap) -> None:
        self.idmap = idmap

    def describe(self) -> str:
        uids, gids = (
            " ".join(f"{m.container_id}:{m.host_id}:{m.size}" for m in maps)
            for maps in (self.idmap.uids, self.idmap.gids)
        )
        return f"write the {self.idmap.mode} id map, uids {uids}, gids {gids}"

    def execute(self, pid: int) -> None:
        if self.idmap.mode == "single":
            write(f"/proc/{pid}/setgroups", "deny")
        if self.idmap.mode == "single" or os.geteuid() == 0:
            write(f"/proc/{pid}/uid_map", text(self.idmap.uids))
            write(f"/proc/{pid}/gid_map", text(self.idmap.gids))
            return
        # Both at once: each is a program of its own and takes a millisecond.
        running = [
            programs.spawn(
                [name, str(pid), *(str(n) for m in maps for n in (m.container_id, m.host_id, m.size))], folder=""
            )
            for name, maps in (("newuidmap", self.idmap.uids), ("newgidmap", self.idmap.gids))
        ]
        said = [program.finish().strip() for program in running]
        for program, message in zip(running, said, strict=True):
            if program.status:
                raise SbxError("idmap-refused", printable(message) or f"{program.name}: failed")


def write(path: str, content: str) -> None:
    """Write `content` to a file of /proc in one write(2), as the kernel demands for maps."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)
