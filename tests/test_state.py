"""Records of sandboxes: names, life and death, and many processes at once. The folders and locks are real."""

from __future__ import annotations

import collections
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from conftest import COMMAND, Sbx

from rootless import state, trees
from rootless.errors import SbxError


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the sandboxes' folders, empty."""
    monkeypatch.setenv("SBX_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sandboxes"


def code_of(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(SbxError) as caught:
        function(*arguments)
    return caught.value.code


def record(name: str, identity: str = "0123456789ab") -> dict[str, object]:
    pid = os.getpid()
    return {"name": name, "id": identity, "created": 1.0, "pid": pid, "start_time": state.start_time(pid)}


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["a", "A9", "web-1", "a.b_c", "0", "x" * 63])
def test_names(name: str) -> None:
    assert state.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "_a", "a/b", "../a", "a b", "a\n", "a\0", "é", "\x1b[31m", "x" * 64, "a:b", "a,b"],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(SbxError, match="bad name") as caught:
        state.check_name(name)
    assert caught.value.code == "name-invalid"
    assert "\x1b" not in caught.value.message


def test_ids_are_twelve_hex_digits_and_differ() -> None:
    ids = {state.new_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(identity) == 12 and not set(identity) - set("0123456789abcdef") for identity in ids)


# ── one folder ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_is_taken_as_long_as_it_lives(top: Path) -> None:
    first = state.create("a")
    assert os.listdir(top) == ["a"]
    assert code_of(state.create, "a") == "name-taken"
    assert os.listdir(top) == ["a"]  # the attempt left nothing
    assert state.discard(first) == ""
    assert os.listdir(top) == []
    state.discard(state.create("a"))


