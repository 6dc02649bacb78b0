"""The protocol client against a real registry: plain, TLS with an own authority, htpasswd, tokens; down and up."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from real_registry import (
    PASSWORD,
    USER,
    RealRegistry,
    SmallImage,
    TokenServer,
    copy_to,
    digest,
    htpasswd,
    make_authority,
    make_certificate,
)

from rootless.errors import SbxError
from rootless.oci.credentials import Credential
from rootless.oci.pace import Patience
from rootless.oci.registries import Endpoint, Registries, _Rule
from rootless.oci.registry import Registry
from rootless.oci.uploads import Uploads

pytestmark = needs.program("docker-registry", "skopeo", "openssl")

HASTE = Patience(tries=3, backoff=0.01)
IMAGE = SmallImage({"etc/": b"", "etc/hello": b"hello\n" * 1000}, {"noise": os.urandom(300_000)})
LAYER = IMAGE.layers[1]
ADA = Credential(USER, PASSWORD)


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No certificates and no proxies of the one who runs the tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CONFIG_HOME", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host of a plain registry with the image `a/b:latest`."""
    with RealRegistry(tmp_path_factory.mktemp("plain")) as registry:
        copy_to(registry.host, "a/b", IMAGE.write_layout(tmp_path_factory.mktemp("layout")))
        yield registry.host


def client(host: str, name: str = "a/b", credential: Credential | None = None, push: bool = False) -> Registry:
    actions = ("pull", "push") if push else ("pull",)
    return Registry(Endpoint(host, name), Registries(), credential, HASTE, actions)


def get_all(registry: Registry) -> None:
    """Read the image back and compare all of it."""
    manifest = registry.manifest("latest")
    assert (manifest.data, manifest.media_type) == (IMAGE.manifest, SmallImage.MANIFEST)
    for name, data in IMAGE.blobs.items():
        assert b"".join(registry.blob(name, len(data))) == data


def put_all(registry: Registry, chunk: int = 0) -> None:
    uploads = Uploads(registry)
    for name, data in IMAGE.blobs.items():
        uploads.upload(name, len(data), lambda start, end, data=data: [data[start:end]], chunk)  # type: ignore[misc]
    registry.put_manifest("latest", IMAGE.manifest, SmallImage.MANIFEST)


def failing(code: str) -> pytest.RaisesExc[SbxError]:
    return pytest.raises(SbxError, check=lambda error: error.code == code)


# ── plain ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_get(plain: str) -> None:
    get_all(client(plain))


def test_get_by_digest(plain: str) -> None:
    assert client(plain).manifest(digest(IMAGE.manifest)).data == IMAGE.manifest


def test_digest_of_a_tag(plain: str) -> None:
    assert client(plain).manifest_digest("latest") == digest(IMAGE.manifest)


def test_part_of_a_blob(plain: str) -> None:
    data = IMAGE.blobs[LAYER]
    assert b"".join(client(plain).blob(LAYER, len(data), 12_345)) == data[12_345:]
    assert b"".join(client(plain).blob(LAYER, len(data), len(data))) == b""


def test_what_is_not_there(plain: str) -> None:
    with failing("image-unknown"):
        client(plain).manifest("other")
    with failing("image-unknown"):
        client(plain, "no/such").manifest_digest("latest")
    with failing("blob-unknown"):
        b"".join(client(plain).blob("sha256:" + "0" * 64, 5))
    assert not client(plain).has_blob("sha256:" + "0" * 64)


