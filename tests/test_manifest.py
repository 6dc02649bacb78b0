"""Manifests, indexes and configurations: what is read of good ones, and that bad ones end in one error."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootless.errors import SbxError
from rootless.oci import manifest
from rootless.oci.manifest import Config, Descriptor, Index, Manifest, Platform

DIGEST = "sha256:" + "a" * 64
LAYER = {"mediaType": manifest.OCI_LAYER_GZIP, "digest": DIGEST, "size": 10}
GOOD: dict[str, Any] = {
    "schemaVersion": 2,
    "mediaType": manifest.OCI_MANIFEST,
    "config": {"mediaType": manifest.OCI_CONFIG, "digest": DIGEST, "size": 20},
    "layers": [LAYER, LAYER],
    "annotations": {"a": "b"},
}
INDEX: dict[str, Any] = {
    "schemaVersion": 2,
    "manifests": [
        {
            "mediaType": manifest.OCI_MANIFEST,
            "digest": DIGEST,
            "size": 5,
            "platform": {"os": "linux", "architecture": "arm64"},
        },
        {"mediaType": manifest.OCI_MANIFEST, "digest": "sha256:" + "b" * 64, "size": 5},
    ],
}
CONFIG: dict[str, Any] = {
    "architecture": "amd64",
    "os": "linux",
    "created": "2024-01-01T00:00:00Z",
    "config": {
        "Env": ["PATH=/bin", "A="], "Entrypoint": ["/e"], "Cmd": ["c"], "WorkingDir": "/w", "User": "1:2",
        "StopSignal": "SIGINT", "Labels": {"l": "v"}, "ExposedPorts": {"80/tcp": {}}, "Volumes": None,
    },
    "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
    "history": [{"created_by": "x"}, {"empty_layer": True}],
}  # fmt: skip


def parse(document: object, media_type: str = "") -> Manifest | Index:
    return manifest.parse(json.dumps(document).encode(), media_type)


def config(document: object) -> Config:
    return manifest.parse_config(json.dumps(document).encode())


def test_a_manifest_and_back() -> None:
    read = parse(GOOD)
    assert isinstance(read, Manifest)
    assert read.layers == [Descriptor(manifest.OCI_LAYER_GZIP, DIGEST, 10)] * 2
    assert manifest.parse(read.encode()) == read
    assert json.loads(read.encode()) == GOOD


def test_a_config() -> None:
    read = config(CONFIG)
    assert (read.env, read.entrypoint, read.cmd) == (["PATH=/bin", "A="], ["/e"], ["c"])
    assert (read.working_dir, read.user, read.stop_signal, read.labels) == ("/w", "1:2", "SIGINT", {"l": "v"})
    assert (read.diff_ids, str(read.platform)) == ([DIGEST], "linux/amd64")
    assert config({"rootfs": {"type": "layers", "diff_ids": []}, "config": None}).env == []
    assert config({**CONFIG, "config": {"Cmd": "one text"}}).cmd == ["one text"]


@pytest.mark.parametrize("entry", ["A", "=A", "", "A\0=b", 3, None])
def test_environment_entries_without_a_value(entry: object) -> None:
    """Such an entry would take the caller's own value (CVE-2026-57231)."""
    with pytest.raises(SbxError) as raised:
        config({**CONFIG, "config": {"Env": [entry]}})
    assert raised.value.code == "document-invalid"


def test_half_a_surrogate_pair_is_no_text() -> None:
    with pytest.raises(SbxError):
        manifest.parse_config(json.dumps({**CONFIG, "config": {"User": "x"}}).replace('"x"', '"\\ud800"').encode())


