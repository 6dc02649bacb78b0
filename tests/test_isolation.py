"""Ways out of a sandbox, tried: each attempt is the real thing, and fails; some are shown to work elsewhere."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, MAIN, Sbx
from launching import NONE, host_python, running

from rootless import capabilities

pytestmark = [needs.userns, needs.busybox]

SECRET = "s3cr3t-of-the-caller"
#: Calls the kernel directly; errno or the result is printed.
CALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    ctypes.set_errno(0)
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(*args)
    return os.strerror(ctypes.get_errno()) if result == -1 else result
"""


def status_fields(text: str) -> dict[str, str]:
    return {line.partition(":")[0]: line.partition(":")[2].strip() for line in text.splitlines()}


def of_status(sbx: Sbx, *words: str) -> dict[str, str]:
    """Return the fields of proc_pid_status(5) of a command that shows its own."""
    return status_fields(sbx.ok("run", *NONE, *words, "cat", "/proc/self/status"))


# ── pid 1 ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "words", [[], ["-u", "guest"], ["--idmap", "single"], ["--cap-add", "SYS_PTRACE"]], ids=" ".join
)
def test_pid_1_tells_nothing(sbx: Sbx, image: str, words: list[str]) -> None:
    script = """
        cd /proc/1
        for file in environ maps mem auxv stack syscall io pagemap smaps map_files/* task/1/environ; do
            head -c 1 $file >/dev/null 2>&1 && echo readable $file
        done
        for link in exe cwd root ns/user fd/0 fd/3; do readlink $link && echo readable $link; done
        ls fd map_files 2>/dev/null
        cat * task/1/* 2>/dev/null
        echo; cat comm"""
    result = sbx("run", *NONE, *words, "-e", f"TOKEN={SECRET}", image, "sh", "-c", script, env={"CALLER": SECRET})
    assert result.status == 0
    assert "readable" not in result.stdout
    assert SECRET not in result.stdout
    assert MAIN.name not in result.stdout
    assert str(sbx.home) not in result.stdout
    assert result.stdout.endswith("\nsbx-init\n")


@pytest.mark.parametrize("filter", [[], ["--seccomp", "unconfined"]], ids=["filtered", "unconfined"])
def test_pid_1_cannot_be_traced_or_read(sbx: Sbx, filter: list[str]) -> None:
    """Neither through the filter nor, without one, by the kernel's own rule for what is not dumpable."""
    code = (
        CALL
        + """
buffer = ctypes.create_string_buffer(64)
iovec = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
there = (ctypes.c_void_p * 2)(0x400000, 64)
print(call(101, 16, 1, 0, 0), call(101, 0x4206, 1, 0, 0), sep="\\n")          # ptrace: attach, seize
print(call(310, 1, iovec, 1, there, 1, 0), call(311, 1, iovec, 1, there, 1, 0), sep="\\n")  # process_vm_readv, writev
pidfd = call(434, 1, 0)
print(call(438, pidfd, 0, 0) if isinstance(pidfd, int) else pidfd)            # pidfd_getfd
"""
    )
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are those of x86_64")
    lines = sbx.ok("run", *NONE, *filter, *host_python(), code).splitlines()
    assert len(lines) == 5
    assert set(lines) <= {"Operation not permitted", "Function not implemented", "Permission denied"}


def test_the_command_itself_can_be_traced(sbx: Sbx) -> None:
    """The attempt above is a real one: with SYS_PTRACE and no filter a child of one's own is attached to."""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are those of x86_64")
    code = (
        CALL + "pid = os.fork() or os.execvp('sleep', ['', '9'])\nprint(call(101, 0x4206, pid, 0, 0)); os.kill(pid, 9)"
    )
    assert sbx.ok("run", *NONE, "--seccomp", "unconfined", *host_python(), code) == "0"


