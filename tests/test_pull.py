"""Pulls from a real registry: what arrives, what is not fetched twice, which place is asked, what is told."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from conftest import COMMAND, Sbx
from hostile_registry import HostileRegistry, says
from pulling import Puller
from real_registry import PASSWORD, USER, RealRegistry, SmallImage, copy_to, digest, htpasswd

pytestmark = [needs.userns, needs.program("docker-registry", "skopeo")]

FILES = {"etc/": b"", "etc/hello": b"hello\n" * 1000, "bin/": b"", "bin/tool": os.urandom(50_000)}
IMAGE = SmallImage(FILES, {"etc/": b"", "etc/hello": b"bye\n"}, {"noise": os.urandom(700_000)})


@pytest.fixture
def puller(tmp_path: Path) -> Iterator[Puller]:
    yield Puller(tmp_path)
    # what subordinate ids own is theirs to delete
    Sbx(tmp_path / "store")("unshare", "rm", "-rf", tmp_path / "store")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host of a real registry with IMAGE as ``a/b:latest``."""
    with RealRegistry(tmp_path_factory.mktemp("registry")) as server:
        copy_to(server.host, "a/b", IMAGE.write_layout(tmp_path_factory.mktemp("layout")))
        yield server.host


@pytest.fixture
def watched() -> Iterator[HostileRegistry]:
    """A registry of ours, which serves IMAGE well, and counts."""
    with HostileRegistry(IMAGE) as server:
        yield server


def is_whole(puller: Puller, image: SmallImage = IMAGE) -> bool:
    return set(puller.blobs) >= {*image.blobs, digest(image.manifest)} and puller.names("partial") == []


# ── what arrives ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_image(puller: Puller, registry: str) -> None:
    got = puller(f"{registry}/a/b")
    assert (got.digest, got.fresh) == (digest(IMAGE.manifest), True)
    content = puller.content(got)
    assert content["etc/hello"] == b"bye\n"
    assert content["bin/tool"] == FILES["bin/tool"]
    assert len(content["noise"]) == 700_000
    assert is_whole(puller)
    assert puller.names("tmp") == []


def test_the_store_is_a_layout_that_skopeo_reads(puller: Puller, registry: str, tmp_path: Path) -> None:
    puller(f"{registry}/a/b")
    target = tmp_path / "copy"
    source = f"oci:{puller.store}:{registry}/a/b:latest"
    subprocess.run(["skopeo", "--insecure-policy", "copy", "--quiet", source, f"dir:{target}"], check=True)
    assert (target / "manifest.json").read_bytes() == IMAGE.manifest


def test_by_digest(puller: Puller, registry: str) -> None:
    name = f"{registry}/a/b@{digest(IMAGE.manifest)}"
    assert puller(name).fresh
    assert not puller(name).fresh


@pytest.mark.parametrize("form", ["v2s2", "oci"])
def test_docker_and_oci_manifests(puller: Puller, registry: str, tmp_path: Path, form: str) -> None:
    copy_to(registry, f"form/{form}", IMAGE.write_layout(tmp_path / "layout"), "latest", "--format", form)
    got = puller(f"{registry}/form/{form}")
    assert puller.content(got)["etc/hello"] == b"bye\n"


@pytest.mark.parametrize("compression", ["zstd", "gzip"])
def test_compressions(puller: Puller, registry: str, tmp_path: Path, compression: str) -> None:
    options = ["--dest-compress-format", compression, "--dest-compress", "--dest-force-compress-format"]
    options = options[:2] if compression == "zstd" else []
    copy_to(registry, f"packed/{compression}", IMAGE.write_layout(tmp_path / "layout"), "latest", *options)
    got = puller(f"{registry}/packed/{compression}")
    assert puller.content(got)["bin/tool"] == FILES["bin/tool"]


def test_an_image_of_one_empty_layer(puller: Puller, watched: HostileRegistry) -> None:
    watched.image = SmallImage({})
    assert puller(f"{watched.host}/x").fresh


def test_a_layer_that_is_listed_twice_is_fetched_once(puller: Puller, watched: HostileRegistry) -> None:
    watched.image = image = SmallImage({"a": b"a"}, {"b": b"b"}, {"a": b"a"})
    assert image.layers[0] == image.layers[2]
    assert puller(f"{watched.host}/x").fresh
    assert watched.count("GET", image.layers[0]) == 1


