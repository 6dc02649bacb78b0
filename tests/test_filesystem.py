"""What a sandbox sees of files: root, volumes, /dev, /proc and /sys; and that it never reaches, or changes, others."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import NONE, is_root

pytestmark = [needs.userns, needs.busybox]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of the user's with one file, to be mounted."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "file").write_text("mine\n")
    return folder


@pytest.fixture
def hostile(rootfs: Path, tmp_path: Path) -> Path:
    """A copy of the offline image's root, to be made hostile."""
    copy = tmp_path / "rootfs"
    shutil.copytree(rootfs, copy, symlinks=True)
    return copy


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of the host that nothing in an image may lead to."""
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("hosts", "resolv.conf", "hostname", "passwd", "null", "sub"):
        (victim / name).write_text("of the host\n")
    return victim


def listing(folder: Path) -> list[tuple[str, int, float]]:
    """Return all that is in `folder`: relative name, mode, and when it was changed last."""
    paths = sorted(folder.rglob("*"))
    return [(str(path.relative_to(folder)), path.lstat().st_mode, path.lstat().st_mtime) for path in paths]


def mounts(text: str) -> dict[str, set[str]]:
    """Return mount point → options of /proc/self/mountinfo's `text`."""
    return {line.split()[4]: set(line.split()[5].split(",")) for line in text.splitlines()}


# ── the root ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_vanishes(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "sh", "-c", "echo x >/root/f; rm /etc/passwd; cat /root/f") == "x"
    assert sbx.ok("run", *NONE, image, "sh", "-c", "ls /root; ls /etc/passwd") == "/etc/passwd"


def test_a_folder_as_root_is_not_written_to(sbx: Sbx, rootfs: Path) -> None:
    before = listing(rootfs)
    script = "mkdir /new; echo x >/etc/new; rm -r /home; mv /mnt /mnt2; echo x >>/etc/passwd; ls /"
    assert "new" in sbx.ok("run", *NONE, "--rootfs", rootfs, "sh", "-c", script).split()
    assert listing(rootfs) == before


def test_a_folder_that_is_none(sbx: Sbx, tmp_path: Path) -> None:
    result = sbx("run", *NONE, "--rootfs", tmp_path / "no\x1b", "true")
    assert result.status == 125
    assert result.stderr == f"sbx: open root filesystem {tmp_path}/no\\x1b: not a folder\n"


def test_read_only(sbx: Sbx, image: str, folder: Path) -> None:
    script = "touch /x; touch /etc/x; touch /dev/shm/ok && touch /mnt/ok && touch /scratch/ok && echo fine"
    result = sbx("run", *NONE, "--read-only", "--tmpfs", "/scratch", "-v", f"{folder}:/mnt", image, "sh", "-c", script)
    assert result.stdout == "fine\n"
    assert result.stderr.count("Read-only file system") == 2
    assert (folder / "ok").exists()


def test_the_host_as_root(sbx: Sbx) -> None:
    home = os.environ.get("HOME", "")
    script = 'ls -A /tmp /run/user 2>/dev/null; ls -A "$0"; touch /etc/x /usr/x; id -u; echo x >/tmp/x && cat /tmp/x'
    result = sbx("run", *NONE, "host", "sh", "-c", script, home)
    shown = [line for line in result.stdout.splitlines() if line and not line.endswith(":")]
    assert shown == [str(os.geteuid()), "x"]  # nothing of /tmp, /run or the home folder
    assert result.stderr.count("Read-only file system") == 2


def test_the_roots_mode_is_the_images(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "stat", "-c", "%a %u:%g", "/").split() == ["755", "0:0"]


# ── volumes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_volumes(sbx: Sbx, image: str, folder: Path) -> None:
    words = [
        "-v",
        f"{folder}:/rw",
        "-v",
        f"{folder}:/ro:ro",
        "-v",
        f"{folder}/file:/one/deep/file:ro",
        "-v",
        f"{folder}:{folder}",
    ]
    script = f"cat /ro/file /one/deep/file {folder}/file; echo x >/rw/new; echo x >/ro/y; echo x >/one/deep/file"
    result = sbx("run", *NONE, *words, image, "sh", "-c", script)
    assert result.stdout == "mine\n" * 3
    assert result.stderr.count("Read-only file system") == 2
    assert (folder / "new").read_text() == "x\n"
    assert (folder / "new").stat().st_uid == os.geteuid()
    assert (folder / "file").read_text() == "mine\n"
    alone = sbx("run", *NONE, "-v", folder, image, "true")  # elsewhere a volume without a name: not the host's folder
    assert (alone.status, "SOURCE:TARGET" in alone.stderr) == (125, True)
    assert not (folder / "y").exists()