def test_localhost_is_loopback_too(plain: str) -> None:
    get_all(client(plain.replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize("chunk", [0, 70_000, 1 << 20])
def test_put(plain: str, chunk: int) -> None:
    registry = client(plain, f"put/{chunk}", push=True)
    put_all(registry, chunk)
    get_all(registry)


def test_an_upload_goes_on_after_a_broken_connection(plain: str) -> None:
    registry = client(plain, "put/broken", push=True)
    data = IMAGE.blobs[LAYER]
    starts = []

    def read(start: int, end: int) -> Iterator[bytes]:
        starts.append(start)
        yield data[start : start + 100]
        if len(starts) == 2:
            raise ConnectionResetError  # in the middle of the second chunk
        yield data[start + 100 : end]

    Uploads(registry).upload(LAYER, len(data), read, chunk=100_000)
    assert starts[0] == 0
    assert b"".join(registry.blob(LAYER, len(data))) == data


def test_mount(plain: str) -> None:
    registry = client(plain, "put/mounted", push=True)
    assert not registry.has_blob(LAYER)
    assert Uploads(registry).mount(LAYER, "a/b")
    assert registry.has_blob(LAYER)
    assert not Uploads(registry).mount("sha256:" + "0" * 64, "a/b")


def test_skopeo_reads_what_was_put(plain: str, tmp_path: Path) -> None:
    put_all(client(plain, "put/skopeo", push=True))
    source = f"docker://{plain}/put/skopeo"
    command = ["skopeo", "inspect", "--raw", "--tls-verify=false", source]
    assert subprocess.run(command, check=True, capture_output=True).stdout == IMAGE.manifest


# ── TLS ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The host of a registry with TLS, and its authority's certificate."""
    folder = tmp_path_factory.mktemp("tls")
    authority = make_authority(folder / "authority")
    with RealRegistry(folder, tls=make_certificate(folder / "server", authority)) as registry:
        yield registry.host, authority.certificate


def test_an_unknown_authority_is_refused(tls: tuple[str, Path]) -> None:
    host, _ = tls
    # although it is loopback: what speaks TLS must speak it well, and http is no way out
    with failing("registry-tls") as caught:
        client(host).probe()
    assert f"certs.d/{host}" in caught.value.hint


@pytest.mark.parametrize("folder", [".config/containers/certs.d", ".config/sbx/certs.d", ".docker/certs.d"])
def test_an_authority_in_certs_d(tls: tuple[str, Path], folder: str, tmp_path: Path) -> None:
    host, certificate = tls
    place = tmp_path / folder / host
    place.mkdir(parents=True)
    (place / "own.crt").write_bytes(certificate.read_bytes())
    put_all(client(host, "x/y", push=True))
    get_all(client(host, "x/y"))
    with failing("registry-tls"):
        client(host.replace("127.0.0.1", "localhost")).probe()


def test_an_authority_in_ssl_cert_file(tls: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    host, certificate = tls
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    client(host).probe()


def test_a_broken_certificate_is_named(tls: tuple[str, Path], tmp_path: Path) -> None:
    place = tmp_path / ".config/containers/certs.d" / tls[0]
    place.mkdir(parents=True)
    (place / "own.crt").write_text("no certificate")
    with failing("certificate-invalid") as caught:
        client(tls[0]).probe()
    assert str(place / "own.crt") in caught.value.message


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_registry_named_insecure_needs_no_authority(tls: tuple[str, Path]) -> None:
    host, _ = tls
    configuration = Registries(rules={host: _Rule(host, host, insecure=True)})
    Registry(Endpoint(host, "x", insecure=True), configuration, None, HASTE).probe()


def test_a_certificate_for_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = make_authority(tmp_path / "authority")
    pair = make_certificate(tmp_path / "server", authority, ["DNS:registry.example"])
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    with RealRegistry(tmp_path / "data", tls=pair) as registry, failing("registry-tls") as caught:
        client(registry.host).probe()
    assert "127.0.0.1" in caught.value.message


# ── authentication ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_htpasswd(tmp_path: Path) -> None:
    with RealRegistry(tmp_path / "data", htpasswd(tmp_path)) as registry:
        put_all(client(registry.host, credential=ADA, push=True))
        get_all(client(registry.host, credential=ADA))
        client(registry.host, credential=ADA).log_in()
        for wrong in (None, Credential(USER, "wrong"), Credential("eve", PASSWORD)):
            with failing("registry-unauthorized"):
                client(registry.host, credential=wrong).manifest("latest")
            with failing("registry-unauthorized"):
                client(registry.host, credential=wrong).log_in()


def test_tokens(tmp_path: Path) -> None:
    with TokenServer(tmp_path / "tokens") as server, RealRegistry(tmp_path / "data", server.settings()) as registry:
        put_all(client(registry.host, credential=ADA, push=True))
        assert server.asked[-1]["account"] == [USER]
        server.asked.clear()
        get_all(client(registry.host))
        assert server.asked == [{"service": [TokenServer.SERVICE], "scope": ["repository:a/b:pull"]}]
        client(registry.host, credential=ADA).log_in()
        for wrong in (Credential(USER, "wrong"), Credential(identity_token="wrong")):
            with failing("registry-unauthorized"):
                client(registry.host, credential=wrong).log_in()
        # a stranger may pull, and gets a token, but not for this
        with failing("registry-unauthorized"):
            put_all(client(registry.host, "other", push=True))


def test_an_identity_token(tmp_path: Path) -> None:
    with TokenServer(tmp_path / "tokens") as server, RealRegistry(tmp_path / "data", server.settings()) as registry:
        put_all(client(registry.host, credential=Credential(identity_token=PASSWORD), push=True))
        assert server.asked[-1]["grant_type"] == ["refresh_token"]
        get_all(client(registry.host))


def test_a_mount_asks_for_both_repositories(tmp_path: Path) -> None:
    with TokenServer(tmp_path / "tokens") as server, RealRegistry(tmp_path / "data", server.settings()) as registry:
        put_all(client(registry.host, credential=ADA, push=True))
        target = client(registry.host, "c/d", credential=ADA, push=True)
        assert Uploads(target).mount(LAYER, "a/b")
        assert server.asked[-1]["scope"] == ["repository:c/d:pull,push", "repository:a/b:pull"]
        assert target.has_blob(LAYER)


def test_a_registry_token_is_used_as_it_is(tmp_path: Path) -> None:
    with TokenServer(tmp_path / "tokens") as server, RealRegistry(tmp_path / "data", server.settings()) as registry:
        put_all(client(registry.host, credential=ADA, push=True))
        server.asked.clear()
        token = server.token(["repository:a/b:pull"], USER)
        get_all(client(registry.host, credential=Credential(registry_token=token)))
        assert server.asked == []


# ── proxies and mirrors ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pull_through_cache(plain: str, tmp_path: Path) -> None:
    with RealRegistry(tmp_path, {"proxy": {"remoteurl": f"http://{plain}"}}) as cache:
        get_all(client(cache.host))