def test_what_its_sender_said_must_agree() -> None:
    with pytest.raises(SbxError, match="its sender said"):
        parse(GOOD, manifest.OCI_INDEX)
    with pytest.raises(SbxError, match="its sender said"):
        parse(GOOD, manifest.DOCKER_MANIFEST)
    assert parse({**GOOD, "mediaType": None}, manifest.DOCKER_MANIFEST).media_type == manifest.DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"manifests": []}, "document-invalid"),
        ({"schemaVersion": 1}, "media-type-unknown"),
        ({"schemaVersion": 3}, "document-invalid"),
        ({"Config": {}}, "document-invalid"),
        ({"LAYERS": []}, "document-invalid"),
        ({"mediaType": "text/plain"}, "media-type-unknown"),
        ({"layers": []}, "image-empty"),
        ({"layers": [LAYER] * 128}, "layer-limit"),
        ({"layers": [{**LAYER, "mediaType": manifest.FOREIGN_LAYERS[0]}]}, "layer-foreign"),
        ({"layers": [{**LAYER, "mediaType": "application/octet-stream"}]}, "media-type-unknown"),
        ({"layers": [{**LAYER, "digest": "sha256:" + "A" * 64}]}, "document-invalid"),
        ({"layers": [{**LAYER, "digest": "md5:" + "a" * 32}]}, "document-invalid"),
        ({"layers": [{**LAYER, "digest": "sha512:" + "a" * 128}]}, "digest-unknown"),
        ({"layers": [{**LAYER, "size": True}]}, "document-invalid"),
        ({"layers": [{**LAYER, "size": 1.5}]}, "document-invalid"),
        ({"config": {**GOOD["config"], "size": 5 << 20}}, "document-limit"),
        ({"config": {**GOOD["config"], "mediaType": "application/vnd.cncf.helm.config.v1+json"}}, "media-type-unknown"),
    ],
)
def test_bad_manifests(change: dict[str, Any], code: str) -> None:
    with pytest.raises(SbxError) as raised:
        parse({**GOOD, **change})
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("wanted", "there", "chosen"),
    [
        ("linux/amd64", ["linux/amd64"], 0),
        ("amd64", ["linux/arm64", "linux/amd64"], 1),
        ("x86_64", ["linux/amd64"], 0),
        ("linux/arm64", ["linux/arm64/v8"], 0),
        ("linux/arm64/v8", ["linux/arm64"], 0),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v6"], 1),
        ("linux/arm/v5", ["linux/arm/v7"], None),
        ("linux/arm", ["linux/arm/v7"], 0),
        ("linux/amd64", ["windows/amd64"], None),
        ("linux/amd64", ["", "linux/amd64"], 1),
        ("linux/amd64", ["", "linux/arm64"], 0),
        ("linux/amd64", [], None),
    ],
)
def test_platforms(wanted: str, there: list[str], chosen: int | None) -> None:
    entries = [
        Descriptor(manifest.OCI_MANIFEST, f"sha256:{place:064x}", 1, platform=Platform.parse(text) if text else None)
        for place, text in enumerate(there)
    ]
    found = Index(manifest.OCI_INDEX, entries).choose(Platform.parse(wanted))
    assert found == (None if chosen is None else entries[chosen])


@pytest.mark.parametrize("text", ["", "/", "linux/", "a/b/c/d", "linux/amd64/", "linux amd64", "linux/\x1b"])
def test_bad_platforms(text: str) -> None:
    with pytest.raises(SbxError) as raised:
        Platform.parse(text)
    assert raised.value.code == "platform-invalid"
    assert "\x1b" not in raised.value.message


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.just(DIGEST)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: object, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to each value inside of a document."""
    found = [way] if way else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*way, key))
    return found


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_value_at_any_place(data: st.DataObject) -> None:
    """Whatever stands where something else belongs: it is read as nothing worse, or there is one error."""
    name = data.draw(st.sampled_from(["manifest", "index", "config"]))
    document = copy.deepcopy({"manifest": GOOD, "index": INDEX, "config": CONFIG}[name])
    for _ in range(data.draw(st.integers(1, 3))):
        if not (ways := places(document)):
            break
        *way, last = data.draw(st.sampled_from(ways))
        inner: Any = document
        for key in way:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(values)
        elif isinstance(inner, dict):
            del inner[last]
    raw = json.dumps(document).encode()
    try:
        if name != "config":
            manifest.parse(raw)
            return
        read = manifest.parse_config(raw)
    except SbxError:
        return
    texts = [*read.env, *read.entrypoint, *read.cmd, read.working_dir, read.user, read.stop_signal, read.created]
    assert all(isinstance(text, str) and "\0" not in text for text in texts)
    assert all("=" in entry[1:] for entry in read.env)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(raw: bytes) -> None:
    for read in (manifest.parse, manifest.parse_config):
        with pytest.raises(SbxError):
            read(raw)