def test_127_layers(puller: Puller, watched: HostileRegistry) -> None:
    watched.image = SmallImage(*({f"file{n}": b"%d" % n} for n in range(127)))
    got = puller(f"{watched.host}/x")
    assert len(got.answer["layers"]) == 127
    assert puller.content(got)["file126"] == b"126"


# ── platforms ─────────────────────────────────────────────────────────────────────────────────────────────────────────


OTHER = SmallImage({"other": b"x"}, architecture="riscv64")


def index_of(*images: tuple[SmallImage, dict[str, Any]]) -> bytes:
    entries = [
        {
            "mediaType": SmallImage.MANIFEST,
            "digest": digest(image.manifest),
            "size": len(image.manifest),
            "platform": where,
        }
        for image, where in images
    ]
    media_type = "application/vnd.oci.image.index.v1+json"
    return json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()


INDEX = index_of(
    (OTHER, {"os": "linux", "architecture": "riscv64"}),
    (IMAGE, {"os": "linux", "architecture": "amd64"}),
    (OTHER, {"os": "unknown", "architecture": "unknown"}),
)


@pytest.fixture
def several(watched: HostileRegistry) -> HostileRegistry:
    """A registry whose `latest` is INDEX."""
    headers = {"Content-Type": "application/vnd.oci.image.index.v1+json", "Docker-Content-Digest": digest(INDEX)}
    watched.on("GET", "/manifests/latest", says(200, INDEX, headers))
    watched.on("HEAD", "/manifests/latest", says(200, INDEX, headers))
    watched.on("GET", f"/manifests/{digest(OTHER.manifest)}", says(200, OTHER.manifest))
    watched.image = copy.copy(IMAGE)
    watched.image.blobs = IMAGE.blobs | OTHER.blobs
    return watched


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the image for this machine is amd64's")
def test_the_image_for_this_machine(puller: Puller, several: HostileRegistry) -> None:
    got = puller(f"{several.host}/x")
    assert got.digest == digest(INDEX)
    assert got.answer["image"] == digest(IMAGE.manifest)
    assert OTHER.layers[0] not in puller.blobs
    assert not puller(f"{several.host}/x").fresh


def test_the_image_for_another_machine(puller: Puller, several: HostileRegistry) -> None:
    got = puller(f"{several.host}/x", platform="linux/riscv64")
    assert (got.digest, got.answer["image"]) == (digest(INDEX), digest(OTHER.manifest))
    assert OTHER.layers[0] in puller.blobs


def test_no_image_for_that_machine(puller: Puller, several: HostileRegistry) -> None:
    got = puller(f"{several.host}/x", platform="linux/s390x")
    assert got.code == "platform-missing"
    assert "linux/amd64" in got.message
    assert "linux/riscv64" in got.message
    puller.nothing_half_stored()


def test_a_single_image_for_another_machine(puller: Puller, watched: HostileRegistry) -> None:
    watched.image = OTHER
    got = puller(f"{watched.host}/x", platform="linux/s390x")
    assert got.code == "platform-missing"
    assert "linux/riscv64" in got.message


# ── what is not fetched ───────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_unchanged_is_asked_for_once(puller: Puller, watched: HostileRegistry) -> None:
    assert puller(f"{watched.host}/x").fresh
    watched.requests.clear()
    assert not puller(f"{watched.host}/x").fresh
    assert [(each.method, each.path) for each in watched.requests if each.path != "/v2/"] == [
        ("HEAD", "/v2/x/manifests/latest")
    ]


def test_a_layer_that_is_here_is_not_fetched(puller: Puller, watched: HostileRegistry) -> None:
    puller(f"{watched.host}/x")
    tag = SmallImage(FILES, {"new": b"new"})
    watched.image = tag
    watched.requests.clear()
    assert puller(f"{watched.host}/y").fresh
    assert watched.count("GET", tag.layers[0]) == 0
    assert watched.count("GET", tag.layers[1]) == 1


def test_a_lost_blob_is_fetched_again(puller: Puller, watched: HostileRegistry) -> None:
    puller(f"{watched.host}/x")
    (puller.store / "blobs" / "sha256" / IMAGE.layers[2].removeprefix("sha256:")).unlink()
    watched.requests.clear()
    assert puller(f"{watched.host}/x").fresh
    assert is_whole(puller)
    assert watched.count("GET", "/blobs/") == 1


