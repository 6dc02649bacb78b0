"""Who the command is: names and numbers of the image, which may be hostile. Nothing ever becomes root by accident."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import NONE

pytestmark = [needs.userns, needs.busybox, needs.subids]

WHO = ["sh", "-c", 'echo "$(id -u):$(id -g) $HOME"']


def who(sbx: Sbx, image: str, *words: str) -> str:
    return sbx.ok("run", *NONE, *words, image, *WHO)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "0:0 /root"),
        ("root", "0:0 /root"),
        ("0", "0:0 /root"),
        ("guest", "1000:1000 /home/guest"),
        ("1000", "1000:1000 /home/guest"),
        ("guest:daemon", "1000:1 /home/guest"),
        ("guest:5", "1000:5 /home/guest"),
        ("1000:users", "1000:100 /home/guest"),
        ("4321", "4321:0 /"),
        ("4321:1234", "4321:1234 /"),
        ("nobody", "65534:65534 /"),
        ("0:1000", "0:1000 /root"),
        ("0000000005", "5:0 /"),
    ],
)
def test_who(sbx: Sbx, image: str, user: str, expected: str) -> None:
    assert who(sbx, image, *(["-u", user] if user else [])) == expected


def test_home_is_the_callers_word_if_it_was_given(sbx: Sbx, image: str) -> None:
    assert who(sbx, image, "-u", "guest", "-e", "HOME=/else") == "1000:1000 /else"


@pytest.mark.parametrize(
    "user",
    [
        "4294967295", "4294967296", "0000000004294967295", "0000000000004294967295", "18446744073709551616", "-1", "+0",
        "-0", "--1", "1e3x/", "٣", "²", "0x0/", "a/b", "a\nb", "1" * 4000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["user", "group"])
def test_never_an_id(sbx: Sbx, image: str, user: str, place: str) -> None:
    """4294967295 is "no change" to the kernel, and one more is 0: neither may be passed on."""
    result = sbx("run", *NONE, f"--user={user if place == 'user' else 'guest:' + user}", image, *WHO)
    assert (result.status, result.stdout) == (125, "")
    assert result.stderr.startswith(f"sbx: read {place} ")


@pytest.mark.parametrize(
    "user", ["no-such", "Root", "ROOT", " root", "root ", "guest:no-such", "guest:", ":0", "1000 "]
)
def test_unknown(sbx: Sbx, image: str, user: str) -> None:
    result = sbx("run", *NONE, f"--user={user}", image, *WHO)
    if user == "guest:":
        assert result.stdout == "1000:1000 /home/guest\n"
        return
    assert (result.status, result.stdout) == (125, "")
    assert "not in the image's /etc/" in result.stderr


@pytest.mark.parametrize("user", ["4294967294", "100000000"])
def test_ids_without_a_place(sbx: Sbx, image: str, user: str) -> None:
    for words in ([user], [f"0:{user}"], [f"{user}:0"]):
        result = sbx("run", *NONE, "-u", *words, image, *WHO)
        assert (result.status, result.stdout) == (125, "")
        assert "has no place in the sandbox's id map" in result.stderr


# ── hostile images ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hostile(rootfs: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "rootfs"
    shutil.copytree(rootfs, copy, symlinks=True)
    return copy


def run_as(sbx: Sbx, rootfs: Path, user: str) -> tuple[int, str, str]:
    return sbx("run", *NONE, "-u", user, "--rootfs", rootfs, *WHO)


def test_digits_are_never_a_name(sbx: Sbx, hostile: Path) -> None:
    """A user called 1000 with the id of root, and a group called 5."""
    (hostile / "etc/passwd").write_text("1000:x:0:0:evil:/root:/bin/sh\n")
    (hostile / "etc/group").write_text("5:x:0:\n")
    assert run_as(sbx, hostile, "1000:5")[:2] == (0, "1000:5 /\n")


@pytest.mark.parametrize(
    "number", ["4294967295", "4294967296", "0000000000004294967295", "-1", "", "x", "0x0", " 0", "+0", "9" * 100, "٣"]
)
@pytest.mark.parametrize("field", [2, 3])
def test_bad_ids_in_passwd(sbx: Sbx, hostile: Path, number: str, field: int) -> None:
    line = ["evil", "x", "1000", "1000", "", "/", "/bin/sh"]
    line[field] = number
    (hostile / "etc/passwd").write_text(":".join(line) + "\n")
    status, stdout, stderr = run_as(sbx, hostile, "evil")
    assert (status, stdout) == (125, "")
    assert stderr == "sbx: become user evil: the image gives it a bad id\n"


def test_bad_ids_in_group(sbx: Sbx, hostile: Path) -> None:
    (hostile / "etc/group").write_text("evil:x:4294967295:\n")
    status, stdout, stderr = run_as(sbx, hostile, "guest:evil")
    assert (status, stdout, stderr) == (125, "", "sbx: become user evil: the image gives it a bad id\n")


@pytest.mark.parametrize("name", ["passwd", "group"])
@pytest.mark.parametrize(
    "kind", ["fifo", "link-out", "loop", "folder", "missing", "device", "unreadable", "empty", "binary"]
)
def test_files_that_are_none(sbx: Sbx, hostile: Path, tmp_path: Path, name: str, kind: str) -> None:
    """They neither hang nor lead to the host's file: such a file counts as empty."""
    path = hostile / "etc" / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link-out":
        (tmp_path / "theirs").write_text("evil:x:0:0::/:/bin/sh\n")
        path.symlink_to(tmp_path / "theirs")
    elif kind == "loop":
        path.symlink_to(name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "unreadable":
        path.write_text("evil:x\n")
        path.chmod(0)
    elif kind == "empty":
        path.write_text("")
    elif kind == "binary":
        path.write_bytes(os.urandom(1000))
    user = "evil" if name == "passwd" else "4321:evil"
    status, stdout, stderr = run_as(sbx, hostile, user)
    assert (status, stdout) == (125, "")
    assert f"not in the image's /etc/{name}" in stderr
    # and what needs no file works (id(1) is not asked: it would read that file)
    stdout = sbx.ok("run", *NONE, "-u", "4321:1234", "--rootfs", hostile, "grep", "^[UG]id:", "/proc/self/status")
    assert stdout.split()[1::5] == ["4321", "1234"]


def test_a_huge_file(sbx: Sbx, hostile: Path) -> None:
    """A sparse one of 8 GiB: the first part is read, no more."""
    with open(hostile / "etc/passwd", "wb") as stream:
        stream.write(b"first:x:7:8::/:/bin/sh\n")
        stream.truncate(8 << 30)
    assert run_as(sbx, hostile, "first")[:2] == (0, "7:8 /\n")
    assert run_as(sbx, hostile, "last")[0] == 125


@pytest.mark.parametrize(
    "line",
    [
        "first:x:7:8",
        "first",
        "",
        ":",
        "::::::",
        "first:x:7:8::/:/bin/sh:more",
        "\0first:x:7:8::/:/bin/sh",
        "first:x:7:8::",
    ],
)
def test_odd_lines(sbx: Sbx, hostile: Path, line: str) -> None:
    (hostile / "etc/passwd").write_text(line + "\nlast:x:9:9::/:/bin/sh\n")
    assert run_as(sbx, hostile, "last")[:2] == (0, "9:9 /\n")
    assert run_as(sbx, hostile, "first")[0] in (0, 125)


def test_a_home_that_is_no_text(sbx: Sbx, hostile: Path) -> None:
    (hostile / "etc/passwd").write_bytes(b"odd:x:7:8::/\xff\x1b:/bin/sh\n")
    result = sbx("run", *NONE, "-u", "odd", "--rootfs", hostile, "sh", "-c", 'printf %s "$HOME" | od -An -tx1')
    assert (result.status, result.stdout.split()) == (0, ["2f", "ff", "1b"])


def test_the_users_own_terminal_and_folder(sbx: Sbx, image: str) -> None:
    assert who(sbx, image, "-u", "guest", "-w", "/home/guest") == "1000:1000 /home/guest"
    result = sbx("run", *NONE, "-t", "-u", "guest", image, "sh", "-c", "echo written >/dev/stdout; stat -c %u $(tty)")
    assert result.stdout.split() == ["written", "1000"]


def test_files_belong_to_the_users_of_the_image(sbx: Sbx, image: str) -> None:
    script = "stat -c %u:%g /home/guest /etc; cat /home/guest/README; touch /etc/x 2>/dev/null || echo refused"
    lines = sbx.ok("run", *NONE, "-u", "guest", image, "sh", "-c", script).splitlines()
    assert (lines[:2], lines[-1]) == (["1000:1000", "0:0"], "refused")


def test_no_descriptor_for_the_images_passwd(sbx: Sbx, image: str) -> None:
    """Which says nothing of what is in it."""
    result = sbx("run", *NONE, "--ulimit", "nofile=3", "-u", "guest", image, "true")
    assert (result.status, result.stdout) == (125, "")
    assert result.stderr.startswith("sbx: become user guest: Too many open files\n")
