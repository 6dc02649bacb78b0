"""The seccomp filter: every call number by the kernel's own judgement, arguments, variants, other people's profiles.

How a verdict is seen without making the call: the program under test is loaded with `allow` replaced by an errno that
no kernel has, behind two instructions that let everything pass whose sixth argument is not a magic number. So the
kernel judges every number with real registers, nothing runs that should not, and its own EPERM isn't taken for ours.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import io
import json
import mmap
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyseccomp
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from rootless import bpf, capabilities, filters, paths, seccomp, syscalls
from rootless.bpf import Instruction
from rootless.errors import SbxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.filters import Variant

MACHINE = os.uname().machine
ARCHITECTURE = seccomp.MACHINES[MACHINE][1]
ALLOW, EPERM, ENOSYS = seccomp.ALLOW, seccomp.ERRNO | errno.EPERM, seccomp.ERRNO | errno.ENOSYS
EAFNOSUPPORT = seccomp.ERRNO | errno.EAFNOSUPPORT
HIGH = 1 << 32
MAGIC = 0x5BC0FFEE
ALLOWED = 4000  #: no kernel's errno; 4095 is the largest that a filter can return
#: Every number, less uretprobe and uprobe: the kernel asks no filter about them, and kills strangers to its trampoline.
CALLS = [call for call in range(1024) if MACHINE != "x86_64" or call not in (335, 336)]
PODMAN = "/usr/share/containers/seccomp.json"

VARIANTS = {
    "default": filters.variant(),
    "real": filters.variant(setgroups="real"),
    "single": filters.variant(chown="fake"),
    "nested": filters.variant(nested=True),
    "no capabilities": filters.variant(caps=0),
    "every capability": filters.variant(caps=capabilities.EVERY),
    "unconfined": filters.variant("unconfined"),
}


def words(text: str) -> list[str]:
    return text.split()


# Written down here, not read from the profile: what an ordinary sandbox is refused, and what it must have.
REFUSED = words("""
    setns mount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount open_tree open_tree_attr
    mount_setattr sethostname setdomainname add_key request_key keyctl bpf perf_event_open userfaultfd
    io_uring_setup io_uring_enter io_uring_register init_module finit_module delete_module kexec_load
    kexec_file_load swapon swapoff reboot clock_settime settimeofday acct quotactl quotactl_fd syslog vhangup
    open_by_handle_at fanotify_init lookup_dcookie kcmp pidfd_getfd process_madvise get_mempolicy set_mempolicy
    set_mempolicy_home_node mbind migrate_pages move_pages
""")  # fmt: skip
REFUSED_X86 = words("""
    iopl ioperm sysfs ustat uselib
""")  # fmt: skip
NEEDED = words("""
    read write openat openat2 close mmap munmap brk execve execveat wait4 exit_group rt_sigaction futex
    futex_waitv io_pgetevents cachestat vmsplice memfd_create statx faccessat2 fchmodat2 close_range pidfd_open
    rseq getrandom ptrace chroot setuid setresgid fchownat landlock_restrict_self seccomp epoll_pwait2
    copy_file_range mseal io_setup prlimit64
""")  # fmt: skip
# Numbers that the kernel's tables keep for calls that no kernel of today has.
NEVER = words("""
    create_module get_kernel_syms query_module nfsservctl getpmsg putpmsg afs_syscall tuxcall security
    set_thread_area get_thread_area epoll_ctl_old epoll_wait_old vserver _sysctl
