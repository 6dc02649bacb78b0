"""The app as a whole: its table of commands is what is registered."""

from __future__ import annotations

import importlib

import pytest
import typer
from conftest import Sbx

from rootless import cli


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