def test_another_id_map_needs_no_network(puller: Puller, watched: HostileRegistry) -> None:
    first = puller(f"{watched.host}/x")
    watched.requests.clear()
    second = puller(f"{watched.host}/x", idmap="single")
    assert watched.count("GET", "/blobs/") == 0
    assert set(first.answer["layers"]).isdisjoint(second.answer["layers"])
    assert puller.content(second)["etc/hello"] == b"bye\n"


def test_a_tag_that_has_moved(puller: Puller, watched: HostileRegistry) -> None:
    old = puller(f"{watched.host}/x")
    watched.image = SmallImage({"new": b"new"})
    new = puller(f"{watched.host}/x")
    assert new.fresh
    assert new.digest != old.digest
    assert puller.content(new) == {"new": b"new"}


# ── broken off and resumed ────────────────────────────────────────────────────────────────────────────────────────────


LARGE = IMAGE.layers[2]


def leave_beginning(puller: Puller, data: bytes) -> None:
    puller.partial(LARGE).parent.mkdir(parents=True, exist_ok=True)
    puller.partial(LARGE).write_bytes(data)


def test_a_beginning_is_used(puller: Puller, watched: HostileRegistry) -> None:
    leave_beginning(puller, IMAGE.blobs[LARGE][:400_000])
    assert puller(f"{watched.host}/x").fresh
    asked = watched.asked("GET", LARGE)
    assert [each.headers.get("Range", "").partition("-")[0] for each in asked] == ["bytes=400000"]
    assert is_whole(puller)


def test_a_beginning_that_is_whole_needs_no_network(puller: Puller, watched: HostileRegistry) -> None:
    leave_beginning(puller, IMAGE.blobs[LARGE])
    assert puller(f"{watched.host}/x").fresh
    assert watched.count("GET", LARGE) == 0


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: bytes(len(data)), id="zeros"),
        pytest.param(lambda data: data[:1000] + bytes(100) + data[1100:], id="hole"),
        pytest.param(lambda data: data[:-50] + os.urandom(50), id="end"),
        pytest.param(lambda data: data + data + data, id="too long"),
    ],
)
def test_a_damaged_beginning_is_fetched_again(puller: Puller, watched: HostileRegistry, damage: Any) -> None:
    leave_beginning(puller, damage(IMAGE.blobs[LARGE][:400_000]))
    assert puller(f"{watched.host}/x").fresh
    assert is_whole(puller)
    blob = puller.store / "blobs" / "sha256" / LARGE.removeprefix("sha256:")
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == LARGE.removeprefix("sha256:")


# ── several at once ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_pulls_at_the_same_time_share_the_work(puller: Puller, watched: HostileRegistry) -> None:
    processes = [puller.start(f"{watched.host}/x") for _ in range(6)]
    pulls = [puller.finish(process) for process in processes]
    assert {pull.digest for pull in pulls} == {digest(IMAGE.manifest)}
    assert is_whole(puller)
    assert puller.names("tmp") == []
    for layer in IMAGE.layers:
        assert watched.count("GET", layer) == 1


# ── which place is asked ──────────────────────────────────────────────────────────────────────────────────────────────


def conf(location: str, *mirrors: str, prefix: str = "docker.io") -> str:
    lines = ["[[registry]]", f'prefix = "{prefix}"', f'location = "{location}"']
    for mirror in mirrors:
        lines += ["[[registry.mirror]]", f'location = "{mirror}"']
    return "\n".join(lines) + "\n"


def test_a_short_name_goes_where_the_configuration_says(puller: Puller, watched: HostileRegistry) -> None:
    puller.configure(conf(watched.host))
    assert puller("alpine").fresh
    assert watched.count("GET", "/v2/library/alpine/manifests/latest") == 1
    assert puller.names("refs") == ["docker.io%library%alpine:latest"]


def test_a_mirror_is_asked_first(puller: Puller, watched: HostileRegistry) -> None:
    with HostileRegistry(IMAGE) as mirror:
        puller.configure(conf(watched.host, f"{mirror.host}/hub"))
        assert puller("alpine").fresh
        assert mirror.count("GET", "/v2/hub/library/alpine/manifests/latest") == 1
        assert watched.requests == []


@pytest.mark.parametrize("status", [404, 401, 500])
def test_a_mirror_that_has_it_not(puller: Puller, watched: HostileRegistry, status: int) -> None:
    with HostileRegistry(IMAGE) as mirror:
        mirror.on("GET", "/manifests/", says(status))
        puller.configure(conf(watched.host, mirror.host))
        assert puller("alpine").fresh
        assert watched.count("GET", "/manifests/") == 1