""")  # fmt: skip
# moby and podman refuse these by accident: they were younger than the profile, or thought dangerous once.
ACCIDENTS = {
    "futex_waitv", "io_pgetevents", "vmsplice", "cachestat", "fchmodat2", "statmount", "listmount", "futex_wait",
    "futex_wake", "futex_requeue", "map_shadow_stack", "mseal", "setxattrat", "getxattrat", "listxattrat",
    "removexattrat", "file_getattr", "file_setattr", "lsm_get_self_attr", "lsm_set_self_attr", "lsm_list_modules",
    "uretprobe", "uprobe", "riscv_hwprobe", "riscv_flush_icache",
}  # fmt: skip


def compiled(variant: Variant) -> bytes:
    return seccomp.compile(filters.profile_path(variant), variant)


def number(name: str) -> int:
    return seccomp._numbers([name])[name]


def verdict(program: bytes, name: str, *arguments: int) -> int:
    return bpf.verdict(bpf.decode(program), ARCHITECTURE, number(name), arguments)


@pytest.fixture(scope="module")
def program() -> bytes:
    return compiled(VARIANTS["default"])


# ── running code behind a filter ──────────────────────────────────────────────────────────────────────────────────────


def behind(program: bytes, function: Callable[[], Any]) -> Any:
    """Return what `function` returns in a forked child behind `program`, as JSON gives it back."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            syscalls.seccomp_load(program)
            os.write(write, json.dumps(function()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(write, json.dumps(f"{type(error).__name__}: {error}").encode())
            os._exit(1)
    os.close(write)
    with open(read) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise AssertionError(f"status {status}: {text}")
    return json.loads(text)


def marked(program: bytes) -> bytes:
    """Return `program` so that it judges only calls with the magic sixth argument, and allows by an odd errno."""
    body = [
        instruction._replace(value=seccomp.ERRNO | ALLOWED) if instruction[0::3] == (bpf.RETURN, ALLOW) else instruction
        for instruction in bpf.decode(program)
    ]
    low = bpf.ARGUMENTS + 5 * 8 + (4 if sys.byteorder == "big" else 0)
    return bpf.encode(
        [
            Instruction(bpf.LOAD, 0, 0, low),
            Instruction(bpf.EQUAL, 1, 0, MAGIC),
            Instruction(bpf.RETURN, 0, 0, ALLOW),
            *body,
        ]
    )


_raw = ctypes.CDLL(None, use_errno=True).syscall
_raw.restype = ctypes.c_long
_raw.argtypes = [ctypes.c_ulong] * 7


def ask(call: int, *arguments: int) -> int:
    """Make the system call behind a marked program; return the verdict as SECCOMP_RET_*."""
    values = [*arguments, *(0,) * (5 - len(arguments)), MAGIC]
    result: int = _raw(call, *(word & (1 << 64) - 1 for word in values))
    if result != -1:
        return seccomp.ERRNO | result  # only ERRNO(0) comes back as success
    found = ctypes.get_errno()
    return ALLOW if found == ALLOWED else seccomp.ERRNO | found


def _ask_all(arguments: list[int]) -> list[int]:
    return [ask(call, *arguments) for call in CALLS]


# ── every number ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", VARIANTS)
def test_the_kernel_gives_every_number_the_profiles_verdict(name: str) -> None:
    """Every number up to 1023, all arguments 0 and all arguments -1; no call takes more than five that a rule tests."""
    variant = VARIANTS[name]
    program = compiled(variant)
    profile = seccomp.read(filters.profile_path(variant), variant)
    known = {call: word for word, call in seccomp._numbers({rule.name for rule in profile.rules}).items()}
    for word in (0, (1 << 64) - 1):
        verdicts = behind(marked(program), functools.partial(_ask_all, [word] * 5))
        wrong = {
            f"{known.get(call)} ({call})": hex(found)
            for call, found in zip(CALLS, verdicts, strict=True)
            if found != profile.verdict(known.get(call, ""), [*[word] * 5, MAGIC])
        }
        assert not wrong


@pytest.mark.parametrize("name", VARIANTS)
def test_the_emulator_judges_as_the_kernel_does(name: str) -> None:
    """So that what the emulator says of arguments, below, is what the kernel would."""
    program = compiled(VARIANTS[name])
    arguments = [HIGH | 0x5412, 0x5412, 0x7E020000, 16, 9]
    decoded = bpf.decode(program)
    real = behind(marked(program), functools.partial(_ask_all, arguments))
    assert real == [bpf.verdict(decoded, ARCHITECTURE, call, [*arguments, MAGIC]) for call in CALLS]


def test_refused_calls_are_refused_by_the_program_as_it_is_loaded() -> None:
    """Not the marked program but the very bytes: what they refuse is safe to call, so all of it is called."""
    program = compiled(VARIANTS["default"])
    decoded = bpf.decode(program)
    refused = {call: v for call in range(1024) if (v := bpf.verdict(decoded, ARCHITECTURE, call, (-1,) * 6)) != ALLOW}
    assert len(refused) > 600

    def call_all() -> list[int]:
        return [0 if _raw(call, *[(1 << 64) - 1] * 6) == 0 else ctypes.get_errno() for call in refused]

    assert behind(program, call_all) == [value & 0xFFFF for value in refused.values()]


def test_what_is_refused_and_what_is_needed(program: bytes) -> None:
    refused = REFUSED + (REFUSED_X86 if MACHINE == "x86_64" else [])
    assert {name: hex(found) for name in refused if (found := verdict(program, name)) != EPERM} == {}
    assert {name: hex(found) for name in NEEDED if (found := verdict(program, name)) != ALLOW} == {}


def test_every_number_that_the_host_knows_is_decided(program: bytes) -> None:
    """A call is allowed, refused, or in the list of those that never were: none is left to chance."""
    document = json.loads(Path(paths.shipped(filters.SHIPPED)).read_text())
    named = {name for entry in document["syscalls"] for name in entry["names"]}
    known = set()
    for call in range(600):
        try:
            known.add(pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call).decode())
        except ValueError:
            continue
    assert len(known) > 250
    assert known - named - set(NEVER) == set()


def test_no_name_in_the_profile_is_misspelt() -> None:
    document = json.loads(Path(paths.shipped(filters.SHIPPED)).read_text())
    architectures = [pyseccomp.Arch.X86_64, pyseccomp.Arch.AARCH64, pyseccomp.Arch.RISCV64]
    young = set(seccomp._YOUNG).union(*seccomp._YOUNG_HERE.values())
    for entry in document["syscalls"]:
        assert entry["comment"], "each group has its reason"
        assert len(entry["names"]) == len(set(entry["names"]))
        for name in entry["names"]:
            assert name in young or any(pyseccomp.resolve_syscall(a, name) != -1 for a in architectures), name


@pytest.mark.skipif(MACHINE != "x86_64", reason="x32 is x86_64's")
def test_x32_calls_do_not_exist(program: bytes) -> None:
    verdicts = behind(marked(program), lambda: [ask(seccomp.X32_BIT + call) for call in range(1024)])
    assert set(verdicts) == {ENOSYS}


@pytest.mark.skipif(MACHINE != "x86_64", reason="int 0x80 is x86's")
def test_i386_calls_do_not_exist(program: bytes) -> None:
    """By machine code, as an attacker would: int 0x80 takes i386's numbers in a 64-bit process."""
    #     mov eax, edi; push rbx; xor ebx, ebx; int 0x80; pop rbx; ret
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("89f85331dbcd805bc3"))
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    child = os.fork()
    if child == 0:
        os._exit(call(20) != os.getpid())  # getpid
    if os.waitpid(child, 0)[1]:
        pytest.skip("this kernel has no i386 calls")
    assert set(behind(program, lambda: [call(n) for n in range(512)])) == {-errno.ENOSYS}


