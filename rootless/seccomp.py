"""Warm: compile a seccomp profile to the bytes that a launch loads. Outside; the only file that knows libseccomp.

    profile (JSON) ── read ──▶ rules ── libseccomp ──▶ program ── bpf.pack ──▶ smaller program ── prove ──▶ cache

A profile has docker's or OCI's shape. **The first rule that fits a call decides.** libseccomp has another idea of rules
that overlap (a rule without arguments swallows those with), so rules are brought into a form in which both agree, and
the result is run against the rules before it is believed: a filter that lets through what its profile refuses is an
error, never a file in the cache.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import platform
import stat
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rootless import bpf, capabilities, filters, paths
from rootless.errors import SbxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from rootless.filters import Variant

# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# SECCOMP_RET_* of <linux/seccomp.h>, which are also libseccomp's SCMP_ACT_*.
KILL_PROCESS, KILL_THREAD, TRAP, ERRNO, TRACE, LOG, ALLOW = (
    0x80000000, 0x00000000, 0x00030000, 0x00050000, 0x7FF00000, 0x7FFC0000, 0x7FFF0000,
)  # fmt: skip
NOT_IMPLEMENTED = ERRNO | errno.ENOSYS

_ACTIONS = {
    "SCMP_ACT_KILL": KILL_THREAD, "SCMP_ACT_KILL_THREAD": KILL_THREAD, "SCMP_ACT_KILL_PROCESS": KILL_PROCESS,
    "SCMP_ACT_TRAP": TRAP, "SCMP_ACT_ERRNO": ERRNO, "SCMP_ACT_TRACE": TRACE, "SCMP_ACT_LOG": LOG,
    "SCMP_ACT_ALLOW": ALLOW,
}  # fmt: skip

# enum scmp_compare
NE, LT, LE, EQ, GE, GT, MASKED_EQ = range(1, 8)
_OPERATORS = {
    "SCMP_CMP_NE": NE, "SCMP_CMP_LT": LT, "SCMP_CMP_LE": LE, "SCMP_CMP_EQ": EQ, "SCMP_CMP_GE": GE, "SCMP_CMP_GT": GT,
    "SCMP_CMP_MASKED_EQ": MASKED_EQ,
}  # fmt: skip

#: uname's machine → docker's name in includes.arches, and AUDIT_ARCH_*
MACHINES = {
    "x86_64": ("amd64", 0xC000003E), "aarch64": ("arm64", 0xC00000B7), "riscv64": ("riscv64", 0xC00000F3),
}  # fmt: skip

X32_BIT = 0x40000000
_OTHERS = frozenset((0x40000003, 0x40000028, *(architecture for _, architecture in MACHINES.values())))  # i386, arm

# Calls younger than the libseccomp of today's distributions (2.5.4 knows Linux 6.0); from 424 on a number is the same
# on every architecture. uretprobe and uprobe exist on x86_64 alone.
_YOUNG = {
    "cachestat": 451, "fchmodat2": 452, "map_shadow_stack": 453, "futex_wake": 454, "futex_wait": 455,
    "futex_requeue": 456, "statmount": 457, "listmount": 458, "lsm_get_self_attr": 459, "lsm_set_self_attr": 460,
    "lsm_list_modules": 461, "mseal": 462, "setxattrat": 463, "getxattrat": 464, "listxattrat": 465,
    "removexattrat": 466, "open_tree_attr": 467, "file_getattr": 468, "file_setattr": 469,
}  # fmt: skip
_YOUNG_HERE = {"x86_64": {"uretprobe": 335, "uprobe": 336}, "riscv64": {"riscv_hwprobe": 258}}

_MOST_PROFILE_BYTES = 1 << 20
_MOST_CACHED = 32


class Test(NamedTuple):
    """A comparison of the argument of that number: with `value`, or of what `value` masks with `second` (MASKED_EQ)."""

    argument: int
    operator: int
    value: int
    second: int = 0

    def holds(self, arguments: Sequence[int]) -> bool:
        """Tell whether `arguments` (64-bit words) pass."""
        word = arguments[self.argument]
        match self.operator:
            case 1:
                return word != self.value
            case 2:
                return word < self.value
            case 3:
                return word <= self.value
            case 4:
                return word == self.value
            case 5:
                return word >= self.value
            case 6:
                return word > self.value
            case _:
                return word & self.value == self.second


class Rule(NamedTuple):
    """What happens to the call `name` when all `tests` hold."""

    name: str
    action: int
    tests: tuple[Test, ...] = ()


class Profile(NamedTuple):
    """A profile for one variant: rules in order, what happens otherwise, and to calls of other architectures."""

    rules: list[Rule]
    default: int
    other_architectures: int = NOT_IMPLEMENTED
    architectures: tuple[str, ...] = ()

    def verdict(self, name: str, arguments: Sequence[int]) -> int:
        """Return what the profile wants for a call: the first rule that fits decides."""
        for rule in self.rules:
            if rule.name == name and all(test.holds(arguments) for test in rule.tests):
                return rule.action
        return self.default


# ── reading a profile ─────────────────────────────────────────────────────────────────────────────────────────────────


def read(path: str, variant: Variant) -> Profile:
    """Return the profile at `path` (empty: allow everything) as it is for `variant`.

    Raises SbxError ``seccomp-profile-unreadable`` or ``seccomp-profile-invalid``.
    """
    if not path:
        return Profile(_answered(variant), ALLOW, other_architectures=ALLOW)
    try:
        document = json.loads(_read_file(path))
        if not isinstance(document, dict):
            raise ValueError("not a JSON object")
        profile = _profile(document, variant)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, str(error) or "nested too deeply") from None
    return profile._replace(rules=[*_answered(variant), *profile.rules])


def _answered(variant: Variant) -> list[Rule]:
    """Return rules for the calls that return 0 without doing anything, so that programs work with the id map there is.

    chown(2): with one id mapped every file belongs to it, and giving it away is EINVAL; archivers and package managers
    want it done. setgroups(2): denied in the user namespace, for dropping a group can mean more access. setuid(2) and
    its family are not answered: a program that drops root must not go on in the belief that it did.
    """
    rules = []
    if variant["setgroups"] == "fake":
        rules += [Rule(name, ERRNO) for name in ("setgroups", "setgroups32")]
    if variant["chown"] == "fake":
        rules += [
            Rule(name, ERRNO) for name in ("chown", "fchown", "lchown", "fchownat", "chown32", "fchown32", "lchown32")
        ]
    return rules


def _read_file(path: str) -> bytes:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a regular file")
            text = file.read(_MOST_PROFILE_BYTES + 1)
    except OSError as error:
        raise filters.unreadable(path, error) from None
    if len(text) > _MOST_PROFILE_BYTES:
        raise ValueError("more than 1 MiB")
    return text


def _invalid(path: str, cause: str) -> SbxError:
    return SbxError(
        "seccomp-profile-invalid", f"read seccomp profile {path or filters.UNCONFINED}: {cause}",
        "the shape is docker's: defaultAction, and syscalls with names, action and args",
    )  # fmt: skip


def _profile(document: dict[str, Any], variant: Variant) -> Profile:
    for key in ("listenerPath", "listenerMetadata"):
        if document.get(key):
            raise ValueError(f"{key} is not supported")
    entries = _objects(document, "syscalls")
    rules = [rule for entry in entries if _applies(entry, variant) for rule in _rules(entry)]
    default = _action(document.get("defaultAction"), document.get("defaultErrnoRet"))
    return Profile(rules, default, architectures=tuple(_architectures(document)))


def _architectures(document: dict[str, Any]) -> list[str]:
    """Return the architectures that `document` wants besides the machine's own: OCI's list, docker's map."""
    wanted = _names(document, "architectures")
    native = "SCMP_ARCH_" + os.uname().machine.upper()
    for row in _objects(document, "archMap"):
        if row.get("architecture") == native:
            wanted += _names(row, "subArchitectures")
    for name in wanted:
        if not name.startswith("SCMP_ARCH_"):
            raise ValueError(f"no such architecture: {name}")
    return [
        name.removeprefix("SCMP_ARCH_") for name in dict.fromkeys(wanted) if name not in (native, "SCMP_ARCH_NATIVE")
    ]


