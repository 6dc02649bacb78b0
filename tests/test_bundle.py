"""The bundle of the hot modules: a launch reads it and nothing else of ours, and it never stands in the way."""

from __future__ import annotations

import _ctypes
import ast
import fcntl
import marshal
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import CodeType

import hypothesis.strategies as st
import needs
import pytest
from hypothesis import given

from rootless import bundle, lean_os, unbundle

NAMES = st.text(alphabet="./ab\0\udcff", max_size=12)


class Installation:
    """A copy of the package of the tests' own."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(needs.CHECKOUT / "rootless", folder / "rootless", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(needs.CHECKOUT / "helpers", folder / "helpers")  # the filter's table
        self.package = folder / "rootless"
        self.cache = self.package / "__pycache__"
        self.file = self.cache / f"bundle.{sys.implementation.cache_tag}"
        self.home = folder / "home"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        main, (options, words) = str(self.package / "__main__.py"), split(arguments)
        command = [sys.executable, "-I", "-S", "-E", *options, main, *words]
        env = {"PATH": "/usr/bin:/bin", "SBX_HOME": str(self.home), "HOME": "/"}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def hide_modules(self) -> None:
        """Make every module but the entry unreadable; times and sizes stay what they are."""
        for path in [*self.package.rglob("*.py"), *self.package.rglob("*.pyc")]:
            if path.name != "__main__.py":
                path.chmod(0)


def split(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Return the interpreter's options and the command's words."""
    options = [word for word in arguments if word in ("-v", "-B")]
    return options, [word for word in arguments if word not in options]


#: A launch without a kernel: the plan of one, on the host's own files.
PLAN = ("run", "--dry-run", "--name", "plan", "--idmap", "single", "--net", "none", "host", "true")


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    made = Installation(tmp_path)
    yield made
    for path in made.package.rglob("*.py"):
        path.chmod(0o644)


@pytest.fixture
def bundled(installation: Installation) -> Installation:
    """One that has been used once."""
    installation("--version")
    installation(*PLAN)
    assert installation.file.exists()
    return installation


def test_the_first_use_makes_it_and_the_next_needs_no_module(installation: Installation) -> None:
    installation.cache.mkdir()
    first = installation(*PLAN)
    assert first[0] == 0, first
    assert installation.file.stat().st_mode & 0o777 == (installation.package / "bundle.py").stat().st_mode & 0o666
    installation.hide_modules()
    again = installation(*PLAN)
    assert again == first


def test_a_changed_module_counts_at_once(bundled: Installation) -> None:
    entry = bundled.package / "entry.py"
    before = bundled.file.stat().st_ino
    entry.write_text(entry.read_text().replace("argv = sys.argv[1:]", "argv = sys.argv[1:]; print('changed')"))
    for _ in range(2):  # from the module, then from the new bundle
        status, stdout, _ = bundled(*PLAN)
        assert status == 0
        assert stdout.startswith("changed\n")
    assert bundled.file.stat().st_ino != before


def test_a_change_of_the_same_size_counts_too(bundled: Installation) -> None:
    entry = bundled.package / "entry.py"
    entry.write_text(entry.read_text().replace('"run": "run"', '"ran": "run"'))
    assert bundled(*PLAN)[0] == 0  # by the slow way
    os.utime(entry, ns=(1, 1))
    assert bundled(*PLAN)[0] == 0


@pytest.mark.parametrize(
    "content", [b"", bytes(9), b"no bundle at all", b"00000001N", b"00000009", b"00000005[\1\0\0\0", b"-0000001("]
)
def test_what_is_no_bundle_is_replaced(bundled: Installation, content: bytes) -> None:
    good = bundled.file.read_bytes()
    bundled.file.write_bytes(MAGIC_NUMBER + content)
    status, _, stderr = bundled(*PLAN)
    assert (status, stderr) == (0, "")
    assert len(bundled.file.read_bytes()) == len(good)