def test_other_architectures_do_not_exist(program: bytes) -> None:
    decoded = bpf.decode(program)
    for other in seccomp._OTHERS - {ARCHITECTURE} | {0, 0xFFFFFFFF}:
        assert {bpf.verdict(decoded, other, call) for call in range(600)} == {ENOSYS}


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────────

WORD = st.integers(0, (1 << 64) - 1)


@given(st.integers(0, 0xFFFFFFFF), st.sampled_from([0x5412, 0x541C]))
def test_input_is_never_pushed_into_a_terminal_whatever_the_high_bits(high: int, request: int) -> None:
    assert verdict(_DEFAULT, "ioctl", 0, high << 32 | request) == EPERM


@given(WORD)
def test_every_other_ioctl_is_allowed(request: int) -> None:
    expected = EPERM if request & 0xFFFFFFFF in (0x5412, 0x541C) else ALLOW
    assert verdict(_DEFAULT, "ioctl", 0, request) == expected


@given(WORD, WORD, st.one_of(st.just(9), st.just(HIGH | 9), WORD), st.sampled_from(["socket", "socketpair"]))
def test_socket_families(high: int, kind: int, protocol: int, name: str) -> None:
    for family in range(64):
        word = (high << 32 | family) & (1 << 64) - 1
        if family not in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
            expected = EAFNOSUPPORT
        elif (name, family, protocol & 0xFFFFFFFF) == ("socket", socket.AF_NETLINK, 9):
            expected = seccomp.ERRNO | errno.EPROTONOSUPPORT
        else:
            expected = ALLOW
        assert verdict(_DEFAULT, name, word, kind, protocol) == expected


@given(WORD)
def test_clone_makes_no_namespace(flags: int) -> None:
    assert verdict(_DEFAULT, "clone", flags) == (EPERM if flags & 0x7E020000 else ALLOW)
    assert verdict(_DEFAULT, "unshare", flags) == (EPERM if flags & 0x7E020080 else ALLOW)
    assert verdict(_DEFAULT, "clone3", flags) == ENOSYS


@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_personality(high: int, persona: int) -> None:
    for word in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
        assert verdict(_DEFAULT, "personality", high << 32 | word) == ALLOW
    if persona not in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
        assert verdict(_DEFAULT, "personality", high << 32 | persona) == EPERM


_DEFAULT = compiled(VARIANTS["default"])


def test_high_bits_before_the_real_kernel(program: bytes) -> None:
    """The kernel truncates an int argument: AF_ALG | 1 << 32 is AF_ALG to it, so it must be to the filter."""

    def attack() -> list[int]:
        found = []
        for family in (socket.AF_ALG, HIGH | socket.AF_ALG, 40, HIGH | 40, 0xFFFFFFFF << 32 | 40):
            found.append((_raw(number_socket, family, socket.SOCK_DGRAM, 0, 0, 0, 0), ctypes.get_errno()))
        for request in (0x5412, HIGH | 0x5412, 0x541C, 0xDEADBEEF << 32 | 0x541C):
            found.append((_raw(number_ioctl, 0, request, 0, 0, 0, 0), ctypes.get_errno()))
        return [code for result, code in found if result == -1]

    number_socket, number_ioctl = number("socket"), number("ioctl")
    assert behind(program, attack) == [errno.EAFNOSUPPORT] * 5 + [errno.EPERM] * 4


# ── variants ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_setgroups_is_answered_or_made() -> None:
    assert verdict(compiled(VARIANTS["default"]), "setgroups") == seccomp.ERRNO
    assert verdict(compiled(VARIANTS["real"]), "setgroups") == ALLOW
    assert behind(compiled(VARIANTS["default"]), lambda: os.setgroups([1, 2, 3])) is None
    if os.getuid():
        with pytest.raises(AssertionError, match="PermissionError"):
            behind(compiled(VARIANTS["real"]), lambda: os.setgroups([1, 2, 3]))


@pytest.mark.parametrize("name", ["chown", "fchown", "lchown", "fchownat"])
def test_chown_is_answered_with_a_single_id(name: str) -> None:
    if name in ("chown", "lchown") and MACHINE != "x86_64":
        pytest.skip("not a call of this architecture")
    assert verdict(compiled(VARIANTS["single"]), name, 1, 2, 3) == seccomp.ERRNO
    assert verdict(compiled(VARIANTS["default"]), name, 1, 2, 3) == ALLOW


def test_changing_ids_is_never_only_pretended() -> None:
    for name in ("setuid", "setresuid", "setreuid", "setgid", "setresgid", "setfsuid"):
        assert verdict(compiled(VARIANTS["single"]), name, 5, 5, 5) == ALLOW


