"""What a hostile command, image, earlier sandbox or neighbour tries; each of these has worked once."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MAIN, Sbx
from launching import DEADLINE, NONE, running

# ── the image `host` ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_home_of_the_password_file_is_hidden_too(sbx: Sbx, tmp_path: Path) -> None:
    real = Path(pwd.getpwuid(os.getuid()).pw_dir)
    if not any(real.iterdir()):
        pytest.skip("the home folder is empty")
    assert sbx.ok("run", *NONE, "host", "ls", "-A", real, env={"HOME": str(tmp_path)}) == ""


def test_our_own_sockets_are_hidden_even_where_the_home_is_shown(sbx: Sbx) -> None:
    # below HOME as by default; in SBX_HOME the tests' is below /tmp, which is hidden anyway
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    data = home / f"escape-{os.getpid()}"
    data.mkdir(mode=0o700)
    try:
        (data / "secret").touch()
        env = {"SBX_HOME": str(data), "HOME": str(home)}
        stdout = sbx.ok("run", *NONE, "--home", "host", "ls", "-A", data, env=env)
        assert "secret" not in stdout
    finally:
        shutil.rmtree(data)


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_home_with_a_nul(sbx: Sbx, rootfs: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(rootfs, root, symlinks=True)
    (root / "etc/passwd").write_bytes(b"evil:x:0:0:x:/ro\0ot:/bin/sh\nnone:x:0:0:x:\0:/bin/sh\n")
    assert sbx.ok("run", *NONE, "--rootfs", "-u", "evil", root, "sh", "-c", "echo $HOME") == "/ro"
    assert sbx.ok("run", *NONE, "--rootfs", "-u", "none", root, "sh", "-c", "echo $HOME") == "/"


@pytest.mark.parametrize("text", [r"\[/nonsense]", r"\[link=http://x/]x[/link]", "[red]x", "\\"])
def test_markup_of_an_image_is_text(text: str) -> None:
    """On a terminal tables are made by a library that knows a markup of its own."""
    script = "from rootless.cli import output; import sys; sys.stdout.isatty = lambda: True; "
    script += f"output.table(('A', 'B'), [({text!r}, 'y')])"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=MAIN.parent.parent, capture_output=True, text=True, env={"TERM": "dumb"}
    )
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
    assert "\33]8" not in done.stdout


# ── sandboxes that share process ids ──────────────────────────────────────────────────────────────────────────────────

#: says what it sees in the command lines of processes that come, until one is called `end`
WATCH = """echo up; while :; do for file in /proc/[0-9]*/cmdline; do
    words=$(tr "\\0" " " <$file 2>/dev/null); case "$words" in *TOKEN*) echo "seen $words";; "sleep 0.01 ") exit;; esac
done; done"""


def test_the_command_line_of_one_who_joins_is_hidden(sbx: Sbx, image: str) -> None:
    watching = ["--name", "watcher", image, "sh", "-c", WATCH.replace("TOKEN", "SECRET[=]")]
    with running(sbx, "run", *NONE, *watching) as process:
        for _ in range(5):
            sbx.ok("run", "--join", "watcher", "--share", "pid", *NONE, "-e", "SECRET=x", image, "true")
        sbx("run", "--join", "watcher", "--share", "pid", *NONE, image, "sleep", "0.01")
        process.terminate()
        process.wait(DEADLINE)
        assert process.stdout
        assert process.stdout.read() == b""


@pytest.mark.parametrize("option", ["--privileged", "--cap-add=SYS_PTRACE"])
def test_nobody_joins_the_processes_of_a_tracer(sbx: Sbx, image: str, option: str) -> None:
    """It could trace the process that sets the new sandbox up, and that still sees the host."""
    joining = ["run", "--join", "first", *NONE]
    with running(sbx, "run", *NONE, "--name", "first", image, "sh", "-c", "echo up; cat"):
        sbx.ok(*joining, "--share", "pid", image, "true")
        with running(sbx, *joining, "--share", "pid", "--name", "tracer", option, image, "sh", "-c", "echo up; cat"):
            for name in ("first", "tracer"):
                result = sbx("run", "--join", name, "--share", "pid", *NONE, image, "true", check=125)
                assert "tracer may trace processes there" in result.stderr
            sbx.ok(*joining, "--share", "ipc", image, "true")