def test_a_mirror_that_is_down(puller: Puller, watched: HostileRegistry) -> None:
    puller.configure(conf(watched.host, "127.0.0.1:1"))
    assert puller("alpine").fresh


def test_a_mirror_that_lacks_a_layer(puller: Puller, watched: HostileRegistry) -> None:
    with HostileRegistry(IMAGE) as mirror:
        mirror.on("GET", LARGE, says(404))
        puller.configure(conf(watched.host, mirror.host))
        assert puller("alpine").fresh
        assert watched.count("GET", "/blobs/") == 1


def test_a_blocked_registry(puller: Puller) -> None:
    puller.configure('[[registry]]\nprefix = "bad.example"\nblocked = true\n')
    got = puller("bad.example/x")
    assert (got.code, got.answer["status"]) == ("registry-blocked", 125)


def test_a_proxy_of_the_environment(puller: Puller, watched: HostileRegistry) -> None:
    puller.configure(conf("registry.example:5000") + "insecure = true\n")
    # https goes through CONNECT, which this proxy does not know; http asks it with the whole URL
    got = puller("alpine", env={"http_proxy": watched.url, "https_proxy": watched.url})
    assert got.fresh
    assert watched.asked("GET", "/manifests/")[0].path.startswith("http://registry.example:5000/v2/library/alpine/")
    assert puller("alpine", env={"http_proxy": watched.url, "no_proxy": "example"}).code == "registry-unknown-host"


def test_an_address_of_ipv6(puller: Puller) -> None:
    try:
        server = HostileRegistry(IMAGE, "::1")
    except OSError as error:
        pytest.skip(f"no IPv6 loopback: {error}")
    with server:
        assert puller(f"{server.host}/x:tag").fresh
        assert puller.names("refs") == [f"{server.host}%x:tag"]


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def ours(fresh_sbx: Sbx, tmp_path: Path) -> Sbx:
    """The command, with a home of its own."""
    home = tmp_path / "own-home"
    home.mkdir()
    fresh_sbx.env |= {"HOME": str(home), "CONTAINERS_REGISTRIES_CONF": "/dev/null"}
    return fresh_sbx


def test_pull_prints_the_digest(ours: Sbx, registry: str) -> None:
    done = ours("pull", f"{registry}/a/b", check=0)
    assert done.stdout == digest(IMAGE.manifest) + "\n"
    assert "3 layers" in done.stderr
    assert done.stderr.count(": done, ") == 3
    assert "\x1b" not in done.stderr
    again = ours("pull", "--quiet", f"{registry}/a/b", check=0)
    assert (again.stdout, again.stderr) == (digest(IMAGE.manifest) + "\n", "")


@needs.busybox
def test_run_pulls_what_is_missing(ours: Sbx, registry: str, offline_tarball: Path) -> None:
    name = f"{registry}/offline:1"
    ours.ok("import", name, offline_tarball)
    ours.ok("push", name)
    ours.ok("rmi", name)
    never = ours("run", "--pull", "never", name, "echo", "hi")
    assert never.status == 125
    assert f"sbx pull {name}" in never.stderr
    done = ours("run", name, "echo", "hi", check=0)
    assert done.stdout == "hi\n"
    assert "1 layer" in done.stderr
    # now it is there, and nothing is told
    again = ours("run", name, "echo", "hi", check=0)
    assert (again.stdout, again.stderr) == ("hi\n", "")


@needs.busybox
def test_run_knows_aliases(ours: Sbx, registry: str, offline_tarball: Path) -> None:
    ours.ok("import", f"{registry}/offline:2", offline_tarball)
    ours.ok("push", f"{registry}/offline:2")
    ours.ok("rmi", f"{registry}/offline:2")
    settings = Path(ours.env["HOME"]) / ".config" / "sbx" / "registries.conf"
    settings.parent.mkdir(parents=True)
    settings.write_text(f'[aliases]\ntools = "{registry}/offline"\n')
    assert ours.ok("run", "tools:2", "echo", "hi") == "hi"
    assert ours.ok("run", "--pull", "never", "tools:2", "echo", "hi") == "hi"
    assert ours("run", "--pull", "never", "docker.io/library/tools:2", "true").status == 125


def test_a_pull_that_fails(ours: Sbx, registry: str) -> None:
    done = ours("pull", f"{registry}/no/such:tag")
    assert (done.status, done.stdout) == (125, "")
    assert done.stderr == f"sbx: get {registry}/no/such:tag: the registry has no such image\n"


