"""What a user installs: the wheel's content, and the command `sbx` that finds its own interpreter."""

from __future__ import annotations

import marshal
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import needs
import pytest

FRONT = needs.CHECKOUT / "helpers" / "sbx"


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return str(done.stdout).strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder, cwd=needs.CHECKOUT)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel in it; what it depends on comes from the tests' own environment."""
    folder = tmp_path_factory.mktemp("installed") / "a folder" / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    site = Path(run(folder / "bin/python3", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            scripts = ".data/scripts/"
            is_script = scripts in member.filename
            target = folder / "bin" / member.filename.split(scripts)[1] if is_script else site / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))
            target.chmod(0o755 if is_script else 0o644)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def version() -> str:
    return run(sys.executable, "-c", "import rootless; print(rootless.__version__)", cwd=needs.CHECKOUT)


def test_the_wheel_ships_what_other_programs_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("helpers", "images"):
        for path in (needs.CHECKOUT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"rootless/share/{path.relative_to(needs.CHECKOUT)}" in names
    assert any(name.endswith(".data/scripts/sbx") for name in names)


def test_sbx_runs(installed: Path) -> None:
    assert version() in run(installed / "bin/sbx", "--version", env={"PATH": "/usr/bin:/bin"})


def test_sbx_runs_through_symlinks(installed: Path, tmp_path: Path) -> None:
    """pipx links ~/.local/bin/sbx to the environment; the link may be relative, and a link to a link."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "absolute").symlink_to(installed / "bin/sbx")
    (tmp_path / "bin/relative").symlink_to("../absolute")
    for link in ("absolute", "bin/relative"):
        assert version() in run(tmp_path / link, "--version", env={"PATH": "/usr/bin:/bin"})
    assert version() in run("sh", "relative", "--version", cwd=tmp_path / "bin")


def test_sbx_is_found_on_the_path(installed: Path) -> None:
    assert version() in run("sbx", "--version", env={"PATH": f"{installed}/bin:/usr/bin:/bin"})


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """An environment whose python3 prints how it was called."""
    (tmp_path / "bin").mkdir()
    shutil.copy(FRONT, tmp_path / "bin/sbx")
    (tmp_path / "bin/python3").write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    (tmp_path / "bin/python3").chmod(0o755)
    return tmp_path


def make_main(folder: Path) -> Path:
    (folder / "rootless").mkdir(parents=True)
    (folder / "rootless/__main__.py").touch()
    return folder / "rootless/__main__.py"


def test_front_takes_the_short_way_into_the_package(fake: Path) -> None:
    main = make_main(fake / "lib/python3.11/site-packages")
    shown = run(fake / "bin/sbx", "a b", "", "*", "-e", "x\ny")
    assert shown == f"<-I><-S><-E><{fake}/bin/../{main.relative_to(fake)}><a b><><*><-e><x\ny>"


def test_front_leaves_an_ambiguous_environment_to_the_interpreter(fake: Path) -> None:
    assert run(fake / "bin/sbx", "a") == "<-m><rootless><a>"
    make_main(fake / "lib/python3.11/site-packages")
    make_main(fake / "lib/python3.12/site-packages")
    assert run(fake / "bin/sbx", "a") == "<-m><rootless><a>"


def test_front_without_an_interpreter_beside_it(fake: Path, tmp_path: Path) -> None:
    """pip install --user puts no python3 beside the scripts."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (fake / "bin/python3").rename(elsewhere / "python3")
    assert run(fake / "bin/sbx", "a", env={"PATH": f"{elsewhere}:/usr/bin:/bin"}) == "<-m><rootless><a>"


def test_front_changes_no_variable_of_the_caller(fake: Path) -> None:
    (fake / "bin/python3").write_text("#!/bin/sh\nexec env\n")
    make_main(fake / "lib/python3.11/site-packages")
    mine = {name: "mine" for name in ("self", "bin", "link", "main", "file", "found")}
    shown = run(fake / "bin/sbx", env=mine | {"PATH": os.environ["PATH"]}).splitlines()
    assert {line for line in shown if line.endswith("=mine")} == {f"{name}=mine" for name in mine}


# ── without a shell ───────────────────────────────────────────────────────────────────────────────────────────────────


def quicken(environment: Path, package: Path) -> None:
    run(environment / "bin/python3", "-ISE", FRONT.parent / "quicken.py", environment, package)


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """An environment with the shell's front, in a folder whose name can stand in a first line."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    shutil.copy(FRONT, tmp_path / "bin/sbx")
    (site,) = tmp_path.glob("lib/python3*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return tmp_path


def test_a_front_without_a_shell(environment: Path) -> None:
    sbx, package = environment / "bin/sbx", environment / "rootless"
    package.mkdir()
    main = "import sys\nprint(__file__, sys.flags.isolated, sys.flags.no_site, sys.argv[1:])\n"
    (package / "__main__.py").write_text(main)
    quicken(environment, package)
    (environment / "link").symlink_to(sbx)
    for command in (sbx, environment / "link"):
        assert run(command, "a b", "", "-c") == f"{package}/__main__.py 1 1 ['a b', '', '-c']"
    before = {path: path.lstat().st_ino for path in environment.rglob("*") if path.suffix != ".pyc"}
    quicken(environment, package)
    assert {path: path.lstat().st_ino for path in before} == before
    sbx.chmod(0o644)
    quicken(environment, package)
    assert run(sbx) == f"{package}/__main__.py 1 1 []"
    (package / "__main__.py").write_text("print('newer')\n")
    assert run(sbx) == "newer"


def test_it_begins_with_the_bundle(environment: Path) -> None:
    """And what is not in there is found: a slow command's packages, as from an interpreter that was started in full."""
    package = environment / "rootless"
    shutil.copytree(needs.CHECKOUT / "rootless", package, ignore=shutil.ignore_patterns("__pycache__"))
    quicken(environment, package)
    env = {"SBX_HOME": str(environment / "home"), "PATH": "/usr/bin:/bin", "HOME": "/"}
    options = "--dry-run --idmap single --net none --seccomp unconfined --name x"
    plan = [str(environment / "bin/sbx"), "run", *options.split(), "host", "true"]
    shown = run(*plan, env=env)
    bundle = package / f"__pycache__/bundle.{sys.implementation.cache_tag}"
    for path in package.rglob("*.py"):
        path.chmod(0)
    assert run(*plan, env=env) == shown  # from the bundle alone
    for path in package.rglob("*.py"):
        path.chmod(0o644)
    number = MAGIC_NUMBER + b"00000005" + marshal.dumps(1)
    for spoiled in (b"", b"no bundle", bundle.read_bytes()[:2000], number, None):
        bundle.unlink()
        if spoiled is not None:
            bundle.write_bytes(spoiled)
        assert run(*plan, env=env) == shown
    assert version() in run(environment / "bin/sbx", "--version", env=env)
    assert "run" in run(environment / "bin/sbx", "--help", env=env)


CODECS = r"""
import builtins, codecs, encodings, io, locale, sys
print = lambda *values: builtins.print(*map(ascii, values))
sys.path[:] = [folder for folder in sys.path if "lean" not in folder]
texts = ["", "a", "ä€𝄞", "\udc80"]
for name in ("utf-8", "UTF8", "utf_8", "latin-1", "cp1252", "utf-16", "idna", "rot13", "nothing", "U8", "utf-8-sig"):
    for text in texts:
        for errors in ("strict", "surrogateescape", "replace"):
            try:
                raw = codecs.encode(text, name, errors)
                print(name, errors, raw, codecs.decode(raw, name, errors))
            except (LookupError, UnicodeError, TypeError) as error:
                print(name, errors, type(error).__name__, error)
for errors in ("strict", "replace"):
    decoder, encoder = codecs.getincrementaldecoder("utf-8")(errors), codecs.getincrementalencoder("utf-8")(errors)
    print([decoder.decode(bytes([byte])) for byte in "ä€".encode()], decoder.getstate(), encoder.encode("ä€", True))
    decoder.decode(b"\xe2"), decoder.reset(), encoder.reset()
    print(decoder.decode(b"a", True), decoder.errors, encoder.errors)
print(codecs.getreader("utf-8")(io.BytesIO("ä".encode())).read(), codecs.lookup("utf-8").name)
stream = io.BytesIO()
codecs.getwriter("utf-8")(stream).write("ä")
print(stream.getvalue(), sys.stdin.read(), sys.stdout.encoding, sys.getfilesystemencoding())
import encodings.idna, encodings.aliases
print(len(encodings.aliases.aliases), encodings.normalize_encoding("a b"), locale.getpreferredencoding(False))
try:
    encodings.nothing
except AttributeError as error:
    print(error)
"""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "de_DE.iso88591"])
def test_lean_encodings_are_the_real_ones(environment: Path, locale: str) -> None:
    quicken(environment, environment)
    env = {"LC_ALL": locale}
    if locale.startswith("de"):
        if not shutil.which("localedef") or not Path("/usr/share/i18n/charmaps").exists():
            pytest.skip("no localedef(1), or no character maps for it: package locales")
        run("localedef", "-f", "ISO-8859-1", "-i", "de_DE", environment / locale)
        env["LOCPATH"] = str(environment)
    (environment / "codecs.txt").write_text(CODECS)
    shown = []
    for interpreter in ("bin/python3", "lean/python3"):
        command = [str(environment / interpreter), "-ISE", "-X", "utf8=0", str(environment / "codecs.txt")]
        done = subprocess.run(command, input="ä\n".encode(), capture_output=True, env=env)
        assert (done.returncode, done.stderr) == (0, b"")
        shown.append(done.stdout)
    assert shown[0] == shown[1]
    loaded = run(environment / "lean/python3", "-ISE", "-c", "import sys; print(*sys.modules)", env={"LC_ALL": "C"})
    assert not [name for name in loaded.split() if name.startswith("encodings.")]