def test_nested_opens_namespaces_and_mounts_and_nothing_else() -> None:
    program, default = compiled(VARIANTS["nested"]), compiled(VARIANTS["default"])
    opened = {
        name
        for name in [*REFUSED, "clone", "clone3", "unshare"]
        if verdict(program, name, 0x7E020000) == ALLOW and verdict(default, name, 0x7E020000) != ALLOW
    }
    assert opened == set(words("""
        clone clone3 unshare setns mount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount open_tree
        open_tree_attr mount_setattr sethostname setdomainname
    """))  # fmt: skip
    assert verdict(program, "keyctl", 1) == ALLOW  # a new session keyring
    assert verdict(program, "keyctl", 11) == EPERM  # reading a key
    assert verdict(program, "socket", socket.AF_ALG) == EAFNOSUPPORT
    assert verdict(program, "ioctl", 0, 0x5412) == EPERM


@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ("SYS_ADMIN", "mount setns bpf perf_event_open fanotify_init sethostname quotactl syslog clone3 unshare"),
        ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
        ("SYS_TIME", "clock_settime settimeofday"),
        ("SYSLOG", "syslog"),
        ("BPF", "bpf"),
        ("PERFMON", "perf_event_open"),
        ("SYS_NICE", "mbind set_mempolicy"),
        ("DAC_READ_SEARCH", "open_by_handle_at"),
        ("SYS_MODULE", "init_module finit_module delete_module"),
        ("SYS_PACCT", "acct"),
        ("SYS_BOOT", "reboot"),
        ("SYS_TTY_CONFIG", "vhangup"),
    ],
)
def test_a_capability_opens_its_calls(capability: str, names: str) -> None:
    base = capabilities.DEFAULT
    wider = compiled(filters.variant(caps=capabilities.adjust(base, [capability], [])))
    for name in names.split():
        assert verdict(wider, name, 0x7E020080) == ALLOW
        assert verdict(compiled(VARIANTS["no capabilities"]), name, 0x7E020080) in (EPERM, ENOSYS)


def test_dropping_chroot_closes_it() -> None:
    assert verdict(compiled(VARIANTS["default"]), "chroot") == ALLOW
    assert verdict(compiled(VARIANTS["no capabilities"]), "chroot") == EPERM


def test_the_audit_socket_needs_its_capability() -> None:
    program = compiled(filters.variant(caps=1 << capabilities.NUMBERS["CAP_AUDIT_WRITE"]))
    assert verdict(program, "socket", socket.AF_NETLINK, 3, 9) == ALLOW


def test_the_capabilities_that_make_a_difference_are_those_in_the_profile() -> None:
    """filters.WIDENING keeps two sandboxes that need the same program from building it twice; it must miss none."""
    document = json.loads(Path(paths.shipped(filters.SHIPPED)).read_text())
    asked = {
        name
        for entry in document["syscalls"]
        for conditions in (entry.get("includes", {}), entry.get("excludes", {}))
        for name in conditions.get("caps", [])
    }
    assert set(capabilities.names(filters.WIDENING)) == asked


def test_unconfined_still_answers_what_the_id_map_cannot_do() -> None:
    program = compiled(filters.variant("unconfined", chown="fake"))
    decoded = bpf.decode(program)
    answered = {
        number("setgroups"),
        *(n for name, n in seccomp._numbers(["chown", "fchown", "lchown", "fchownat"]).items() if n >= 0),
    }
    for call in range(600):
        assert bpf.verdict(decoded, ARCHITECTURE, call) == (seccomp.ERRNO if call in answered else ALLOW)
    assert seccomp.build(filters.variant("unconfined", setgroups="real")) == b""
    assert filters.needs_none(filters.variant("unconfined", setgroups="real"))


@pytest.mark.skipif(not os.path.exists(PODMAN), reason="podman's profile is not installed")
def test_nothing_is_allowed_that_podmans_default_refuses(program: bytes) -> None:
    variant = filters.variant(PODMAN, setgroups="real")
    theirs = seccomp.read(PODMAN, variant)
    ours = seccomp.read(paths.shipped(filters.SHIPPED), filters.variant(setgroups="real"))
    wider = {
        rule.name
        for rule in ours.rules
        if rule.action == ALLOW
        and theirs.verdict(rule.name, [0] * 6) != ALLOW
        and ours.verdict(rule.name, [0] * 6) == ALLOW
    }
    assert wider <= ACCIDENTS


# ── ordinary programs ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_ordinary_programs_run(program: bytes) -> None:
    script = (
        "import threading, socket, subprocess, os, mmap, select, tempfile, multiprocessing\n"
        "t = threading.Thread(target=print, args=('thread',)); t.start(); t.join()\n"
        "a, b = socket.socketpair(); a.send(b'x'); assert b.recv(1) == b'x'\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()\n"
        "print(subprocess.run(['sh', '-c', 'echo child | cat'], capture_output=True, text=True).stdout.strip())\n"
        "with tempfile.NamedTemporaryFile() as f: os.chmod(f.name, 0o600); mmap.mmap(-1, 4096); os.fsync(f.fileno())\n"
        "select.epoll().close(); multiprocessing.Lock(); os.setgroups([]); print('done')\n"
    )

    def run() -> list[Any]:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        return [done.returncode, done.stdout.split(), done.stderr]

    assert behind(program, run) == [0, ["thread", "child", "done"], ""]


