"""What a hostile registry gets from a pull: one error with its code, and a store with nothing half-stored."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import COMMAND, Sbx
from hostile_registry import Handler, HostileRegistry, cut_after, endless, redirects, says, silent, trickles
from pulling import HASTE, Pull, Puller
from real_registry import SmallImage, digest, layer_tar

pytestmark = needs.userns

LARGE = SmallImage({"a": b"a"}, {"noise": os.urandom(600_000)})
FIRST, SECOND = LARGE.layers


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    yield Puller(tmp_path)
    Sbx(tmp_path / "store")("unshare", "rm", "-rf", tmp_path / "store")


@pytest.fixture
def bad() -> Iterator[HostileRegistry]:
    with HostileRegistry(LARGE) as server:
        yield server


def refused(puller: Puller, bad: HostileRegistry, code: str, *words: str, seconds: float = 8, **options: Any) -> Pull:
    """Require that a pull ends in time with `code` in one line that holds `words`, and leaves nothing half-stored."""
    start = time.monotonic()
    got = puller(f"{bad.host}/x", **options)
    assert time.monotonic() - start < seconds
    assert got.code == code, got.answer
    assert got.answer["status"] == 125
    assert "\n" not in got.message
    assert got.message.isprintable()
    assert all(word in got.message for word in words), got.message
    puller.nothing_half_stored()
    return got


def serves(bad: HostileRegistry, **changes: Any) -> SmallImage:
    """Let the registry serve an image whose manifest has these fields changed."""
    image = SmallImage({"a": b"a"})
    image.document |= changes
    bad.image = image
    return image


def layer(image: SmallImage, **changes: Any) -> list[dict[str, Any]]:
    return [image.document["layers"][0] | changes]


# ── documents ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "document-invalid"),
        (b"[]", "document-invalid"),
        (b"null", "document-invalid"),
        (b"\xff\xfe", "document-invalid"),
        (b'{"schemaVersion":1,"fsLayers":[]}', "media-type-unknown"),
        (b'{"schemaVersion":2}', "media-type-unknown"),
        (b'{"schemaVersion":2,"manifests":[],"layers":[]}', "document-invalid"),
        (b'{"schemaVersion":2,"config":{},"layers":[],"manifests":[]}', "document-invalid"),
        (b'{"schemaVersion":2,"config":null,"layers":null}', "document-invalid"),
        (b'{"a":' * 100_000, "document-invalid"),
        (b"[" * 1_000_000, "document-invalid"),
        (b'{"schemaVersion":' + b"9" * 100_000 + b"}", "document-invalid"),
        (b'{"schemaVersion":2,"schemaVersion":2}', "document-invalid"),
        (b'{"schemaVersion":2,"Manifests":[],"manifests":[]}', "document-invalid"),
        (b"\x1f\x8b" + b"x" * 100, "document-invalid"),
        (b" " * (5 << 20), "document-limit"),
    ],
)
def test_a_manifest_that_is_none(puller: Puller, bad: HostileRegistry, body: bytes, code: str) -> None:
    bad.on("GET", "/manifests/", says(200, body))
    refused(puller, bad, code)


def test_a_manifest_of_another_type_than_its_sender_says(puller: Puller, bad: HostileRegistry) -> None:
    index = "application/vnd.oci.image.index.v1+json"
    bad.on("GET", "/manifests/", says(200, LARGE.manifest, {"Content-Type": index}))
    refused(puller, bad, "document-invalid", index)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"digest": "sha256:../../../../tmp/x"}, "document-invalid"),
        ({"digest": "md5:0"}, "document-invalid"),
        ({"digest": 5}, "document-invalid"),
        ({"digest": "sha512:" + "0" * 128}, "digest-unknown"),
        ({"size": -1}, "document-invalid"),
        ({"size": 1e3}, "document-invalid"),
        ({"size": "10"}, "document-invalid"),
        ({"size": True}, "document-invalid"),
        ({"mediaType": "text/html"}, "media-type-unknown"),
        ({"mediaType": ""}, "media-type-unknown"),
        ({"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"}, "layer-foreign"),
        (
            {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "urls": ["http://127.0.0.1/"]},
            "layer-foreign",
        ),
    ],
)
def test_a_layer_that_cannot_be(puller: Puller, bad: HostileRegistry, changes: dict[str, Any], code: str) -> None:
    image = serves(bad)
    image.document["layers"] = layer(image, **changes)
    refused(puller, bad, code)


def test_urls_of_a_layer_are_not_followed(puller: Puller, bad: HostileRegistry) -> None:
    with HostileRegistry() as other:
        image = serves(bad)
        image.document["layers"] = layer(image, urls=[f"{other.url}/v2/x/blobs/{image.layers[0]}"])
        bad.on("GET", "/blobs/" + image.layers[0], says(404))
        refused(puller, bad, "blob-unknown")
        assert other.requests == []


def test_128_layers(puller: Puller, bad: HostileRegistry) -> None:
    bad.image = SmallImage(*({f"{n}": b""} for n in range(128)))
    refused(puller, bad, "layer-limit", "127")


def test_a_config_without_a_diff_id(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    image.document["layers"] *= 2
    refused(puller, bad, "document-invalid", "diff-ids")


def change_config(image: SmallImage, **changes: Any) -> None:
    image.config = json.dumps(json.loads(image.config) | changes).encode()
    image.blobs[digest(image.config)] = image.config
    image.document["config"] |= {"digest": digest(image.config), "size": len(image.config)}


@pytest.mark.parametrize(
    "changes",
    [
        {"rootfs": None}, {"rootfs": {"type": "layers"}}, {"rootfs": {"type": "layers", "diff_ids": ["x"]}},
        {"config": {"Env": ["NOVALUE"]}}, {"config": {"Cmd": 5}}, {"config": {"User": "a\0b"}}, {"config": ["x"]},
        {"config": {"Entrypoint": [["sh"]]}}, {"os": 5},
    ],
)  # fmt: skip
def test_a_config_that_cannot_be(puller: Puller, bad: HostileRegistry, changes: dict[str, Any]) -> None:
    image = serves(bad)
    change_config(image, **changes)
    refused(puller, bad, "document-invalid")


def test_a_config_that_is_too_large(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    image.document["config"]["size"] = 5 << 20
    refused(puller, bad, "document-limit")


def test_a_config_that_is_another(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    other = image.config.replace(b"/bin/sh", b"/bin/ev")
    bad.on("GET", f"/blobs/{digest(image.config)}", says(200, other))
    refused(puller, bad, "digest-mismatch", digest(image.config))


# ── an index ──────────────────────────────────────────────────────────────────────────────────────────────────────────


INDEX = "application/vnd.oci.image.index.v1+json"


def index(*entries: dict[str, Any]) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries}).encode()


def entry(data: bytes, media_type: str = SmallImage.MANIFEST, **changes: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digest(data), "size": len(data), **changes}


def test_an_index_of_nothing(puller: Puller, bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(200, index(), {"Content-Type": INDEX}))
    refused(puller, bad, "platform-missing")


def test_an_index_in_an_index(puller: Puller, bad: HostileRegistry) -> None:
    inner = index()
    outer = index(entry(inner, INDEX))
    bad.on("GET", "/manifests/latest", says(200, outer, {"Content-Type": INDEX}))
    bad.on("GET", f"/manifests/{digest(inner)}", says(200, inner, {"Content-Type": INDEX}))
    refused(puller, bad, "document-invalid", "index")


def test_an_index_that_names_another_manifest(puller: Puller, bad: HostileRegistry) -> None:
    outer = index(entry(b"{}"))
    bad.on("GET", "/manifests/latest", says(200, outer, {"Content-Type": INDEX}))
    bad.on("GET", "/manifests/sha256", says(200, LARGE.manifest, {"Content-Type": SmallImage.MANIFEST}))
    refused(puller, bad, "digest-mismatch")


def test_an_index_that_lies_of_a_size(puller: Puller, bad: HostileRegistry) -> None:
    outer = index(entry(LARGE.manifest, size=5))
    bad.on("GET", "/manifests/latest", says(200, outer, {"Content-Type": INDEX}))
    refused(puller, bad, "size-mismatch", "5")


# ── layers ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_layer_that_is_another(puller: Puller, bad: HostileRegistry) -> None:
    blob = bytearray(LARGE.blobs[SECOND])
    blob[300_000] ^= 1
    bad.on("GET", SECOND, says(200, bytes(blob)))
    got = puller(f"{bad.host}/x")
    # the bit may be found by its digest, or before that by the decompressor or the reader of the archive
    assert got.code in ("digest-mismatch", "archive-invalid"), got.answer
    puller.partial(SECOND).unlink(missing_ok=True)
    assert puller.names("layers") == [] or FIRST in puller.blobs
    assert puller.names("refs") == []
    assert puller.names("tmp") == []


def test_a_layer_that_is_another_archive(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    size = len(image.blobs[image.layers[0]])
    other = gzip.compress(layer_tar({"b": b"b"}), mtime=0)
    bad.on("GET", f"/blobs/{image.layers[0]}", says(200, other[:size].ljust(size, b"\0")))
    got = puller(f"{bad.host}/x")
    assert got.code in ("digest-mismatch", "archive-invalid"), got.answer
    puller.nothing_half_stored()


def test_a_diff_id_that_lies(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    change_config(image, rootfs={"type": "layers", "diff_ids": ["sha256:" + "3" * 64]})
    refused(puller, bad, "digest-mismatch", "diff-id", "sha256:" + "3" * 64)


@pytest.mark.parametrize("change", [-10, 10, 1 << 30])
def test_a_layer_of_another_size(puller: Puller, bad: HostileRegistry, change: int) -> None:
    image = serves(bad)
    image.document["layers"] = layer(image, size=image.document["layers"][0]["size"] + change)
    refused(puller, bad, "size-mismatch")


def test_an_endless_layer(puller: Puller, bad: HostileRegistry) -> None:
    serves(bad)
    bad.on("GET", bad.image.layers[0], endless(declared=False))
    got = puller(f"{bad.host}/x")
    assert got.code in ("size-mismatch", "archive-invalid", "digest-mismatch")
    puller.nothing_half_stored()


def test_a_layer_that_trickles(puller: Puller, bad: HostileRegistry) -> None:
    serves(bad)
    bad.on("GET", bad.image.layers[0], trickles(0.1, body=False))
    refused(puller, bad, "registry-timeout", seconds=15)


def test_a_layer_whose_connection_breaks_always(puller: Puller, bad: HostileRegistry) -> None:
    serves(bad)
    bad.on("GET", bad.image.layers[0], cut_after(0))
    refused(puller, bad, "registry-broken")


def test_what_came_before_the_connection_broke_is_kept(puller: Puller, bad: HostileRegistry) -> None:
    bad.on("GET", SECOND, cut_after(100_000))
    assert puller(f"{bad.host}/x", patience={**HASTE, "tries": 1}).code == "registry-broken"
    assert puller.partial(SECOND).read_bytes() == LARGE.blobs[SECOND][:100_000]
    assert puller.names("refs") == []
    bad.rules.clear()
    assert puller(f"{bad.host}/x").fresh
    assert bad.asked("GET", SECOND)[-1].headers["Range"].startswith("bytes=100000-")


@pytest.mark.parametrize("levels", [1, 2])
def test_a_gzip_bomb(puller: Puller, bad: HostileRegistry, levels: int) -> None:
    image = serves(bad)
    bomb = gzip.compress(bytes(64 << 20), mtime=0)
    for _ in range(levels - 1):
        bomb = gzip.compress(bomb, mtime=0)
    image.blobs[digest(bomb)] = bomb
    image.document["layers"] = layer(image, digest=digest(bomb), size=len(bomb))
    got = puller(f"{bad.host}/x")
    assert got.code in ("archive-invalid", "digest-mismatch"), got.answer
    puller.nothing_half_stored()


def test_a_layer_that_is_no_archive(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    junk = os.urandom(5000)
    image.blobs[digest(junk)] = junk
    image.document["layers"] = layer(image, digest=digest(junk), size=len(junk))
    got = puller(f"{bad.host}/x")
    assert got.code.startswith(("archive-", "digest-")), got.answer
    puller.nothing_half_stored()


def test_a_redirect_of_a_layer_that_leads_astray(puller: Puller, bad: HostileRegistry) -> None:
    serves(bad)
    bad.on("GET", "/blobs/", redirects("http://example.invalid/"))
    refused(puller, bad, "redirect-refused")


# ── the disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_more_than_the_disk_holds(puller: Puller, bad: HostileRegistry) -> None:
    image = serves(bad)
    image.document["layers"] = layer(image, size=1 << 55)
    refused(puller, bad, "disk-full", "are needed", "36029 TB")


def test_a_disk_that_fills_up(puller: Puller, bad: HostileRegistry, tmp_path: Path) -> None:
    # a tmpfs of our own in a user namespace: room for the blob, and not for what it holds
    bad.image = SmallImage({"zeros": bytes(30 << 20)})
    puller.store.mkdir()
    mount = f'mount -t tmpfs -o size=8m none {puller.store} && exec "$@"'
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "-"]
    got = puller(f"{bad.host}/x", idmap="single", prefix=prefix)
    assert got.code == "disk-full", got.answer
    assert "No space left" in got.message


# ── stopped by the user ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pull_that_is_stopped(puller: Puller, bad: HostileRegistry, number: int, status: int) -> None:
    def half(handler: Handler) -> None:
        blob = LARGE.blobs[SECOND]
        handler.head(200, {"Content-Length": str(len(blob))})
        handler.wfile.write(blob[:300_000])
        handler.wfile.flush()
        handler.wait()

    bad.on("GET", SECOND, half)
    process = subprocess.Popen(
        [*COMMAND, "pull", f"{bad.host}/x"], env=puller.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 20
    while not puller.partial(SECOND).exists() or puller.partial(SECOND).stat().st_size < 300_000:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - start < 1
    assert process.returncode in (status, status - 256, 128 - status)
    assert b"Traceback" not in err
    # the beginning stays, and nothing else; a worker of a killed parent may need a moment to see it
    wait_until(lambda: puller.names("locks") in ([], ["collect"]))
    assert puller.partial(SECOND).read_bytes() == LARGE.blobs[SECOND][:300_000]
    assert puller.names("refs") == []
    bad.rules.clear()
    assert puller(f"{bad.host}/x").fresh
    assert puller.names("tmp") == []


def wait_until(condition: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_registry_that_says_nothing_can_be_left(puller: Puller, bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", silent)
    process = subprocess.Popen(
        [*COMMAND, "pull", f"{bad.host}/x"], env=puller.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_until(lambda: bad.count("GET", "/manifests/") == 1, 20)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert time.monotonic() - start < 1
