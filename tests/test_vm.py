"""The tests that need a whole machine: a real systemd, a real cgroup v2 tree. One is made and booted in emulation."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

import needs
import pytest

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rootless-test"
MACHINE = Path(os.environ.get("SBX_TEST_VM") or CACHE / "vm")
#: What the tests import in the machine, pure Python (hypothesis is not: it comes from the distribution).
PACKAGES = ("typer", "rich", "pytest", "pytest-timeout", "pyseccomp", "jeepney")


def dependencies(names: tuple[str, ...]) -> set[str]:
    """Return the names of distributions and of all that they depend on here."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another version of Python, or another system
        found.add(name)
        waiting += [text for text in needed if "extra ==" not in text]
    return found


def copy_packages(target: Path) -> None:
    for name in dependencies(PACKAGES):
        distribution = importlib.metadata.distribution(name)
        for file in distribution.files or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                destination = target / file
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(distribution.locate_file(file)), destination)


def boot(folder: Path, settings: str, tests: str, seconds: int) -> str:
    """Run `tests` in the machine, in each of `settings`; return what it printed. Fails where it does."""
    copy_packages(folder / "site")
    ignore = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv")
    shutil.copytree(needs.CHECKOUT, folder / "checkout", ignore=ignore)
    shutil.copy(needs.CHECKOUT / "tests/vm/job", folder / "run")
    (folder / "settings").write_text(settings)
    (folder / "tests").write_text(tests)
    script = needs.CHECKOUT / "tests/vm"
    subprocess.run(["sh", script / "build", MACHINE], check=True)
    done = subprocess.run(["sh", script / "run", MACHINE, folder, str(seconds)], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.vm
@pytest.mark.timeout(3600)
@needs.program("mmdebstrap", "qemu-system-x86_64", "qemu-img", "mkfs.ext4")
def test_limits_in_every_setting(tmp_path: Path) -> None:
    said = boot(tmp_path, "user-manager login unit delegated root", "tests/test_limits.py tests/test_root.py", 2400)
    assert len(re.findall(r"^\d+ passed", said, re.MULTILINE)) == 5, said


@pytest.mark.vm
@pytest.mark.timeout(3600)
@needs.program("mmdebstrap", "qemu-system-x86_64", "qemu-img", "mkfs.ext4")
def test_a_thousand_sandboxes(tmp_path: Path) -> None:
    said = boot(tmp_path, "unit", "tests/test_limits.py --slow -k thousand", 3000)
    assert "1 passed" in said
