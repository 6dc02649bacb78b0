"""Pushes to a real registry, and what others read of it: the same digests, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from conftest import Sbx
from hostile_registry import Handler, HostileRegistry, says
from real_registry import PASSWORD, USER, RealRegistry, SmallImage, TokenServer, copy_to, digest, htpasswd

pytestmark = [needs.userns, needs.program("docker-registry", "skopeo")]

IMAGE = SmallImage({"etc/": b"", "etc/hello": b"hello\n"}, {"noise": os.urandom(3_000_000)})
DIGEST = digest(IMAGE.manifest)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host of a real registry with IMAGE as ``a/b:latest``."""
    with RealRegistry(tmp_path_factory.mktemp("registry")) as server:
        copy_to(server.host, "a/b", IMAGE.write_layout(tmp_path_factory.mktemp("layout")))
        yield server.host


@pytest.fixture
def ours(fresh_sbx: Sbx, tmp_path: Path) -> Sbx:
    """The command, with a home of its own."""
    home = tmp_path / "own-home"
    home.mkdir()
    fresh_sbx.env |= {"HOME": str(home), "CONTAINERS_REGISTRIES_CONF": "/dev/null"}
    return fresh_sbx


def skopeo(*arguments: str | Path) -> bytes:
    return subprocess.run(["skopeo", "--insecure-policy", *arguments], check=True, capture_output=True).stdout


def raw(name: str, *options: str) -> bytes:
    """Return the manifest that the registry has for `name`, as skopeo reads it."""
    return skopeo("inspect", "--raw", "--tls-verify=false", *options, f"docker://{name}")


# ── to a registry ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", [[], ["--chunk-size", "1"]], ids=["whole", "chunks"])
def test_push(ours: Sbx, registry: str, tmp_path: Path, options: list[str]) -> None:
    ours.ok("pull", f"{registry}/a/b")
    with RealRegistry(tmp_path / "other") as other:
        done = ours("push", *options, f"{registry}/a/b", f"{other.host}/c/d:e", check=0)
        assert done.stdout == DIGEST + "\n"
        assert done.stderr.count(": done, ") == 3
        assert raw(f"{other.host}/c/d:e") == IMAGE.manifest
        # all of it can be read back
        skopeo("copy", "--quiet", "--src-tls-verify=false", f"docker://{other.host}/c/d:e", f"dir:{tmp_path}/copy")
        again = ours("push", f"{registry}/a/b", f"{other.host}/c/d:f", check=0)
        assert again.stderr.count("already there") == 3
        assert raw(f"{other.host}/c/d:f") == IMAGE.manifest


def test_push_to_where_its_name_says(ours: Sbx, registry: str) -> None:
    ours.ok("pull", f"{registry}/a/b")
    ours.ok("tag", f"{registry}/a/b", f"{registry}/named:1")
    assert ours.ok("push", "--quiet", f"{registry}/named:1") == DIGEST
    assert raw(f"{registry}/named:1") == IMAGE.manifest


def test_blobs_of_a_neighbour_are_mounted(ours: Sbx, registry: str) -> None:
    ours.ok("pull", f"{registry}/a/b")
    done = ours("push", f"{registry}/a/b", f"{registry}/x/mounted", check=0)
    assert done.stderr.count(": mounted, ") == 3
    assert raw(f"{registry}/x/mounted") == IMAGE.manifest


def test_a_mount_that_is_refused_becomes_an_upload(ours: Sbx, tmp_path: Path) -> None:
    with HostileRegistry(IMAGE) as source:
        ours.ok("pull", f"{source.host}/a/b")
        got: list[str] = []
        source.on("HEAD", "/v2/c/d/blobs/", says(404))
        source.on("POST", "/v2/c/d/blobs/uploads/", says(202, b"", {"Location": "/v2/c/d/blobs/uploads/1?state=x"}))
        source.on("POST", "mount=", says(403))

        def take(handler: Handler) -> None:
            name = handler.path.partition("digest=")[2].replace("%3A", ":")
            assert digest(handler.rfile.read(int(handler.headers["Content-Length"]))) == name
            got.append(name)
            handler.reply(201)

        def take_manifest(handler: Handler) -> None:
            handler.rfile.read(int(handler.headers["Content-Length"]))
            handler.reply(201)

        source.on("PUT", "/blobs/uploads/1", take)
        source.on("PUT", "/manifests/", take_manifest)
        ours.ok("push", f"{source.host}/a/b", f"{source.host}/c/d")
        assert sorted(got) == sorted(IMAGE.blobs)


def test_push_with_a_password(ours: Sbx, registry: str, tmp_path: Path) -> None:
    ours.ok("pull", f"{registry}/a/b")
    with RealRegistry(tmp_path / "other", htpasswd(tmp_path / "auth")) as other:
        refused = ours("push", f"{registry}/a/b", f"{other.host}/c/d")
        assert refused.status == 125
        assert f"sbx login {other.host}" in refused.stderr
        ours("login", "-u", USER, "--password-stdin", other.host, input=PASSWORD, check=0)
        ours.ok("push", f"{registry}/a/b", f"{other.host}/c/d")
        assert raw(f"{other.host}/c/d", "--creds", f"{USER}:{PASSWORD}") == IMAGE.manifest


