"""What a caller notes about a sandbox: labels, and the file with its id."""

from __future__ import annotations

import json
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from launching import NONE, eventually, running

pytestmark = [needs.userns, needs.busybox]
SLEEP = ("sh", "-c", "echo up; exec sleep 1000")


def test_labels(sbx: Sbx, image: str, tmp_path: Path) -> None:
    file = tmp_path / "labels"
    file.write_text("# a comment\n\na=file\nfrom=file\n")
    words = ["--label-file", str(file), "-l", "a=b=c", "--label", "bare", "--label", "a=last"]
    with running(sbx, "run", *NONE, *words, image, *SLEEP):
        [shown] = json.loads(sbx.ok("inspect", sbx.ok("ps", "-q")))
        assert shown["labels"] == {"a": "last", "from": "file", "bare": ""}
        assert json.loads(sbx.ok("ps", "--json"))[0]["labels"] == shown["labels"]
        assert sbx.ok("ps", "--format", '{{.Label "from"}} {{.Labels}}') == "file a=last,from=file,bare="
        for good in (["label=a"], ["label=a=last"], ["label=a", "label=bare"], ["label=bare="]):
            assert sbx.ok("ps", "-q", *[word for text in good for word in ("-f", text)]), good
        for bad in (["label=b"], ["label=a=b=c"], ["label=a", "label=none"]):
            assert not sbx.ok("ps", "-q", *[word for text in bad for word in ("-f", text)]), bad


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--label", "=x"], "set label '=x': it has no name"),
        (["--label", ""], "set label '': it has no name"),
        (["--label-file", "none"], "read label file none: No such file or directory"),
    ],
)
def test_what_is_no_label(sbx: Sbx, image: str, tmp_path: Path, words: list[str], message: str) -> None:
    result = sbx("run", *words, image, "true", cwd=tmp_path)
    assert (result.status, result.stderr.splitlines()[0]) == (125, f"sbx: {message}")


def test_the_id_is_written_when_the_sandbox_can_be_found(sbx: Sbx, image: str, tmp_path: Path) -> None:
    file = tmp_path / "id"
    with running(sbx, "run", *NONE, "--cidfile", file, image, *SLEEP):
        eventually(file.read_text, "the id")
        identity = file.read_text()
        assert sbx.ok("ps", "-q") == identity
        assert sbx.ok("exec", identity, "echo", "found") == "found"
        result = sbx("run", *NONE, "--cidfile", file, image, "true")
        assert (result.status, result.stderr.splitlines()[0]) == (125, f"sbx: create id file {file}: there is one")
        assert file.read_text() == identity
    assert file.read_text() == identity  # as docker leaves it


@pytest.mark.parametrize("words", [["--user", "nobody-known"], ["--workdir", "/etc/passwd"], ["--memory", "x"]])
def test_no_file_is_left_of_what_failed(sbx: Sbx, image: str, tmp_path: Path, words: list[str]) -> None:
    file = tmp_path / "id"
    assert sbx("run", *NONE, "--cidfile", file, *words, image, "true").status == 125
    assert not file.exists()


def test_no_file_is_left_where_there_was_no_command(sbx: Sbx, image: str, tmp_path: Path) -> None:
    file = tmp_path / "id"
    assert sbx("run", *NONE, "--cidfile", file, image, "no-such-command").status == 127
    assert sbx("run", *NONE, "--cidfile", file, "--pull", "never", "no-such-image", "true").status == 125
    assert sbx("run", *NONE, "--cidfile", file, "--dry-run", image, "true").status == 0
    assert not file.exists()
    assert sbx("run", *NONE, "--cidfile", tmp_path / "none" / "id", image, "true").status == 125


def test_a_command_that_fails_has_had_an_id(sbx: Sbx, image: str, tmp_path: Path) -> None:
    assert sbx("run", *NONE, "--cidfile", tmp_path / "id", image, "sh", "-c", "exit 3").status == 3
    assert len((tmp_path / "id").read_text()) == 12
