"""The hot reader and Typer: one declaration, two readers, one meaning. The reader answers what Typer would, or None."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rootless import cli, options
from rootless.cli import hot
from rootless.options import FLAG, LIST, NUMBER, SECONDS, TEXT, Option, Request

Answer = dict[str, Any]
COMMANDS = tuple(options.TABLES)
VALUES = {TEXT: ["a", "", "-x", "--net", "a=b", "é"], LIST: ["a", "", "-x", "a=b"], NUMBER: ["5", "-3", "0", "007"],
          SECONDS: ["5", "0.5", "5.", ".5", "0"]}  # fmt: skip
NOT_VALUES = {NUMBER: ["x", "", "1.5"], SECONDS: ["x", "", "-"]}


def answer(request: Request | None) -> Answer | None:
    return dict(vars(request)) if request is not None else None


class Typers:
    """Asks Typer: `request` is what the last command line meant, None for a mistake, help or nothing."""

    def __init__(self) -> None:
        self.request: Request | None = None

    def carry_out(self, request: Request) -> int:
        self.request = request
        return 0

    def __call__(self, command: str, argv: list[str]) -> Answer | None:
        self.request = None
        cli.main([command, *argv])
        return answer(self.request)


@pytest.fixture(scope="module")
def typers() -> Iterator[Typers]:
    asked = Typers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot, "carry_out", asked.carry_out)
        yield asked


def every_option() -> list[tuple[str, Option, str]]:
    return [
        (command, option, flag) for command in COMMANDS for option in options.TABLES[command] for flag in option.flags
    ]


def subject(command: str) -> list[str]:
    return ["x", "true"] if command == "exec" else ["x"]


@pytest.mark.parametrize(
    ("command", "option", "flag"), [pytest.param(*row, id=f"{row[0]} {row[2]}") for row in every_option()]
)
def test_both_readers_agree_on_every_option(typers: Typers, command: str, option: Option, flag: str) -> None:
    lines = [[]] if option.kind == FLAG else [[value] for value in VALUES[option.kind]]
    for words in lines:
        argv = [flag, *words, *subject(command)]
        read = answer(options.read(command, argv))
        assert read is not None, f"the reader declines {argv}"
        assert read == typers(command, argv), argv
        assert read[option.name] is not False, argv
        assert read[option.name] is not None, argv
    for value in NOT_VALUES.get(option.kind, []):
        argv = [flag, value, *subject(command)]
        assert options.read(command, argv) is None, argv


@pytest.mark.parametrize("command", COMMANDS)
def test_names_and_flags_are_declared_once(command: str) -> None:
    table = options.TABLES[command]
    flags = [flag for option in table for flag in option.flags]
    assert len(flags) == len(set(flags))
    assert len(table) == len({option.name for option in table})
    assert all(option.help and option.help[-1] != "." for option in table)
    assert all(flag.startswith("--") or (len(flag) == 2 and flag[0] == "-") for flag in flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_reader_leaves_to_typer(command: str) -> None:
    for argv in ([], ["--help"], ["-h"], ["--no-such", "x"], ["-Z", "x"], ["--env"], ["-e"], ["--tty=yes", "x"],
                 ["--rm=1", "x", "y"], ["-it"], ["--"], ["-tZ", "x", "y"]):  # fmt: skip
        assert options.read(command, argv) is None, argv


def test_the_commands_words_are_passed_byte_for_byte(typers: Typers) -> None:
    words = ["", "-x", "--", "--net", "a\nb", "\udcff", "--help", "-h", "é"]
    for argv in (["-t", "image", *words], ["--", "image", *words], ["image", "--", *words]):
        read = options.read("run", argv)
        assert read is not None
        assert answer(read) == typers("run", argv)
        assert read.arguments[-len(words) :] == words


def test_defaults_are_not_shared() -> None:
    one, two = options.read("run", ["x"]), options.read("run", ["x"])
    assert one is not None
    assert two is not None
    one.env.append("changed")
    assert two.env == []


FLAGS = sorted({flag for table in options.TABLES.values() for option in table for flag in option.flags})
WORDS = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(
        ["--", "-", "x", "5", "-5", "0.5", "", "-it", "-ti", "-eA=b", "-e=b", "-itu", "-uroot", "-i5", "--help"]
    ),
    st.builds(
        lambda flag, value: f"{flag}={value}", st.sampled_from(FLAGS), st.sampled_from(["", "5", "a", "-x", "a=b"])
    ),
    st.builds(lambda letters: "-" + letters, st.text("itevuwmpxh5=-", min_size=1, max_size=4)),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(COMMANDS),
    argv=st.builds(
        list.__add__,
        st.lists(WORDS, max_size=5),
        st.sampled_from([[], ["x"], ["x", "y"], ["--", "x", "-t"], ["x", "--", "y"]]),
    ),
)
@example(command="run", argv=["-it", "x"])
@example(command="run", argv=["-e=b", "x"])
@example(command="run", argv=["--timeout", "1e3", "x"])
@example(command="run", argv=["--oom-score-adj", "--5", "x"])
@example(command="run", argv=["--oom-score-adj", "٥", "x"])
@example(command="shell", argv=["x", "--"])
@example(command="shell", argv=["--", "x"])
@example(command="exec", argv=["x", "--", "y"])
def test_the_reader_answers_what_typer_does_or_nothing(typers: Typers, command: str, argv: list[str]) -> None:
    read = answer(options.read(command, argv))
    if read is not None:
        assert read == typers(command, argv)