def test_archives_with_other_owners_unpack_with_a_single_id(tmp_path: Path) -> None:
    """Root in a user namespace with one id: tar's and chown's chown are answered; a real one would be EINVAL."""
    busybox = next((path for path in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(path)), None)
    if not busybox:
        pytest.skip("busybox is not installed")
    (tmp_path / "file").write_text("x")
    uid, gid = os.getuid(), os.getgid()

    def run() -> list[int]:
        os.chdir(tmp_path)
        statuses = []
        for argv in (
            ["chown", "5:5", "file"],
            ["chown", "-R", "bin", "."],
            ["chgrp", "7", "file"],
            ["tar", "xf", "owned.tar"],
        ):
            statuses.append(subprocess.run([busybox, *argv], stderr=subprocess.DEVNULL, timeout=60).returncode)
        return statuses

    def in_namespace(program: bytes) -> Any:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                syscalls.unshare(syscalls.CLONE_NEWUSER)
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
                Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
                os.write(write, json.dumps(behind(program, run)).encode())
            finally:
                os._exit(0)
        os.close(write)
        with open(read) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return json.loads(text)

    with tarfile.open(tmp_path / "owned.tar", "w") as tar:
        member = tarfile.TarInfo("member")
        member.uid, member.gid, member.size = 1234, 4321, 1
        tar.addfile(member, io.BytesIO(b"y"))
    assert in_namespace(compiled(VARIANTS["single"])) == [0, 0, 0, 0]
    assert (tmp_path / "member").read_text() == "y"
    refused = in_namespace(compiled(VARIANTS["default"]))
    assert (refused[0], refused[2]) != (0, 0), "without the answer chown fails: the test would prove nothing"


# ── other people's profiles ───────────────────────────────────────────────────────────────────────────────────────────


def profile(folder: Path, **document: Any) -> str:
    path = folder / "profile.json"
    path.write_text(json.dumps(document))
    return str(path)


def entry(names: str, action: str = "ALLOW", **rest: Any) -> dict[str, Any]:
    return {"names": names.split(), "action": "SCMP_ACT_" + action, **rest}


def test_an_oci_profile(tmp_path: Path) -> None:
    """linux.seccomp of config.json: default, names, args with every operator, errnoRet."""
    path = profile(
        tmp_path,
        defaultAction="SCMP_ACT_ERRNO",
        syscalls=[
            entry("read write exit_group"),
            entry("mkdirat", "ERRNO", errnoRet=errno.EROFS),
            entry("kill", "KILL_PROCESS"),
            entry("lseek", args=[{"index": 1, "value": 10, "op": "SCMP_CMP_LT"}]),
            entry("lseek", args=[{"index": 1, "value": 100, "op": "SCMP_CMP_GT"}]),
            entry("ftruncate", args=[{"index": 1, "value": 5, "op": "SCMP_CMP_NE"}]),
            entry("fchmod", args=[{"index": 1, "value": 5, "op": "SCMP_CMP_LE"}]),
            entry(
                "dup3",
                args=[{"index": 0, "value": 5, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 6, "op": "SCMP_CMP_GE"}],
            ),
            entry("nosuchcall_of_a_later_kernel"),
        ],
    )
    program = compiled(filters.variant(path, setgroups="real"))
    for name, arguments, expected in [
        ("read", (), ALLOW), ("openat", (), EPERM), ("mkdirat", (), seccomp.ERRNO | errno.EROFS),
        ("kill", (), seccomp.KILL_PROCESS), ("lseek", (0, 9), ALLOW), ("lseek", (0, 10), EPERM),
        ("lseek", (0, 100), EPERM), ("lseek", (0, 101), ALLOW), ("lseek", (0, HIGH), ALLOW),
        ("ftruncate", (0, 5), EPERM), ("ftruncate", (0, 6), ALLOW),
        ("fchmod", (0, 5), ALLOW), ("fchmod", (0, 6), EPERM), ("dup3", (5, 6), ALLOW), ("dup3", (5, 5), EPERM),
        ("dup3", (4, 6), EPERM),
    ]:  # fmt: skip
        assert verdict(program, name, *arguments) == expected, (name, arguments)


def test_conditions_of_a_docker_profile(tmp_path: Path) -> None:
    here = seccomp.MACHINES[MACHINE][0]
    path = profile(
        tmp_path,
        defaultAction="SCMP_ACT_ERRNO",
        defaultErrnoRet=errno.ENOSYS,
        syscalls=[
            entry("mount", includes={"caps": ["CAP_SYS_ADMIN"]}),
            entry("umount2", excludes={"caps": ["CAP_CHOWN"]}),
            entry("sync", includes={"arches": [here]}),
            entry("syncfs", includes={"arches": ["s390x"]}),
            entry("fsync", excludes={"arches": [here]}),
            entry("ptrace", includes={"minKernel": "4.8"}),
            entry("kcmp", includes={"minKernel": "99.0"}),
            entry("acct", includes={"variant": ["nested"]}),
        ],
    )
    program = compiled(filters.variant(path))
    expected = dict(mount=0, umount2=0, sync=1, syncfs=0, fsync=0, ptrace=1, kcmp=0, acct=0)
    assert {name: verdict(program, name) for name in expected} == {
        name: ALLOW if allowed else ENOSYS for name, allowed in expected.items()
    }
    assert verdict(compiled(filters.variant(path, caps=1 << 21, nested=True)), "mount") == ALLOW
    assert verdict(compiled(filters.variant(path, caps=1 << 21)), "umount2") == ALLOW
    assert verdict(compiled(filters.variant(path, nested=True)), "acct") == ALLOW
    assert verdict(program, "setgroups") == seccomp.ERRNO, "the id map's answers come with any profile"


