"""The planner's text: what is done and in which order. Nothing is done here."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rootless import build, idmap, options, plan
from rootless.spec import IdMap, Image, SandboxSpec

IDS = IdMap(mode="auto", uids=idmap.auto(1000, [(100000, 65536)]), gids=idmap.auto(1000, [(100000, 65536)]))
SINGLE = IdMap(mode="single", uids=idmap.auto(1000, []), gids=idmap.auto(1000, []))


def spec_of(*words: str, ids: IdMap = IDS, image: str = "img") -> SandboxSpec:
    """Return the spec of `sbx run WORDS img echo hi`, with a filter, as the launch would complete it."""
    request = options.read("run", ["--net", "none", *words, image, "echo", "hi"])
    assert request is not None
    layers = [] if image == build.HOST else ["top/fs", "base/fs"]
    stored = Image(reference=image, digest=image, layers=layers)
    spec = build.sandbox(request, stored, ids, "box", "0123456789ab", "/data/sandboxes/box")
    spec.filter_name, spec.filter = "default", bytes(8)
    return spec


def lines_of(*words: str, ids: IdMap = IDS, image: str = "img") -> list[str]:
    return plan.for_sandbox(spec_of(*words, ids=ids, image=image)).describe()


def place(lines: list[str], start: str) -> int:
    """Return where the one line is that is this, or starts so."""
    found = [
        number for number, line in enumerate(lines) if line == start or (line.startswith(start) and start not in lines)
    ]
    assert len(found) == 1, (start, lines)
    return found[0]


def test_the_whole_of_it() -> None:
    """`sbx run alpine echo hi`, from the first line to the last."""
    masked = " ".join(build.MASKED)
    root = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_KILL CAP_SETGID CAP_SETUID CAP_SETPCAP"
    root += " CAP_NET_BIND_SERVICE CAP_SYS_CHROOT CAP_SETFCAP"
    assert lines_of() == [
        "create namespaces user",
        "wait for the parent",
        "  outside: write the auto id map, uids 0:1000:1 1:100000:65536, gids 0:1000:1 1:100000:65536",
        "become root and drop supplementary groups",
        "start pid 1 in new namespaces user mnt pid net uts ipc cgroup",
        "set umask 0000",
        "stop mounts from propagating to the host",
        "open the devices null zero full random urandom tty",
        "create a proc,nosuid,nodev,noexec",
        "create a sysfs,ro,nosuid,nodev,noexec",
        "create a tmpfs,nosuid,noexec,mode=755,size=64k",
        "create a devpts,nosuid,noexec,newinstance,ptmxmode=0666,mode=0620",
        "create a tmpfs,nosuid,nodev,noexec,mode=1777,size=67108864",
        "create a mqueue,nosuid,nodev,noexec",
        "mount overlay of 2 layers on /data/sandboxes/box,nosuid,nodev",
        "pivot_root, and detach the host's tree",
        "mount proc on /proc",
        "mount sysfs on /sys",
        "mount tmpfs on /dev",
        "populate /dev",
        "mount devpts on /dev/pts",
        "mount tmpfs on /dev/shm",
        "mount mqueue on /dev/mqueue",
        "write /etc/hosts /etc/resolv.conf /etc/hostname",
        "set the host name to box",
        "bring up the loopback interface",
        "set net.ipv4.ping_group_range to 0 65536",
        "set user.max_user_namespaces to 0",
        "make read-only /proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger",
        f"mask {masked}",
        "wait until the network is attached",
        "hide this process's memory and command line",
        "start the command's process; pid 1 stays as init",
        "start a session",
        "join a new session keyring",
        "set limits core=0:0",
        "set umask 0022",
        "change to folder /",
        "set no_new_privs",
        f"bound capabilities to {root}",
        "become user 0",
        "confine to the sandbox's tree by Landlock",
        f"keep capabilities {root} as root, none as others",
        "arm the death signal",
        "restore signal actions",
        "close inherited descriptors",
        "load the seccomp filter default, 1 instructions",
        "execute echo",
    ]


EVERYTHING = [
    "-t",
    "-v",
    "/etc:/a/b",
    "-v",
    "/usr:/a:ro",
    "--tmpfs",
    "/t:size=1m",
    "--read-only",
    "-w",
    "/work",
    "--ulimit",
    "nofile=9",
    "--oom-score-adj",
    "9",
    "-u",
    "guest",
    "--sysctl",
    "kernel.msgmax=1",
    "--unshare",
    "time",
    "--clock-offset",
    "boottime=5",
    "--device",
    "/dev/null",
]

#: Pairs of acts whose order is a fact of the kernel's, or what keeps the sandbox closed.
ORDER = [
    ("create namespaces user", "become root"),
    ("become root", "start pid 1"),  # the groups are dropped where that is allowed still
    ("start pid 1", "stop mounts"),
    ("create namespaces time", "set the boottime clock"),
    ("set the boottime clock", "enter the time namespace"),
    ("stop mounts", "open /etc"),  # or mounts of ours would reach the host
    ("open /etc", "pivot_root"),  # the host's files are named only before the switch
    ("mount overlay", "pivot_root"),
    ("pivot_root", "mount proc"),  # and the sandbox's only after it
    ("mount tmpfs on /dev", "populate /dev"),
    ("populate /dev", "mount devpts"),
    ("mount /usr on /a", "mount /etc on /a/b"),  # the outer one first
    ("set user.max_user_namespaces", "make read-only"),  # while /proc/sys can be written
    ("mount /etc", "mask"),
    ("mask", "make the root filesystem read-only"),  # when all mount points exist
    ("make the root filesystem read-only", "wait until the network"),
    ("wait until the network", "hide this process's memory"),  # the helper needs /proc/PID/ns of it
    ("hide this process's memory", "start the command's process"),
    ("start the command's process", "start a session"),
    ("set umask 0000", "set umask 0022"),
    ("set no_new_privs", "load the seccomp filter"),
    ("bound capabilities", "become user"),  # needs CAP_SETPCAP
    ("become user", "keep capabilities"),
    ("become user", "arm the death signal"),  # a change of ids disarms it
    ("become user", "confine to"),
    ("restore signal actions", "load the seccomp filter"),
    ("load the seccomp filter", "execute"),  # last: it may refuse what the others need
]


@pytest.mark.parametrize(("first", "second"), ORDER, ids=lambda value: value)
def test_order(first: str, second: str) -> None:
    lines = lines_of(*EVERYTHING)
    assert place(lines, first) < place(lines, second)


@pytest.mark.parametrize(
    ("words", "gone", "come"),
    [
        (["--no-init"], ["start the command's process; pid 1 stays as init"], []),
        (["--share", "pid"], [], ["start pid 1 in new namespaces user mnt net uts ipc cgroup"]),
        (["--share", "net"], ["bring up the loopback interface", "set net.ipv4.ping_group_range to 0 65536"], []),
        (["--share", "ipc"], ["mount mqueue on /dev/mqueue", "create a mqueue,nosuid,nodev,noexec"], []),
        (["--read-only"], [], ["make the root filesystem read-only"]),
        (["-w", "/work"], ["change to folder /"], ["create folder /work if it is missing", "change to folder /work"]),
        (["-v", "/etc:/x:ro"], [], ["open /etc,ro,nosuid,nodev", "mount /etc on /x"]),
        (["-v", "/etc:/x:noexec"], [], ["open /etc,nosuid,nodev,noexec"]),
        (
            ["--tmpfs", "/x:size=1m"],
            [],
            ["create a tmpfs,nosuid,nodev,noexec,mode=1777,size=1048576", "mount tmpfs on /x"],
        ),
        (["--nested"], ["set user.max_user_namespaces to 0"], []),
        (["-u", "guest:users"], ["become user 0"], ["become user guest:users"]),
        (["--umask", "77"], ["set umask 0022"], ["set umask 0077"]),
        (["--ulimit", "nofile=5:6"], ["set limits core=0:0"], ["set limits core=0:0 nofile=5:6"]),
        (["--hostname", "other"], ["set the host name to box"], ["set the host name to other"]),
        (["-v", "/etc/hosts:/etc/hosts"], [], ["write /etc/resolv.conf /etc/hostname"]),
        (
            ["-t"],
            ["start a session"],
            ["open a terminal and bind it on /dev/console", "start a session on the terminal"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value and value[0].startswith("-") else "",
)
def test_what_an_option_changes(words: list[str], gone: list[str], come: list[str]) -> None:
    plain = lines_of()
    spec = spec_of(*words)
    spec.terminal = "-t" in words  # what the launch decides when it looks at its own streams
    lines = plan.for_sandbox(spec).describe()
    assert not [line for line in gone if line in lines or line not in plain]
    assert not [line for line in come if line not in lines or line in plain]


def test_privileged_opens_everything_and_nothing_else() -> None:
    lines = lines_of("--privileged")
    assert not [line for line in lines if line.startswith(("set no_new_privs", "set user.max_user", "confine to"))]
    assert place(lines, "start pid 1 in new namespaces user mnt pid net uts ipc cgroup")
    assert place(lines, "hide this process's memory")
    assert place(lines, "close inherited descriptors")


def test_without_no_new_privs_the_filter_comes_while_it_may() -> None:
    lines = lines_of("--allow-new-privs")
    assert place(lines, "load the seccomp filter") < place(lines, "bound capabilities")


def test_one_id_has_one_user_namespace() -> None:
    lines = lines_of(ids=SINGLE)
    assert "become root" in lines
    assert place(lines, "start pid 1 in new namespaces mnt pid net uts ipc cgroup")


def test_the_hosts_tree_is_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home")
    lines = lines_of(image=build.HOST)
    assert place(lines, "bind / on /data/sandboxes/box,ro,nosuid,nodev")
    for folder in ("/tmp", "/var/tmp", "/run", "/home"):
        assert f"mount tmpfs on {folder}" in lines
    assert "mount tmpfs on /home" not in lines_of("--home", image=build.HOST)


def test_describing_is_for_people() -> None:
    """One imperative line each, lower case, no full stop; and safe to print."""
    for words in ([], EVERYTHING):
        for line in lines_of(*words):
            text = line.removeprefix("  outside: ")
            assert text
            assert text[0].islower()
            assert not text.endswith(".")
            assert "\n" not in text


def test_the_same_spec_gives_the_same_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pure: no look at the world, no change of the spec."""
    spec = spec_of(*EVERYTHING)
    before = repr(spec)
    one = plan.for_sandbox(spec).describe()
    monkeypatch.chdir(tmp_path)
    assert plan.for_sandbox(spec).describe() == one
    assert repr(spec) == before


