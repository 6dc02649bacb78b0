"""How fast, beside others: the parts that helpers/bench can run. See there, and bench_peers for who does what."""

from __future__ import annotations

import argparse
import contextlib
import os
import pickle
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import bench_memory
import bench_profile
from bench_measure import UNIQUE, Command, Launcher, lower_quartile, median, parallel, sequential, table
from bench_peers import CHECKOUT, IMAGE, World, alpine_tarball

T = TypeVar("T")
AT_ONCE = (8, 32)
CGROUPS = Path("/sys/fs/cgroup")
USER = "sbx-test"


class Bench:
    """One run: the words of the command line, who launches, and what is compared, `sbx` first."""

    def __init__(self, words: argparse.Namespace, user: pwd.struct_passwd, scratch: Path) -> None:
        self.words = words
        self.user = user
        self.world = World(scratch, scratch / "checkout", environment(user, scratch))
        self.commands: dict[str, Command] = {}
        self.world, self.commands = as_user(user, self._prepare)
        self.launcher = Launcher(self.world.environment)

    def _prepare(self) -> tuple[World, dict[str, Command]]:
        self.world.prepare()
        commands = dict(self.world.own("sbx", self.world.sbx(self.world.checkout)))
        for word in self.words.also:
            name, _, checkout = word.partition("=")
            commands |= self.world.own(name, self.world.sbx(Path(checkout)), image=False)
        only = self.words.only.split(",") if self.words.only else []
        commands |= self.world.peers(only)
        return self.world, {name: command for name, command in commands.items() if name in ["sbx", *only] or not only}

    # ── the parts ─────────────────────────────────────────────────────────────────────────────────────────────────

    def launch(self) -> None:
        """One launch after the other: the cold command line, from before its process is made until it has ended."""
        times = as_user(self.user, lambda: sequential(self.launcher, self.commands, self.words.rounds))
        own = times["sbx"].wall
        heads = ("one after the other", "median ms", "quiet ms", "CPU ms", "median / sbx", "quiet / sbx")
        rows = []
        for name, (wall, cpu) in times.items():
            ratios = (median(wall) / median(own), lower_quartile(wall) / lower_quartile(own))
            numbers = (median(wall), lower_quartile(wall), median(cpu))
            rows.append((name, *(f"{number:.1f}" for number in numbers), *(f"{ratio:.2f}" for ratio in ratios)))
        print(table(heads, rows))
        print("\nquiet: a quarter of the launches were faster, those that no other work disturbed")

    def parallel(self) -> None:
        """Many launches at once: how many in a second."""
        for at_once in AT_ONCE:
            # of few at once a turn is over in a moment, and tells the less
            rounds = max(1, self.words.rounds * 4 // at_once)
            rates = self._rates(at_once, at_once * self.words.batch, rounds)
            own = median(rates["sbx"])
            rows = [(name, f"{median(rate):.0f}", f"{own / median(rate):.2f}") for name, rate in rates.items()]
            print(table((f"{at_once} at once", "launches/s", "sbx's / its"), rows), end="\n\n")

    def _rates(self, at_once: int, total: int, rounds: int) -> dict[str, list[float]]:
        return as_user(self.user, lambda: parallel(self.launcher, self.commands, at_once, total, rounds))

    def memory(self) -> None:
        """Idle sandboxes: the PSS of every process but the command."""
        if reason := bench_memory.may_look():
            self.world.left_out["memory"] = reason
            return
        ids = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        rows = []
        for name in ("sbx", *(word.partition("=")[0] for word in self.words.also)):
            argv = [*self.commands[name][:-1], *bench_memory.IDLE]
            sandboxes = bench_memory.idle(argv, self.world.environment, self.words.sandboxes, ids)
            each = [median(numbers) for numbers in zip(*sandboxes, strict=True)]
            rows.append(
                (name, f"{sum(map(sum, sandboxes)) / len(sandboxes):.0f}", " + ".join(f"{pss:.0f}" for pss in each))
            )
        print(table((f"{self.words.sandboxes} idle sandboxes", "kB each", "parent + supervisor + pid 1"), rows))

    def import_(self) -> None:
        """Importing a compressed root filesystem into an empty store, beside `tar xzf`."""
        scratch, tarball, sbx = self.world.scratch, str(self.world.compressed), self.commands["sbx"][0]
        unpack = 'mkdir "$1" && exec tar xzf "$2" -C "$1"'
        commands: dict[str, Command] = {
            "tar xzf": ["sh", "-c", unpack, "sh", f"{scratch}/tar-{UNIQUE}", tarball],
            "sbx import": ["env", f"SBX_HOME={scratch}/home-{UNIQUE}", sbx, "import", IMAGE, tarball],
        }
        times = as_user(self.user, lambda: sequential(self.launcher, commands, max(1, self.words.rounds // 4)))
        base = median(times["tar xzf"].wall)
        rows = [(name, f"{median(wall):.0f}", f"{median(wall) / base:.2f}") for name, (wall, _) in times.items()]
        print(table(("one import", "median ms", "/ tar xzf"), rows))

    def profile(self) -> None:
        """Where the milliseconds of one launch go."""
        sbx, *arguments = self.commands["sbx"]
        checkout = Path(sbx).parents[2]
        take = bench_profile.profile
        print(as_user(self.user, lambda: take(checkout, arguments, self.world, self.words.rounds)))


PARTS = {
    "launch": Bench.launch, "parallel": Bench.parallel, "memory": Bench.memory, "import": Bench.import_,
    "profile": Bench.profile,
}  # fmt: skip


def main() -> int:
    words = read()
    user = pwd.getpwnam(launching_user(words.user)) if os.geteuid() == 0 else pwd.getpwuid(os.getuid())
    with scratch_folder(user) as scratch, own_cgroup(user):
        bench = Bench(words, user, scratch)
        try:
            for part in words.parts:
                print(f"## {part}\n", flush=True)
                PARTS[part](bench)
                print(flush=True)
            for name, why in bench.world.left_out.items():
                print(f"left out: {name}: {why}")
        finally:
            as_user(user, bench.world.remove)
    return 0


def read() -> argparse.Namespace:
    """Return the command line's words."""
    parser = argparse.ArgumentParser(prog="helpers/bench", description="How fast sbx is here, beside others.")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}, or all (default: launch)")
    add("--rounds", type=int, default=40, help="launches of each, one after the other (default 40)")
    add("--batch", type=int, default=4, help="launches in parallel, in multiples of how many at once (default 4)")
    add("--sandboxes", type=int, default=20, help="idle at once, for memory (default 20)")
    add("--only", default="", metavar="NAME,NAME", help="compare with these only")
    add("--also", action="append", default=[], metavar="NAME=CHECKOUT", help="compare with another version of sbx")
    add("--user", default="", help=f"who launches, when run as root (default {USER})")
    words = parser.parse_args()
    if unknown := set(words.parts) - {*PARTS, "all"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    words.parts = list(PARTS) if "all" in words.parts else words.parts or ["launch"]
    return words


# ── where and as whom ─────────────────────────────────────────────────────────────────────────────────────────────────


def launching_user(name: str) -> str:
    """Return the ordinary user who launches; the tests' own is made where it is missing."""
    if not name:
        name = USER
        try:
            pwd.getpwnam(name)
        except KeyError:
            subprocess.run(["useradd", "--create-home", "--shell", "/bin/sh", name], check=True)
    subprocess.run(["sh", CHECKOUT / "helpers" / "setup-host", "--user", name], check=True, stdout=subprocess.DEVNULL)
    return name


def environment(user: pwd.struct_passwd, scratch: Path) -> dict[str, str]:
    """Return the little that every launch gets."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": user.pw_dir,
        "USER": user.pw_name, "SBX_HOME": str(scratch / "home"),
    }  # fmt: skip


@contextlib.contextmanager
def scratch_folder(user: pwd.struct_passwd) -> Iterator[Path]:
    """A folder of the user's on a disk (overlayfs on a tmpfs would be another measurement)."""
    folder = Path(tempfile.mkdtemp(prefix="sbx-bench-", dir="/var/tmp"))
    # a copy of what is measured: the checkout may be closed to that user, and it changes while people work on it
    for part in ("rootless", "helpers", "images"):
        shutil.copytree(CHECKOUT / part, folder / "checkout" / part, ignore=shutil.ignore_patterns("__pycache__"))
    if alpine := alpine_tarball():
        os.environ["SBX_TEST_ALPINE"] = str(shutil.copy(alpine, folder / "alpine.tar.gz"))
    if os.geteuid() == 0:
        os.chmod(folder, 0o755)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def own_cgroup(user: pwd.struct_passwd) -> Iterator[None]:
    """Enter a cgroup v2 subtree that is the user's, as a systemd session would give it: the peers insist on one."""
    if os.geteuid() or not (CGROUPS / "cgroup.controllers").exists():
        yield
        return
    before = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
    top = CGROUPS / f"sbx-bench-{os.getpid()}"
    (top / "run").mkdir(parents=True)
    for path in (top, *top.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    (top / "run" / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        Path(f"{CGROUPS}{before}/cgroup.procs").write_text(str(os.getpid()))
        (top / "cgroup.kill").write_text("1")  # what a peer may have left behind
        while "populated 1" in (top / "cgroup.events").read_text():
            time.sleep(0.01)
        for folder in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
            folder.rmdir()
        top.rmdir()


def as_user(user: pwd.struct_passwd, function: Callable[[], T]) -> T:
    """Return what `function` returns, called in a child process that is `user`; raise what it raises."""
    if os.geteuid() != 0:
        return function()
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(reader)
        try:
            os.setgroups([])
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)
            os.environ.update(HOME=user.pw_dir, USER=user.pw_name)
            answer: tuple[bool, Any] = (True, function())
        except BaseException as error:
            answer = (False, error)
        sys.stdout.flush()
        with open(writer, "wb") as stream:
            pickle.dump(answer, stream)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        answered = stream.read()
    os.waitpid(pid, 0)
    worked, result = pickle.loads(answered)
    if not worked:
        raise result
    return result  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