def test_push_with_tokens(ours: Sbx, registry: str, tmp_path: Path) -> None:
    ours.ok("pull", f"{registry}/a/b")
    with TokenServer(tmp_path / "tokens") as server, RealRegistry(tmp_path / "other", server.settings()) as other:
        assert ours("push", f"{registry}/a/b", f"{other.host}/c/d").status == 125
        ours("login", "-u", USER, "--password-stdin", other.host, input=PASSWORD, check=0)
        ours.ok("push", f"{registry}/a/b", f"{other.host}/c/d")
        ours.ok("logout", other.host)
        assert ours.ok("pull", "--quiet", f"{other.host}/c/d") == DIGEST


@pytest.mark.parametrize("form", ["v2s2", "oci"])
def test_the_form_stays(ours: Sbx, registry: str, tmp_path: Path, form: str) -> None:
    copy_to(registry, f"form/{form}", IMAGE.write_layout(tmp_path / "layout"), "latest", "--format", form)
    before = raw(f"{registry}/form/{form}")
    ours.ok("pull", f"{registry}/form/{form}")
    ours.ok("push", f"{registry}/form/{form}", f"{registry}/again/{form}")
    assert raw(f"{registry}/again/{form}") == before


# ── an index ──────────────────────────────────────────────────────────────────────────────────────────────────────────


OTHER = SmallImage({"other": b"x"}, architecture="riscv64")
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


def index(*images: SmallImage) -> bytes:
    entries = [
        {
            "mediaType": SmallImage.MANIFEST,
            "digest": digest(image.manifest),
            "size": len(image.manifest),
            "platform": {"os": "linux", "architecture": json.loads(image.config)["architecture"]},
        }
        for image in images
    ]
    return json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}).encode()


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the image for this machine is amd64's")
@pytest.mark.parametrize(("images", "pushed"), [((IMAGE,), index(IMAGE)), ((IMAGE, OTHER), IMAGE.manifest)])
def test_an_index_goes_whole_or_not(ours: Sbx, registry: str, images: tuple[SmallImage, ...], pushed: bytes) -> None:
    """What the store has of an index is this machine's image: with all others it is the index, else that image."""
    with HostileRegistry(IMAGE) as source:
        source.on("GET", "/manifests/latest", says(200, index(*images), {"Content-Type": INDEX_TYPE}))
        ours.ok("pull", f"{source.host}/a/b")
        name = f"{registry}/index/{len(images)}"
        assert ours.ok("push", "--quiet", f"{source.host}/a/b", name) == digest(pushed)
        assert raw(name) == pushed


# ── what can go wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_not_here(ours: Sbx, registry: str) -> None:
    done = ours("push", f"{registry}/no/such")
    assert done.status == 125
    assert "not in the store" in done.stderr


def test_a_blob_that_is_lost(ours: Sbx, registry: str) -> None:
    ours.ok("pull", f"{registry}/a/b")
    (ours.home / "blobs" / "sha256" / IMAGE.layers[0].removeprefix("sha256:")).unlink()
    done = ours("push", f"{registry}/a/b", f"{registry}/lost")
    assert done.status == 125
    assert IMAGE.layers[0] in done.stderr
    assert ours("pull", "--quiet", f"{registry}/lost").status == 125


def test_an_upload_that_fails_stops_the_others(ours: Sbx, registry: str) -> None:
    ours.ok("pull", f"{registry}/a/b")
    with HostileRegistry() as other:
        other.on("POST", "/uploads/", says(403, b'{"errors":[{"message":"read-only"}]}'))
        done = ours("push", f"{registry}/a/b", f"{other.host}/c/d")
        assert done.status == 125
        assert "read-only" in done.stderr
        assert other.count("PUT", "/manifests/") == 0


# ── round trips ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_skopeo_and_umoci_read_what_we_push(ours: Sbx, registry: str, tmp_path: Path) -> None:
    needs.enforce(needs.program("umoci").args[0]())
    ours.ok("pull", f"{registry}/a/b")
    ours.ok("push", f"{registry}/a/b", f"{registry}/for/umoci")
    skopeo("copy", "--quiet", "--src-tls-verify=false", f"docker://{registry}/for/umoci", f"oci:{tmp_path}/oci:x")
    unpack = ["umoci", "unpack", "--rootless", "--image", f"{tmp_path}/oci:x", f"{tmp_path}/bundle"]
    subprocess.run(unpack, check=True, capture_output=True)
    assert (tmp_path / "bundle" / "rootfs" / "etc" / "hello").read_bytes() == b"hello\n"


@needs.program("podman")
def test_podman_reads_what_we_push_and_we_what_podman_pushes(ours: Sbx, registry: str, tmp_path: Path) -> None:
    folder = tempfile.mkdtemp(prefix="podman-")  # podman takes no long paths
    podman = ["podman", f"--root={folder}/root", f"--runroot={folder}/run", "--storage-driver=vfs", "--log-level=error"]

    def run(*arguments: str) -> str:
        done = subprocess.run([*podman, *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    ours.ok("pull", f"{registry}/a/b")
    ours.ok("push", f"{registry}/a/b", f"{registry}/for/podman")
    try:
        run("pull", "--quiet", "--tls-verify=false", f"{registry}/for/podman")
        assert DIGEST in run("images", "--digests", "--format", "{{.Digest}}")
        run("tag", f"{registry}/for/podman", f"{registry}/from/podman")
        run("push", "--quiet", "--tls-verify=false", f"{registry}/from/podman")
        got = ours.ok("pull", "--quiet", f"{registry}/from/podman")
        assert got == digest(raw(f"{registry}/from/podman"))
    finally:
        ours("unshare", "rm", "-rf", folder)