def test_exec_hides_before_it_can_be_seen() -> None:
    spec = spec_of("-u", "guest")
    names = ["user", "cgroup", "ipc", "uts", "net", "pid", "mnt"]
    lines = plan.for_exec(spec, 9, {name: 10 + number for number, name in enumerate(names)}).describe()
    order = [
        "join the user namespace", "become root and drop supplementary groups", "hide this process's memory",
        "join the pid namespace", "start a process", "become user guest", "load the seccomp filter", "execute echo",
    ]  # fmt: skip
    places = [next(number for number, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert places == sorted(places)
    assert lines.count("join the user namespace") == 2  # the outer one, where groups can be dropped; then its own
    first = plan.for_sandbox(spec).describe()
    protections = (
        "set no_new_privs",
        "bound cap",
        "become user",
        "keep cap",
        "load the",
        "close inh",
        "join a new",
        "set limits",
    )
    assert [line for line in lines if line.startswith(protections)] == [
        line for line in first if line.startswith(protections)
    ]


def test_every_kind_of_namespace_can_be_left_out() -> None:
    for count in range(3):
        for shared in itertools.combinations(["pid", "net", "uts", "ipc", "cgroup"], count):
            words = [word for name in shared for word in ("--share", name)]
            [line] = [line for line in lines_of(*words) if line.startswith("start pid 1")]
            assert set(line.split()[6:]) == {"user", "mnt", "pid", "net", "uts", "ipc", "cgroup"} - set(shared)