def _applies(entry: dict[str, Any], variant: Variant) -> bool:
    """Tell whether the conditions of `entry` hold: all of includes, none of excludes."""
    includes, excludes = _object(entry, "includes"), _object(entry, "excludes")
    held = set(capabilities.names(variant["capabilities"]))
    machine = MACHINES.get(os.uname().machine, (os.uname().machine, 0))[0]
    special = {"nested"} if variant["nested"] else set()
    if not held.issuperset(_names(includes, "caps")) or held.intersection(_names(excludes, "caps")):
        return False
    arches = _names(includes, "arches")
    if (arches and machine not in arches) or machine in _names(excludes, "arches"):
        return False
    if not special.issuperset(_names(includes, "variant")) or special.intersection(_names(excludes, "variant")):
        return False
    least, before = includes.get("minKernel"), excludes.get("minKernel")
    return not (least and _kernel() < _version(least)) and not (before and _kernel() >= _version(before))


def _names(table: dict[str, Any], key: str) -> list[str]:
    names = table.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} is not a list of names")
    return list(names)


def _object(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key) if table.get(key) is not None else {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is not an object")
    return value


def _objects(table: dict[str, Any], key: str) -> list[dict[str, Any]]:
    value = table.get(key) if table.get(key) is not None else []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{key} is not a list of objects")
    return value


def _version(text: object) -> tuple[int, int]:
    try:
        major, minor = str(text).split(".")[:2]
        return int(major), int(minor)
    except ValueError:
        raise ValueError(f"minKernel {text!r} is not a version") from None


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(itertools.takewhile(str.isdigit, minor)))


