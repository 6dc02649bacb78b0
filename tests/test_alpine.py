"""A real distribution inside: its package manager, its user tools and its tar, as root of the user namespace."""

from __future__ import annotations

import datetime
import os
import subprocess
from pathlib import Path

import needs
import pytest
from conftest import Sbx

SINGLE = ("--idmap", "single")
AUTO = ("--idmap", "auto")
MAPS = [pytest.param(SINGLE, id="single"), pytest.param(AUTO, id="auto", marks=needs.subids)]


@pytest.fixture(params=["offline", "alpine"])
def system(request: pytest.FixtureRequest) -> str:
    """Either image: what is not about packages works on both."""
    return str(request.getfixturevalue({"offline": "image", "alpine": "alpine"}[request.param]))


def run(sbx: Sbx, ids: tuple[str, ...], image: str, script: str) -> str:
    return sbx.ok("run", "--net", "none", *ids, image, "sh", "-ec", script)


@pytest.mark.parametrize("ids", MAPS)
def test_apk(sbx: Sbx, alpine: str, ids: tuple[str, ...]) -> None:
    """The package manager works on the local database: it asks for locks, owners, chroot and renames."""
    packages = run(sbx, ids, alpine, "apk --no-network info").splitlines()
    assert {"busybox", "musl", "apk-tools"} <= set(packages)
    script = "apk --no-network del libc-utils >/dev/null; apk --no-network info"
    left = run(sbx, ids, alpine, script)
    assert {"musl-utils", "scanelf"} <= set(packages)
    assert set(packages) - set(left.splitlines()) == {"musl-utils", "scanelf"}
    assert "is owned by busybox" in run(sbx, ids, alpine, "apk --no-network info --who-owns /bin/busybox")


@needs.subids
def test_users(sbx: Sbx, system: str) -> None:
    make = "adduser -D -u 4242 -s /bin/sh mallory"
    if system == "offline":  # whose busybox may lack it
        make = (
            "echo mallory:x:4242:4242::/home/mallory:/bin/sh >>/etc/passwd; echo mallory:x:4242: >>/etc/group; "
            "mkdir /home/mallory; chown 4242:4242 /home/mallory"
        )
    script = f"""
        {make}
        su mallory -c 'id -u; cd; touch mine; stat -c %U:%G mine'
        su -s /bin/sh nobody -c 'id -u; ! cat /etc/shadow' 2>/dev/null
        chown 12:34 /tmp; stat -c %u:%g /tmp
    """
    assert run(sbx, AUTO, system, script).split() == ["4242", "mallory:mallory", "65534", "12:34"]


@needs.subids
def test_tar_with_other_owners(sbx: Sbx, system: str) -> None:
    script = """
        cd /tmp; mkdir a; echo x > a/b; chown 33:44 a/b; chmod 4750 a/b; ln a/b a/c; ln -s b a/d
        tar -cf t.tar a; rm -r a; tar -xf t.tar; stat -c %u:%g:%a:%h a/b; readlink a/d
    """
    assert run(sbx, AUTO, system, script).split() == ["33:44:4750:2", "b"]


def test_tar_with_one_id(sbx: Sbx, system: str) -> None:
    """chown is only pretended there, but what unpacks with tar still unpacks."""
    script = (
        "cd /tmp; tar -cf t.tar /etc; mkdir x; tar -xf t.tar -C x; cmp /etc/passwd x/etc/passwd; chown 33 x; echo done"
    )
    assert run(sbx, SINGLE, system, script).splitlines()[-1] == "done"


def as_tar_lists_it(tarball: Path) -> dict[str, tuple[str, str, str, str]]:
    """Return path → mode, owner, size or target, and time of what is neither a folder's nor the sandbox's own."""
    command = ["tar", "--numeric-owner", "--full-time", "-tvzf", str(tarball)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TZ": "UTC"})
    found = {}
    for line in done.stdout.splitlines():
        mode, owner, size, day, time, rest = line.split(None, 5)
        name, _, target = rest.removesuffix("/").partition(" -> ")
        found[name] = (
            mode,
            owner,
            target or ("" if mode[0] == "d" else size),
            "" if mode[0] == "d" else f"{day} {time}",
        )
    return found


@pytest.mark.parametrize("ids", MAPS)
def test_the_tree_is_what_the_tar_holds(sbx: Sbx, alpine: str, ids: tuple[str, ...]) -> None:
    """Names, kinds, modes, owners, times and contents, through import, launch and the sandbox's own tools."""
    tarball = needs.alpine_tarball()
    assert tarball
    own = ("./dev", "./proc", "./sys", "./run", "./etc/hosts", "./etc/resolv.conf", "./etc/hostname", "./etc/mtab")
    expected = {name: entry for name, entry in as_tar_lists_it(tarball).items() if not name.startswith(own)}
    del expected["."]
    if ids == SINGLE:  # one owner, who can enter each folder of his
        for name, (mode, _, what, when) in expected.items():
            expected[name] = (f"drwx{mode[4:]}" if mode[0] == "d" else mode, "0/0", what, when)
    script = "cd /; find . -xdev -print0 | xargs -0 stat -c '%A|%u/%g|%s|%Y|%n|%N'"
    found = {}
    for line in run(sbx, ids, alpine, script).splitlines():
        mode, owner, size, seconds, name, shown = line.split("|")
        if name in expected:
            when = datetime.datetime.fromtimestamp(int(seconds), datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
            target = shown.partition(" -> ")[2].strip("'")
            found[name] = (mode, owner, target or ("" if mode[0] == "d" else size), "" if mode[0] == "d" else when)
    assert found == expected
    assert len(found) > 450


def test_exported_alpine_is_alpine(fresh_sbx: Sbx, tmp_path: Path) -> None:
    """With one id the owners are recorded, so what is exported has them again."""
    needs.enforce(needs.alpine.args[0]())
    tarball = str(needs.alpine_tarball())
    fresh_sbx.ok("import", "--idmap", "single", "alpine", tarball)
    fresh_sbx.ok("export", "--idmap", "single", "-o", tmp_path / "out.tar", "alpine")

    def listing(*options: str) -> list[str]:
        done = subprocess.run(["tar", "--numeric-owner", "-tv", *options], capture_output=True, text=True, check=True)
        lines = [line.split(None, 5) for line in done.stdout.splitlines()]
        # a file's second name is a hard link to whichever came first
        return sorted(
            f"{fields[0]} {fields[1]} {fields[5].removeprefix('./')}" for fields in lines if fields[0][0] != "h"
        )

    assert listing("-f", str(tmp_path / "out.tar")) == listing("-zf", tarball)
    assert os.path.getsize(tmp_path / "out.tar") > 7_000_000