def test_lean_encodings_try_again(environment: Path) -> None:
    quicken(environment, environment)
    code = """
import codecs, resource
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
try:
    codecs.lookup("cp437")
except OSError as error:
    print(error.strerror)
resource.setrlimit(resource.RLIMIT_NOFILE, limits)
print(codecs.lookup("cp437").name)
"""
    assert run(environment / "lean/python3", "-ISE", "-c", code) == "Too many open files\ncp437"


@pytest.mark.parametrize("folder", ["a folder", 'a"folder', "f" * 110])
def test_the_shell_stays_where_a_first_line_cannot_say_it(environment: Path, folder: str) -> None:
    (environment / folder / "bin").mkdir(parents=True)
    (environment / folder / "bin/python3").symlink_to(sys.executable)
    shutil.copy(FRONT, environment / folder / "bin/sbx")
    quicken(environment / folder, environment)
    assert (environment / folder / "bin/sbx").read_bytes() == FRONT.read_bytes()


def test_the_shell_stays_where_nothing_can_be_written(environment: Path) -> None:
    environment.chmod(0o555)
    try:
        quicken(environment, environment)
    finally:
        environment.chmod(0o755)
    assert (environment / "bin/sbx").read_bytes() == FRONT.read_bytes()


def test_a_folder_as_stdin_is_told_in_one_line(installed: Path) -> None:
    folder = os.open("/", os.O_RDONLY)
    done = subprocess.run([installed / "bin/sbx", "run", "alpine"], stdin=folder, capture_output=True, text=True)
    os.close(folder)
    said = "sbx: read stdin: it is a folder\nhint: </dev/null gives it nothing to read\n"
    assert (done.returncode, done.stdout, done.stderr) == (125, "", said)


@needs.program("strace")
def test_front_forks_nothing(fake: Path) -> None:
    make_main(fake / "lib/python3.11/site-packages")
    trace = fake / "trace"
    run("strace", "-f", "-e", "trace=process", "-o", trace, fake / "bin/sbx")
    calls = trace.read_text()
    assert calls.count("execve(") == 2
    assert "fork(" not in calls
    assert "clone" not in calls
