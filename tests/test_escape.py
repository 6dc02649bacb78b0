"""What a hostile command, image, earlier sandbox or neighbour tries; each of these has worked once."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import needs
import pytest
from conftest import MAIN, Sbx
from launching import DEADLINE, NONE, running

from rootless import syscalls

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


# ── descriptors ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_descriptor_of_ours_is_passed_for_the_callers(sbx: Sbx, image: str) -> None:
    for number in map(str, range(3, 16)):  # none of them is open
        assert "it is not open" in sbx("run", *NONE, "--pass-fd", number, image, "true", check=125).stderr
    with running(sbx, "run", *NONE, "--name", "first", image, "sh", "-c", "echo up; cat"):
        for number in map(str, range(3, 16)):
            assert "it is not open" in sbx("exec", "--pass-fd", number, "first", "true", check=125).stderr
            joined = sbx("run", "--join", "first", "--pass-fd", number, image, "true", check=125)
            assert "it is not open" in joined.stderr


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

#: says what it sees in the command lines of processes that come
WATCH = """echo up; while :; do for file in /proc/[0-9]*/cmdline; do
    words=$(tr "\\0" " " <$file 2>/dev/null); case "$words" in *TOKEN*) echo "seen $words";; esac
done; done"""


def test_the_command_line_of_one_who_joins_is_hidden(sbx: Sbx, image: str) -> None:
    watching = ["--name", "watcher", image, "sh", "-c", WATCH.replace("TOKEN", "SECRET[=]")]
    with running(sbx, "run", *NONE, *watching) as process:
        for _ in range(5):
            sbx.ok("run", "--join", "watcher", "--share", "pid", *NONE, "-e", "SECRET=x", image, "true")
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


# ── the interpreter behind /proc/self/exe ─────────────────────────────────────────────────────────────────────────────

#: A dynamic loader, in the place where the interpreter's program header looks for one: it tells what it was run for.
LOADER = r"""
#include <stdio.h>
#include <unistd.h>
int main(void) { char name[4096]; name[readlink("/proc/self/exe", name, 4095)] = 0; printf("%s\n", name); return 0; }
"""


@pytest.fixture(scope="session")
def trap(rootfs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root folder whose files have the interpreter of the host executed, with code of the image as its loader."""
    needs.enforce("" if shutil.which("gcc") else "no gcc")
    folder = tmp_path_factory.mktemp("trap")
    (folder / "loader.c").write_text(LOADER)
    root = folder / "root"
    shutil.copytree(rootfs, root, symlinks=True)
    headers = subprocess.run(["readelf", "-l", sys.executable], capture_output=True, text=True, check=True).stdout
    loader = headers.partition("program interpreter: ")[2].partition("]")[0]
    if not loader:
        pytest.skip("the interpreter is a static program")
    (root / loader[1:]).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["gcc", "-static", "-o", root / loader[1:], folder / "loader.c"], check=True)
    (root / "bin/evil-script").write_text("#!/proc/self/exe\n")
    (root / "bin/evil-script").chmod(0o755)
    (root / "bin/evil-link").symlink_to("/proc/self/exe")
    return root


@pytest.mark.parametrize("command", ["evil-script", "evil-link", "/proc/self/exe"])
@pytest.mark.parametrize("options", [[], ["--nested"], ["--allow-new-privs"], ["--privileged"]], ids=str)
def test_no_file_inside_has_the_interpreter_executed(sbx: Sbx, trap: Path, command: str, options: list[str]) -> None:
    result = sbx("run", *NONE, *options, "--rootfs", trap, command)
    assert result.stdout == ""
    assert result.status in (126, 127)


@pytest.mark.parametrize("command", ["evil-script", "evil-link", "/proc/self/exe"])
def test_nor_when_one_comes_in(sbx: Sbx, trap: Path, command: str) -> None:
    with running(sbx, "run", *NONE, "--name", "trap", "--rootfs", trap, "sh", "-c", "echo up; cat"):
        result = sbx("exec", "trap", command)
        assert result.stdout == ""
        assert result.status in (126, 127)


def test_what_cannot_be_executed_is_told_all_the_same(sbx: Sbx, trap: Path) -> None:
    files = "echo >/tmp/none; printf '#!/gone\\n' >/tmp/gone; printf x >/tmp/odd; chmod +x /tmp/gone /tmp/odd"
    with running(sbx, "run", *NONE, "--name", "trap", "--rootfs", trap, "sh", "-c", f"{files}; echo up; cat"):
        for path, status, cause in (
            ("/tmp/none", 126, "Permission denied"), ("/tmp", 126, "Permission denied"), ("nothing", 127, "not found"),
            ("/tmp/gone", 127, "No such file"), ("/tmp/odd", 126, "Exec format error"),
        ):  # fmt: skip
            result = sbx("exec", "trap", path, check=status)
            assert f"execute {path}: " in result.stderr
            assert cause in result.stderr
        assert sbx.ok("exec", "-e", "A=b c", "trap", "sh", "-c", 'echo "$0 $# $A"', "", "x") == " 1 b c"


# ── the host's network ────────────────────────────────────────────────────────────────────────────────────────────────

CONNECT = r"""
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/un.h>
int main(int count, char **words) {
    struct sockaddr_un name = {AF_UNIX};
    strcpy(name.sun_path + 1, words[1]);
    struct sockaddr_in port = {AF_INET, htons(atoi(words[2])), {htonl(INADDR_LOOPBACK)}};
    socklen_t size = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(words[1]);
    printf("%d", connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&name, size) ? errno : 0);
    printf(" %d\n", connect(socket(AF_INET, SOCK_STREAM, 0), (void *)&port, sizeof port) ? errno : 0);
    return 0;
}
"""


@pytest.mark.skipif(syscalls.landlock_version() < 6, reason="this kernel's Landlock has no scopes")
def test_a_command_that_comes_in_reaches_no_more_of_the_host(sbx: Sbx, image: str, tmp_path: Path) -> None:
    needs.enforce("" if shutil.which("gcc") else "no gcc")
    (tmp_path / "it.c").write_text(CONNECT)
    subprocess.run(["gcc", "-static", "-o", tmp_path / "it", tmp_path / "it.c"], check=True)
    name = f"sbx-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as theirs, socket.create_server(("127.0.0.1", 0)) as server:
        theirs.bind("\0" + name)
        theirs.listen()
        port = server.getsockname()[1]
        words = ["--net", "host", "--net-allow", "*:443", "-v", f"{tmp_path / 'it'}:/it:ro"]
        assert sbx.ok("run", *words, image, "/it", name, str(port)) == "1 13"
        with running(sbx, "run", *words, "--name", "first", image, "sh", "-c", "echo up; cat"):
            assert sbx.ok("exec", "first", "/it", name, str(port)) == "1 13"


# ── root as the caller ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root as the caller")
@pytest.mark.parametrize(
    ("options", "told"),
    [([], False), (["--nested"], False), (["--privileged"], True), (["--cap-add", "ALL"], True),
     (["--unmask", "ALL"], True), (["--unmask", "/proc/acpi"], False)],
)  # fmt: skip
def test_root_is_told_what_is_no_boundary(sbx: Sbx, image: str, options: list[str], told: bool) -> None:
    assert ("take over the host" in sbx("run", *NONE, *options, image, "true", check=0).stderr) == told