@pytest.mark.skipif(not os.path.exists(PODMAN), reason="podman's profile is not installed")
def test_podmans_profile_compiles_and_means_what_it_says() -> None:
    program = compiled(filters.variant(PODMAN))
    assert verdict(program, "read") == ALLOW
    assert verdict(program, "kexec_load") == EPERM
    assert verdict(program, "socket", socket.AF_NETLINK, 3, 9) == seccomp.ERRNO | errno.EINVAL
    assert verdict(program, "socket", socket.AF_NETLINK, 3, 0) == ALLOW
    assert behind(program, lambda: subprocess.run(["true"]).returncode) == 0
    if MACHINE == "x86_64":  # it asks for the other architectures
        assert bpf.verdict(bpf.decode(program), 0x40000003, 20) == ALLOW


def test_the_first_rule_that_fits_decides(tmp_path: Path) -> None:
    low = {"index": 0, "value": 0xFF, "valueTwo": 7, "op": "SCMP_CMP_MASKED_EQ"}
    path = profile(
        tmp_path,
        defaultAction="SCMP_ACT_ERRNO",
        syscalls=[
            entry("close", "ERRNO", errnoRet=5, args=[low]),
            entry("close"),
            entry("close", "ERRNO", errnoRet=6),
            entry("dup", "LOG"),
            entry("dup"),
        ],
    )
    program = compiled(filters.variant(path))
    assert verdict(program, "close", 0x107) == seccomp.ERRNO | 5
    assert verdict(program, "close", 0x108) == ALLOW
    assert verdict(program, "dup") == seccomp.LOG


def test_rules_that_libseccomp_cannot_express_are_an_error(tmp_path: Path) -> None:
    """An exception with the default action, before a wider rule: libseccomp takes no such rule, and would allow it."""
    path = profile(
        tmp_path,
        defaultAction="SCMP_ACT_ERRNO",
        syscalls=[entry("socket", "ERRNO", args=[{"index": 0, "value": 40, "op": "SCMP_CMP_EQ"}]), entry("socket")],
    )
    with pytest.raises(SbxError, match="overlap") as caught:
        compiled(filters.variant(path))
    assert caught.value.code == "seccomp-profile-invalid"


def test_refusing_an_unknown_call_where_all_else_is_allowed_is_an_error(tmp_path: Path) -> None:
    path = profile(tmp_path, defaultAction="SCMP_ACT_ALLOW", syscalls=[entry("mounnt", "ERRNO")])
    with pytest.raises(SbxError, match="mounnt"):
        compiled(filters.variant(path))


ALLOW_ALL, REFUSE_ALL = '"defaultAction": "SCMP_ACT_ALLOW"', '"defaultAction": "SCMP_ACT_ERRNO"'


def reading(rest: str) -> str:
    """A profile with one rule for read, and `rest` in its entry."""
    return f'{{{REFUSE_ALL}, "syscalls": [{{"names": ["read"], "action": "SCMP_ACT_ALLOW", {rest}}}]}}'


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"defaultAction": "ALLOW"}', '{"defaultAction": ["SCMP_ACT_ALLOW"]}',
        '{"defaultAction": "SCMP_ACT_NOTIFY"}', f'{{{ALLOW_ALL}, "listenerPath": "/x"}}',
        f'{{{ALLOW_ALL}, "syscalls": {{}}}}', f'{{{ALLOW_ALL}, "syscalls": [1]}}', f'{{{ALLOW_ALL}, "syscalls": 7}}',
        f'{{{REFUSE_ALL}, "defaultErrnoRet": 4096}}', f'{{{REFUSE_ALL}, "defaultErrnoRet": "EPERM"}}',
        f'{{{ALLOW_ALL}, "syscalls": [{{"action": "SCMP_ACT_ALLOW"}}]}}',
        reading('"args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]'),
        reading('"args": [{"index": 0, "value": -1, "op": "SCMP_CMP_EQ"}]'),
        reading('"args": [{"index": 0, "value": 18446744073709551616, "op": "SCMP_CMP_EQ"}]'),
        reading('"args": [{"index": 0, "value": "1", "op": "SCMP_CMP_EQ"}]'),
        reading('"args": [{"index": 0, "value": 1, "op": "EQ"}]'), reading('"args": [{"op": []}]'),
        reading('"args": [7]'), reading('"args": 7'), reading('"includes": {"minKernel": "x"}'),
        reading('"includes": {"caps": "CAP_X"}'), reading('"includes": ["x"]'), reading('"excludes": 7'),
        f'{{{REFUSE_ALL}, "architectures": ["SCMP_ARCH_VAX"]}}', f'{{{REFUSE_ALL}, "architectures": ["x"]}}',
        f'{{{REFUSE_ALL}, "archMap": [3]}}', f'{{{REFUSE_ALL}, "archMap": 3}}',
        "[" * 100_000, '{"defaultAction": ' + "9" * 5000 + "}", " " * (1 << 20) + "{}", "\udcff",
    ],
    ids=lambda text: text[-50:].strip() or "blank",
)  # fmt: skip
def test_bad_profiles_end_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SbxError) as caught:
        compiled(filters.variant(str(path)))
    assert caught.value.code == "seccomp-profile-invalid"
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_profiles_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, code in [
        ("none", "seccomp-profile-unreadable"),
        ("fifo", "seccomp-profile-invalid"),
        (".", "seccomp-profile-"),
    ]:
        with pytest.raises(SbxError) as caught:
            compiled(filters.variant(str(tmp_path / name)))
        assert caught.value.code.startswith(code)
    with pytest.raises(SbxError) as caught:
        filters.filter_key(filters.variant(str(tmp_path / "none")))
    assert caught.value.code == "seccomp-profile-unreadable"


