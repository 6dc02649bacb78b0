"""`--filter` and `--format` of `ps` and `images`: docker's words, and one clear line for what is none of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from conftest import Sbx
from hypothesis import given
from hypothesis import strategies as st
from launching import NONE, running

from rootless.cli.templates import Template
from rootless.errors import SbxError

VALUE = {
    "ID": "c0ffee",
    "State": {"pid": 7, "no_new_privileges": True},
    "Labels": {"a": "b", "c": "d"},
    "Command": ["sh", "-c", "x y"],
    "None": None,
}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("ID", "ID"),
        ("{{.ID}}", "c0ffee"),
        ("{{ .ID }}:{{.Id}}", "c0ffee:c0ffee"),
        ("{{.State.Pid}} {{.State.NoNewPrivileges}}", "7 true"),
        ("{{json .Labels}}", '{"a": "b", "c": "d"}'),
        ("{{json .State.Pid}}{{.None}}", "7"),
        ("{{.Labels}} {{.Command}}", "map[a:b c:d] [sh -c x y]"),
        ('{{join .Command " "}}', "sh -c x y"),
        ('{{index .Labels "a"}} {{index .Command 1}} {{.Labels `c`}} {{index .Labels "none"}}', "b -c d "),
        ("{{.ID | upper | lower | json}}", '"c0ffee"'),
        ("{{len .Command}}", "3"),
        (r"{{.ID}}\t{{.ID}}\n", "c0ffee\tc0ffee\n"),
        ("a {{- .ID -}} b", "ac0ffeeb"),
        ('{{"\\"x"}}', '"x'),
    ],
)
def test_a_template(text: str, shown: str) -> None:
    assert Template(text).expand(VALUE) == shown


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{.Nothing}}", "there is no .Nothing"),
        ("{{.State.Nothing}}", "there is no .State.Nothing"),
        ("{{.ID.Nothing}}", "there is no .ID.Nothing"),
        ("{{.ID", "a {{ or }} stands alone"),
        ("ID}}", "a {{ or }} stands alone"),
        ("{{}}", "{{}} is not understood"),
        ("{{ID}}", "{{ID}} is not understood"),
        ("{{range .Command}}", "{{range .Command}} is not understood"),
        ("{{if .ID}}", "{{if .ID}} is not understood"),
        ("{{.ID | }}", "{{.ID | }} is not understood"),
        ("{{(index .Command 0)}}", "{{(index .Command 0)}} is not understood"),
        ("{{join .Command}}", "join does not take these operands"),
        ("{{index .Command 9}}", "index does not take these operands"),
        ("{{index .ID upper}}", "upper is not understood"),
    ],
)
def test_what_is_no_template(text: str, why: str) -> None:
    with pytest.raises(SbxError) as raised:
        Template(text).expand(VALUE)
    assert raised.value.message == f"read --format {text!r}: {why}"


@given(st.text(st.sampled_from('{}.|"`\\ aID(-)json\n\t'), max_size=24))
def test_a_template_is_read_or_refused(text: str) -> None:
    with suppress(SbxError):
        Template(text).expand(VALUE)


def test_a_second_place_to_look() -> None:
    both = {"state": "running", "x": {"a": 1}}, {"State": {"pid": 7}, "x": {"b": 2}}
    assert Template("{{.State}} {{.State.Pid}} {{.X.A}} {{.X.B}} {{json .}}").expand(*both) == (
        'running 7 1 2 {"state": "running", "x": {"a": 1}}'
    )


def test_values_are_made_safe_for_a_terminal() -> None:
    assert Template("{{.x}}\n{{json .}}").expand({"x": "\x1b[2J\n"}) == '\\x1b[2J\\n\n{"x": "\\u001b[2J\\n"}'


@pytest.fixture
def box(sbx: Sbx, image: str) -> Iterator[str]:
    with running(sbx, "run", *NONE, "--name", "box", "-v", "/usr:/mnt", image, "sh", "-c", "echo up; exec sleep 100"):
        yield sbx.ok("ps", "-q")


def test_ps_by_a_template(sbx: Sbx, box: str, image: str) -> None:
    assert sbx.ok("ps", "--format", "{{.ID}} {{.Names}} {{.Image}} {{.State}}") == f"{box} box {image} running"
    assert sbx.ok("ps", "--format", "{{.Networks}} {{.Mounts}} {{.Ports}}.") == "none /usr ."
    assert sbx.ok("ps", "--format", "{{.Status}}").startswith("Up ")
    assert sbx.ok("ps", "--format", r"table {{.Names}}\t{{.State}}").split() == ["NAME", "STATE", "box", "running"]
    assert sbx.ok("ps", "--format", "table").split()[:2] == ["ID", "NAME"]
    assert sbx.ok("ps", "--format", "json") == sbx.ok("ps", "--json")
    row = json.loads(sbx.ok("ps", "-a", "--no-trunc", "--format", "{{json .}}"))
    assert (row["ID"], row["Names"], row["Command"]) == (box, "box", "sh -c 'echo up; exec sleep 100'")


def test_ps_by_a_filter(sbx: Sbx, box: str, image: str) -> None:
    for good in ("name=b.x", "name=^/box$", f"id={box[:4]}", "status=running", f"ancestor={image}",
                 f"ancestor={image}:latest", f"ancestor={sbx.ok('images', '-q', image)[7:19]}",
                 "network=none", "volume=/mnt", "volume=/usr"):  # fmt: skip
        assert sbx.ok("ps", "-q", "-f", good) == box, good
    for bad in ("name=bx", "id=zz", "status=paused", "status=exited", "ancestor=other", "ancestor=host",
                "network=host", "volume=/u"):  # fmt: skip
        assert sbx.ok("ps", "-q", "--filter", bad) == "", bad
    assert sbx.ok("ps", "-q", "-f", "name=none", "-f", "name=box") == box
    assert sbx.ok("ps", "-q", "-f", "name=box", "-f", "status=paused") == ""


def test_an_image_made_on_top_of_another_has_it_for_an_ancestor(sbx: Sbx, box: str, image: str) -> None:
    sbx.ok("import", "unrelated", "bin:/bin/sh")
    assert sbx.ok("ps", "-q", "-f", "ancestor=unrelated") == ""
    sbx.ok("tag", image, "same")
    assert sbx.ok("ps", "-q", "-f", "ancestor=same") == box
    sbx.ok("rmi", "unrelated", "same")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ps", "--format", "{{.Foo}}"], "read --format '{{.Foo}}': there is no .Foo"),
        (["images", "--format", "{{.Foo}}"], "read --format '{{.Foo}}': there is no .Foo"),
        (["ps", "-f", "foo=1"], "read --filter 'foo=1': there is no 'foo'"),
        (["ps", "-f", "name"], "read --filter 'name': it is KEY=VALUE"),
        (["ps", "-f", "status=sleeping"], "read --filter status=sleeping: there is no such status"),
        (["images", "-f", "dangling=x"], "read --filter dangling=x: it is true or false"),
        (["images", "-f", "\x1b=x"], r"read --filter '\x1b=x': there is no '\x1b'"),
    ],
)
def test_what_there_is_not_is_one_line_even_of_an_empty_list(sbx: Sbx, words: list[str], message: str) -> None:
    result = sbx(*words)
    assert (result.status, result.stdout) == (125, "")
    first, *rest = result.stderr.splitlines()
    assert first == f"sbx: {message}"
    assert all(line.startswith("hint: ") for line in rest)


def test_a_bad_expression_is_told(sbx: Sbx) -> None:
    assert "read --filter name=(: " in sbx("ps", "-f", "name=(").stderr


def test_images_by_template_and_filter(fresh_sbx: Sbx) -> None:
    fresh_sbx.ok("import", "one:1", "bin:/bin/sh", "-c", "LABEL kind=tool")
    fresh_sbx.ok("import", "registry.test/two", "bin:/bin/cat")
    row = fresh_sbx.ok("images", "--format", '{{.Repository}} {{.Tag}} {{.Label "kind"}}').splitlines()
    assert row == ["one 1 tool", "registry.test/two latest "]
    [first, _] = fresh_sbx.ok("images", "-q").splitlines()
    assert fresh_sbx.ok("images", "-f", "label=kind=tool", "--format", "{{.ID}}") == first[7:19]
    assert fresh_sbx.ok("images", "-f", "label=kind", "--no-trunc", "--format", "{{.ID}}") == first
    assert fresh_sbx.ok("images", "-f", "label=kind=toy", "-q") == ""
    assert fresh_sbx.ok("images", "-f", "reference=one*", "-q") == first
    assert fresh_sbx.ok("images", "-f", "reference=*/two", "--format", "{{.Tag}}") == "latest"
    assert fresh_sbx.ok("images", "-f", "dangling=true", "-q") == ""
    assert len(fresh_sbx.ok("images", "-f", "dangling=false", "-q").splitlines()) == 2
    assert fresh_sbx.ok("images", "--format", "json") == fresh_sbx.ok("images", "--json")
    shown = fresh_sbx.ok("images", "-f", "label=kind", "--format", r'table {{.Tag}}\t{{.Label "kind"}}')
    assert shown.split() == ["TAG", "KIND", "1", "tool"]
