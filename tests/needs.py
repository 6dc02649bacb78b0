"""What this host can do: marks for tests that need more than Python and a kernel.

    @needs.subids
    @needs.program("podman")
    def test_…

A probe returns the reason why the host cannot, or an empty text; it runs once for each worker, when the first test
asks, and never raises. With SBX_MUST_RUN=1 a reason fails the test instead of skipping it.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

Probe = Callable[[], str]
CHECKOUT = Path(__file__).resolve().parent.parent

# Debian's users do not have these, and so no nft, though sbx finds it there.
os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def enforce(reason: str) -> None:
    """Skip the running test for `reason`, or fail it where every test must run; do nothing where it is empty."""
    if reason and os.environ.get("SBX_MUST_RUN") == "1":
        pytest.fail(f"SBX_MUST_RUN=1, and this host cannot: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


def _mark(probe: Probe) -> pytest.MarkDecorator:
    # with_args, since a mark that is called with one function decorates it
    return pytest.mark.needs.with_args(cache(probe))


def _succeeds(*command: str) -> str:
    """Return why `command` failed: the last line it wrote to stderr; empty when it did not."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1]


# ── probes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _no_userns() -> str:
    # Each step counts: on Ubuntu unshare succeeds, and the first privileged act after it fails.
    reason = _succeeds(
        "unshare", "--user", "--map-root-user", "--mount", "--net", "mount", "-t", "tmpfs", "none", "/tmp"
    )
    return f"no user namespaces: {reason}" if reason else ""


def _no_subids() -> str:
    if not (shutil.which("newuidmap") and shutil.which("newgidmap")):
        return "no newuidmap and newgidmap (package uidmap)"
    owners = {str(os.getuid()), pwd.getpwuid(os.getuid()).pw_name}
    for file in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError as error:
            return f"{file}: {error.strerror}"
        if not any(line.split(":")[0] in owners for line in lines):
            return f"{file} has no range for this user"
    return ""


def _no_delegation() -> str:
    try:
        path = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        controllers = Path(f"/sys/fs/cgroup{path[3:]}/cgroup.controllers").read_text().split()
    except (OSError, StopIteration):
        return "no cgroup v2 hierarchy at /sys/fs/cgroup"
    if missing := {"memory", "pids"} - set(controllers):
        return f"controllers not delegated: {' '.join(sorted(missing))}"
    return "" if os.access(f"/sys/fs/cgroup{path[3:]}", os.W_OK) else "this cgroup is not the user's"


def _no_device(path: str) -> Probe:
    def probe() -> str:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            return f"{path}: {error.strerror}"
        return ""

    return probe


def _no_busybox() -> str:
    if not (program := shutil.which("busybox")):
        return "no busybox (package busybox-static)"
    # ldd fails on a static program.
    return "" if _succeeds("ldd", program) else "busybox is not static (package busybox-static)"


def alpine_tarball() -> Path | None:
    """Return the tarball of a real Alpine root filesystem, from SBX_TEST_ALPINE or the folder beside the checkout."""
    if path := os.environ.get("SBX_TEST_ALPINE"):
        return Path(path)
    found = glob.glob(f"{CHECKOUT.parent}/shared/images/alpine-minirootfs-*.tar.gz")
    return Path(sorted(found)[-1]) if found else None


def _no_alpine() -> str:
    path = alpine_tarball()
    return "" if path and path.is_file() else "no Alpine: SBX_TEST_ALPINE names an alpine-minirootfs tarball"


# ── marks ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

userns = _mark(_no_userns)
subids = _mark(_no_subids)
delegation = _mark(_no_delegation)
tun = _mark(_no_device("/dev/net/tun"))
fuse = _mark(_no_device("/dev/fuse"))
busybox = _mark(_no_busybox)
alpine = _mark(_no_alpine)


def program(*names: str) -> pytest.MarkDecorator:
    """Mark a test that runs these programs of the host's."""
    return _mark(lambda: ", ".join(f"no {name}" for name in names if not shutil.which(name)))


def kernel(major: int, minor: int, what: str) -> pytest.MarkDecorator:
    """Mark a test of something that came with Linux `major`.`minor`."""

    def probe() -> str:
        release = os.uname().release
        version = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
        return "" if version >= (major, minor) else f"{what} needs Linux {major}.{minor}; this is {release}"

    return _mark(probe)