@needs.subids
@pytest.mark.parametrize(
    "words", [[], ["--seccomp", "unconfined", "--cap-add", "SYS_PTRACE"]], ids=["default", "widened"]
)
def test_who_joins_by_exec_tells_nothing(sbx: Sbx, words: list[str]) -> None:
    """A process of the sandbox looks into every new one when it appears: before its execve it must see nothing."""
    code = """
import os, sys
print("up", flush=True)
known, found = {1, 2, os.getpid()}, set()
while not os.path.exists("/tmp/end"):
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        if pid == os.getpid():
            continue
        for file in ("environ", "cmdline"):
            try:
                data = open(f"/proc/{pid}/{file}", "rb").read()
            except OSError:
                continue
            if b"s3cr3t" in data:
                found.add(f"secret in {file}")
        if pid in known:
            continue
        try:
            exe = os.readlink(f"/proc/{pid}/exe")
            if "python" in exe:
                found.add(f"interpreter {exe}")
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if int(fd) > 2 and ("ns" in (link := os.readlink(f"/proc/{pid}/fd/{fd}")) or "sandboxes" in link):
                    found.add(f"descriptor {link}")
        except OSError:
            pass
for line in sorted(found):
    print(line)
print("looked")
"""
    with running(sbx, "run", *NONE, *words, "--name", "watched", *host_python(), code) as process:
        for _ in range(8):
            sbx.ok("exec", "watched", "true", env={"CALLER": SECRET})
        sbx.ok("exec", "watched", "touch", "/tmp/end")
        assert process.stdout
        assert process.stdout.read() == b"looked\n"


# ── descriptors and folders ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def leaked(tmp_path: Path) -> Iterator[list[int]]:
    """Descriptors of a folder on the host, at several numbers."""
    (tmp_path / "host-file").write_text("of the host\n")
    first = os.open(tmp_path, os.O_RDONLY)
    leaked = [fcntl.fcntl(first, fcntl.F_DUPFD, number) for number in (100, 200, 300)]
    yield leaked
    for fd in (first, *leaked):
        os.close(fd)


def test_no_descriptor_of_the_callers_but_those_passed(sbx: Sbx, image: str, leaked: list[int]) -> None:
    with running(sbx, "run", *NONE, "--name", "descriptors", image, "sh", "-c", "echo up; cat"):
        for words, subject in ((["run", *NONE], image), (["exec"], "descriptors")):
            for options, expected in ((), set()), (("--pass-fd", "200"), {"200"}):
                with sbx.start(*words, *options, subject, "ls", "/proc/self/fd", pass_fds=leaked) as process:
                    stdout, _ = process.communicate()
                assert set(stdout.decode().split()) == {"0", "1", "2", "3"} | expected  # 3 is the listing's own


def test_passing_what_is_not_open(sbx: Sbx, image: str) -> None:
    result = sbx("run", *NONE, "--pass-fd", "777", image, "true")
    assert (result.status, result.stderr.splitlines()[0]) == (125, "sbx: pass descriptor 777: it is not open")


@pytest.mark.parametrize("command", ["run", "exec"])
def test_a_working_directory_through_a_descriptor(sbx: Sbx, image: str, leaked: list[int], command: str) -> None:
    """CVE-2024-21626: the folder of a leaked descriptor as the working directory is a place on the host."""
    with running(sbx, "run", *NONE, "--name", "folders", image, "sh", "-c", "echo up; cat"):
        # also the numbers that our own descriptors may have at that moment
        for number in (*range(3, 16), *leaked):
            where = f"/proc/self/fd/{number}"
            words = ["run", *NONE, "-w", where, image] if command == "run" else ["exec", "-w", where, "folders"]
            with sbx.start(*words, "sh", "-c", "pwd; cat host-file ../host-file", pass_fds=leaked) as process:
                stdout, stderr = process.communicate()
            assert b"of the host" not in stdout
            assert process.returncode == 125, (number, stdout, stderr)
            assert stderr.startswith(b"sbx: ")


# ── terminals and keys ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "number", [0x5412, 1 << 32 | 0x5412, 0x541C], ids=["TIOCSTI", "TIOCSTI-high-bits", "TIOCLINUX"]
)
def test_nothing_is_typed_into_a_terminal(sbx: Sbx, number: int) -> None:
    code = CALL + f"print(call(16, 0, {number}, ctypes.c_char_p(b'x')))"
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are those of x86_64")
    for words in (["-t"], []):
        assert sbx.ok("run", *NONE, *words, *host_python(), code).strip() == "Operation not permitted"


def test_the_session_keyring_is_a_new_one(sbx: Sbx) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are those of x86_64")
    ask = "print(call(250, 0, -3, 0))"  # keyctl: the id of the session keyring
    ctypes.CDLL(None).syscall(250, 1, None)  # one of our own, to be compared with
    ours = ctypes.CDLL(None).syscall(250, 0, ctypes.c_long(-3), 0)
    theirs = sbx.ok("run", *NONE, "--seccomp", "unconfined", *host_python(), CALL + ask)
    assert theirs.lstrip("-").isdigit() or theirs == "Required key not available"
    assert theirs != str(ours)
    assert sbx.ok("run", *NONE, *host_python(), CALL + ask) == "Operation not permitted"


