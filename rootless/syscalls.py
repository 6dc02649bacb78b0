"""Every kernel call that Python lacks, each a small function named after it. Either side.

The only file that knows ctypes or the `unshare` binding. It uses the C half of ctypes alone (`_ctypes` costs 0.5 ms to
import, `ctypes` 2.8). A call that fails raises OSError with the kernel's errno. Constants have the kernel's spelling.
"""

from __future__ import annotations

import _ctypes
import _struct
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# ── the bridge ────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Pointer(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """A machine word: takes int, bytes, None and buffers alike, and never truncates an int to 32 bits."""

    _type_ = "P"


class _Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Text(_ctypes._SimpleCData):  # type: ignore[type-arg]
    """The address of bytes, which it keeps."""

    _type_ = "z"


class _Function(_ctypes.CFuncPtr):
    """A function whose arguments are bytes, buffers, None, and ints of 32 bits: wider ones it would cut off.

    An address is to be wrapped as a _Pointer. Types for the arguments would double the time of a call.
    """

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


class _LockedFunction(_ctypes.CFuncPtr):
    """The same with the global lock held: between fork and PyOS_AfterFork_Child no lock may change hands."""

    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_PYTHONAPI | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


_LIBC = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]
_syscall = _Function(_ctypes.dlsym(_LIBC, "syscall"))

MACHINE = os.uname().machine

# Numbers of the calls that differ between architectures; from 424 on they are the same everywhere.
_NUMBERS = {
    "x86_64": dict(
        clone=56, pivot_root=155, mount=165, umount2=166, sethostname=170, prctl=157, capget=125, capset=126,
        keyctl=250, unshare=272, setns=308, prlimit64=302, seccomp=317, statx=332, sendmsg=46, recvmsg=47,
        personality=135, mknodat=259, setdomainname=171, clock_settime=227, finit_module=313, timerfd_create=283,
        rt_sigaction=13, signalfd4=289,
    ),
    "aarch64": dict(
        clone=220, pivot_root=41, mount=40, umount2=39, sethostname=161, prctl=167, capget=90, capset=91,
        keyctl=219, unshare=97, setns=268, prlimit64=261, seccomp=277, statx=291, sendmsg=211, recvmsg=212,
        personality=92, mknodat=33, setdomainname=162, clock_settime=112, finit_module=273, timerfd_create=85,
        rt_sigaction=134, signalfd4=74,
    ),
}  # fmt: skip
_NUMBERS["riscv64"] = _NUMBERS["aarch64"]  # both use the generic table
_NR = _NUMBERS.get(MACHINE, {}) | dict(
    open_tree=428, move_mount=429, fsopen=430, fsconfig=431, fsmount=432, pidfd_open=434, openat2=437,
    close_range=436, mount_setattr=442, landlock_create_ruleset=444, landlock_add_rule=445, landlock_restrict_self=446,
)  # fmt: skip

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100


def _call(name: str, *args: int | bytes | object | None) -> int:
    """Make the system call `name`; raise OSError with its errno when it fails.

    All arguments that the call looks at must be given, and an address as a _Pointer.
    """
    try:
        number = _NR[name]
    except KeyError:
        raise OSError(38, f"{name} on {MACHINE}: not supported") from None  # ENOSYS
    result: int = _syscall(number, *args)
    if result == -1:
        errno = _ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def _libc(name: str, *args: int | bytes | object) -> int:
    """Call the C library's `name`, for calls whose numbers differ between architectures too much to list."""
    function = _Function(_ctypes.dlsym(_LIBC, name))
    result = function(*args)
    # an int in a long's register: the upper half is not the callee's to set
    if result & 0xFFFFFFFF == 0xFFFFFFFF:
        errno = _ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return int(result & 0xFFFFFFFF)


def buffer(size: int = 256) -> Any:
    """Return `size` bytes of zeroed memory that a call may write to; bytes() reads them.

    The first one of each size costs ten microseconds, for a type of its own.
    """
    return (_Byte * size)()


def address(memory: Any) -> int:
    """Return where `memory` is; it must be kept alive as long as the address is used."""
    return int(_ctypes.addressof(memory))


def words(*values: int) -> bytes:
    """Return `values` as consecutive 64-bit words: the layout of the newer calls' argument structures."""
    return _struct.pack(f"{len(values)}Q", *[value & 0xFFFFFFFFFFFFFFFF for value in values])