def _action(name: object, errno_return: object) -> int:
    action = _ACTIONS.get(name) if isinstance(name, str) else None
    if action is None:
        raise ValueError(f"no such action, or not one for a sandbox: {name!r}")
    if action not in (ERRNO, TRACE):
        return action
    value = errno.EPERM if errno_return is None else errno_return
    if not isinstance(value, int) or not 0 <= value < 4096:
        raise ValueError(f"errnoRet {value!r} is not an errno")
    return action | value


def _rules(entry: dict[str, Any]) -> Iterable[Rule]:
    """Return the rules of one entry: one for each name; tests of one argument twice are alternatives, as in runc."""
    names = _names(entry, "names") or ([entry["name"]] if isinstance(entry.get("name"), str) else [])
    if not names:
        raise ValueError("an entry without names")
    action = _action(entry.get("action"), entry.get("errnoRet"))
    tests = [_test(argument) for argument in _objects(entry, "args")]
    repeated = len({test.argument for test in tests}) < len(tests)
    choices: list[tuple[Test, ...]] = [(test,) for test in tests] if repeated else [tuple(tests)]
    return (Rule(name, action, choice) for name in names for choice in choices)


def _test(comparison: dict[str, Any]) -> Test:
    operator = comparison.get("op")
    if not isinstance(operator, str) or operator not in _OPERATORS:
        raise ValueError(f"not a comparison: {comparison!r}")
    return Test(
        _word(comparison, "index", 6), _OPERATORS[operator], _word(comparison, "value"), _word(comparison, "valueTwo")
    )


def _word(comparison: dict[str, Any], key: str, end: int = 1 << 64) -> int:
    value = comparison.get(key) or 0
    if not isinstance(value, int) or not 0 <= value < end:
        raise ValueError(f"{key} {value!r} of an argument is not a number that a call can have")
    return value


# ── compiling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile(profile_path: str, variant: Variant) -> bytes:
    """Return the program (an array of struct sock_filter) of the profile at `profile_path` for `variant`.

    Raises SbxError: ``seccomp-profile-unreadable``, ``seccomp-profile-invalid``, or ``seccomp-unavailable`` where the
    binding or the host's libseccomp is missing.
    """
    profile = read(profile_path, variant)
    numbers = _numbers({rule.name for rule in profile.rules})
    program = _libseccomp_program(profile, numbers, profile_path)
    # What cannot be packed is loaded as libseccomp made it.
    with contextlib.suppress(ValueError):
        program = bpf.encode(bpf.pack(bpf.decode(program)))
    _prove(bpf.decode(program), profile, numbers, profile_path)
    if not filters.is_sound(program):
        raise _invalid(profile_path, f"{len(program) // filters.INSTRUCTION} instructions, the kernel takes 4095")
    return program