def test_one_for_other_bytecode_is_replaced(bundled: Installation) -> None:
    head = marshal.dumps(compile("raise SystemExit(3)", "head", "exec"))
    bundled.file.write_bytes(b"\1\2\r\n%08d%b" % (len(head), head))
    assert bundled(*PLAN)[0] == 0
    assert bundled.file.read_bytes().startswith(MAGIC_NUMBER)


def test_a_new_way_to_make_it_counts_at_once(bundled: Installation) -> None:
    before = bundled.file.stat().st_ino
    os.utime(bundled.package / "bundle.py", ns=(1, 1))
    assert bundled(*PLAN)[0] == 0
    assert bundled.file.stat().st_ino != before


@needs.program("strace")
def test_another_interpreters_c_modules_are_not_loaded(bundled: Installation, tmp_path: Path) -> None:
    """Two interpreters of one version share the cache tag, and so the bundle, but not what was built for each."""
    content = bundled.file.read_bytes()
    files = [str(module.__file__) for module in (_ctypes, fcntl, select) if getattr(module, "__file__", None)]
    if not files:
        pytest.skip("all C modules are built into this interpreter")
    for file in files:
        other = os.path.dirname(file)[:-1] + "_/" + os.path.basename(file)  # of the same length
        assert content.count(file.encode()) == 1
        content = content.replace(file.encode(), other.encode())
    bundled.file.write_bytes(content)
    main, trace = str(bundled.package / "__main__.py"), tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "-o",
        str(trace),
        "-e",
        "trace=open,openat",
        sys.executable,
        "-I",
        "-S",
        "-E",
        main,
        *PLAN,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": "/"})
    assert (done.returncode, done.stderr) == (0, "")
    opened = trace.read_text()
    assert str(bundled.file) in opened
    assert "entry.cpython" not in opened  # it is from the bundle
    assert os.path.dirname(other) + "/" not in opened


@needs.userns
@pytest.mark.parametrize("spoil", ["echo 'def (' >> trees.py", "rm bundle.py __pycache__/bundle.*.pyc"])
def test_sources_that_are_replaced_meanwhile_change_no_status(bundled: Installation, spoil: str) -> None:
    (bundled.package / "trees.py").touch()  # so that a new one is due
    options = (
        "--idmap",
        "single",
        "--net",
        "none",
        "--volume",
        f"{bundled.package}:/tmp/package:rw",
        "--workdir",
        "/tmp/package",
    )
    outcome = bundled("run", *options, "host", "sh", "-c", f"{spoil}; exit 7")
    assert outcome == (7, "", "")


def test_a_full_disk_leaves_no_half_a_bundle(bundled: Installation) -> None:
    """A limit on the size of files cuts a write(2) short as a full disk does."""
    bundled.file.unlink()
    main = str(bundled.package / "__main__.py")
    command = ["prlimit", "--fsize=100000", sys.executable, "-I", "-S", "-E", main, *PLAN]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HOME": "/"})
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in bundled.cache.iterdir() if path.suffix != ".pyc"] == []