class Words:
    """Texts, or structures that point at one another, in memory, each with a NUL behind it.

    `first` is where the first is, and `address` where their addresses are, which end with a NULL, as execve(2) wants
    them. Both are good for as long as this is kept.
    """

    __slots__ = ("_addresses", "_texts", "address", "first")

    def __init__(self, *texts: bytes) -> None:
        self._texts = _Text(b"\0".join(texts))  # bytes have a NUL of their own behind them
        self.first = end = _place(self._texts)
        places = [(end := end + len(text) + 1) - len(text) - 1 for text in texts]
        self._addresses = _Text(words(*places, 0))
        self.address = _place(self._addresses)


def _place(text: _Text) -> int:
    """Return where the bytes are that `text` refers to."""
    return int.from_bytes(bytes(text), sys.byteorder)


def _path(path: str | bytes) -> bytes:
    return path if isinstance(path, bytes) else os.fsencode(path)


# ── processes and namespaces: clone(2), unshare(2), setns(2) ──────────────────────────────────────────────────────────

CLONE_VM = 0x00000100
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
SIGCHLD = 17


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones: unshare(2).

    Through Python (3.12 and later), else the `unshare` binding where it is installed, else the bare call. The binding
    knows no errno, so when it fails the kernel is asked again, directly.
    """
    if hasattr(os, "unshare"):
        os.unshare(flags)
        return
    try:
        # Where packages are out of reach the search would be in vain, and it costs 0.2 ms.
        if not any(folder.endswith("-packages") for folder in sys.path):
            raise ImportError
        import unshare as binding

        binding.unshare(flags)
    except (ImportError, RuntimeError):
        _call("unshare", flags)


def setns(fd: int, flags: int = 0) -> None:
    """Join the namespace behind `fd` (or, with a pidfd, those in `flags`): setns(2)."""
    _call("setns", fd, flags)


_NS_GET_USERNS, _NS_GET_PARENT = 0xB701, 0xB702


def owning_namespace(fd: int) -> int:
    """Return a descriptor of the user namespace whose root rules over the namespace behind `fd`: ioctl_ns(2)."""
    return _libc("ioctl", fd, _NS_GET_USERNS)


def parent_namespace(fd: int) -> int:
    """Return a descriptor of the user (or pid) namespace that the one behind `fd` was made in: ioctl_ns(2)."""
    return _libc("ioctl", fd, _NS_GET_PARENT)


def fork_into(flags: int) -> int:
    """Fork into the new namespaces in `flags`; return 0 in the child, its id in the parent, as os.fork() does.

    One clone(2), so that a new user namespace owns the others. The interpreter is told before and after as os.fork()
    tells it; the process must have one thread.
    """
    number = _NR["clone"]
    _before_fork()
    # SIGCHLD so that it is waited for like any child; no new stack: the child continues on a copy of ours.
    pid = _locked_syscall(number, flags | SIGCHLD, None, None, None, None)
    if pid == 0:
        _after_fork_child()
        return 0
    errno = _ctypes.get_errno()
    _after_fork_parent()
    if pid == -1:
        raise OSError(errno, os.strerror(errno))
    return int(pid)


_locked_syscall, _before_fork, _after_fork_parent, _after_fork_child = (
    _LockedFunction(_ctypes.dlsym(_LIBC, name))
    for name in ("syscall", "PyOS_BeforeFork", "PyOS_AfterFork_Parent", "PyOS_AfterFork_Child")
)


_PROT_READ, _PROT_WRITE, _PROT_EXEC, _MAP_PRIVATE, _MAP_ANONYMOUS = 1, 2, 4, 2, 0x20


def load_code(code: bytes) -> int:
    """Return the address of memory that holds `code`, a page at most, to be read and executed: mmap(2), mprotect(2).

    Raises OSError where the host forbids such memory.
    """
    place = _Function(_ctypes.dlsym(_LIBC, "mmap"))(
        None, len(code), _PROT_READ | _PROT_WRITE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, None
    )
    if place == -1:
        raise OSError(_ctypes.get_errno(), os.strerror(_ctypes.get_errno()))
    _MEMCPY(_Pointer(place), code, len(code))
    _libc("mprotect", _Pointer(place), len(code), _PROT_READ | _PROT_EXEC)
    return int(place)


_ARCH_PRCTL, _ARCH_SHSTK_STATUS = 158, 0x5005


def has_shadow_stack() -> bool:
    """Whether the processor checks where functions return to: arch_prctl(2), of x86_64 alone (Linux 6.6)."""
    features = buffer()
    return _syscall(_ARCH_PRCTL, _ARCH_SHSTK_STATUS, features) == 0 and any(bytes(features)[:8])


def enter(code: int, frame: int, act: int, divides: bool) -> int:
    """Call the machine code at `code` with two words and return the one that it returns.

    If it `divides`, it may return in a new process too: with 0, as fork_into() does.
    """
    if divides:
        _before_fork()
    result = int(_LockedFunction(code)(_Pointer(frame), act))
    if divides:
        _after_fork_parent() if result else _after_fork_child()
    return result


def sethostname(name: str) -> None:
    """Set the host name of this UTS namespace: sethostname(2)."""
    raw = name.encode()
    _call("sethostname", raw, len(raw))


def signal_descriptor(numbers: Sequence[int]) -> int:
    """Return a descriptor on which blocked signals of `numbers` can be read, close-on-exec: signalfd(2)."""
    return _call("signalfd4", -1, words(sum(1 << number - 1 for number in numbers)), 8, os.O_CLOEXEC)


def default_signal(number: int) -> None:
    """Restore the default action of a signal, past the interpreter, which is to remember its own: sigaction(2)."""
    _call("rt_sigaction", number, bytes(32), None, 8)


# ── mounts: mount(2), fsopen(2), open_tree(2), move_mount(2), mount_setattr(2), pivot_root(2) ─────────────────────────

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 32, 4096, 16384, 1 << 18, 1 << 19
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC = 1, 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6


def mount(source: str, target: str, fstype: str, flags: int, options: str | bytes = "") -> None:
    """Mount by the classic call, whose options are at most a page long: mount(2)."""
    _call("mount", _path(source), _path(target), _path(fstype), flags, _path(options) or None)


def umount(target: str, flags: int = MNT_DETACH) -> None:
    """Unmount `target`: umount2(2)."""
    _call("umount2", _path(target), flags)


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root of this mount namespace and leave the old one at `put_old`: pivot_root(2)."""
    _call("pivot_root", _path(new_root), _path(put_old))


