"""Warm: probes of what takes privileges from a sandbox: seccomp, Landlock, keyrings. Outside."""

from __future__ import annotations

import errno as e
import sys

from rootless import paths, seccomp, syscalls
from rootless.checks import host
from rootless.checks.probing import DEGRADED, MISSING, OK, Finding, attempt
from rootless.errors import SbxError

_ALLOW_ALL = b"\x06\0\0\0\0\0\xff\x7f" if sys.byteorder == "little" else b"\0\x06\0\0\x7f\xff\0\0"


def can_load_filters() -> Finding:
    """Whether seccomp filters can be loaded, and libseccomp is there to compile them."""
    failure = attempt([
        ("set no_new_privs", lambda: syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)),
        ("load a seccomp filter", lambda: syscalls.seccomp_load(_ALLOW_ALL)),
    ])  # fmt: skip
    if failure:
        return Finding(
            MISSING, str(failure), "use a kernel with CONFIG_SECCOMP_FILTER, or (without it) --seccomp unconfined"
        )
    paths.allow_packages()
    try:
        library = seccomp.libseccomp()
    except SbxError as error:
        return Finding(MISSING, error.message, error.hint)
    return Finding(OK, f"filters work, libseccomp's interface {library.get_api()}")


def has_landlock() -> Finding:
    """Whether there is the second wall around what handles hostile bytes."""
    if version := syscalls.landlock_version():
        return Finding(OK, f"version {version}")
    return Finding(DEGRADED, "not there, so the process that unpacks images has one wall less",
                   "Linux 5.13 has it; boot with lsm=landlock,… where it is switched off")  # fmt: skip


def has_keyrings() -> Finding:
    """Whether a sandbox can have a session keyring of its own."""
    failure = attempt([("join a new session keyring", syscalls.join_new_session_keyring)])
    if failure is None:
        return Finding(OK, "each sandbox has its own")
    if failure.errno == e.ENOSYS:
        return Finding(OK, "the kernel has none that would have to be hidden")
    if failure.errno == e.EDQUOT:
        quota = "the user's quota of keys is used up"
        return Finding(MISSING, f"{failure}: {quota}", "raise the sysctls kernel.keys.maxkeys and maxbytes", quota)
    refused = "a seccomp filter around this process forbids keyrings"
    return Finding(MISSING, f"{failure}: {refused}", host.OUTER, refused)