def libseccomp() -> Any:
    """Return the module pyseccomp; raises SbxError ``seccomp-unavailable`` with the package to install."""
    if os.uname().machine not in MACHINES:
        raise SbxError("seccomp-unavailable", f"compile the seccomp filter: no support for {os.uname().machine}")
    try:
        import pyseccomp
    except ImportError:
        raise SbxError(
            "seccomp-unavailable", "compile the seccomp filter: the Python package pyseccomp is missing",
            "pip install pyseccomp (or, without this protection: --seccomp unconfined --setgroups allow)",
        ) from None  # fmt: skip
    except (RuntimeError, OSError, AttributeError):  # not found, not loadable, or too old to have all its functions
        raise SbxError(
            "seccomp-unavailable", "compile the seccomp filter: the library libseccomp is missing",
            f"{_install_hint()} (or, without this protection: --seccomp unconfined --setgroups allow)",
        ) from None  # fmt: skip
    return pyseccomp


_INSTALL = {
    "debian": "apt-get install libseccomp2", "ubuntu": "apt-get install libseccomp2",
    "fedora": "dnf install libseccomp", "rhel": "dnf install libseccomp", "suse": "zypper install libseccomp2",
    "alpine": "apk add libseccomp", "arch": "pacman -S libseccomp",
}  # fmt: skip


def _install_hint() -> str:
    """Return this distribution's command that installs libseccomp, or all of them."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    for name in [release.get("ID", ""), *release.get("ID_LIKE", "").split()]:
        if name in _INSTALL:
            return _INSTALL[name]
    return "install it: " + ", ".join(dict.fromkeys(_INSTALL.values()))


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Return name → number on this machine; negative for a call of another architecture; unknown names are left out."""
    binding = libseccomp()
    young = _YOUNG | _YOUNG_HERE.get(os.uname().machine, {})
    found = {name: young.get(name) or binding.resolve_syscall(binding.Arch.NATIVE, name) for name in names}
    return {name: number for name, number in found.items() if number != -1}


def _libseccomp_program(profile: Profile, numbers: dict[str, int], path: str) -> bytes:
    binding = libseccomp()
    try:
        program = binding.SyscallFilter(profile.default)
        program.set_attr(binding.Attr.ACT_BADARCH, profile.other_architectures)
        with contextlib.suppress(OSError):  # the binary tree came with libseccomp 2.5; only the way to pack is longer
            program.set_attr(binding.Attr.CTL_OPTIMIZE, 2)
        for name in profile.architectures:
            program.add_arch(getattr(binding.Arch, name))
        add = program.add_rule if profile.architectures else program.add_rule_exactly
        for rule in _disjoint(profile, numbers, path):
            if numbers[rule.name] >= 0 or profile.architectures:
                add(rule.action, numbers[rule.name], *(binding.Arg(*test) for test in rule.tests))
        with open(os.memfd_create("filter"), "rb") as file:
            program.export_bpf(file)
            file.seek(0)
            return file.read()
    except AttributeError as error:
        raise _invalid(path, f"no such architecture: {error.name}") from None
    except OSError as error:
        raise _invalid(path, f"libseccomp refuses it: {error.strerror}") from None


def _disjoint(profile: Profile, numbers: dict[str, int], path: str) -> Iterable[Rule]:
    """Return the rules in a form where libseccomp's reading is ours.

    All rules of one call test the same arguments: where one does not care, it asks for >= 0. libseccomp then asks for a
    masked value before >= 0 on each argument, and no rule swallows another.
    """
    by_name: dict[str, list[Rule]] = {}
    for rule in profile.rules:
        rules = by_name.setdefault(rule.name, [])
        if rule.name not in numbers and rule.action not in (ALLOW, LOG) and profile.default in (ALLOW, LOG):
            raise _invalid(path, f"refuses {rule.name}, which the installed libseccomp does not know")
        if all(earlier.tests and earlier.tests != rule.tests for earlier in rules):  # else an earlier one decides
            rules.append(rule)
    for name, rules in by_name.items():
        indices = sorted({test.argument for rule in rules for test in rule.tests})
        for rule in rules if name in numbers else ():
            if rule.action == profile.default:
                continue  # libseccomp takes none such; where it mattered, the proof fails
            tested = {test.argument: test for test in rule.tests}
            yield Rule(name, rule.action, tuple(tested.get(index, Test(index, GE, 0)) for index in indices))