# ── privileges ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_capabilities(sbx: Sbx, image: str) -> None:
    fields = of_status(sbx, image)
    assert [int(fields[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")] == [capabilities.DEFAULT] * 3
    assert [int(fields[name], 16) for name in ("CapInh", "CapAmb")] == [0, 0]
    assert (fields["NoNewPrivs"], fields["Seccomp"]) == ("1", "2")


@needs.subids
def test_capabilities_of_others(sbx: Sbx, image: str) -> None:
    fields = of_status(sbx, "-u", "guest", image)
    assert [int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0] * 4
    assert int(fields["CapBnd"], 16) == capabilities.DEFAULT


def test_capabilities_that_were_asked_for(sbx: Sbx, image: str) -> None:
    assert int(of_status(sbx, "--cap-drop", "ALL", image)["CapEff"], 16) == 0
    assert int(of_status(sbx, "--cap-drop", "ALL", "--cap-add", "KILL", image)["CapBnd"], 16) == 1 << 5
    fields = of_status(sbx, "--privileged", image)
    last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    assert int(fields["CapEff"], 16) == (1 << last + 1) - 1
    assert fields["NoNewPrivs"] == "0"


def test_a_capability_does_what_it_says_inside_alone(sbx: Sbx, image: str) -> None:
    """SYS_ADMIN names the sandbox's own UTS namespace; SYS_TIME sets nobody's clock."""
    script = "hostname renamed; hostname; date -s 2001-01-01"
    words = ["--hostname", "box", "--cap-add", "SYS_ADMIN", "--cap-add", "SYS_TIME"]
    result = sbx("run", *NONE, *words, "--seccomp", "unconfined", image, "sh", "-c", script)
    assert result.stdout.startswith("renamed\n")
    assert "can't set date: Operation not permitted" in result.stderr
    assert os.uname().nodename != "renamed"
    assert (
        sbx.ok("run", *NONE, "--hostname", "box", image, "sh", "-c", "hostname renamed 2>/dev/null; hostname") == "box"
    )


@needs.subids
def test_set_user_id_has_no_effect(sbx: Sbx, tmp_path: Path) -> None:
    """A program of the caller's, set-user-id, on a volume: another user of the sandbox stays who it is."""
    folder = tmp_path / "volume"
    folder.mkdir()
    shutil.copy("/bin/cat", folder / "cat")
    (folder / "cat").chmod(0o4755)
    words = ["-u", "1:1", "-v", f"{folder}:/mnt", "host", "/mnt/cat", "/proc/self/status"]
    own = str(os.geteuid())
    for options, effective in (([], "1"), (["--allow-new-privs"], own)):
        assert status_fields(sbx.ok("run", *NONE, *options, *words))["Uid"].split()[:2] == ["1", effective]


@needs.subids
def test_groups(sbx: Sbx, image: str) -> None:
    assert of_status(sbx, image)["Groups"] == ""
    assert sbx.ok("run", *NONE, image, "cat", "/proc/self/setgroups") == "deny"
    code = CALL + "print(call(116, 1, (ctypes.c_uint * 1)(5)), os.getgroups())"
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers of the calls are those of x86_64")
    root = ["-u", "0"]  # on the image host one is oneself
    assert sbx.ok("run", *NONE, *root, *host_python(), code) == "0 []"
    assert sbx.ok("run", *NONE, *root, "--setgroups", "deny", *host_python(), code) == "Operation not permitted []"
    assert sbx.ok("run", *NONE, *root, "--setgroups", "allow", *host_python(), code) == "0 [5]"


@needs.subids
def test_groups_of_the_caller_are_dropped(sbx: Sbx, image: str) -> None:
    """Such a caller is made in a user namespace, where root may have any group of the map."""
    script = "import os, sys; os.setgroups([3, 4]); os.execv(sys.argv[1], sys.argv[1:])"
    make = ["unshare", sys.executable, "-I", "-S", "-c", script]
    assert status_fields(sbx.ok(*make, "/bin/cat", "/proc/self/status"))["Groups"].split() == ["3", "4"]
    result = sbx(*make, *COMMAND, "run", *NONE, image, "cat", "/proc/self/status")
    if result.status == 125:  # another id map: the image was not unpacked for it
        result = sbx(*make, *COMMAND, "run", *NONE, "host", "cat", "/proc/self/status")
    assert (result.status, status_fields(result.stdout)["Groups"]) == (0, "")


def test_nested_user_namespaces(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "cat", "/proc/sys/user/max_user_namespaces") == "0"
    for words in (["-U"], ["-Ur"], ["-n"], ["-m"], ["-p"]):
        result = sbx("run", *NONE, image, "unshare", *words, "true")
        assert result.status != 0, words
    # The limit holds by itself too
    assert sbx("run", *NONE, "--seccomp", "unconfined", image, "unshare", "-U", "true").status != 0
    assert sbx.ok("run", *NONE, "--nested", image, "unshare", "-Ur", "id", "-u") == "0"


@pytest.mark.parametrize(
    "line",
    [
        "mount -t tmpfs x /mnt",
        "umount /proc",
        "hostname x",
        "swapoff -a",
        "dmesg",
        "mknod /x b 8 0",
        "pivot_root / /mnt",
        "nsenter -t 1 -m true",
        "ip link add x type dummy",
        "sysctl -w kernel.domainname=x",
        "readlink /proc/1/fd/0",
    ],
)
def test_refused(sbx: Sbx, image: str, line: str) -> None:
    assert sbx("run", *NONE, image, *line.split()).status != 0


# ── the environment ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_is_fixed(sbx: Sbx, image: str) -> None:
    result = sbx("run", *NONE, "--hostname", "box", image, "env", env={"CALLER": SECRET, "LD_PRELOAD": "/nowhere.so"})
    assert result.status == 0
    assert set(result.stdout.splitlines()) == {
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOSTNAME=box",
        "container=sbx",
        "HOME=/root",
    }


def test_only_what_is_asked_for_comes_along(sbx: Sbx, image: str) -> None:
    words = ["-e", "CALLER", "-e", "SET=it", "-e", "MISSING", "-e", "EMPTY=", "-e", "PATH=/bin"]
    lines = sbx.ok("run", *NONE, *words, image, "/usr/bin/env", env={"CALLER": "mine", "OTHER": SECRET}).splitlines()
    assert {"CALLER=mine", "SET=it", "EMPTY=", "PATH=/bin"} <= set(lines)
    assert not [line for line in lines if line.startswith(("MISSING", "OTHER"))]


# ── namespaces ────────────────────────────────────────────────────────────────────────────────────────────────────────


def namespaces(sbx: Sbx, *words: str) -> set[str]:
    names = "user mnt pid net uts ipc cgroup"
    script = f"for name in {names}; do readlink /proc/self/ns/$name; done"
    return set(sbx.ok("run", *words, "sh", "-c", script).split())


def test_all_namespaces_are_its_own(sbx: Sbx, image: str) -> None:
    ours = {os.readlink(f"/proc/self/ns/{name}") for name in ("user", "mnt", "pid", "net", "uts", "ipc", "cgroup")}
    assert len(ours) == 7
    inside = namespaces(sbx, *NONE, image)
    assert len(inside) == 7
    assert not inside & ours


@pytest.mark.parametrize("name", ["pid", "net", "uts", "ipc", "cgroup"])
def test_a_namespace_that_is_shared(sbx: Sbx, image: str, name: str) -> None:
    ours = os.readlink(f"/proc/self/ns/{name}")
    net = NONE if name != "net" else ()
    result = namespaces(sbx, *net, "--share", name, image)
    assert ours in result
    assert len(
        [link for link in result if link in {os.readlink(f"/proc/self/ns/{n}") for n in ("user", "mnt", "uts")}]
    ) == (name == "uts")


def test_abstract_sockets_are_out_of_reach(sbx: Sbx) -> None:
    name = f"sbx-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("\0" + name)
        listener.listen()
        code = f"import socket; s = socket.socket(socket.AF_UNIX); print(s.connect_ex('\\0{name}'))"
        assert sbx.ok("run", *NONE, *host_python(), code) == "111"  # ECONNREFUSED
        # The attempt is a real one; and where Landlock can, it keeps even a sandbox on the host's network from it.
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "0\n"
        assert sbx.ok("run", "--net", "host", *host_python(), code) in ("0", "1")


def test_the_hosts_loopback_is_out_of_reach(sbx: Sbx) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        code = f"import socket; s = socket.socket(); print(s.connect_ex(('127.0.0.1', {listener.getsockname()[1]})))"
        assert sbx.ok("run", *NONE, *host_python(), code) == "111"
        assert sbx.ok("run", "--net", "host", *host_python(), code) == "0"


def test_processes_of_the_host_are_out_of_reach(sbx: Sbx, image: str) -> None:
    result = sbx("run", *NONE, image, "sh", "-c", f"kill -0 {os.getpid()}; ls -d /proc/{os.getpid()}")
    assert result.status != 0
    assert result.stdout == ""


def test_limits_and_masks(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", *NONE, image, "sh", "-c", "umask; ulimit -c").split() == ["0022", "0"]
    words = ["--umask", "077", "--ulimit", "nofile=77:88"]
    assert sbx.ok("run", *NONE, *words, image, "sh", "-c", "umask; ulimit -n; ulimit -Hn").split() == [
        "0077",
        "77",
        "88",
    ]
    score = Path("/proc/self/oom_score_adj").read_text()
    assert sbx.ok("run", *NONE, image, "cat", "/proc/self/oom_score_adj") == score.strip()
    assert sbx.ok("run", *NONE, "--oom-score-adj", "500", image, "cat", "/proc/self/oom_score_adj") == "500"


def test_clocks(sbx: Sbx, image: str) -> None:
    words = ["--unshare", "time", "--clock-offset", "boottime=1000000"]
    ours = float(Path("/proc/uptime").read_text().split()[0])
    theirs = float(sbx.ok("run", *NONE, *words, image, "cat", "/proc/uptime").split()[0])
    assert 1000000 <= theirs - ours < 1000100


def test_a_command_that_comes_in_has_its_clocks(sbx: Sbx, image: str) -> None:
    words = ["--unshare", "time", "--clock-offset", "boottime=1000000", "--name", "late"]
    with running(sbx, "run", *NONE, *words, image, "sh", "-c", "echo up; exec sleep 1000"):
        assert float(sbx.ok("exec", "late", "cat", "/proc/uptime").split()[0]) > 1000000


# ── code of the image run by us ───────────────────────────────────────────────────────────────────────────────────────


def calls_inside(trace: str) -> list[str]:
    """Return the calls about files that processes of ours made between their entry into a sandbox and their execve."""
    inside: set[str] = set()
    calls = []
    for line in trace.splitlines():
        pid, _, call = line.partition(" ")
        call = call.strip()
        made = call.rpartition("= ")[2]
        if call.startswith("pivot_root(") or (call.startswith("setns(") and "CLONE_NEWNS" in call):
            inside.add(pid)
        elif "execve" in call and made == "0":
            inside.discard(pid)
        elif "clone" in call and pid in inside and made.isdigit():
            inside.add(made)
        elif pid in inside and re.match(r"open|l?stat|newfstatat|f?access|readlink", call):
            calls.append(call)
    return calls


@needs.program("strace")
@pytest.mark.parametrize("end", ["well", "failing"])
@pytest.mark.parametrize("command", ["run", "exec"])
def test_nothing_is_imported_or_looked_up_inside(sbx: Sbx, image: str, tmp_path: Path, command: str, end: str) -> None:
    """Once the image's files are the root, an import or a look-up by the C library would run the image's code."""
    words = ["-w", "/tmp" if end == "well" else "/no/such/folder" if command == "exec" else "/etc/passwd"]
    # With an id file it has memory of its own, which is hidden later than what is lent: strace can read names in it
    words += ["--cidfile", str(tmp_path / "id")] if command == "run" else []
    trace = tmp_path / "trace"
    # One id: a traced newuidmap has no privileges.
    with running(sbx, "run", *NONE, "--idmap", "single", "--name", "traced", image, "sh", "-c", "echo up; cat"):
        subject = ["run", *NONE, "--idmap", "single", *words, image] if command == "run" else ["exec", *words, "traced"]
        done = subprocess.run(
            ["strace", "-f", "-qq", "-o", trace, "-e", "trace=%file,%process,setns", *COMMAND, *subject, "true"],
            env=sbx.env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, b"Traceback" in done.stderr) == (0 if end == "well" else 125, False), done
    calls = calls_inside(trace.read_text())
    assert calls  # the trace has been understood
    names = [name for call in calls for name in re.findall(r'"([^"]*)"', call) if not name.endswith("/true")]
    ours = ("/proc", "/dev", "/sys", "/etc", "/tmp", "/no/such")
    assert not [name for name in names if name.startswith("/") and name != "/" and not name.startswith(ours)]
    assert not [name for name in names if re.search(r"\.py|\.so|nsswitch|locale|rootless", name)]
    # Once the memory is hidden, strace cannot read the names. An import asks for many a file's status by its name.
    assert not [call for call in calls if re.match(r"(l?stat\(|newfstatat\(AT_FDCWD, )0x", call)]
