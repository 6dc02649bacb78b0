"""The manual is true: every transcript in it is run, and what it shows must come.

A transcript is a fenced block of README.md, CONTRIBUTING.md or tests/manual/*.md that begins with ```console:

    ```console
    $ sbx run alpine cat /etc/hostname     a command, run by sh; "> " continues it on the next line
    alpine                                 what stdout and stderr show
    $ sbx run alpine false
    [exit status 1]                        only where it is not 0
    ```

A line of `...` stands for any lines, and `...` within one for any text. Blocks of a file run in order, in one empty
folder. Words after ```console say what a block needs: names from needs.py; `by-hand` keeps a block from being run.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import needs
import pytest
from conftest import COMMAND, Sbx

FILES = [
    needs.CHECKOUT / "README.md",
    needs.CHECKOUT / "CONTRIBUTING.md",
    *sorted((needs.CHECKOUT / "tests/manual").glob("*.md")),
]
BLOCK = re.compile(r"^```console *(?P<words>.*)\n(?P<text>(?s:.*?))^```$", re.MULTILINE)


class Exchange(NamedTuple):
    """A command, and what must come of it; `line` is where it stands in its file."""

    command: str
    expected: str
    line: int


def exchanges(text: str, line: int = 1) -> list[Exchange]:
    """Return the commands of a block with what is expected of each."""
    found: list[Exchange] = []
    for number, content in enumerate(text.splitlines(), line):
        if content.startswith("$ "):
            found.append(Exchange(content[2:], "", number))
            continue
        assert found, f"line {number}: a transcript begins with a command"
        last = found[-1]
        if content.startswith("> ") and not last.expected:
            found[-1] = last._replace(command=f"{last.command}\n{content[2:]}")
        else:
            found[-1] = last._replace(expected=f"{last.expected}{content}\n")
    return found


def matches(expected: str, shown: str) -> bool:
    """Tell whether `shown` is what the transcript says."""
    pattern = "".join(
        "(?:.*\n)*?" if line == "...\n" else ".*?".join(map(re.escape, line.split("...")))
        for line in expected.splitlines(keepends=True)
    )
    return re.fullmatch(pattern, shown) is not None


def run(exchange: Exchange, folder: Path, env: dict[str, str]) -> str:
    """Run a command of a transcript, and return what it shows with its exit status as a transcript has it."""
    done = subprocess.run(
        ["sh", "-c", exchange.command],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=60,
    )
    shown = done.stdout + ("" if done.stdout.endswith("\n") or not done.stdout else "\n")
    return shown + (f"[exit status {done.returncode}]\n" if done.returncode else "")


def blocks(file: Path) -> list[tuple[list[str], list[Exchange]]]:
    """Return the words and commands of each transcript of `file`."""
    text = file.read_text()
    return [
        (block["words"].split(), exchanges(block["text"], text.count("\n", 0, block.start()) + 2))
        for block in BLOCK.finditer(text)
    ]


@needs.userns
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_transcripts(file: Path, sbx: Sbx, alpine: str, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "sbx"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {" ".join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    env = sbx.env | {"PATH": f"{command.parent}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    folder = tmp_path / "project"
    folder.mkdir()
    for words, commands in blocks(file):
        if "by-hand" in words:
            continue
        for word in words:
            needs.enforce(getattr(needs, word).args[0]())
        for exchange in commands:
            shown = run(exchange, folder, env)
            assert matches(exchange.expected, shown), (
                f"{file}:{exchange.line}: $ {exchange.command}\n"
                f"--- the text says\n{exchange.expected}--- it shows\n{shown}"
            )


def test_the_reader_of_transcripts() -> None:
    text = "$ a\nb\n$ c \\\n> d\n[exit status 3]\n"
    assert exchanges(text) == [Exchange("a", "b\n", 1), Exchange("c \\\nd", "[exit status 3]\n", 3)]


@pytest.mark.parametrize(
    ("expected", "shown", "good"),
    [
        ("", "", True),
        ("", "b\n", False),
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a ... c\n", "a b c\n", True),
        ("a ... c\n", "a\nc\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a.c\n", "abc\n", False),
        ("[exit status 1]\n", "", False),
    ],
)
def test_what_matches(expected: str, shown: str, good: bool) -> None:
    assert matches(expected, shown) is good


def test_a_transcript_is_run(tmp_path: Path) -> None:
    exchange = Exchange("echo out; echo err >&2; printf end; exit 3", "", 1)
    assert run(exchange, tmp_path, dict(os.environ)) == "out\nerr\nend\n[exit status 3]\n"