def _prove(program: bpf.Program, profile: Profile, numbers: dict[str, int], path: str) -> None:
    """Run `program` for every number, and at every edge of the arguments that rules test: it must say what they say."""
    native = MACHINES[os.uname().machine][1]
    names = {number: name for name, number in numbers.items()}
    tests: dict[str, list[Test]] = {}
    for rule in profile.rules:
        tests.setdefault(rule.name, []).extend(rule.tests)
    for number in range(1024):
        name = names.get(number, "")
        for arguments in _edges(tests.get(name, [])):
            wanted = profile.verdict(name, arguments)
            found = bpf.verdict(program, native, number, arguments)
            if found != wanted:
                raise _invalid(
                    path, f"the rules of {name or number} overlap in a way that libseccomp cannot express "
                    f"(arguments {', '.join(map(hex, arguments))}: {found:#x} for {wanted:#x})",
                )  # fmt: skip
    if profile.architectures:
        return
    # Numbers with bit 30 are x32's on x86_64, and nobody's elsewhere.
    high = profile.other_architectures if native == MACHINES["x86_64"][1] else profile.default
    foreign = [(architecture, 0, profile.other_architectures) for architecture in _OTHERS - {native}]
    for architecture, first, wanted in [(native, X32_BIT, high), *foreign]:
        for number in range(first, first + 1024):
            if bpf.verdict(program, architecture, number) != wanted:
                raise _invalid(
                    path, f"call {number:#x} of architecture {architecture:#x} gets past libseccomp's filter"
                )


def _edges(tests: Sequence[Test]) -> Iterable[tuple[int, ...]]:
    """Return argument lists around the values that `tests` compare with, and those values with high bits set."""
    values: dict[int, set[int]] = {}
    for test in tests:
        value = test.second if test.operator == MASKED_EQ else test.value
        near = {value, value + 1, value - 1, value ^ 1 << 32, value ^ 1 << 63, value | 0xFFFFFFFF << 32}
        if test.operator == MASKED_EQ:
            near |= {value | ~test.value, value ^ (test.value & -test.value), value ^ test.value}
        values.setdefault(test.argument, {0, (1 << 64) - 1}).update(word & (1 << 64) - 1 for word in near)
    return itertools.product(*(sorted(values.get(index, {0})) for index in range(6)))


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def build(variant: Variant) -> bytes:
    """Compile the program of `variant`, put it into the cache, and return it; empty when `variant` needs none.

    The file appears whole or not at all, and builders at the same time don't disturb one another. Where it cannot be
    written (a read-only home) the program is returned all the same. Raises what `compile` raises.
    """
    if filters.needs_none(variant):
        return b""
    target = filters.cache_path(variant)
    program = compile(filters.profile_path(variant), variant)
    # A profile that was edited meanwhile has another name now: what was compiled belongs to neither for certain.
    if filters.cache_path(variant) == target:
        with contextlib.suppress(OSError, SbxError):
            _write(target, program)
    return program


def _write(target: str, program: bytes) -> None:
    folder = paths.ensure(os.path.dirname(target))
    # Not named after the target, which may be as long as a name can be.
    temporary = f"{folder}/.{os.getpid()}.{os.urandom(6).hex()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            os.fchmod(fd, 0o600)  # whatever the umask
            file.write(program)
            file.flush()
            os.fsync(fd)
        os.rename(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _prune(folder)


def _prune(folder: str) -> None:
    """Remove all but the newest programs, and what builders left that died: kernels, versions and profiles change."""
    found: list[tuple[float, str]] = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another builder may remove it first
            found.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
    for _, path in sorted(found, reverse=True)[_MOST_CACHED:]:
        with contextlib.suppress(OSError):
            os.unlink(path)