def test_bars_on_a_terminal(ours: Sbx, registry: str, tty: Any) -> None:
    terminal = tty([*COMMAND, "pull", f"{registry}/a/b"], env=ours.env)
    assert terminal.wait() == 0
    for layer in IMAGE.layers:
        assert re.search(rf"{layer[7:19]} \[#+\] .* done".encode(), terminal.output)
    assert re.search(rb"pull \S+/a/b:latest \[[#.]+\] \d\S* \w?B / \S+ kB", terminal.output)
    # drawn in place: what is left to be seen is one line for each layer, one for all, and what is said anyway
    last = terminal.output.rpartition(b"\x1b[J")[2].decode().split("\r\n")
    assert last[4:] == [f"sbx: {registry}/a/b: pulled", digest(IMAGE.manifest), ""]


def test_policies(ours: Sbx, watched: HostileRegistry) -> None:
    name = f"{watched.host}/x"
    never = ours("pull", "--pull", "never", name)
    assert never.status == 125
    assert "not in the store" in never.stderr
    assert watched.requests == []
    ours.ok("pull", "--pull", "missing", name)
    watched.requests.clear()
    ours.ok("pull", "--pull", "missing", name)
    ours.ok("pull", "--pull", "never", name)
    assert watched.requests == []
    watched.image = SmallImage({"new": b"new"})
    assert ours.ok("pull", "--pull", "newer", "-q", name) == digest(watched.image.manifest)
    watched.on("GET", "/v2/", says(404))
    watched.on("HEAD", "/v2/", says(404))
    assert ours.ok("pull", "--pull", "newer", "-q", name) == digest(watched.image.manifest)
    assert ours("pull", "--pull", "always", name).status == 125
    odd = ours("pull", "--pull", "sometimes", name)
    assert odd.status == 125
    assert "missing, always, never, newer" in odd.stderr


def test_login_and_logout(ours: Sbx, tmp_path: Path) -> None:
    settings = htpasswd(tmp_path / "auth")
    with RealRegistry(tmp_path / "registry", settings) as server:
        layout = IMAGE.write_layout(tmp_path / "layout")
        copy_to(server.host, "a/b", layout, "latest", "--dest-creds", f"{USER}:{PASSWORD}")
        refused = ours("pull", f"{server.host}/a/b")
        assert refused.status == 125
        assert f"sbx login {server.host}" in refused.stderr
        wrong = ours("login", "-u", USER, "--password-stdin", server.host, input="wrong\n")
        assert wrong.status == 125
        assert "wrong" not in wrong.stderr.replace("sbx: ", "").split("hint")[0]
        done = ours("login", "-u", USER, "--password-stdin", server.host, input=PASSWORD, check=0)
        assert PASSWORD not in done.stdout + done.stderr
        kept = Path(ours.env["HOME"]) / ".config/sbx/auth.json"
        assert kept.stat().st_mode & 0o777 == 0o600
        ours.ok("pull", "-q", f"{server.host}/a/b")
        assert "logged out" in ours("logout", server.host, check=0).stderr
        assert "not logged in" in ours("logout", server.host, check=0).stderr
        assert ours("pull", f"{server.host}/a/b").status == 125


@pytest.mark.parametrize("host", ["a b", "a/b", "user@host", "-", "", "HOST:99999", "\x1b[31m"])
def test_a_login_at_no_host(ours: Sbx, host: str) -> None:
    done = ours("login", "-u", "x", "--password-stdin", "--", host, input="y")
    assert done.status == 125
    assert "\x1b" not in done.stderr


def test_a_login_on_a_terminal_shows_no_password(ours: Sbx, tmp_path: Path, tty: Any) -> None:
    with RealRegistry(tmp_path / "registry", htpasswd(tmp_path / "auth")) as server:
        terminal = tty([*COMMAND, "login", server.host], env=ours.env)
        terminal.expect("Username: ")
        terminal.line(USER)
        terminal.expect("Password: ")
        terminal.line(PASSWORD)
        terminal.expect(f"logged in at {server.host} as {USER}")
        assert terminal.wait() == 0
        assert PASSWORD.encode() not in terminal.output


def test_a_login_needs_a_terminal_or_stdin(ours: Sbx) -> None:
    done = ours("login", "-u", "x", "127.0.0.1:1")
    assert done.status == 125
    assert "--password-stdin" in done.stderr