def test_a_truncated_bundle_is_replaced(bundled: Installation) -> None:
    good = bundled.file.read_bytes()
    for length in range(1, len(good), len(good) // 7):
        bundled.file.write_bytes(good[:length])
        status, _, stderr = bundled(*PLAN)
        assert (status, stderr) == (0, "")
        assert len(bundled.file.read_bytes()) == len(good)


def test_without_a_place_to_write_to_the_modules_do(installation: Installation) -> None:
    installation.cache.mkdir()
    installation.cache.chmod(0o555)
    try:
        status, _, stderr = installation(*PLAN)
        assert (status, stderr) == (0, "")
        assert not list(installation.cache.iterdir())
    finally:
        installation.cache.chmod(0o755)


def test_who_asks_for_no_compiled_modules_gets_none(installation: Installation) -> None:
    installation.cache.mkdir()
    assert installation("-B", *PLAN)[0] == 0
    assert not installation.file.exists()


def test_of_many_at_once_one_makes_it(installation: Installation) -> None:
    installation.cache.mkdir()
    running = [installation.start(*PLAN) for _ in range(8)]
    outcomes = [(process.communicate(timeout=60), process.returncode) for process in running]
    assert {status for _, status in outcomes} == {0}
    assert {stderr for (_, stderr), _ in outcomes} == {""}
    assert not list(installation.cache.glob("*.new"))
    installation.hide_modules()
    assert installation(*PLAN)[0] == 0


def test_killed_at_any_moment_it_leaves_none_or_a_whole_one(installation: Installation) -> None:
    installation("-B", "--version")  # warms the files, so that the moments fall into the work
    installation.cache.mkdir(exist_ok=True)
    pause = random.Random(1)
    for _ in range(12):
        installation.file.unlink(missing_ok=True)
        process = installation.start(*PLAN)
        time.sleep(pause.uniform(0.02, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if installation.file.exists():
            assert len(installation.file.read_bytes()) > 100_000
    assert installation(*PLAN)[0] == 0
    assert installation.file.exists()
    assert not list(installation.cache.glob("*.new"))


@needs.userns
@needs.program("strace")
def test_a_launch_opens_no_module_and_imports_no_os(bundled: Installation, tmp_path: Path) -> None:
    arguments = ("run", "--idmap", "single", "--net", "none", "host", "true")
    assert bundled(*arguments)[0] == 0  # compiles the filter
    status, _, stderr = bundled("-v", *arguments)
    assert status == 0
    assert "import 'marshal'" in stderr or "import 'time'" in stderr  # it does tell
    loaded = [line.split()[1] for line in stderr.splitlines() if line.startswith("import ")]
    assert not {"'os'", "'posixpath'", "'_collections_abc'"} & set(loaded), loaded
    assert not [name for name in loaded if "rootless" in name]


def test_a_traceback_has_its_lines(bundled: Installation) -> None:
    """SBX_DEBUG shows where an error was raised."""
    main, env = str(bundled.package / "__main__.py"), {"PATH": "/usr/bin:/bin", "SBX_DEBUG": "1", "HOME": "/"}
    command = [sys.executable, "-I", "-S", "-E", main, "run", "--rootfs", "/nowhere", "x"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 125
    assert 'raise SbxError("rootfs-missing"' in done.stderr


def test_a_function_keeps_its_first_line() -> None:
    def check(code: CodeType) -> int:
        assert {line for _, _, line in code.co_lines()} <= {code.co_firstlineno}
        # no further, or an interpreter that traces writes past the memory that it has for the lines
        assert max((end for _, end, _ in code.co_lines()), default=0) == len(code.co_code)
        return 1 + sum(check(value) for value in code.co_consts if isinstance(value, CodeType))

    assert sum(check(bundle.compiled(file)) for _, file in bundle.hot_modules()) > 500


def test_a_slow_command_finds_the_modules_that_are_in_no_bundle(bundled: Installation) -> None:
    status, stdout, _ = bundled("--help")
    assert status == 0
    assert "run" in stdout


# ── what a usual launch does without ──────────────────────────────────────────────────────────────────────────────────

USUAL = (needs.CHECKOUT / "rootless" / "usual.txt").read_text().split()

#: Runs a command line from the bundle of the package that is its first word; into a file goes what was rare in it.
WATCHED = """
import os, sys
package, report = sys.argv[1:3]
del sys.argv[1:3]
sys.path.insert(0, os.path.dirname(package))
from rootless import unbundle
real, wanted = unbundle.Rare.__getattr__, []
def get(place, name):
    found = real(place, name)
    wanted.append(str(found))
    return found
unbundle.Rare.__getattr__ = get
file = open(f"{package}/__pycache__/bundle.{sys.implementation.cache_tag}", "rb", 0)
file.seek(4)
file.read(int(file.read(8)))
assert unbundle.load(package, file)
from rootless import entry
stream = open(report, "w")
status = entry.main()
stream.write("\\n".join(wanted))
stream.flush()
os._exit(status)
"""


def functions(tree: ast.AST, above: str) -> Iterator[str]:
    """Yield the full names of the functions of modules and classes in `tree`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield f"{above}.{node.name}"
        if isinstance(node, ast.ClassDef | ast.If):
            yield from functions(node, f"{above}.{node.name}" if isinstance(node, ast.ClassDef) else above)


def test_the_list_names_functions_that_there_are() -> None:
    there = {
        name for module, file in bundle.hot_modules() for name in functions(ast.parse(Path(file).read_text()), module)
    }
    assert not [name for name in USUAL if name not in there], "run helpers/usual.py again"
    assert sorted(set(USUAL)) == USUAL


@needs.subids
def test_a_usual_launch_wants_nothing_rare(bundled: Installation, home: Path, image: str, tmp_path: Path) -> None:
    report = tmp_path / "report"
    command = [sys.executable, "-ISE", "-c", WATCHED, str(bundled.package), str(report)]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/", "SBX_HOME": str(home)}
    for options, rare in ((["--workdir", "/"], 0), (["-v", "/etc:/x"], 1)):
        words = ["run", "--net", "none", *options, image, "true"]
        for _ in range(2):  # the first one may have a filter to compile
            subprocess.run([*command, *words], env=env, check=True)
        wanted = report.read_text().splitlines()
        assert len(wanted) >= rare, "nothing is rare: it was not watched"
        assert rare or len(wanted) < 5, f"run helpers/usual.py again: {wanted}"


def test_what_is_damaged_of_it_is_told_and_removed(bundled: Installation) -> None:
    """As a disk may do it; what is read at once would rather be no code, and then the modules are."""
    content = bundled.file.read_bytes()
    assert bundled("run", "--rootfs", "/nowhere", "x")[0] == 125
    for damaged in (content[:-1000] + bytes(1000), content[:-1] + bytes([content[-1] ^ 1])):
        bundled.file.write_bytes(damaged)
        assert bundled(*PLAN)[0] == 125  # a plan is shown by what is rare
        assert not bundled.file.exists()
        assert bundled(*PLAN)[0] == 0
        bundled.file.write_bytes(damaged)
        status, _, stderr = bundled("run", "--rootfs", "/nowhere", "x")
        assert (status, stderr.count("\n")) == (125, 2)
        assert stderr.startswith(f"sbx: load {bundled.file}: it is damaged\nhint: ")
        assert bundled("run", "--rootfs", "/nowhere", "x")[2].startswith("sbx: open root filesystem")
    bundled.file.write_bytes(content)
    assert bundled("run", "--rootfs", "/nowhere", "x")[2].startswith("sbx: open root filesystem")


def test_a_rare_one_passes_for_nothing_else() -> None:
    """signal.signal() takes a number for a handler's."""
    rare = unbundle.Rare((0,))
    assert rare
    with pytest.raises(TypeError):
        int(rare)


@needs.userns
@pytest.mark.parametrize("usual", ["nothing", "everything"])
def test_whatever_is_usual_makes_no_difference(installation: Installation, usual: str) -> None:
    names = [
        name for module, file in bundle.hot_modules() for name in functions(ast.parse(Path(file).read_text()), module)
    ]
    (installation.package / "usual.txt").write_text("\n".join(names) if usual == "everything" else "")
    plain = Installation(installation.package.parent / "plain")
    plain.home = installation.home
    run = ("run", "--idmap", "single", "--net", "none", "--name", "x", "--hostname", "x")
    for line in (
        PLAN, (*PLAN[:-1], "nothing"), (*run, "host", "sh", "-c", "exit 3"), (*run, "host", "/no/such/program"),
        (*run, "--tmpfs", "/x", "--volume", "/etc:/y:ro", "-w", "/y", "host", "sh", "-c", "ls /x; umask"),
        (*run, "--volume", "/nowhere:/x", "host", "true"), (*run, "--user", "nobody-here", "host", "true"),
        (*run, "--debug", "host", "true"), (*run, "--rootfs", "/nowhere", "true"), ("exec", "x", "true"), ("ps",),
        (*run, "--timeout", "0.2", "host", "sleep", "9"), (*run, "--no-init", "host", "sh", "-c", "kill -9 $$"),
    ):  # fmt: skip
        assert installation(*line) == plain("-B", *line), line
    assert installation.file.exists()
    assert not plain.file.exists()


# ── lean_os ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def uses_of_os(file: str) -> Iterator[str]:
    """Yield the names below `os` that a module uses: open, path.isdir."""
    for node in ast.walk(ast.parse(Path(file).read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text.startswith("os.") and text.replace(".", "").isidentifier():
                yield text.removeprefix("os.")


@pytest.mark.parametrize(("module", "file"), bundle.hot_modules())
def test_lean_os_has_what_the_hot_modules_use(module: str, file: str) -> None:
    for use in uses_of_os(file):
        here, there = lean_os, os
        for name in use.split("."):
            if name == "unshare" and not hasattr(os, name):
                break  # Python 3.12's; syscalls.py looks before it calls
            here, there = getattr(here, name), getattr(there, name)


def test_every_hot_module_is_in_the_table() -> None:
    names = [name for name, _ in bundle.hot_modules()]
    assert {"rootless", "rootless.entry", "rootless.launch", "rootless.plan", "rootless.lean_os"} <= set(names)
    assert "rootless.cli" not in names
    assert names.index("rootless.errors") < names.index("rootless.paths") < names.index("rootless.launch")


@pytest.mark.parametrize("name", ["dirname", "basename", "normpath", "abspath"])
@given(text=NAMES)
def test_paths_are_what_os_path_says(name: str, text: str) -> None:
    assert getattr(lean_os.path, name)(text) == getattr(os.path, name)(text)


@given(one=NAMES, other=NAMES)
def test_paths_of_two_are_what_os_path_says(one: str, other: str) -> None:
    assert lean_os.path.join(one, other) == os.path.join(one, other)
    if one:
        assert lean_os.path.relpath("/" + one, "/" + other) == os.path.relpath("/" + one, "/" + other)


@pytest.mark.parametrize("name", ["exists", "isdir", "islink", "realpath"])
def test_looks_are_what_os_path_says(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    for each in (
        "file",
        "folder",
        "link",
        "dangling",
        "nothing",
        "file/below",
        "x" * 300,
        "link/..",
        "dangling/x",
        "link/no/no",
        "a/../b",
    ):
        text = f"{tmp_path}/{each}"
        assert getattr(lean_os.path, name)(text) == getattr(os.path, name)(text), each


@given(raw=st.binary(max_size=20))
def test_names_in_any_bytes_survive(raw: bytes) -> None:
    assert lean_os.fsdecode(raw) == os.fsdecode(raw)
    assert lean_os.fsencode(os.fsdecode(raw)) == raw
    assert lean_os.fsencode(raw) == raw


def test_the_environment_is_what_we_were_started_with() -> None:
    code = (
        "from rootless import lean_os as os; e = os.environ;"
        "print(e.get('A'), e.get('B'), e.get('B', 'c'), 'A' in e, 'B' in e, ascii(e['X']))"
    )
    env = {b"A": b"a", b"X": b"\xff", b"PYTHONPATH": os.fsencode(needs.CHECKOUT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "a None c True False '\\udcff'\n", done.stderr


def test_interrupted_while_the_modules_load() -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from rootless import entry, unbundle\n"
        "def main(): raise KeyboardInterrupt\nentry.main = main; unbundle.begin()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(needs.CHECKOUT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
