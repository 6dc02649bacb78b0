"""`inspect`, and what all JSON of ours has in common: the names of its keys."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import needs
import pytest
from conftest import Sbx
from launching import running

pytestmark = [needs.userns, needs.busybox]
KEY = re.compile("[a-z][a-z0-9]*(_[a-z0-9]+)*")
#: below these the keys are somebody else's: of an image, of the kernel's files, or names of what is limited
THEIRS = {"config", "labels", "annotations", "limits", "resources", "options", "rows"}


def odd_keys(found: Any, path: str = "") -> Iterator[str]:
    """Yield the keys that are not words with underscores."""
    if isinstance(found, list):
        for one in found:
            yield from odd_keys(one, path)
    elif isinstance(found, dict):
        for key, value in found.items():
            if not KEY.fullmatch(key):
                yield f"{path}.{key}"
            if key not in THEIRS:
                yield from odd_keys(value, f"{path}.{key}")


@pytest.fixture
def box(sbx: Sbx, image: str) -> Iterator[str]:
    words = ["-v", "/usr:/mnt:ro", "-l", "a=b", "--ulimit", "nofile=64", "--stop-signal", "INT", "-p", "0:80"]
    with running(sbx, "run", *words, "--name", "box", image, "sh", "-c", "echo up; exec sleep 1000"):
        yield "box"


def test_every_key_is_words_with_underscores(sbx: Sbx, box: str, image: str) -> None:
    sbx.ok("network", "create", "inspected")
    seen = 0
    for words in (["inspect", box], ["inspect", image], ["ps", "--json"], ["images", "--json"],
                  ["history", "--json", image], ["stats", "--once", "--json"], ["top", "--json", box],
                  ["port", "--json", box], ["ns", "--json"], ["system", "df", "--json"], ["system", "check", "--json"],
                  ["network", "ls", "--json"], ["network", "inspect", "inspected"]):  # fmt: skip
        found = json.loads(sbx.ok(*words))
        assert list(odd_keys(found)) == [], words
        seen += bool(found)
    assert seen == 12, "only the list of problems is empty"
    assert list(odd_keys(json.loads(sbx("doctor", "--json").stdout))) == []
    sbx.ok("network", "rm", "inspected")


def test_what_is_an_odd_key() -> None:
    assert list(odd_keys([{"a_b2": {"mediaType": 1, "config": {"Env": 1}, "x-y": [{"_z": 1}]}}])) == [
        ".a_b2.mediaType",
        ".a_b2.x-y",
        ".a_b2.x-y._z",
    ]


def test_a_sandbox_by_a_template(sbx: Sbx, box: str, image: str) -> None:
    [found] = json.loads(sbx.ok("inspect", box))
    for template, shown in (
        ("{{.id}} {{.Name}}", f"{found['id']} box"),
        ("{{.Id}}", found["id"]),
        ("{{.NoNewPrivileges}} {{.stop_signal}}", "true SIGINT"),
        ("{{.State.Pid}} {{.State.Status}} {{.State.Running}}", f"{found['pid']} running true"),
        ("{{.Config.Labels}} {{index .Config.Labels `a`}} {{.labels.a}}", "map[a:b] b b"),
        ("{{json .Config.Cmd}}", '["sh", "-c", "echo up; exec sleep 1000"]'),
        ("{{.Path}} {{len .Args}} {{.Config.Image}}", f"sh 2 {image}"),
        ("{{json .Mounts}}", json.dumps(found["mounts"])),
        ("{{index .Config.Env 1}}", "HOSTNAME=box"),
        ("{{json .}}", json.dumps(found)),
    ):
        assert sbx.ok("inspect", "--format", template, box) == shown, template
    [port] = json.loads(sbx.ok("port", "--json", box))
    assert found["network"]["ports"] == [port]
    assert port["host"] > 0
    ports = json.loads(sbx.ok("inspect", "-f", "{{json .NetworkSettings.Ports}}", box))
    assert ports == {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port["host"])}]}
    assert sbx.ok("inspect", "--format", "json", box, image) == sbx.ok("inspect", box, image)


def test_an_image_by_a_template(fresh_sbx: Sbx) -> None:
    identity = fresh_sbx.ok("import", "one", "bin:/bin/sh", "-c", 'CMD ["/bin/sh"]', "-c", "LABEL a=b")
    fresh_sbx.ok("tag", "one", "two")
    names = "[docker.io/library/one:latest docker.io/library/two:latest]"
    for template, shown in (
        ("{{.Id}}", identity),
        ("{{.Config.Cmd}} {{.config.Labels}}", "[/bin/sh] map[a:b]"),
        ("{{.RepoTags}}", names),
        ("{{.Os}}", "linux"),
        ("{{len .RootFS.Layers}}", "1"),
    ):
        assert fresh_sbx.ok("inspect", "-f", template, "one") == shown, template
    assert fresh_sbx.ok("inspect", "-f", "{{.reference}}", "one", "two").splitlines() == names[1:-1].split()


def test_the_kind_that_is_looked_for(sbx: Sbx, box: str, image: str) -> None:
    assert sbx.ok("inspect", "--type", "container", "-f", "{{.name}}", box) == "box"
    assert sbx.ok("inspect", "--type=image", "-f", "{{.digest}}", image).startswith("sha256:")
    assert sbx("inspect", "--type", "image", box).stderr.startswith("sbx: find image box: not in the store\n")
    assert sbx("inspect", "--type", "sandbox", image).stderr.startswith(f"sbx: find sandbox {image}: none of that name")
    assert sbx("inspect", "--type", "volume", box).stderr == "sbx: read --type 'volume': it is sandbox or image\n"


def test_a_field_that_is_not_there(sbx: Sbx, image: str) -> None:
    result = sbx("inspect", "--format", "{{.State.Health}}", image)
    assert (result.status, result.stdout) == (125, "")
    message, hint = result.stderr.splitlines()
    assert message == "sbx: read --format '{{.State.Health}}': there is no .State.Health"
    assert hint.startswith("hint: there are .reference .id .digest")


def test_networks_by_a_template(fresh_sbx: Sbx) -> None:
    fresh_sbx.ok("network", "create", "one", "--internal", "--subnet", "10.89.7.0/24")
    assert fresh_sbx.ok("network", "inspect", "-f", "{{.subnet}} {{.Internal}}", "one") == "10.89.7.0/24 true"
    assert fresh_sbx.ok("network", "ls", "--format", "{{.Name}} {{.Members}}") == "one 0"
    assert "there is no .Nmae" in fresh_sbx("network", "ls", "--format", "{{.Nmae}}", check=125).stderr
