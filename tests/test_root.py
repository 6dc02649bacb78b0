"""What root, who needs no sandbox to do harm, does not do by mistake. In the machine of tests/test_vm.py."""

from __future__ import annotations

import os
from pathlib import Path

import needs
import pytest
from conftest import Sbx

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="these are root's own")


@needs.tun
@needs.program("slirp4netns")
def test_the_network_mounts_nothing_on_the_host(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    """slirp4netns covered a /tmp that is a mount of its own."""
    mounts = Path("/proc/self/mountinfo")
    before = mounts.read_text()
    process = sbx.start("run", "--net", "slirp4netns", "--rootfs", rootfs, "sh", "-c", "echo up; exec sleep 1000")
    assert process.stdout
    assert process.stdout.readline() == b"up\n", process.communicate()
    during = mounts.read_text()
    process.terminate()
    process.communicate(timeout=30)
    assert [line for line in during.splitlines() if line not in before.splitlines()] == []
    assert tmp_path.is_dir()
