"""Credentials as people have them, and how ours are kept."""

from __future__ import annotations

import base64
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from rootless.errors import SbxError
from rootless.oci import credentials
from rootless.oci.credentials import Credential


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and nothing of the tester's own."""
    for name in ("XDG_CONFIG_HOME", "DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "SBX_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def save(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def who(registry: str, repository: str = "") -> str:
    found = credentials.find(registry, repository)
    return f"{found.user}:{found.password}" if found else ""


DOCKER = ".docker/config.json"


def test_nothing(home: Path) -> None:
    assert credentials.find("a.example") is None


def test_docker(home: Path) -> None:
    entries = {"a.example:5000": auth("u", "p:w"), "https://index.docker.io/v1/": auth("hub", "x")}
    save(home / DOCKER, {"auths": entries, "HttpHeaders": {}})
    assert who("a.example:5000") == "u:p:w"
    assert who("a.example") == ""
    assert who("docker.io") == "hub:x"


@pytest.mark.parametrize(
    "key", ["https://a.example/v1/", "http://a.example", "https://a.example/v2/", "a.example/", "a.example"]
)
def test_old_spellings(home: Path, key: str) -> None:
    save(home / DOCKER, {"auths": {key: auth("u", "p")}})
    assert who("a.example") == "u:p"
    assert who("b.example") == ""


def test_the_most_specific_entry_counts(home: Path) -> None:
    entries = {"q.io": auth("1", ""), "q.io/a": auth("2", ""), "q.io/a/b": auth("3", ""), "q.io/ab": auth("4", "")}
    save(home / "run/containers/auth.json", {"auths": entries})
    assert [who("q.io", name) for name in ("x", "a/x", "a/b", "a/b/c", "ab", "abc")] == [
        "1:",
        "2:",
        "3:",
        "3:",
        "4:",
        "1:",
    ]


def test_which_file_counts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DOCKER, ".config/containers/auth.json", "run/containers/auth.json", "named.json"):
        save(home / name, {"auths": {"a.example": auth(name, "")}})
        if name == "named.json":
            monkeypatch.setenv("REGISTRY_AUTH_FILE", str(home / name))
        assert who("a.example") == f"{name}:"
    credentials.store("a.example", Credential("ours", ""))
    assert who("a.example") == "ours:"


def test_tokens_and_plain_fields(home: Path) -> None:
    save(home / DOCKER, {"auths": {
        "a": {**auth("u", ""), "identitytoken": "i"}, "b": {"registrytoken": "r"},
        "c": {"username": "u", "password": "p"}, "d": {}, "e": None, "f": {"auth": ""},
    }})  # fmt: skip
    assert (credentials.find("a") or Credential()).identity_token == "i"
    assert (credentials.find("b") or Credential()).registry_token == "r"
    assert who("c") == "u:p"
    assert [credentials.find(each) for each in "def"] == [None] * 3


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"auths": 5}', '{"auths": {"a": {"auth": "%%%"}}}', "\x00", "[" * 100_000]
)
def test_a_bad_file_is_named(home: Path, text: str) -> None:
    path = save(home / DOCKER, text)
    with pytest.raises(SbxError) as caught:
        credentials.find("a")
    assert caught.value.code == "credentials-invalid"
    assert str(path) in caught.value.message


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def helper(home: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str = "test") -> Path:
    program = home / "bin" / f"docker-credential-{name}"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


ANSWERS = """
read server
echo "$1 $server" >>"$HOME/asked"
case $server in
a.example) echo '{"ServerURL":"a.example","Username":"u","Secret":"p"}' ;;
https://index.docker.io/v1/) echo '{"Username":"<token>","Secret":"t"}' ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    "document", [{"credsStore": "test"}, {"credHelpers": {"a.example": "test", "docker.io": "test"}}]
)
def test_helpers(home: Path, monkeypatch: pytest.MonkeyPatch, document: dict[str, Any]) -> None:
    helper(home, monkeypatch, ANSWERS)
    save(home / DOCKER, document)
    assert who("a.example") == "u:p"
    assert (credentials.find("docker.io") or Credential()).identity_token == "t"
    assert credentials.find("b.example") is None
    asked = (home / "asked").read_text()
    assert asked.startswith("get a.example\nget https://index.docker.io/v1/\n")


def test_a_helper_of_its_own_comes_before_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, "exit 9", "all")
    helper(home, monkeypatch, ANSWERS, "one")
    save(home / DOCKER, {"credsStore": "all", "credHelpers": {"a.example": "one"}})
    assert who("a.example") == "u:p"


@pytest.mark.parametrize(
    ("script", "words"),
    [("echo locked >&2; exit 1", "locked"), ("echo '['", "not valid JSON"), ("kill -9 $$", "exit status")],
)
def test_a_helper_that_fails(home: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str) -> None:
    helper(home, monkeypatch, script)
    save(home / DOCKER, {"credsStore": "test"})
    with pytest.raises(SbxError, match=words) as caught:
        credentials.find("a.example")
    assert caught.value.code == "credential-helper-failed"


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "-x", "absent", 5, ["a"]])
def test_a_helper_that_cannot_be(home: Path, name: object) -> None:
    save(home / DOCKER, {"credsStore": name})
    with pytest.raises(SbxError) as caught:
        credentials.find("a.example")
    assert caught.value.code == "credential-helper-failed"


# ── ours ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_store_and_erase(home: Path) -> None:
    old = os.umask(0)
    try:
        path = Path(credentials.store("a.example", Credential("u", "p:é")))
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert who("a.example") == "u:p:é"
    credentials.store("b.example", Credential("v", "q"))
    assert credentials.erase("a.example")
    assert not credentials.erase("a.example")
    assert (who("a.example"), who("b.example")) == ("", "v:q")
    assert credentials.erase()
    assert who("b.example") == ""
    assert sorted(os.listdir(path.parent)) == ["auth.json", "auth.json.lock"]


def test_what_else_is_in_the_file_stays(home: Path) -> None:
    path = save(home / "other.json", {"credHelpers": {"x": "y"}, "auths": {"b": auth("u", "p")}, "unknown": [1]})
    credentials.store("a", Credential("v", "q"), str(path))
    document = json.loads(path.read_text())
    assert document["credHelpers"] == {"x": "y"}
    assert document["unknown"] == [1]
    assert list(document["auths"]) == ["b", "a"]


def test_logins_at_the_same_time_all_stay(home: Path) -> None:
    threads = [threading.Thread(target=credentials.store, args=(f"r{n}", Credential(str(n), ""))) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [who(f"r{n}") for n in range(20)] == [f"{n}:" for n in range(20)]


def test_a_folder_that_cannot_be_written(home: Path) -> None:
    (home / ".config").write_text("a file")
    with pytest.raises(SbxError) as caught:
        credentials.store("a", Credential("u", "p"))
    assert caught.value.code in ("data-unwritable", "credentials-unwritable")
