"""Checks and hints on hosts that lack something: each is really made so, in namespaces or by a filter of its own."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import COMMAND, Result, Sbx

from rootless import checks
from rootless.checks import probing
from rootless.errors import SbxError, StepError

pytestmark = [needs.userns, needs.program("unshare", "setpriv")]

ROOT = ("--map-root-user",)  #: the caller as root of a namespace with one id
SELF = ("--map-current-user", "--keep-caps")  #: the caller as itself, able to mount all the same
#: Load a filter that answers the calls named after the errno with it, and go on.
FILTER = """
import os, sys, pyseccomp
number, calls, command = int(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
filter = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
for call in calls:
    filter.add_rule(pyseccomp.ERRNO(number), call)
filter.load()
os.execv(command[0], command)
"""

Host = Callable[..., Result]


@pytest.fixture
def host(sbx: Sbx, tmp_path: Path) -> Host:
    """Run sbx on a host made worse: `before` is run as one who may mount; `$T` is an empty folder of the test's own."""

    def run(before: str, *arguments: str | Path, who: tuple[str, ...] = ROOT, wrap: tuple[str, ...] = ()) -> Result:
        command = ["unshare", "--user", *who, "--mount", "sh", "-c", f'set -e; {before or ":"}; exec "$@"', "sh"]
        done = subprocess.run(
            [*command, *wrap, *COMMAND, *arguments],
            env=sbx.env | {"T": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    return run


def answering(number: int, *calls: str) -> tuple[str, ...]:
    return (sys.executable, "-c", FILTER, str(number), ",".join(calls))


def diagnosis(done: Result) -> dict[str, dict[str, Any]]:
    assert done.stdout, done
    return {finding["name"]: finding for finding in json.loads(done.stdout)}


# ── what doctor finds ─────────────────────────────────────────────────────────────────────────────────────────────────

ON_OVERLAY = """mount -t tmpfs none "$T"; cd "$T"; mkdir l u w m; export SBX_HOME=$T/m/home
mount -t overlay -o lowerdir=l,upperdir=u,workdir=w,userxattr none m"""
NO_USERNS = "echo 0 > /proc/sys/user/max_user_namespaces"
#: what is done to the host → the check, its mark, and words of what it finds and of the cure
BAD_HOSTS = {
    "no user namespaces": (NO_USERNS, "userns", "missing", "user.max_user_namespaces is 0", "--nested"),
    "no net namespaces": ("echo 0 > /proc/sys/user/max_net_namespaces", "userns", "missing",
                          "cannot create a sandbox's namespaces in it", "--nested"),
    "a limit of 0": ("echo 0 > /proc/sys/user/max_net_namespaces", "limits", "missing", "max_net_namespaces is 0", ""),
    "few descriptors": ("ulimit -n 100", "limits", "degraded", "100 files", "ulimit -n"),
    "covered /proc": ("mount --bind /dev/null /proc/cpuinfo", "proc", "degraded", "/proc/cpuinfo is covered",
                      "systempaths"),
    "data on overlayfs": (ON_OVERLAY, "overlay", "missing", "is itself on overlayfs", "SBX_HOME"),
    "read-only data": ('mount -t tmpfs -o ro none "$T"; export SBX_HOME=$T/home', "data", "missing", "read-only",
                       "SBX_HOME"),
    "full disk": ('mount -t tmpfs -o size=16k none "$T"; export SBX_HOME=$T/home; cat /dev/zero > $T/f 2>&- || :',
                  "data", "degraded", "0 MiB", "sbx rmi"),
    "data in a file": ('touch "$T/file"; export SBX_HOME=$T/file', "data", "missing", "cannot be written", "SBX_HOME"),
    "no device": ("mount --bind /dev/null /dev/full", "devices", "missing", "/dev/full", "mknod"),
    "no runtime folder": ("unset XDG_RUNTIME_DIR", "runtime", "degraded", "not set", "linger"),
    "runtime folder gone": ("export XDG_RUNTIME_DIR=/nowhere", "runtime", "degraded", "/nowhere", "linger"),
    "no slirp4netns": ("for n in slirp4netns pasta; do [ ! -e /bin/$n ] || mount --bind /dev/null /usr/bin/$n; done",
                       "network", "degraded", "not installed", "package"),
    "no tun": ("mount --bind /dev/full /dev/net/tun; mount -o remount,bind,nodev /dev/net/tun",
               "network", "degraded", "/dev/net/tun: Permission denied", "chmod"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_HOSTS)
def test_a_bad_host(host: Host, what: str) -> None:
    before, name, mark, found, fix = BAD_HOSTS[what]
    finding = diagnosis(host(before, "doctor", "--json"))[name]
    assert finding["mark"] == mark, finding
    assert found in finding["found"]
    assert fix in finding["fix"]


def test_a_user_without_name_or_home(host: Host) -> None:
    done = host("mount --bind /dev/null /etc/passwd; unset HOME SBX_HOME", "doctor", "--json", who=SELF)
    finding = diagnosis(done)["data"]
    assert finding["mark"] == "missing"
    assert "HOME is unset" in finding["found"]
    assert "SBX_HOME" in finding["fix"]


SUBIDS = {
    "none": ("", "no subordinate ids for", "usermod --add-subuids"),
    "malformed": ("{me}:many:65536\n", "no subordinate ids for", "usermod --add-subuids"),
    "somebody else's": ("x{me}:100000:65536\n", "no subordinate ids for", "usermod --add-subuids"),
    "the caller's own id": ("{me}:1:65536\n", "contains your own id", "another range"),
    "overlapping": ("{me}:100000:65536\n{uid}:120000:10\n", "overlap", "correct"),
    "past the last id": ("{me}:4294967290:100\n", "past the last id", "correct"),
}


@needs.subids
@pytest.mark.parametrize("what", SUBIDS)
def test_subordinate_ids_that_will_not_do(host: Host, tmp_path: Path, what: str) -> None:
    text, found, fix = SUBIDS[what]
    (tmp_path / "subuid").write_text(text.format(me=os.environ.get("USER") or os.getlogin(), uid=os.getuid()))
    finding = diagnosis(host('mount --bind "$T/subuid" /etc/subuid', "doctor", "--json", who=SELF))["subids"]
    assert finding["mark"] == "degraded"
    assert found in finding["found"]
    assert "one user only" in finding["found"]
    assert fix in finding["fix"]


@needs.subids
@pytest.mark.parametrize(
    ("before", "wrap", "found"),
    [
        ("mount --bind /dev/null /usr/bin/newuidmap", (), "not installed"),
        ("", (), "is not root's in the user namespace"),
        ("", ("setpriv", "--no-new-privs"), "no_new_privs is set"),
        ("mount --bind /usr/bin/newuidmap /usr/bin/newuidmap; mount -o remount,bind,nosuid /usr/bin/newuidmap", (),
         "mounted nosuid"),
        ('cp /usr/bin/newuidmap "$T/p"; mount --bind "$T/p" /usr/bin/newuidmap', (), "neither setuid root nor"),
    ],
    ids=["missing", "not root's", "no_new_privs", "nosuid", "not setuid"],
)  # fmt: skip
def test_a_newuidmap_that_will_not_do(host: Host, before: str, wrap: tuple[str, ...], found: str) -> None:
    finding = diagnosis(host(before, "doctor", "--json", who=SELF, wrap=wrap))["subids"]
    assert (finding["mark"], found in finding["found"]) == ("degraded", True), finding
    assert finding["fix"]


def test_a_filter_around_us_is_named(host: Host) -> None:
    found = diagnosis(host("", "doctor", "--json", wrap=answering(errno.EPERM, "unshare", "keyctl")))
    assert "cannot create a user namespace" in found["userns"]["found"]
    assert found["userns"]["cause"] == "a seccomp filter around this process forbids it"
    assert "seccomp" in found["keyrings"]["found"]
    # what needs a user namespace does not give a reason of its own
    assert found["overlay"]["blocked"]
    assert found["proc"]["blocked"]


def test_the_act_that_fails_is_named_and_apparmor_is_the_reason(host: Host, tmp_path: Path) -> None:
    # as on Ubuntu: the namespace can be made, and the first privileged act in it fails
    (tmp_path / "apparmor_restrict_unprivileged_userns").write_text("1\n")
    done = host('mount --bind "$T" /proc/sys/kernel', "doctor", "--json", wrap=answering(errno.EACCES, "mount"))
    finding = diagnosis(done)["userns"]
    assert finding["found"].startswith("cannot change mounts in it (Permission denied): AppArmor denies")
    assert "setup-host --sbx " in finding["fix"]


def test_user_namespaces_for_root_only(host: Host, tmp_path: Path) -> None:
    (tmp_path / "unprivileged_userns_clone").write_text("0\n")
    done = host('mount --bind "$T" /proc/sys/kernel', "doctor", "--json", who=SELF, wrap=answering(1, "unshare"))
    finding = diagnosis(done)["userns"]
    assert (finding["cause"], finding["fix"]) == (
        "kernel.unprivileged_userns_clone is 0", "sudo sysctl -w kernel.unprivileged_userns_clone=1",
    )  # fmt: skip


# ── hints ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

RUN = ("run", "--net", "none", "--idmap", "single")


@needs.busybox
@pytest.mark.parametrize(
    ("what", "error", "hint"),
    [
        ("no user namespaces", "create namespaces user: the limit on namespaces is reached",
         "user.max_user_namespaces is 0; "),
        ("no net namespaces", "start pid 1 in new namespaces", "user.max_net_namespaces is 0; "),
        ("data on overlayfs", "mount overlay of 1 layers on ", "the data folder is itself on overlayfs"),
        ("read-only data", "create folder ", "set SBX_HOME to "),
        ("full disk", "No space left on device", "0 MiB"),
        ("no device", "open /dev/full: it is not the device of that name", "/dev/full: not the device of that name; "),
    ],
)  # fmt: skip
def test_a_hint_after_a_failure(host: Host, rootfs: Path, what: str, error: str, hint: str) -> None:
    done = host(BAD_HOSTS[what][0], *RUN, "--rootfs", rootfs, "true")
    assert done.status == 125
    told, *hints = done.stderr.splitlines()[-2:]
    assert told.startswith("sbx: ")
    assert error in told
    assert len(hints) == 1
    assert hints[0].startswith("hint: ")
    assert hint in hints[0]


@needs.busybox
@needs.subids
def test_a_hint_when_the_map_is_refused(host: Host, rootfs: Path) -> None:
    done = host("", "run", "--net", "none", "--idmap", "auto", "--rootfs", rootfs, "true", who=SELF)
    assert done.status == 125
    assert "hint: /usr/bin/newuidmap is not root's in the user namespace that we are in; " in done.stderr


@needs.busybox
def test_a_hint_when_a_filter_hides_a_call(host: Host, rootfs: Path) -> None:
    wrap = answering(errno.ENOSYS, "mount_setattr")
    done = host("", *RUN, "-v", "/usr:/mnt:ro", "--rootfs", rootfs, "true", wrap=wrap)
    assert done.status == 125
    assert "Function not implemented\nhint: a seccomp filter around this process, such as a container's" in done.stderr


@needs.busybox
def test_a_covered_proc_is_no_failure(host: Host, rootfs: Path) -> None:
    done = host("mount --bind /dev/null /proc/cpuinfo", *RUN, "--rootfs", rootfs, "echo", "works")
    assert (done.status, done.stdout) == (0, "works\n")


@needs.busybox
def test_files_of_users_that_are_not_mapped(sbx: Sbx, tmp_path: Path) -> None:
    # /var/tmp is root's, and open to everyone: a mount point there means a copy that would have to be root's
    needs.enforce("" if os.stat("/var/tmp").st_uid not in (os.getuid(), 65534) else "/var/tmp belongs to the caller")
    done = sbx("run", "--net", "none", "-v", f"{tmp_path}:/tmp/new", "--rootfs", "/var", "true")
    assert done.status == 125
    assert "mount " in done.stderr.splitlines()[-2]
    assert "belongs to a user that the id map leaves out" in done.stderr.splitlines()[-1]


@needs.busybox
@pytest.mark.parametrize(
    ("make", "status", "hint"),
    [
        (lambda file: file.write_bytes(b"\x7fNOT"), 126, "hint: it is not a program for "),
        (lambda file: file.symlink_to("file"), 126, "hint: its name leads through too many symbolic links"),
        (lambda file: None, 127, ""),
    ],
    ids=["no program", "a circle", "not there"],
)
def test_a_command_that_cannot_be_executed(
    sbx: Sbx, rootfs: Path, tmp_path: Path, make: Callable[[Path], object], status: int, hint: str
) -> None:
    make(tmp_path / "file")
    if (tmp_path / "file").exists():
        (tmp_path / "file").chmod(0o755)
    done = sbx("run", "--net", "none", "-v", f"{tmp_path}:/mnt", "--rootfs", rootfs, "/mnt/file")
    assert done.status == status
    assert (done.stderr.splitlines()[1:] or [""])[0].startswith(hint)
    assert len(done.stderr.splitlines()) == 1 + bool(hint)


@needs.busybox
def test_a_command_that_is_open_for_writing(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as stream:
        stream.write((rootfs / "bin" / "busybox").read_bytes())
        stream.flush()
        os.fchmod(stream.fileno(), 0o755)
        done = sbx("run", "--net", "none", "-v", f"{tmp_path}:/mnt", "--rootfs", rootfs, "/mnt/file", "true")
    assert done.stderr.splitlines()[1:] == ["hint: somebody has it open for writing"]


@needs.busybox
def test_a_command_on_a_noexec_mount(host: Host, rootfs: Path) -> None:
    before = f'mount -t tmpfs -o noexec none "$T"; cp {rootfs}/bin/busybox "$T/busybox"; cd "$T"'
    done = host(before, *RUN, "--here", "--rootfs", rootfs, "./busybox", "true")
    assert done.status == 126
    assert "is mounted noexec, and so is what a sandbox shows of it" in done.stderr


@needs.busybox
def test_few_descriptors_are_enough(sbx: Sbx, rootfs: Path) -> None:
    limited = ["prlimit", "--nofile=24:24", *COMMAND, "run", "--net", "none", "--rootfs", str(rootfs), "echo", "works"]
    done = subprocess.run(limited, env=sbx.env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "works\n"), done.stderr


def test_a_caller_whose_id_is_not_mapped(host: Host) -> None:
    finding = diagnosis(host("", "doctor", "--json", who=("--mount",)))["userns"]
    assert finding["cause"] == "your own id is not mapped in the user namespace around this process"


def test_an_error_with_a_hint_of_its_own_is_left_alone(host: Host) -> None:
    done = host(NO_USERNS, "inspect", "no-such-box")
    assert "user.max_user_namespaces" not in done.stderr
    assert done.status == 125


def test_no_hint_where_nothing_is_found() -> None:
    assert checks.hint_for(StepError("create namespaces user", errno.EPERM, "Operation not permitted")) == ""
    assert checks.hint_for(SbxError("some-other", "do something: it fails")) == ""
    assert checks.hint_for(StepError("execute x", errno.ENOENT, "No such file or directory")) == ""


# ── acts in a throw-away child ────────────────────────────────────────────────────────────────────────────────────────


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_the_first_failure_is_told() -> None:
    acts: probing.Acts = [("begin", lambda: None), ("go on", lambda: fail(errno.EXDEV)), ("end", lambda: fail(1))]
    assert probing.attempt(acts) == probing.Failure("go on", errno.EXDEV)
    assert probing.attempt(acts[:1]) is None


def test_a_failure_in_a_grandchild_is_told() -> None:
    acts: probing.Acts = [("fork", probing.fork_on), ("fail", lambda: fail(errno.EXDEV))]
    assert probing.attempt(acts) == probing.Failure("fail", errno.EXDEV)
    assert probing.attempt(acts[:1]) is None


def test_an_act_that_kills_the_child_is_named() -> None:
    acts: probing.Acts = [("begin", lambda: None), ("die", lambda: os.kill(os.getpid(), signal.SIGKILL))]
    assert probing.attempt(acts) == probing.Failure("die", errno.EPERM)


def test_an_act_that_hangs_is_named_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "WAIT", 0.2)
    acts: probing.Acts = [("begin", lambda: None), ("hang", lambda: select.select([], [], []))]
    assert probing.attempt(acts) == probing.Failure("hang", errno.ETIMEDOUT)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_probe_that_breaks_is_a_finding() -> None:
    def breaks() -> probing.Finding:
        raise ZeroDivisionError("by design")

    finding = checks.Check("name", "title", "meaning", breaks).run()
    assert (finding.mark, finding.blocked) == (checks.DEGRADED, True)
    assert "ZeroDivisionError: by design" in finding.found