def test_where_the_filesystem_can_it_spreads_the_folders(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flags(path: Path) -> int:
        fd = os.open(path, os.O_RDONLY)
        try:
            return int.from_bytes(fcntl.ioctl(fd, state.GETFLAGS, bytes(8))[:4], sys.byteorder)
        finally:
            os.close(fd)

    folder = state.create("one")
    plain = top / "plain"
    plain.mkdir()
    try:
        before = flags(plain)
    except OSError as error:
        pytest.skip(f"the filesystem of {top} has no flags: {error.strerror}")
    state.spread(str(plain))
    if flags(plain) == before:
        pytest.skip(f"the filesystem of {top} has no flag for folders that do not belong together")
    assert flags(plain) == before | state.TOPDIR
    assert flags(Path(state.sandboxes())) == before | state.TOPDIR
    state.discard(folder)
    monkeypatch.setattr(fcntl, "ioctl", None)
    state.discard(state.create("two"))  # it is there, and was told


def test_folders_are_the_users_alone(top: Path) -> None:
    folder = state.create("a")
    assert Path(folder.path).stat().st_mode & 0o777 == 0o700
    assert top.stat().st_mode & 0o777 == 0o700
    state.discard(folder)


def test_a_dead_ones_name_is_free_and_its_folder_debris(top: Path) -> None:
    dead = state.create("a")
    dead.write_record(record("a"))
    dead.publish_record()
    os.close(dead.lock)  # what the kernel does when the last holder ends
    assert code_of(state.find, "a") == "sandbox-unknown"
    assert state.running() == []
    alive = state.create("a")
    assert not (top / "a" / "record").exists()  # a new folder, not the dead one's
    found = state.debris()
    assert [os.path.basename(path).startswith(".dead-") for path in found] == [True]
    for path in found:
        trees.remove(path)
    assert os.listdir(top) == ["a"]
    state.discard(alive)


def test_the_sweep_takes_the_dead_and_leaves_the_living(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, dead = state.create("alive"), state.create("dead")
    os.close(dead.lock)
    (top / ".new-0123456789ab").mkdir()  # one whose maker was killed before it had its name, or is about to lock it
    for path in state.debris():
        trees.remove(path)
    assert sorted(os.listdir(top)) == [".new-0123456789ab", "alive"]
    monkeypatch.setattr(state, "_MOMENT", 0)  # when that has passed
    for path in state.debris():
        trees.remove(path)
    assert os.listdir(top) == ["alive"]
    state.discard(alive)


def test_the_sweep_leaves_what_is_being_deleted(top: Path) -> None:
    """Whoever ends just now deletes its own; a launch that took it over would be a slow one."""
    ending = state.create("a")
    os.rename(ending.path, dead := state.aside("0" * 12))
    assert state.debris() == []
    os.unlink(f"{dead}/lock")  # it has come to that
    assert state.debris() == []
    os.mkdir(f"{dead}/lock")
    os.close(ending.lock)
    assert state.debris() == [dead]  # whatever that is
    trees.remove(dead)


def test_the_sweep_is_bounded(top: Path) -> None:
    for number in range(5):
        os.close(state.create(f"s{number}").lock)
    assert len(state.debris(3)) == 3


def test_discarding_spares_the_next_one_of_that_name(top: Path) -> None:
    """The supervisor has deleted the folder and the name was given away before the parent comes to look."""
    first = state.create("a")
    os.rename(first.path, state.aside("0" * 12))
    second = state.create("a")
    second.write_record(record("a"))
    second.publish_record()
    state.discard(first)
    assert state.find("a")["name"] == "a"
    state.discard(second)


def leave_work(folder: state.Folder) -> Path:
    """Make what overlayfs leaves of a volatile upper layer, with folders that nobody may enter."""
    work = Path(folder.path) / "work" / "work"
    (work / "incompat" / "volatile").mkdir(parents=True)
    (work / "incompat" / "volatile" / "dirty").touch()
    for path in (work / "incompat" / "volatile", work / "incompat", work):
        path.chmod(0)
    return work


def test_what_overlayfs_leaves_is_deleted_without_a_look(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = state.create("a")
    leave_work(folder)
    listed: list[list[tuple[bytes, bool]]] = []
    entries = trees._entries

    def seen(fd: int) -> list[tuple[bytes, bool]]:
        listed.append(entries(fd))
        return listed[-1]

    monkeypatch.setattr(trees, "_entries", seen)
    assert state.discard(folder) == ""
    assert os.listdir(top) == []
    assert listed == [[(b"lock", False)]]


@pytest.mark.parametrize("place", ["work", "work/work", "work/work/incompat"])
def test_no_link_in_a_work_folder_is_followed(top: Path, tmp_path: Path, place: str) -> None:
    """Whoever was given the data folder can put one there."""
    theirs = tmp_path / "theirs"
    for path in (theirs, theirs / "work", theirs / "work" / "incompat", theirs / "work" / "incompat" / "volatile"):
        path.mkdir()
    folder = state.create("a")
    link = Path(folder.path) / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(theirs / place.removeprefix("work").removeprefix("/"))
    for path in (theirs / "work" / "incompat" / "volatile", theirs / "work" / "incompat", theirs / "work", theirs):
        path.chmod(0o555)
    assert state.discard(folder) == ""
    assert {path.stat().st_mode & 0o777 for path in (theirs, *theirs.rglob("*"))} == {0o555}
    assert len([*theirs.rglob("*")]) == 3


def test_layers_that_do_not_fit_on_the_disk_are_an_error(top: Path) -> None:
    """A limit on the size of files cuts a write(2) short as a full disk does."""
    folder = state.create("a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, before[1]))
    try:
        assert code_of(folder.use_layers, ["first", "second"]) == "data-unwritable"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    state.discard(folder)


def test_where_nothing_may_be_written_the_error_says_what_to_set(top: Path) -> None:
    top.mkdir(parents=True)
    top.chmod(0o500)
    try:
        if os.access(top, os.W_OK):
            pytest.skip("root may write everywhere")
        with pytest.raises(SbxError) as caught:
            state.create("a")
        assert (caught.value.code, "SBX_HOME" in caught.value.hint) == ("data-unwritable", True)
    finally:
        top.chmod(0o700)


# ── records ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_found_by_name_by_id_and_by_the_start_of_the_id(top: Path) -> None:
    one, two = state.create("one"), state.create("two")
    one.write_record(record("one", "aaaa11111111"))
    one.publish_record()
    two.write_record(record("two", "aaaa22222222"))
    two.publish_record()
    for word, name in [("one", "one"), ("two", "two"), ("aaaa11111111", "one"), ("aaaa2", "two")]:
        assert state.find(word)["name"] == name
    assert code_of(state.find, "aaaa") == "sandbox-ambiguous"
    for word in ["", "b", "on", "../sandboxes/one", ".", "one/", "\x1b[31m", "aaaa111111112"]:
        assert code_of(state.find, word) == "sandbox-unknown"
    assert [found["name"] for found in state.running()] == ["one", "two"]
    state.discard(one)
    state.discard(two)


@pytest.mark.parametrize("content", [b"", b"x", b"\xe9\x00", bytes(range(100)), b"i\0\0\0\0", b"N"])
def test_a_damaged_record_is_none(top: Path, content: bytes) -> None:
    folder = state.create("a")
    (top / "a" / "record").write_bytes(content)
    assert state.running() == []
    assert code_of(state.find, "a") == "sandbox-unknown"
    state.discard(folder)


def test_a_record_that_is_a_link_or_a_fifo_is_none(top: Path, tmp_path: Path) -> None:
    folder = state.create("a")
    folder.write_record(record("a"))
    folder.publish_record()
    (top / "a" / "record").rename(tmp_path / "elsewhere")
    (top / "a" / "record").symlink_to(tmp_path / "elsewhere")
    assert state.running() == []
    state.discard(folder)


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "f" / "child").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):  # a folder cannot be replaced by a file
        state.write_atomically(str(tmp_path), "f", b"x" * 1000)
    assert os.listdir(tmp_path) == ["f"]
    state.write_atomically(str(tmp_path), "g", b"x" * 1_000_000)
    assert (tmp_path / "g").read_bytes() == b"x" * 1_000_000


def test_a_process_is_the_one_of_the_record_or_none(top: Path) -> None:
    mine = record("a")
    os.close(state.open_process(mine))
    assert code_of(state.open_process, mine | {"start_time": 1}) == "sandbox-gone"  # somebody else has its number now
    assert code_of(state.open_process, mine | {"pid": 4194305}) == "sandbox-gone"


# ── many at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


def in_processes(count: int, work: Callable[[int], str]) -> list[str]:
    """Do `work` in so many processes, all let go at one moment; what each returns."""
    start, go = os.pipe()
    readers, pids = [], []
    for number in range(count):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            said = "crashed"
            try:
                os.close(go)
                os.read(start, 1)  # the end of file comes to all of them
                said = work(number)
            except BaseException as error:
                said = repr(error)
            finally:
                os.write(writer, said.encode())
                os._exit(0)
        os.close(writer)
        readers.append(reader)
        pids.append(pid)
    os.close(start)
    os.close(go)
    answers = []
    for reader, pid in zip(readers, pids, strict=True):
        with open(reader) as stream:
            answers.append(stream.read())
        os.waitpid(pid, 0)
    return answers


def test_fifty_creates_of_one_name_give_one_winner(top: Path) -> None:
    done, ended = os.pipe()

    def work(number: int) -> str:
        try:
            folder = state.create("wanted")
        except SbxError as error:
            return error.code
        finally:
            os.write(ended, b".")
        # Keep it until everybody has tried.
        seen = 0
        while seen < 50:
            seen += len(os.read(done, 50))
        os.write(ended, b"." * 50)
        return "won" if state._holds(folder.lock, folder.path) else "lost"

    assert collections.Counter(in_processes(50, work)) == {"won": 1, "name-taken": 49}
    os.close(done)
    os.close(ended)


def test_sweeps_never_take_a_living_one(top: Path) -> None:
    def work(number: int) -> str:
        for turn in range(60):
            try:
                # half of them fight for one name
                folder = state.create("same" if number % 2 else f"own-{number}")
            except SbxError as error:
                if error.code != "name-taken" or number % 2 == 0:
                    return f"{turn}: {error.message}"
                continue
            folder.write_record(record(folder.name, f"{number:012x}"))
            folder.publish_record()
            for path in state.debris():
                if not os.path.basename(path).startswith(".dead-"):
                    return f"{turn}: {path} may be a living one's by now"
                trees.remove(path)
            if state.find(folder.name)["id"] != f"{number:012x}":
                return f"{turn}: it is another's"
            if turn % 3:
                state.discard(folder)
            else:
                os.close(folder.lock)  # it dies
        return ""

    assert in_processes(8, work) == [""] * 8
    for path in state.debris():
        trees.remove(path)
    assert os.listdir(top) == []


def test_killed_at_any_moment_it_leaves_only_debris(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(20):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(writer, b".")
                while True:
                    folder = state.create("a")
                    folder.write_record(record("a"))
                    folder.publish_record()
                    state.discard(folder)
            finally:
                os._exit(1)
        os.read(reader, 1)
        state.running()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
        assert state.running() == []
        state.discard(state.create("a"))
    monkeypatch.setattr(state, "_MOMENT", 0)
    for path in state.debris():
        trees.remove(path)
    assert os.listdir(top) == []


# ── as commands ───────────────────────────────────────────────────────────────────────────────────────────────────────


@needs.userns
@needs.busybox
def test_one_name_one_sandbox(sbx: Sbx, image: str) -> None:
    with sbx.start("run", "--net", "none", "--name", "only", image, "sh", "-c", "echo up; cat") as running:
        assert running.stdout
        assert running.stdout.readline() == b"up\n"
        second = sbx("run", "--net", "none", "--name", "only", image, "true")
        assert second.status == 125
        assert second.stderr.startswith("sbx: create sandbox only: one of that name is running\nhint: ")
        [listed] = json.loads(sbx.ok("ps", "--json"))
        assert (listed["name"], listed["command"]) == ("only", ["sh", "-c", "echo up; cat"])
        assert sbx.ok("ps", "-q") == listed["id"]
        assert sbx.ok("exec", listed["id"][:6], "echo", "found") == "found"
        running.communicate()
    assert json.loads(sbx.ok("ps", "--json")) == []
    assert sbx("exec", "only", "true").stderr.startswith("sbx: find sandbox only: none of that name or id is running\n")


@needs.userns
@needs.busybox
def test_a_name_is_used_again_at_once_by_whoever_comes(sbx: Sbx, image: str) -> None:
    """One after the other from three sides: each either finds the name taken or has a sandbox of its own, whole."""
    script = 'i=0; while [ $i -lt 12 ]; do i=$((i+1)); "$@"; echo "status $?"; done'
    command = [*COMMAND, "run", "--net", "none", "--name", "again", image, "sh", "-c", "echo whole >/x; cat /x"]
    loops = [
        subprocess.Popen(
            ["sh", "-c", script, "sh", *command], env=sbx.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for loop in loops:
        stdout, stderr = loop.communicate(timeout=60)
        counts = collections.Counter(stdout.split("\n"))
        assert counts["status 0"] == counts["whole"] > 0
        assert counts["status 0"] + counts["status 125"] == 12
        assert set(stderr.splitlines()) <= {
            "sbx: create sandbox again: one of that name is running",
            "hint: stop it with: sbx stop again, or choose another name",
        }