def test_volumes_in_words(sbx: Sbx, image: str, tmp_path: Path) -> None:
    odd = tmp_path / "a:b c"
    odd.mkdir()
    words = ["--mount", f"type=bind,source={odd},target=/x,readonly", "--mount", "type=tmpfs,dst=/t,tmpfs-size=1m"]
    stdout = sbx.ok("run", *NONE, *words, image, "cat", "/proc/self/mountinfo")
    assert "ro" in mounts(stdout)["/x"]
    assert " /t rw,nosuid,nodev,noexec" in stdout
    assert "size=1024k" in stdout


def test_relative_sources(sbx: Sbx, image: str, folder: Path) -> None:
    assert sbx.ok("run", *NONE, "-v", "./file:/x", image, "cat", "/x", cwd=folder) == "mine"
    assert sbx.ok("run", *NONE, "-v", ".:/x", image, "cat", "/x/file", cwd=folder) == "mine"
    result = sbx("run", *NONE, "-v", "file:/x", image, "true", cwd=folder)
    assert (result.status, "write ./file" in result.stderr) == (125, True)


def test_one_volume_in_another_whatever_the_order(sbx: Sbx, image: str, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "inner").mkdir(parents=True)
    words = ["-v", f"{folder}:/a/inner", "-v", f"{other}:/a"]
    assert sbx.ok("run", *NONE, *words, image, "cat", "/a/inner/file") == "mine"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (["-v", "/no/such:/x"], "mount /no/such: No such file or directory"),
        (["-v", "/etc:/"], "read mount '/etc:/': the target cannot be the root"),
        (["-v", "/etc:/x/../.."], "read mount '/etc:/x/../..': the target cannot be the root"),
        (["-v", "/etc:x"], "read mount target 'x': it is no absolute path"),
        (["-v", "/etc:/x:wat"], "read mount '/etc:/x:wat': unknown option 'wat'\nhint: options are ro, rw, noexec"),
        (["--tmpfs", "/x:wat"], "read mount '/x:wat': unknown option 'wat'\nhint: options are size=, mode=, exec, ro"),
        (["--ulimit", "nofile=9:8"], "set limit 'nofile=9:8': the soft limit is above the hard one"),
        (["--ulimit", "core=-1:8"], "set limit 'core=-1:8': the soft limit is above the hard one"),
        (["--timeout", "-1"], "read --timeout -1: it is a number of seconds, more than 0"),
        (["--cpu-time", "nan"], "read --cpu-time nan: it is a number of seconds, more than 0"),
        (["-v", ":/x"], "read volume ':/x': it is SOURCE:TARGET[:OPTIONS]"),
        (["--tmpfs", "x"], "read mount target 'x': it is no absolute path"),
        (["--tmpfs", "/x:size=lots"], "read size 'lots' of --tmpfs /x:size=lots: it is a number with k, m, g or t"),
        (["--mount", "type=wat,source=/etc,target=/x"], "read mount 'type=wat,source=/etc,target=/x': it is "),
        (["-w", "rel"], "read working directory 'rel': it is no absolute path"),
        (["--device", "/etc/passwd"], "add device /etc/passwd: it is not a device below /dev"),
        (["--device", "/dev/no-such"], "add device /dev/no-such: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(sbx: Sbx, image: str, words: list[str], cause: str) -> None:
    result = sbx("run", *NONE, *words, image, "true")
    assert result.status == 125
    assert result.stderr.startswith(f"sbx: {cause}")


def test_read_only_includes_all_mounts_below(sbx: Sbx, image: str) -> None:
    stdout = sbx.ok("run", *NONE, "-v", "/:/host:ro", image, "cat", "/proc/self/mountinfo")
    below = {point: options for point, options in mounts(stdout).items() if point.startswith("/host/")}
    assert below
    assert all("ro" in options for options in below.values())


def test_volumes_have_no_set_user_id_and_no_devices(sbx: Sbx, image: str, folder: Path) -> None:
    words = ["-v", f"{folder}:/v", "-v", f"{folder}:/n:noexec", "--tmpfs", "/t"]
    found = mounts(sbx.ok("run", *NONE, *words, image, "cat", "/proc/self/mountinfo"))
    assert found["/v"] >= {"nosuid", "nodev"}
    assert found["/n"] >= {"nosuid", "nodev", "noexec"}
    assert found["/t"] >= {"nosuid", "nodev", "noexec"}
    assert found["/"] >= {"nosuid", "nodev"}


def test_mounts_of_the_sandbox_do_not_reach_the_host(sbx: Sbx, image: str, folder: Path) -> None:
    words = ["--privileged", "-v", f"{folder}:/v", image, "mount", "-t", "tmpfs", "none", "/v"]
    assert sbx("run", *NONE, *words).status == 0
    assert os.listdir(folder) == ["file"]  # and the fixture has looked at the mounts


# ── nothing is made in the user's folders ─────────────────────────────────────────────────────────────────────────────


def test_targets_are_made_inside_only(sbx: Sbx, rootfs: Path, folder: Path) -> None:
    before = listing(rootfs)
    words = [
        "-v",
        f"{folder}:/new/deep/folder",
        "-v",
        f"{folder}/file:/new/file",
        "--tmpfs",
        "/new/tmp",
        "-w",
        "/new/work",
    ]
    stdout = sbx.ok("run", *NONE, *words, "--rootfs", rootfs, "sh", "-c", "pwd; cat /new/file; ls /new/deep/folder")
    assert stdout.split() == ["/new/work", "mine", "file"]
    assert listing(rootfs) == before


@pytest.mark.parametrize(
    "words",
    [
        ["-v", "/etc/hostname:/v/f"],
        ["-v", "/etc:/v/sub/folder"],
        ["--tmpfs", "/v/t"],
        ["-w", "/v/work"],
        ["--mount", "type=bind,source=/etc,target=/v/../v/x"],
    ],
    ids=lambda words: " ".join(words),
)
def test_never_in_a_volume(sbx: Sbx, image: str, folder: Path, words: list[str]) -> None:
    before = listing(folder)
    result = sbx("run", *NONE, "-v", f"{folder}:/v", *words, image, "true")
    assert result.status == 125
    assert "it would appear in your own folder that is mounted there" in result.stderr
    assert listing(folder) == before


def test_what_is_there_in_a_volume_can_be_mounted_on(sbx: Sbx, image: str, folder: Path) -> None:
    before = listing(folder)
    words = ["-v", f"{folder}:/v", "-v", "/etc/hostname:/v/file"]
    assert sbx.ok("run", *NONE, *words, image, "cat", "/v/file") == Path("/etc/hostname").read_text().strip()
    assert listing(folder) == before


def test_a_volume_on_etc_is_the_users(sbx: Sbx, image: str, folder: Path) -> None:
    """Nothing is written over it, and nothing in it is replaced: a dangling link there is the user's too."""
    (folder / "hosts").write_text("my hosts\n")
    (folder / "resolv.conf").symlink_to("/nowhere")
    os.mkfifo(folder / "hostname")
    before = listing(folder)
    assert sbx.ok("run", *NONE, "-v", f"{folder}:/etc", image, "cat", "/etc/hosts") == "my hosts"
    assert listing(folder) == before


@pytest.mark.parametrize("name", ["hosts", "resolv.conf", "hostname"])
def test_a_volume_on_a_file_of_ours_is_the_users(sbx: Sbx, image: str, folder: Path, name: str) -> None:
    assert sbx.ok("run", *NONE, "-v", f"{folder}/file:/etc/{name}", image, "cat", f"/etc/{name}") == "mine"


def test_an_image_whose_etc_leads_into_a_volume(sbx: Sbx, hostile: Path, folder: Path) -> None:
    (hostile / "etc").rename(hostile / "old")
    (hostile / "etc").symlink_to("/v")
    (folder / "hosts").write_text("my hosts\n")
    (folder / "resolv.conf").symlink_to("/nowhere")
    before = listing(folder)
    result = sbx("run", *NONE, "-v", f"{folder}:/v", "--rootfs", hostile, "true")
    assert result.status == 125
    assert result.stderr.startswith(
        "sbx: write /etc/resolv.conf: it is no plain file, in your own folder that is mounted"
    )
    assert listing(folder) == before


# ── tmpfs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tmpfs(sbx: Sbx, image: str) -> None:
    words = ["--tmpfs", "/a:size=64k,mode=700", "--tmpfs", "/b:exec", "--tmpfs", "/c:ro", "--shm-size", "128k"]
    script = """
        stat -c %a /a /b
        dd if=/dev/zero of=/a/x bs=1k count=100 2>/dev/null || echo full
        dd if=/dev/zero of=/dev/shm/x bs=1k count=200 2>/dev/null || echo full
        cp /bin/busybox /b/true; /b/true && echo ran
        cp /bin/busybox /dev/shm/true 2>/dev/null; /dev/shm/true 2>/dev/null || echo refused
        touch /c/x 2>/dev/null || echo read-only"""
    stdout = sbx.ok("run", *NONE, *words, image, "sh", "-c", script)
    assert stdout.split() == ["700", "1777", "full", "full", "ran", "refused", "read-only"]


# ── /dev ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dev(sbx: Sbx, image: str) -> None:
    names = "core fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"
    assert set(sbx.ok("run", *NONE, image, "ls", "/dev").split()) == set(names.split())
    script = "cd /dev; stat -c '%n %t:%T %a' null zero full random urandom tty"
    assert sbx.ok("run", *NONE, image, "sh", "-c", script).splitlines() == [
        "null 1:3 666", "zero 1:5 666", "full 1:7 666", "random 1:8 666", "urandom 1:9 666", "tty 5:0 666",
    ]  # fmt: skip
    script = "cd /dev; for link in fd stdin stdout stderr ptmx core; do readlink $link; done"
    links = ["/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", "pts/ptmx", "/proc/kcore"]
    assert sbx.ok("run", *NONE, image, "sh", "-c", script).splitlines() == links


def test_devices_work_and_no_others_can_be_made(sbx: Sbx, image: str) -> None:
    script = """
        echo x >/dev/null; head -c 4 /dev/zero | od -An -tx1; head -c 8 /dev/urandom | wc -c
        echo x 2>/dev/null >/dev/full || echo full
        mknod /dev/sda b 8 0 2>/dev/null || echo no-block
        mknod /tmp/mem c 1 1 2>/dev/null || echo no-char
        cat /dev/core 2>/dev/null | head -c 1 | wc -c"""
    stdout = sbx.ok("run", *NONE, image, "sh", "-c", script)
    assert stdout.split() == ["00"] * 4 + ["8", "full", "no-block", "no-char", "0"]


def test_dev_is_small(sbx: Sbx, image: str) -> None:
    assert sbx("run", *NONE, image, "sh", "-c", "head -c 1000000 /dev/zero >/dev/filler").status == 1


@needs.fuse
def test_a_device_that_was_asked_for(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, "--device", "/dev/fuse", image, "stat", "-c", "%t:%T", "/dev/fuse") == "a:e5"


# ── /proc and /sys ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_proc_shows_the_sandbox_alone(sbx: Sbx, image: str) -> None:
    stdout = sbx.ok("run", *NONE, image, "sh", "-c", "cd /proc; echo [0-9]*")
    assert set(stdout.split()) <= {"1", "2", "3"}


MASKED_FILES = [
    "/proc/kcore",
    "/proc/keys",
    "/proc/interrupts",
    "/proc/timer_list",
    "/proc/kallsyms",
    "/proc/config.gz",
]


def test_masked(sbx: Sbx, image: str) -> None:
    words = ["cat", *[path for path in MASKED_FILES if os.path.exists(path)]]
    assert sbx.ok("run", *NONE, image, *words) == ""
    folders = ["/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/kernel/debug", "/sys/kernel/security"]
    words = ["find", *[path for path in folders if os.path.exists(path)], "-mindepth", "1"]
    assert sbx.ok("run", *NONE, image, *words) == ""


@pytest.mark.parametrize("init", [[], ["--no-init"]], ids=["init", "no-init"])
@pytest.mark.parametrize("null", ["missing", "folder", "file"])
def test_files_are_masked_or_nothing_runs(sbx: Sbx, image: str, tmp_path: Path, null: str, init: list[str]) -> None:
    """The user's own /dev, in which the device is not there, or something else."""
    folder = tmp_path / "dev"
    folder.mkdir()
    folder.chmod(0o755)
    {"missing": lambda: None, "folder": (folder / "null").mkdir, "file": (folder / "null").touch}[null]()
    result = sbx("run", *NONE, *init, "-v", f"{folder}:/dev", image, "echo", "runs")
    assert (result.status, result.stdout) == (125, "")
    assert result.stderr.startswith("sbx: mask "), result


def test_unmask(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, "--unmask", "/proc/interrupts", image, "head", "-c", "9", "/proc/interrupts")
    found = mounts(sbx.ok("run", *NONE, "--unmask", "ALL", image, "cat", "/proc/self/mountinfo"))
    assert not [point for point in found if point.startswith(("/proc/", "/sys/"))]


@pytest.mark.parametrize(
    "path", ["/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/sys/vm/drop_caches", "/proc/irq/x"]
)
def test_proc_cannot_be_written(sbx: Sbx, image: str, path: str) -> None:
    result = sbx("run", *NONE, image, "sh", "-c", f"echo x >{path}")
    assert result.status == 1
    assert any(cause in result.stderr for cause in ("Read-only", "Permission denied", "nonexistent")), result


def test_sys_is_read_only(sbx: Sbx, image: str) -> None:
    found = mounts(sbx.ok("run", *NONE, image, "cat", "/proc/self/mountinfo"))
    assert all(
        "ro" in options or point == "/sys/kernel/vmcoreinfo"
        for point, options in found.items()
        if point.startswith("/sys")
    )
    result = sbx("run", *NONE, image, "sh", "-c", "ls /sys/class/net; echo 1 >/sys/class/net/lo/mtu")
    assert result.stdout == "lo\n"  # our own net namespace's
    assert "Read-only" in result.stderr


# ── files of ours ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_of_ours(sbx: Sbx, image: str) -> None:
    words = ["--hostname", "box", "--add-host", "db:10.1.2.3", image]
    stdout = sbx.ok("run", *NONE, *words, "sh", "-c", "hostname; cat /etc/hostname /etc/hosts")
    lines = stdout.splitlines()
    assert lines[:2] == ["box", "box"]
    hosts = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert "localhost" in hosts["127.0.0.1"]
    assert "box" in str(hosts)
    assert hosts["10.1.2.3"] == ["db"]


def test_no_resolver(sbx: Sbx, hostile: Path) -> None:
    """The image's is covered; where it has none there is nothing to say, and nothing is written to say it."""
    words: list[str | Path] = ["run", *NONE, "--rootfs", hostile]
    (hostile / "etc" / "resolv.conf").write_text("nameserver 10.1.1.1\n")
    assert sbx.ok(*words, "cat", "/etc/resolv.conf") == ""
    (hostile / "etc" / "resolv.conf").unlink()
    assert sbx.ok(*words, "sh", "-c", "test ! -e /etc/resolv.conf && echo none") == "none"


def test_files_of_ours_can_be_changed(sbx: Sbx, image: str) -> None:
    """Programs do: they are the sandbox's own, and vanish with it."""
    script = "echo 127.0.0.1 more >>/etc/hosts && grep -c more /etc/hosts"
    assert sbx.ok("run", *NONE, image, "sh", "-c", script) == "1"


# ── hostile images ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["proc", "sys", "dev"])
@pytest.mark.parametrize("how", ["absolute", "relative", "file", "dangling", "loop"])
def test_a_place_of_ours_that_is_something_else(sbx: Sbx, hostile: Path, victim: Path, place: str, how: str) -> None:
    (hostile / place).rmdir()
    if how == "file":
        (hostile / place).write_text("x")
    else:
        target = {"absolute": str(victim), "relative": f"../../../../../../../..{victim}", "dangling": "/none"}
        (hostile / place).symlink_to(target.get(how, place))
    before = listing(victim)
    result = sbx("run", *NONE, "--rootfs", hostile, "true")
    assert result.status == 125
    assert result.stderr.startswith(f"sbx: mount {'on' if how != 'file' else ''}".rstrip())
    assert listing(victim) == before


@pytest.mark.parametrize("name", ["hosts", "resolv.conf", "hostname"])
@pytest.mark.parametrize("how", ["absolute", "relative", "proc", "loop", "fifo", "folder", "socket"])
def test_a_file_of_ours_that_is_something_else(sbx: Sbx, hostile: Path, victim: Path, name: str, how: str) -> None:
    path = hostile / "etc" / name
    path.unlink(missing_ok=True)
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        target = {
            "absolute": f"{victim}/{name}",
            "relative": f"../../../../../..{victim}/{name}",
            "proc": "/proc/1/root/x",
        }
        path.symlink_to(target.get(how, name))
    before = listing(victim)
    result = sbx("run", *NONE, "--hostname", "box", "--rootfs", hostile, "sh", "-c", f"cat /etc/{name}")
    if how == "folder":
        assert (result.status, result.stderr.startswith(f"sbx: write /etc/{name}: ")) == (125, True)
    else:
        assert (result.status, result.stderr) == (0, "")
        assert "of the host" not in result.stdout
    assert listing(victim) == before


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("data", ["-v", "/etc/hostname:/data/new"]),
        ("data", ["--tmpfs", "/data/deep/new"]),
        ("data", ["-w", "/data/new"]),
        ("data", ["-w", "/data"]),
        ("data", ["-v", "/etc:/data"]),
        ("etc", []),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
@pytest.mark.parametrize("how", ["absolute", "relative", "magic"])
def test_targets_behind_links_stay_inside(
    sbx: Sbx, hostile: Path, victim: Path, link: str, words: list[str], how: str
) -> None:
    if (hostile / link).exists():
        (hostile / link).rename(hostile / "moved")
    target = {"absolute": str(victim), "relative": f"../../../../../..{victim}", "magic": "/proc/self/cwd"}
    (hostile / link).symlink_to(target[how])
    before = listing(victim)
    # Where it leads to is missing inside, so most of this fails; what must not happen is that it is the host's.
    result = sbx("run", *NONE, *words, "--rootfs", hostile, "sh", "-c", f"cat {victim}/hosts hosts 2>/dev/null; true")
    assert result.status in (0, 125)
    assert "of the host" not in result.stdout
    assert result.status == 0 or result.stderr.startswith("sbx: ")
    assert listing(victim) == before


def test_links_inside_are_followed_inside(sbx: Sbx, hostile: Path, folder: Path) -> None:
    (hostile / "var" / "run").symlink_to("/run")
    (hostile / "opt" / "up").symlink_to("../../../../mnt")
    words = ["-v", f"{folder}:/var/run/mine", "-v", f"{folder}:/opt/up/mine"]
    stdout = sbx.ok("run", *NONE, *words, "--rootfs", hostile, "cat", "/run/mine/file", "/mnt/mine/file")
    assert stdout == "mine\nmine"


def test_a_folder_without_read_permission_is_passed(sbx: Sbx, hostile: Path, folder: Path) -> None:
    (hostile / "srv").chmod(0o111)
    (hostile / "srv" / "x").mkdir() if is_root() else None
    assert sbx.ok("run", *NONE, "-v", f"{folder}:/srv/x", "--rootfs", hostile, "cat", "/srv/x/file") == "mine"
    (hostile / "srv").chmod(0o755)


SHOW = 'cd /mnt; printf %s * | od -An -tx1; for name in *; do touch "$name/x"; done'


def test_odd_names(sbx: Sbx, image: str, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/\xff\n \x1b'\""
    os.mkdir(odd)
    result = sbx("run", *NONE, "-v", odd + b":/mnt/\xfe\n", image, "sh", "-c", SHOW)
    assert (result.status, result.stdout.split()) == (0, ["fe", "0a"])
    assert os.listdir(odd) == [b"x"]
    # and with control characters nothing is printed raw
    result = sbx("run", *NONE, "-v", odd + b"/none:/x", image, "true")
    assert (result.status, "\x1b" in result.stderr, result.stderr.count("\n") <= 2) == (125, False, True)


def test_the_stores_path_is_not_shown(sbx: Sbx, image: str) -> None:
    stdout = sbx.ok("run", *NONE, image, "sh", "-c", "cat /proc/self/mountinfo /proc/1/mountinfo /proc/mounts")
    assert str(sbx.home) not in stdout
    assert os.environ.get("HOME", "/nonexistent") not in stdout


def test_a_hundred_layers(sbx: Sbx, image: str) -> None:
    """An image's layers are folders of the store: an overlay of a hundred of them is mounted as one of three."""
    layers = sbx.home / "layers"
    base = next(path.name for path in layers.iterdir() if (path / "fs").is_dir())
    made = [f"many{number:020}" for number in range(100)]
    for number, name in enumerate(made):
        (layers / name / "fs").mkdir(parents=True)
        (layers / name / "fs" / f"file{number}").write_text(f"{number}\n")
        (layers / name / "fs" / "top").write_text(f"{number}\n")
    names = [f"{name}/fs" for name in (*reversed(made), base)]
    code = f"""
import os, sys
sys.path.insert(0, {str(needs.CHECKOUT)!r})
from rootless import launch, options, spec
request = options.read("run", ["--net", "none", "x", "sh", "-c", "cat /top; ls -d /file* | wc -l"])
launch.find_image = lambda *_: spec.Image(reference="x", digest="x", layers={names!r})
os._exit(launch.run(request))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=sbx.env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    for name in made:
        shutil.rmtree(layers / name)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["99", "100"], "")