def new_mount(fstype: str, options: dict[str, str], attributes: int) -> int:
    """Create a filesystem and return a descriptor of its mount, which is attached nowhere: fsopen(2), fsmount(2).

    An option with an empty value is a flag. `attributes` are MOUNT_ATTR_*.
    """
    context = _call("fsopen", _path(fstype), FSOPEN_CLOEXEC)
    try:
        for key, value in options.items():
            if value:
                _call("fsconfig", context, _FSCONFIG_SET_STRING, _path(key), _path(value), 0)
            else:
                _call("fsconfig", context, _FSCONFIG_SET_FLAG, _path(key), None, 0)
        _call("fsconfig", context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _call("fsmount", context, FSMOUNT_CLOEXEC, attributes)
    finally:
        os.close(context)


def open_tree(path: str | bytes, dir_fd: int = AT_FDCWD, recursive: bool = True, follow: bool = True) -> int:
    """Copy the mount at `path` (with those below it) and return a descriptor of the unattached copy: open_tree(2).

    With an empty `path` the copy is of what `dir_fd` is.
    """
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    flags |= AT_EMPTY_PATH if not path else 0
    flags |= 0 if follow else AT_SYMLINK_NOFOLLOW
    return _call("open_tree", dir_fd, _path(path), flags)


def move_mount(tree: int, target: int) -> None:
    """Attach the mount behind `tree` on what the descriptor `target` is: move_mount(2)."""
    _call("move_mount", tree, b"", target, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def mount_setattr(tree: int, attributes: int, recursive: bool = False, path: str = "", propagation: int = 0) -> None:
    """Add `attributes` (MOUNT_ATTR_*) to the mount behind `tree`, and to all below it: mount_setattr(2)."""
    flags = (AT_RECURSIVE if recursive else 0) | (AT_EMPTY_PATH if not path else 0)
    _call("mount_setattr", tree, _path(path), flags, words(attributes, 0, propagation, 0), 32)


# ── paths inside a root: openat2(2), statx(2) ─────────────────────────────────────────────────────────────────────────

RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 0x01, 0x02, 0x04
RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x08, 0x10


def openat2(dir_fd: int, path: str | bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """Open `path` with the restrictions in `resolve` (RESOLVE_*) on how it may be reached: openat2(2)."""
    return _call("openat2", dir_fd, _path(path), words(flags | os.O_CLOEXEC, mode, resolve), 24)


STATX_MNT_ID = 0x1000


def mount_id(fd: int) -> int:
    """Return the id of the mount that `fd` is on, as in /proc/PID/mountinfo: statx(2) (Linux 5.8)."""
    result = buffer()
    _call("statx", fd, b"", AT_EMPTY_PATH, STATX_MNT_ID, result)
    return int.from_bytes(bytes(result)[144:152], sys.byteorder)


# ── privileges: prctl(2), capset(2), seccomp(2), prlimit(2), keyctl(2) ────────────────────────────────────────────────

PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NAME = 1, 3, 4, 15
PR_SET_KEEPCAPS, PR_GET_SECCOMP = 8, 21
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 39, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
_SECCOMP_SET_MODE_FILTER = 1
_KEYCTL_JOIN_SESSION_KEYRING = 1
_CAPABILITY_VERSION_3 = 0x20080522


def prctl(option: int, arg2: int | bytes = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """Set or get an attribute of this process: prctl(2)."""
    return _call("prctl", option, arg2, arg3, arg4, arg5)


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set this process's capability sets, each a mask of 1 << CAP_*: capset(2)."""
    _call("capset", *capability_sets(effective, permitted, inheritable))


def capability_sets(effective: int, permitted: int, inheritable: int) -> tuple[bytes, bytes]:
    """Return the two structures that capset(2) takes."""
    header = _CAPABILITY_VERSION_3.to_bytes(4, sys.byteorder) + bytes(4)
    low = [mask & 0xFFFFFFFF for mask in (effective, permitted, inheritable)]
    high = [mask >> 32 for mask in (effective, permitted, inheritable)]
    return header, b"".join(word.to_bytes(4, sys.byteorder) for word in low + high)


def permitted_capabilities() -> int:
    """Return this process's permitted set, a mask of 1 << CAP_*: capget(2)."""
    data = buffer()
    _call("capget", _CAPABILITY_VERSION_3.to_bytes(4, sys.byteorder) + bytes(4), data)
    raw = bytes(data)
    return int.from_bytes(raw[4:8], sys.byteorder) | int.from_bytes(raw[16:20], sys.byteorder) << 32


def seccomp_load(program: bytes) -> None:
    """Load a BPF `program` (struct sock_filter, 8 bytes each) as this process's filter: seccomp(2).

    Needs no_new_privs or CAP_SYS_ADMIN in the user namespace.
    """
    text = Words(program)
    length = (len(program) // 8).to_bytes(2, sys.byteorder) + bytes(6)
    _call("seccomp", _SECCOMP_SET_MODE_FILTER, 0, length + words(text.first))


def prlimit(resource: int, soft: int, hard: int) -> None:
    """Set this process's resource limit, in the resource's own unit; -1 is infinity: prlimit(2)."""
    _call("prlimit64", 0, resource, words(soft, hard), None)


def join_new_session_keyring() -> None:
    """Leave the caller's session keyring for a new, empty, anonymous one: keyctl(2)."""
    _call("keyctl", _KEYCTL_JOIN_SESSION_KEYRING, None)


def personality(persona: int) -> int:
    """Set the execution domain (0xffffffff asks only) and return the one before: personality(2)."""
    return _call("personality", persona)


CLOSE_RANGE_CLOEXEC = 4
LAST_FD = 0xFFFFFFFF


def close_on_exec_from(first: int) -> None:
    """Mark every descriptor from `first` on close-on-exec: close_range(2) (Linux 5.11)."""
    _call("close_range", first, LAST_FD, CLOSE_RANGE_CLOEXEC)


def close_from(first: int) -> None:
    """Close every descriptor from `first` on: close_range(2) (Linux 5.9)."""
    _call("close_range", first, LAST_FD, 0)


# ── Landlock: landlock(7) ─────────────────────────────────────────────────────────────────────────────────────────────

_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH, _LANDLOCK_RULE_NET_PORT = 1, 2
LANDLOCK_ACCESS_NET_CONNECT_TCP = 2


def landlock_version() -> int:
    """Return the version of the kernel's Landlock interface, 0 where it has none or it is switched off."""
    try:
        return _call("landlock_create_ruleset", None, 0, _LANDLOCK_CREATE_RULESET_VERSION)
    except OSError:
        return 0


def landlock_create_ruleset(handled: Sequence[int]) -> int:
    """Return a ruleset that handles the access rights in `handled` (filesystem, then network, then scope masks)."""
    attribute = words(*handled)
    return _call("landlock_create_ruleset", attribute, len(attribute), 0)


def landlock_add_path(ruleset: int, folder: int, access: int) -> None:
    """Allow `access` below the open `folder`."""
    rule = words(access) + folder.to_bytes(4, sys.byteorder)
    _call("landlock_add_rule", ruleset, _LANDLOCK_RULE_PATH_BENEATH, rule, 0)


def landlock_add_port(ruleset: int, port: int, access: int) -> None:
    """Allow `access` (LANDLOCK_ACCESS_NET_*) to a TCP port of any host (version 4)."""
    _call("landlock_add_rule", ruleset, _LANDLOCK_RULE_NET_PORT, words(access, port), 0)


def landlock_restrict_self(ruleset: int) -> None:
    """Hold this process and its children to `ruleset`; needs no_new_privs."""
    _call("landlock_restrict_self", ruleset, 0)


# ── descriptors between processes: unix(7), SCM_RIGHTS ────────────────────────────────────────────────────────────────

_SOL_SOCKET, _SCM_RIGHTS = 1, 1
MSG_CMSG_CLOEXEC = 0x40000000


def socketpair() -> tuple[int, int]:
    """Return two connected unix stream sockets as descriptors, close-on-exec."""
    pair = buffer()
    _libc("socketpair", 1, 1 | os.O_CLOEXEC, 0, pair)  # AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC
    raw = bytes(pair)
    return int.from_bytes(raw[:4], sys.byteorder), int.from_bytes(raw[4:8], sys.byteorder)


def send_fd(sock: int, fd: int) -> None:
    """Send the descriptor `fd` over the unix socket `sock`, with one byte of data: sendmsg(2)."""
    data = Words(b".")
    vector = Words(words(data.first, 1))
    # struct cmsghdr, the descriptor, and padding to a whole word
    control = Words(words(20) + b"".join(v.to_bytes(4, sys.byteorder) for v in (_SOL_SOCKET, _SCM_RIGHTS, fd, 0)))
    _call("sendmsg", sock, words(0, 0, vector.first, 1, control.first, 24, 0), 0)


def receive_fd(sock: int) -> int | None:
    """Return the descriptor that comes over the unix socket `sock`, or None at the other's end of file: recvmsg(2)."""
    data, control = buffer(), buffer()
    vector = Words(words(address(data), 1))
    header = Words(words(0, 0, vector.first, 1, address(control), 24, 0))
    if _call("recvmsg", sock, _Pointer(header.first), MSG_CMSG_CLOEXEC) == 0:
        return None
    return int.from_bytes(bytes(control)[16:20], sys.byteorder)


# ── the loopback interface: netdevice(7) ──────────────────────────────────────────────────────────────────────────────

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


def loopback_up() -> None:
    """Set the interface lo of this net namespace up; the kernel gives it its addresses: netdevice(7)."""
    fd = _libc("socket", 2, 2 | os.O_CLOEXEC, 0)  # AF_INET, SOCK_DGRAM
    try:
        # struct ifreq: sixteen bytes of name, then the flags
        _libc("ioctl", fd, _SIOCSIFFLAGS, b"lo".ljust(16, b"\0") + _IFF_UP.to_bytes(2, sys.byteorder) + bytes(22))
    finally:
        os.close(fd)


# ── addresses: rtnetlink(7), if_nametoindex(3), inet_pton(3) ──────────────────────────────────────────────────────────

_AF_INET, _AF_INET6, _AF_NETLINK, _SOCK_RAW = 2, 10, 16, 3


def netlink_route_socket() -> int:
    """Return a socket to the kernel's routing subsystem in this net namespace, as a descriptor: rtnetlink(7)."""
    return _libc("socket", _AF_NETLINK, _SOCK_RAW | os.O_CLOEXEC, 0)


def interface_index(name: str) -> int:
    """Return the number of a network interface: if_nametoindex(3)."""
    index = _libc("if_nametoindex", name.encode())
    if index == 0:
        raise OSError(19, os.strerror(19))  # ENODEV
    return index


def packed_address(text: str) -> bytes:
    """Return the 4 or 16 bytes of an IPv4 or IPv6 address, b"" where `text` is none: inet_pton(3)."""
    result = buffer()
    family = _AF_INET6 if ":" in text else _AF_INET
    if "\0" in text or _libc("inet_pton", family, text.encode("utf-8", "replace"), result) != 1:
        return b""
    return bytes(result)[: 16 if family == _AF_INET6 else 4]


# ── memory of this process ────────────────────────────────────────────────────────────────────────────────────────────


def wipe(start: int, end: int) -> int:
    """Overwrite this process's memory from `start` up to `end` with zeroes; restore() finds what was there at the
    address that is returned."""
    size = end - start
    copy = int(_MALLOC(size))
    if not copy:
        raise MemoryError
    _MEMCPY(_Pointer(copy), _Pointer(start), size)
    _MEMSET(_Pointer(start), 0, size)
    return copy


def restore(start: int, end: int, copy: int) -> None:
    """Undo wipe(), once."""
    _MEMCPY(_Pointer(start), _Pointer(copy), end - start)
    _FREE(_Pointer(copy))


_MALLOC, _FREE, _MEMCPY, _MEMSET = (
    _Function(_ctypes.dlsym(_LIBC, name)) for name in ("malloc", "free", "memcpy", "memset")
)