# ── the packer ────────────────────────────────────────────────────────────────────────────────────────────────────────


def raw_program(variant: Variant) -> bytes:
    path = filters.profile_path(variant)
    profile = seccomp.read(path, variant)
    return seccomp._libseccomp_program(profile, seccomp._numbers({rule.name for rule in profile.rules}), path)


PACKED = {
    name: (bpf.decode(raw), bpf.pack(bpf.decode(raw)))
    for name, variant in [*VARIANTS.items(), *([("podman", filters.variant(PODMAN))] if os.path.exists(PODMAN) else [])]
    for raw in [raw_program(variant)]
}
NEAR = st.one_of(
    WORD, st.integers(0, 64), st.sampled_from([0x5412, 0x541C, 16, 9, 40, 0x7E020000, 0x20008, HIGH | 0x5412])
)


@pytest.mark.parametrize("name", PACKED)
@hypothesis_settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packing_changes_no_verdict(name: str, data: st.DataObject) -> None:
    before, after = PACKED[name]
    arguments = data.draw(st.lists(NEAR, min_size=6, max_size=6))
    architecture = data.draw(st.sampled_from([*seccomp._OTHERS, 0, 0xFFFFFFFF]))
    for call in [*range(480), seccomp.X32_BIT, seccomp.X32_BIT + 59, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]:
        for where in (ARCHITECTURE, architecture):
            assert bpf.verdict(after, where, call, arguments) == bpf.verdict(before, where, call, arguments), hex(call)


def test_packing_makes_the_program_small() -> None:
    """What a launch pays for: the kernel walks the program once for each number when it is loaded."""
    before, after = PACKED["default"]
    assert len(after) * 3 < len(before)
    steps = [_steps(after, call) for call in range(480)]
    assert sum(steps) / len(steps) < 12


def _steps(program: bpf.Program, call: int) -> int:
    """Return how many instructions decide a call with arguments 0."""
    place = accumulator = steps = 0
    while program[place].code != bpf.RETURN:
        instruction = program[place]
        steps, place = steps + 1, place + 1
        if instruction.code == bpf.LOAD:
            accumulator = {bpf.NUMBER: call, bpf.ARCHITECTURE: ARCHITECTURE}.get(instruction.value, 0)
        elif instruction.code == bpf.AND:
            accumulator &= instruction.value
        elif instruction.code == bpf.JUMP:
            place += instruction.value
        else:
            place += instruction.yes if bpf.holds(instruction, accumulator) else instruction.no
    return steps


def test_jumps_that_are_too_far_become_long_ones(tmp_path: Path) -> None:
    """Many different verdicts: the program is longer than a conditional jump reaches, and still right."""
    names = [pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call).decode() for call in range(30, 220)]
    entries = [
        entry(name, "ERRNO", errnoRet=100 + i, args=[{"index": i % 3, "value": i << 20, "op": "SCMP_CMP_GE"}])
        for i, name in enumerate(names)
    ]
    path = profile(tmp_path, defaultAction="SCMP_ACT_ALLOW", syscalls=entries)
    program = compiled(filters.variant(path, setgroups="real"))
    assert len(program) // 8 > 500
    for i, name in enumerate(names):
        assert verdict(program, name, *[i << 20] * 3) == seccomp.ERRNO | 100 + i
        if i:
            assert verdict(program, name, *[(i << 20) - 1] * 3) == ALLOW
    assert any(instruction.code == bpf.JUMP for instruction in bpf.decode(program))


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SBX_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_is_built_is_found(home: Path) -> None:
    variant = filters.variant()
    assert filters.cached(variant) is None
    program = seccomp.build(variant)
    assert filters.cached(variant) == program
    (file,) = (home / "cache/seccomp").iterdir()
    assert file.name == filters.filter_key(variant) + ".bpf"
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("umask", [0, 0o777])
def test_the_file_is_private_whatever_the_umask(home: Path, umask: int) -> None:
    (home / "cache/seccomp").mkdir(parents=True)
    old = os.umask(umask)
    try:
        seccomp.build(filters.variant())
    finally:
        os.umask(old)
    assert filters.cached(filters.variant())


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_long(path: Path) -> None:
    path.write_bytes(bytes(8 * 4096))


def damage_mode(path: Path) -> None:
    path.chmod(0o660)


