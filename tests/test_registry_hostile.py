"""What a hostile or broken registry gets from the protocol client: an end in time, and one error with its code."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from hostile_registry import (
    Handler,
    HostileRegistry,
    cut_after,
    endless,
    redirects,
    says,
    says_json,
    silent,
    trickles,
)
from real_registry import SmallImage, digest

from rootless.errors import SbxError
from rootless.oci.auth import Challenge, parse
from rootless.oci.credentials import Credential
from rootless.oci.pace import Patience
from rootless.oci.registries import Endpoint, Registries
from rootless.oci.registry import Registry
from rootless.oci.transport import Transport
from rootless.oci.uploads import Uploads

#: as the real one, in less time
HASTE = Patience(connect=2, head=0.6, window=0.5, rate=1000, tries=3, backoff=0.01, retry_after=1)
LARGE = SmallImage({"noise": bytes(i * i % 251 for i in range(300_000))})
LAYER = LARGE.layers[0]
SIZE = len(LARGE.blobs[LAYER])


@pytest.fixture
def bad() -> Iterator[HostileRegistry]:
    with HostileRegistry(LARGE) as server:
        yield server


def client(server: HostileRegistry, credential: Credential | None = None) -> Registry:
    return Registry(Endpoint(server.host, "some/image"), Registries(), credential, HASTE, ("pull", "push"))


def refused(code: str, act: Callable[[], object], *words: str) -> SbxError:
    """Require that `act` ends soon in the error `code`, whose one line holds `words`."""
    start = time.monotonic()
    with pytest.raises(SbxError) as caught:
        act()
    assert time.monotonic() - start < 5
    assert caught.value.code == code, caught.value
    assert all(word in caught.value.message for word in words), caught.value.message
    assert "\n" not in caught.value.message
    assert not caught.value.message.endswith(".")
    assert caught.value.status == 125
    return caught.value


def read(server: HostileRegistry, offset: int = 0) -> bytes:
    return b"".join(client(server).blob(LAYER, SIZE, offset))


# ── reaching it ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_good_answers_are_good(bad: HostileRegistry) -> None:
    got = client(bad).manifest("latest")
    assert (got.data, got.digest, got.media_type) == (LARGE.manifest, digest(LARGE.manifest), SmallImage.MANIFEST)
    assert client(bad).manifest_digest("latest") == got.digest
    assert read(bad) == LARGE.blobs[LAYER]
    assert client(bad).has_blob(LAYER)
    assert not client(bad).has_blob("sha256:" + "0" * 64)


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        host = f"127.0.0.1:{closed.getsockname()[1]}"
    refused("registry-refused", Registry(Endpoint(host, "x"), Registries(), None, HASTE).probe, host)


def test_a_name_that_nobody_knows() -> None:
    refused("registry-unknown-host", Registry(Endpoint("nowhere.invalid", "x"), Registries(), None, HASTE).probe)


def test_what_listens_is_no_registry(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(404, b"<html>"))
    refused("registry-unsupported", client(bad).probe, "404")


def test_what_listens_speaks_another_protocol(bad: HostileRegistry) -> None:
    def babbles(handler: Handler) -> None:
        handler.wfile.write(b"220 mail ESMTP\r\n\r\n")
        handler.cut()

    bad.on("GET", "/v2/$", babbles)
    refused("registry-broken", client(bad).probe, "not HTTP")


def test_plain_http_is_for_loopback_and_named_registries_alone(bad: HostileRegistry) -> None:
    port = bad.server_address[1]
    name = socket.gethostname()
    transport = Transport(Registries().insecure, HASTE)
    assert transport.may_be_plain(f"[::1]:{port}")
    assert not transport.may_be_plain(f"{name}.example:{port}")
    # a host name that is not loopback's, though it may lead there: TLS is asked for, and its lack is the end of it
    registry = Registry(Endpoint(f"0.0.0.0:{port}", "x"), Registries(), None, HASTE)
    refused("registry-tls", registry.probe, "plain text")
    assert bad.requests == []


@pytest.mark.parametrize("code", [500, 502, 503, 504])
def test_an_error_that_stays(bad: HostileRegistry, code: int) -> None:
    bad.on("GET", "/manifests/", says(code, b'{"errors":[{"message":"the disk\\u001b[31m is full"}]}'))
    refused("registry-failed", lambda: client(bad).manifest("latest"), str(code), r"the disk\x1b[31m is full")
    assert bad.count("GET", "/manifests/") == HASTE.tries


def test_an_error_that_passes(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(503), times=2)
    assert client(bad).manifest("latest").data == LARGE.manifest


def test_too_many_requests(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(429, b"", {"Retry-After": "1"}), times=1)
    start = time.monotonic()
    assert client(bad).manifest("latest").data == LARGE.manifest
    assert 1.0 <= time.monotonic() - start < 2


def test_too_many_requests_for_today(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(429, b"", {"Retry-After": "86400"}))
    error = refused("registry-rate-limited", lambda: client(bad).manifest("latest"), "429")
    assert "86400 s" in error.hint
    assert bad.count("GET", "/manifests/") == 1


@pytest.mark.parametrize("value", ["soon", "-5", "9" * 400, "Wed, 21 Oct 2015 07:28:00 GMT", "\xff", "nan"])
def test_odd_retry_after(bad: HostileRegistry, value: str) -> None:
    bad.on("GET", "/manifests/", says(429, b"", {"Retry-After": value}))
    refused("registry-rate-limited", lambda: client(bad).manifest("latest"))


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_answer(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", silent)
    refused("registry-timeout", lambda: client(bad).manifest("latest"))


def test_a_head_that_trickles(bad: HostileRegistry) -> None:
    # each byte comes sooner than a timeout for one receive would notice
    bad.on("GET", "/manifests/", trickles(0.05, body=False))
    refused("registry-timeout", lambda: client(bad).manifest("latest"))


def test_a_body_that_trickles(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", trickles(0.05, body=True))
    refused("registry-timeout", lambda: client(bad).manifest("latest"), "too slowly")


def test_a_blob_that_trickles(bad: HostileRegistry) -> None:
    def slow(handler: Handler) -> None:
        start = int((handler.headers.get("Range") or "bytes=0-")[6:].partition("-")[0])
        headers = {"Content-Range": f"bytes {start}-{SIZE - 1}/{SIZE}", "Content-Length": str(SIZE - start)}
        handler.head(206 if start else 200, headers)
        while not handler.server.ended.wait(0.05):
            handler.wfile.write(b"x")

    bad.on("GET", "/blobs/", slow)
    refused("registry-timeout", lambda: read(bad), "too slowly")


# ── manifests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_such_image(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}'))
    refused("image-unknown", lambda: client(bad).manifest("latest"), "some/image:latest")


def test_another_manifest_than_the_digest_says(bad: HostileRegistry) -> None:
    asked = "sha256:" + "1" * 64
    bad.on("GET", "/manifests/", says(200, LARGE.manifest, {"Content-Type": SmallImage.MANIFEST}))
    refused("digest-mismatch", lambda: client(bad).manifest(asked), asked)


@pytest.mark.parametrize("said", ["sha256:" + "2" * 64, "sha256:../../../etc/passwd", "md5:0", "\x07"])
def test_a_digest_header_that_lies(bad: HostileRegistry, said: str) -> None:
    headers = {"Content-Type": SmallImage.MANIFEST, "Docker-Content-Digest": said}
    bad.on("GET", "/manifests/", says(200, LARGE.manifest, headers))
    refused("digest-mismatch", lambda: client(bad).manifest("latest"))


def test_a_digest_header_that_lies_of_a_digest_is_no_better(bad: HostileRegistry) -> None:
    headers = {"Content-Type": SmallImage.MANIFEST, "Docker-Content-Digest": "sha256:" + "2" * 64}
    bad.on("GET", "/manifests/", says(200, LARGE.manifest, headers))
    refused("digest-mismatch", lambda: client(bad).manifest(digest(LARGE.manifest)))


def test_a_manifest_that_is_too_large(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(200, b" " * (5 << 20)))
    refused("document-limit", lambda: client(bad).manifest("latest"), "4194304")


def test_a_manifest_that_never_ends(bad: HostileRegistry) -> None:
    def floods(handler: Handler) -> None:
        handler.head(200, {"Transfer-Encoding": "chunked"})
        while True:
            handler.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")

    bad.on("GET", "/manifests/", floods)
    refused("document-limit", lambda: client(bad).manifest("latest"))


def test_a_content_encoding_is_not_undone(bad: HostileRegistry) -> None:
    headers = {"Content-Type": SmallImage.MANIFEST, "Content-Encoding": "gzip"}
    bad.on("GET", "/manifests/", says(200, LARGE.manifest, headers))
    assert client(bad).manifest("latest").data == LARGE.manifest
    assert bad.requests[-1].headers["Accept-Encoding"] == "identity"


# ── blobs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_broken_connection_goes_on_where_it_broke(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", cut_after(SIZE // 3), times=2)
    assert read(bad) == LARGE.blobs[LAYER]
    ranges = [each.headers.get("Range") for each in bad.asked("GET", "/blobs/")]
    assert ranges == [None, f"bytes={SIZE // 3}-{SIZE - 1}", f"bytes={SIZE // 3 * 2}-{SIZE - 1}"]


def test_a_connection_that_breaks_always(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", cut_after(10))
    refused("registry-broken", lambda: read(bad), "broke off")
    assert bad.count("GET", "/blobs/") == HASTE.tries


def test_a_registry_that_knows_no_ranges(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", says(200, LARGE.blobs[LAYER]))
    assert read(bad, offset=1000) == LARGE.blobs[LAYER][1000:]


@pytest.mark.parametrize(
    "said", ["", "bytes 0-9/10", "bytes 1001-{last}/{size}", "bytes 1000-{last}/{more}", "x" * 9999]
)
def test_a_range_that_was_not_asked_for(bad: HostileRegistry, said: str) -> None:
    said = said.format(last=SIZE - 1, size=SIZE, more=SIZE + 1)
    bad.on("GET", "/blobs/", says(206, LARGE.blobs[LAYER][1000:], {"Content-Range": said}))
    refused("size-mismatch", lambda: read(bad, offset=1000))


def test_a_range_beyond_the_end(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", says(416))
    refused("size-mismatch", lambda: read(bad, offset=1000))


@pytest.mark.parametrize("change", [-1, 1, 1 << 40])
def test_a_blob_of_another_size(bad: HostileRegistry, change: int) -> None:
    bad.on("GET", "/blobs/", says(200, LARGE.blobs[LAYER], {"Content-Length": str(SIZE + change)}))
    refused("size-mismatch", lambda: read(bad), str(SIZE))
    assert bad.count("GET", "/blobs/") == 1


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 30, "10, 20"])
def test_an_odd_content_length(bad: HostileRegistry, length: str) -> None:
    bad.on("GET", "/blobs/", says(200, b"x" * (SIZE + 1), {"Content-Length": length}))
    with pytest.raises(SbxError) as caught:
        read(bad)
    assert caught.value.code in ("size-mismatch", "registry-broken", "url-invalid", "registry-timeout")


def test_an_endless_blob_is_read_up_to_its_size(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", endless(declared=False))
    got = 0

    def count() -> None:
        nonlocal got
        for chunk in client(bad).blob(LAYER, SIZE):
            got += len(chunk)

    refused("size-mismatch", count, "more bytes")
    assert got <= SIZE


def test_an_endless_blob_with_a_good_length_ends_there(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", endless(declared=True))
    assert len(read(bad)) == SIZE


def test_a_chunked_blob_that_is_too_short(bad: HostileRegistry) -> None:
    def short(handler: Handler) -> None:
        handler.head(200, {"Transfer-Encoding": "chunked"})
        handler.wfile.write(b"3\r\nabc\r\n0\r\n\r\n")

    bad.on("GET", "/blobs/", short)
    refused("size-mismatch", lambda: read(bad), "before the size")


def test_a_blob_that_is_not_there(bad: HostileRegistry) -> None:
    bad.on("GET", "/blobs/", says(404))
    refused("blob-unknown", lambda: read(bad), LAYER)


# ── redirects ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_redirect_to_another_host_does_not_see_the_password(bad: HostileRegistry) -> None:
    with HostileRegistry(LARGE) as store:
        bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
        bad.on("GET", "/blobs/", redirects(f"{store.url}/v2/some/image/blobs/{LAYER}?sig=a%2Fb"))
        registry = client(bad, Credential("ada", "secret"))
        assert b"".join(registry.blob(LAYER, SIZE)) == LARGE.blobs[LAYER]
        assert bad.requests[-1].headers["Authorization"].startswith("Basic ")
        assert store.requests[-1].path.endswith("?sig=a%2Fb")
        assert "Authorization" not in store.requests[-1].headers


def test_a_redirect_on_the_same_host_keeps_the_password(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
    bad.on("GET", "/some/image/blobs/", redirects(f"/v2/other/blobs/{LAYER}"))
    assert b"".join(client(bad, Credential("ada", "secret")).blob(LAYER, SIZE)) == LARGE.blobs[LAYER]
    assert "Authorization" in bad.requests[-1].headers


def test_a_redirect_away_and_back_does_not_bring_the_password_back(bad: HostileRegistry) -> None:
    with HostileRegistry(LARGE) as store:
        bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
        bad.on("GET", "/some/image/blobs/", redirects(f"{store.url}/blobs/back"))
        store.on("GET", "/back", redirects(f"{bad.url}/v2/other/blobs/{LAYER}"))
        assert b"".join(client(bad, Credential("ada", "secret")).blob(LAYER, SIZE)) == LARGE.blobs[LAYER]
        assert "Authorization" not in bad.requests[-1].headers


def test_a_redirect_loop(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", redirects("/v2/some/image/manifests/again"))
    refused("redirect-refused", lambda: client(bad).manifest("latest"))


@pytest.mark.parametrize(
    "location",
    [
        "", "http://example.invalid/x", "ftp://127.0.0.1/x", "file:///etc/passwd", "http://user@127.0.0.1/", "http://[::1",
        "http://127.0.0.1:99999/", "http://127.0.0.1/a b", "http://127.0.0.1\\@evil/", "//evil.invalid/x",
    ],
)  # fmt: skip
def test_a_redirect_that_leads_astray(bad: HostileRegistry, location: str) -> None:
    bad.on("GET", "/manifests/", redirects(location))
    refused("redirect-refused", lambda: client(bad).manifest("latest"))


def test_https_never_becomes_http() -> None:
    transport = Transport(lambda host: True, HASTE)
    refused("redirect-refused", lambda: transport.follow("https://a.example/x", "http://a.example/y"), "https to http")
    # not over a detour either
    refused("redirect-refused", lambda: transport.follow("http://a.example/x", "http://b.example/y", "https"))


# ── authentication ────────────────────────────────────────────────────────────────────────────────────────────────────


def bearer(realm: str, **parameters: str) -> dict[str, str]:
    return {"WWW-Authenticate": ",".join([f'Bearer realm="{realm}"', *(f'{k}="{v}"' for k, v in parameters.items())])}


@pytest.mark.parametrize(
    "realm",
    [
        "", "token", "//evil.invalid/token", "ftp://127.0.0.1/token", "http://example.invalid/token",
        "http://127.0.0.1@evil.invalid/token", "http://evil.invalid\\@127.0.0.1/", "http://[::1/", "http://127.0.0.1/#x",
        "http://127.0.0.1 .evil.invalid/", "http://127.0.0.1:0/", "https://", "\x7f", "http://localhost.evil.invalid/",
    ],
)  # fmt: skip
def test_a_realm_that_leads_astray(bad: HostileRegistry, realm: str) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer(realm)))
    refused("realm-refused", lambda: client(bad, Credential("ada", "secret")).manifest("latest"))


def test_a_password_goes_to_no_other_host_that_a_plain_registry_names(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer("https://evil.invalid/token")))
    refused("realm-refused", lambda: client(bad, Credential("ada", "secret")).manifest("latest"), "evil.invalid")
    refused(
        "realm-refused", lambda: client(bad, Credential(identity_token="secret")).manifest("latest"), "evil.invalid"
    )
    # without anything to lose it is asked
    refused("registry-unknown-host", lambda: client(bad).manifest("latest"), "evil.invalid")


def test_a_token_server_that_redirects_gets_nothing_sent_on(bad: HostileRegistry) -> None:
    with HostileRegistry() as other:
        bad.on("GET", "/v2/$", says(401, b"", bearer(f"{bad.url}/token")))
        bad.on("GET", "/token", redirects(f"{other.url}/token"))
        refused("token-failed", lambda: client(bad, Credential("ada", "secret")).manifest("latest"), "307")
        assert other.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        {}, [], {"token": ""}, {"token": 5}, {"token": "a\r\nHost: evil"}, {"token": "a b"}, {"token": "\x00"},
        {"token": "é"}, {"token": "x" * 70_000}, {"access_token": ["x"]}, "token",
    ],
)  # fmt: skip
def test_a_token_that_is_none(bad: HostileRegistry, answer: object) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer(f"{bad.url}/token")))
    bad.on("GET", "/token", says_json(answer, "application/json"))
    refused("token-failed", lambda: client(bad).manifest("latest"))


@pytest.mark.parametrize("body", [b"[" * 200_000, b'{"a":' * 3000 + b"1" + b"}" * 3000, b"9" * 5000, b'{"a":1,"a":2}'])
def test_a_token_that_is_a_bomb(bad: HostileRegistry, body: bytes) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer(f"{bad.url}/token")))
    bad.on("GET", "/token", says(200, body))
    refused("token-failed", lambda: client(bad).manifest("latest"))


@pytest.mark.parametrize("life", [-1, 0, "soon", 10**18, True, None, 1.5])
def test_an_odd_life_of_a_token(bad: HostileRegistry, life: object) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer(f"{bad.url}/token")))
    bad.on("GET", "/token", says_json({"token": "good", "expires_in": life}, "application/json"))
    assert client(bad).manifest("latest").data == LARGE.manifest


def test_a_token_is_asked_for_once_and_again_when_it_is_refused(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer(f"{bad.url}/token", service="s p", scope="repository:evil:push")))
    bad.on("GET", "/token", says_json({"token": "good", "expires_in": 300}, "application/json"))
    registry = client(bad)
    registry.manifest("latest")
    b"".join(registry.blob(LAYER, SIZE))
    assert bad.count("GET", "/token") == 1
    # the scope is ours, whatever the registry asks us to ask for
    asked = bad.asked("GET", "/token")[0].path
    assert "scope=repository%3Asome%2Fimage%3Apull%2Cpush" in asked
    assert "service=s+p" in asked
    assert "evil" not in asked
    bad.on("GET", "/blobs/", says(401, b"", bearer(f"{bad.url}/token")), times=1)
    assert b"".join(registry.blob(LAYER, SIZE)) == LARGE.blobs[LAYER]
    assert bad.count("GET", "/token") == 2


def test_a_short_token_is_renewed(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(401, b"", bearer(f"{bad.url}/token")))
    bad.on("GET", "/token", says_json({"token": "good", "expires_in": 1}, "application/json"))
    registry = client(bad)
    registry.manifest("latest")
    time.sleep(1)
    registry.manifest("latest")
    assert bad.count("GET", "/token") == 2


def test_a_login_that_never_suffices(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
    bad.on("GET", "/manifests/", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
    error = refused("registry-unauthorized", lambda: client(bad).manifest("latest"))
    assert "sbx login" in error.hint
    refused("registry-unauthorized", lambda: client(bad, Credential("ada", "x")).manifest("latest"), "ada")
    assert bad.count("GET", "/manifests/") <= 4


def test_no_entry(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(403, b'{"errors":[{"message":"not for you"}]}'))
    refused("registry-denied", lambda: client(bad).manifest("latest"), "not for you")


def test_a_login_of_an_unknown_kind(bad: HostileRegistry) -> None:
    bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": "Negotiate"}))
    refused("registry-unauthorized", lambda: client(bad).manifest("latest"))


def test_a_secret_is_never_shown(bad: HostileRegistry) -> None:
    credential = Credential("ada", "hunter2", "hunter3", "hunter4")
    assert "hunter" not in repr(credential)
    bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
    bad.on("GET", "/manifests/", says(401))
    for each in (Credential("ada", "hunter2"), Credential(registry_token="hunter2")):
        assert "hunter2" not in str(refused("registry-unauthorized", lambda each=each: client(bad, each).manifest("x")))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (['Bearer realm="https://a/b",service="c",scope="d:e:f,g"'],
         [("bearer", {"realm": "https://a/b", "service": "c", "scope": "d:e:f,g"})]),
        (["Basic realm=\"x\", Bearer realm=\"y\\\"z\" , error=invalid"],
         [("basic", {"realm": "x"}), ("bearer", {"realm": 'y"z', "error": "invalid"})]),
        (["Negotiate", "BEARER Realm=q"], [("negotiate", {}), ("bearer", {"realm": "q"})]),
        (["", ",,,", '"', "=", 'Bearer realm="unclosed'], [("bearer", {})]),
        (["Negotiate, Basic"], [("negotiate", {}), ("basic", {})]),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    found = [each for each in parse(headers) if each.scheme in ("bearer", "basic", "negotiate")]
    assert found == [Challenge(*each) for each in expected]


def test_challenges_end_in_time() -> None:
    start = time.monotonic()
    for header in (
        "a=" * 30_000,
        "Bearer " + "a=b," * 20_000,
        "Bearer " + 'a="' + "\\" * 60_000,
        " " * 60_000,
        "a" * 60_000,
    ):
        parse([header])
    assert time.monotonic() - start < 1


# ── uploads ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def up(server: HostileRegistry, chunk: int = 0) -> None:
    blob = LARGE.blobs[LAYER]
    Uploads(client(server)).upload(LAYER, SIZE, lambda start, end: [blob[start:end]], chunk)


def takes(handler: Handler) -> None:
    handler.rfile.read(int(handler.headers.get("Content-Length", "0")))
    handler.reply(202, b"", {"Location": "/v2/some/image/blobs/uploads/1", "Range": "0-9"})


@pytest.mark.parametrize("location", ["", "http://example.invalid/x", "file:///x", "http://a@127.0.0.1/"])
def test_an_upload_that_is_sent_astray(bad: HostileRegistry, location: str) -> None:
    bad.on("POST", "/uploads/", says(202, b"", {"Location": location}))
    refused("redirect-refused", lambda: up(bad))


def test_an_upload_to_another_host_does_not_see_the_password(bad: HostileRegistry) -> None:
    with HostileRegistry() as store:
        bad.on("GET", "/v2/$", says(401, b"", {"WWW-Authenticate": 'Basic realm="x"'}))
        bad.on("POST", "/uploads/", says(202, b"", {"Location": f"{store.url}/there"}))
        got = []

        def keep(handler: Handler) -> None:
            got.append(handler.rfile.read(int(handler.headers["Content-Length"])))
            handler.reply(201)

        store.on("PUT", "/there", keep)
        registry = client(bad, Credential("ada", "secret"))
        Uploads(registry).upload(LAYER, SIZE, lambda start, end: [LARGE.blobs[LAYER][start:end]])
        assert got == [LARGE.blobs[LAYER]]
        assert "Authorization" in bad.requests[-1].headers
        assert "Authorization" not in store.requests[-1].headers


@pytest.mark.parametrize("said", ["0-9", "0-999999999", "5-9", "x", "0-" + "9" * 30])
def test_an_upload_that_gets_nowhere(bad: HostileRegistry, said: str) -> None:
    def patch(handler: Handler) -> None:
        handler.rfile.read(int(handler.headers.get("Content-Length", "0")))
        handler.reply(202, b"", {"Location": "/v2/some/image/blobs/uploads/1", "Range": said})

    bad.on("POST", "/uploads/", takes)
    bad.on("PATCH", "/uploads/", patch)
    bad.on("GET", "/uploads/", patch)
    refused("registry-failed", lambda: up(bad, chunk=50_000))


def test_an_upload_that_is_refused(bad: HostileRegistry) -> None:
    bad.on("POST", "/uploads/", says(403, b'{"errors":[{"code":"DENIED"}]}'))
    refused("registry-denied", lambda: up(bad), "DENIED")


def test_documents_of_errors_are_bounded(bad: HostileRegistry) -> None:
    bad.on("GET", "/manifests/", says(400, json.dumps({"errors": [{"message": "x" * 5000}]}).encode()))
    error = refused("registry-failed", lambda: client(bad).manifest("latest"))
    assert len(error.message) < 500
