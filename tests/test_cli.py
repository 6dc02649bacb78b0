"""The app as a whole: its table of commands is what is registered."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from conftest import Sbx

from rootless import cli, options
from rootless.cli import mistakes


@pytest.mark.parametrize("group", cli.GROUPS)
def test_the_table_names_each_command_of_a_module(group: str) -> None:
    """A command that is missing there would be found all the same, but only after all modules were imported."""
    app = typer.Typer()
    importlib.import_module(f"rootless.cli.{group}").register(app)
    command = typer.main.get_group(app) if len(app.registered_commands) + len(app.registered_groups) > 1 else None
    names = set(command.commands) if command else {app.registered_commands[0].name or group}
    assert names == set(cli.GROUPS[group].split())


def test_an_unknown_command_and_the_help_know_all(sbx: Sbx) -> None:
    result = sbx("imagse")
    assert result.status == 125
    assert "imagse" in result.stderr
    shown = sbx.ok("--help")
    for commands in cli.GROUPS.values():
        for name in commands.split():
            assert f" {name} " in shown, name


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("rnu", "no such command: rnu", "did you mean run? see: sbx --help"),
        ("none-such", "no such command: none-such", "see: sbx --help"),
        ("image ls", "no such command: image ls", "it is: sbx images"),
        ("run -itd alpine", "no such option: -d", mistakes.OPTIONS["-d"]),
        ("ps --jsn", "no such option: --jsn", "did you mean --json? see: sbx ps --help"),
        ("run --expose 80 x", "no such option: --expose", mistakes.OPTIONS["--expose"]),
        ("run --tzone x", "no such option: --tzone", "see: sbx run --help"),
        ("run --rm=true x", "option '--rm' does not take a value", "it is on when it is given: leave out the ="),
        ("container ls -a", "no such command: container", "it is: sbx ps"),
        ("container logs x", "no such command: container", mistakes.COMMANDS["logs"]),
        ("container", "no such command: container", mistakes.COMMANDS["container"]),
        ("-v", "no such option: -v", "it is: sbx --version"),
        (
            "run --net container:x host true",
            "choose network container:x: there is none of that name",
            "it is: --net sandbox:x",
        ),
        (
            "run ./tree x",
            "bad reference './tree': a part of a host name is empty or ends in '-', at position 1",
            "a folder with a root filesystem is run with --rootfs",
        ),
        ("run --\x1b[31m alpine", "no such option: --\\x1b[31m", "see: sbx run --help"),
        ("run --env", "option '--env' requires an argument", "see: sbx run --help"),
        ("run", "missing argument 'IMAGE'", "see: sbx run --help"),
        ("login -p x", "no such option: -p", mistakes.OTHERS["login -p"]),
        ("ps x", "got unexpected extra argument(s) (x)", "see: sbx ps --help"),
    ],
)
def test_a_mistake_is_one_line_and_a_hint(sbx: Sbx, line: str, message: str, hint: str) -> None:
    result = sbx(*line.split(" "))
    assert (result.status, result.stdout, result.stderr) == (125, "", f"sbx: {message}\nhint: {hint}\n")


def test_words_of_other_tools_are_none_of_ours() -> None:
    """A word that has become ours would never be explained, and a hint must name what there is."""
    ours = {name for commands in cli.GROUPS.values() for name in commands.split()}
    assert not ours & set(mistakes.COMMANDS)
    flags = {flag for option in options.TABLES["run"] for flag in option.flags}
    assert not flags & set(mistakes.OPTIONS)
    for hint in (*mistakes.COMMANDS.values(), *mistakes.OPTIONS.values(), *mistakes.OTHERS.values()):
        assert set(re.findall(r"\bsbx ([a-z]+)", hint)) <= ours, hint


def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command, and each group of them, with the words that call it."""
    for name, command in group.commands.items():
        yield f"{path}{name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{path}{name} ")


ALL = dict(commands(typer.main.get_command(cli.build_app())))


@pytest.mark.parametrize("path", ALL)
def test_help_reads_as_a_manual_page(sbx: Sbx, path: str) -> None:
    """It says of each argument and option what it is, in the words of manual pages and not of Python."""
    command = ALL[path]
    assert command.help, path
    for parameter in command.params:
        assert parameter.help, f"{path}: {parameter.opts}"
    shown = sbx.ok(*path.split(" "), "--help", env={"COLUMNS": "160"})
    usage = shown.split("\n")[1]
    assert usage.startswith(f" Usage: sbx {path} [OPTIONS]"), usage
    assert not set(usage) & set("{}<>"), usage
    assert not re.search(r"<\w+>", shown), shown
    arguments = usage.partition("[OPTIONS]")[2].strip()
    assert arguments == arguments.upper() or "/tcp|udp" in arguments, usage


def test_the_list_of_commands_is_divided(sbx: Sbx) -> None:
    shown = sbx.ok("--help")
    assert set(" ".join(cli.PANELS.values()).split()) == set(cli.GROUPS)
    assert re.findall("╭─ (.*?) ─", shown) == ["Options", *cli.PANELS]


def test_paragraphs_of_help_flow(sbx: Sbx) -> None:
    shown = sbx.ok("save", "--help", env={"COLUMNS": "400"})
    assert any("docker-archive it is what" in line and "FILE:NAME." in line for line in shown.split("\n"))


def test_a_lone_h_asks_for_help(sbx: Sbx) -> None:
    for command in ("run", "shell", "exec", "ps"):
        assert sbx.ok(command, "-h") == sbx.ok(command, "--help")
    assert sbx("run", "-h").stdout != sbx("shell", "-h").stdout


def test_of_run_h_is_the_host_name(sbx: Sbx, image: str) -> None:
    assert sbx.ok("run", "--net", "none", "-h", "there", image, "hostname") == "there"
    result = sbx("run", "-it", "-h")
    assert (result.status, result.stderr) == (125, "sbx: option '-h' requires an argument\nhint: see: sbx run --help\n")


def test_help_on_a_command_is_its_own_help(sbx: Sbx) -> None:
    assert sbx.ok("help", "rmi") == sbx.ok("rmi", "--help")