def damage_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def damage_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def damage_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_long, damage_mode, damage_link, damage_fifo])
def test_a_file_that_is_not_sound_is_built_again(home: Path, damage: Callable[[Path], None]) -> None:
    variant = filters.variant()
    program = seccomp.build(variant)
    damage(Path(filters.cache_path(variant)))
    assert filters.cached(variant) is None
    assert seccomp.build(variant) == program
    assert filters.cached(variant) == program


def test_a_cache_that_cannot_be_written_costs_only_time(home: Path) -> None:
    variant = filters.variant()
    seccomp.build(variant)
    damage_folder(Path(filters.cache_path(variant)))
    assert filters.cached(variant) is None
    assert seccomp.build(variant) == compiled(variant)
    assert not [entry for entry in (home / "cache/seccomp").iterdir() if entry.name.endswith(".tmp")]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("SBX_HOME", str(tmp_path / "locked/home"))
    assert filters.is_sound(seccomp.build(filters.variant()))
    assert filters.cached(filters.variant()) is None


def test_the_key_says_all_that_the_program_depends_on(home: Path, tmp_path: Path) -> None:
    path = profile(tmp_path, defaultAction="SCMP_ACT_ALLOW")
    variants = [*VARIANTS.values(), filters.variant(path), filters.variant(path, caps=1)]
    keys = {filters.filter_key(variant) for variant in variants}
    assert len(keys) == len(variants)
    assert all(re.fullmatch(r"[\w.+~-]{1,251}", key) for key in keys)
    before = filters.filter_key(filters.variant(path))
    Path(path).write_text('{"defaultAction": "SCMP_ACT_LOG"}')
    assert filters.filter_key(filters.variant(path)) != before
    # a capability that the profile does not ask about makes no second program
    assert filters.filter_key(filters.variant(caps=0)) == filters.filter_key(filters.variant(caps=1))


def test_a_profile_that_is_edited_takes_effect(home: Path, tmp_path: Path) -> None:
    path = profile(tmp_path, defaultAction="SCMP_ACT_ERRNO", syscalls=[entry("read")])
    seccomp.build(filters.variant(path))
    Path(path).write_text(
        '{"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["write"], "action": "SCMP_ACT_ALLOW"}]}'
    )
    assert filters.cached(filters.variant(path)) is None
    assert verdict(seccomp.build(filters.variant(path)), "read") == EPERM


def test_builders_at_the_same_time(home: Path) -> None:
    """Eight processes, one key: each gets the program, and one whole file stays."""
    variant = filters.variant()
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                program = seccomp.build(variant)
                os._exit(0 if filters.cached(variant) == program else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert [file.name for file in (home / "cache/seccomp").iterdir()] == [filters.filter_key(variant) + ".bpf"]


def test_the_cache_does_not_grow_for_ever(home: Path) -> None:
    folder = home / "cache/seccomp"
    folder.mkdir(parents=True)
    for old in range(60):
        (folder / f"old-{old}.bpf").write_bytes(b"x" * 8)
        os.utime(folder / f"old-{old}.bpf", (old, old))
    (folder / ".77.0.tmp").write_bytes(b"debris")
    os.utime(folder / ".77.0.tmp", (0, 0))
    seccomp.build(filters.variant())
    names = {file.name for file in folder.iterdir()}
    assert len(names) == 32
    assert filters.filter_key(filters.variant()) + ".bpf" in names
    assert ".77.0.tmp" not in names
    assert "old-59.bpf" in names
    assert "old-0.bpf" not in names


# ── when it cannot be had ─────────────────────────────────────────────────────────────────────────────────────────────


def test_without_the_binding(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(SbxError) as caught:
        seccomp.build(filters.variant())
    assert caught.value.code == "seccomp-unavailable"
    assert "pip install pyseccomp" in caught.value.hint
    assert not (home / "cache").exists()


@pytest.mark.parametrize(("distribution", "command"), [
    ("ID=debian", "apt-get install libseccomp2"), ("ID=fedora", "dnf install libseccomp"),
    ("ID=alpine", "apk add libseccomp"), ("ID=arch", "pacman -S libseccomp"),
    ("ID=rocky\nID_LIKE='rhel centos fedora'", "dnf install libseccomp"),
    ("ID=plan9", "apt-get install libseccomp2, dnf"),
])  # fmt: skip
def test_without_the_library(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribution: str, command: str
) -> None:
    """The binding is there and finds no library: the words of the hint are the distribution's own."""
    (tmp_path / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pyseccomp")
    fields = dict(re.findall(r"(\w+)='?([^'\n]*)", distribution))
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: fields)
    with pytest.raises(SbxError) as caught:
        seccomp.build(filters.variant())
    assert caught.value.code == "seccomp-unavailable"
    assert command in caught.value.hint


def test_the_launch_path_imports_nothing_for_it() -> None:
    script = """
import sys, os, __future__
before = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import rootless.filters
rootless.filters.cached(rootless.filters.variant())
print(*sorted(name for name in set(sys.modules) - before if not name.startswith("rootless")))
"""
    root = os.path.dirname(paths.PACKAGE)
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script, root], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_thread_is_behind_the_filter_too(program: bytes) -> None:
    def run() -> list[int]:
        found: list[int] = []
        thread = threading.Thread(
            target=lambda: found.append(_raw(number_mount, 0, 0, 0, 0, 0, 0) or ctypes.get_errno())
        )
        thread.start()
        thread.join()
        return found

    number_mount = number("mount")
    assert behind(program, run) == [-1]
