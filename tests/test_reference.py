"""Image references: what docker and podman understand, what they refuse, and where the mistake is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootless import reference
from rootless.errors import SbxError

HEX = "0123456789abcdef" * 4
DIGEST = "sha256:" + HEX


@pytest.mark.parametrize(
    ("text", "full", "familiar"),
    [
        ("alpine", "docker.io/library/alpine:latest", "alpine"),
        ("alpine:3.20", "docker.io/library/alpine:3.20", "alpine:3.20"),
        ("library/alpine", "docker.io/library/alpine:latest", "alpine"),
        ("docker.io/alpine", "docker.io/library/alpine:latest", "alpine"),
        ("index.docker.io/alpine", "docker.io/library/alpine:latest", "alpine"),
        ("user/tool", "docker.io/user/tool:latest", "user/tool"),
        ("a/b/c:t", "docker.io/a/b/c:t", "a/b/c:t"),
        ("quay.io/x", "quay.io/x:latest", "quay.io/x"),
        ("localhost/x", "localhost/x:latest", "localhost/x"),
        ("localhost:5000/x:1", "localhost:5000/x:1", "localhost:5000/x:1"),
        ("host:5000/a/b", "host:5000/a/b:latest", "host:5000/a/b"),
        ("HOST/x", "HOST/x:latest", "HOST/x"),
        ("127.0.0.1:80/x", "127.0.0.1:80/x:latest", "127.0.0.1:80/x"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x"),
        ("[fe80::1]/x", "[fe80::1]/x:latest", "[fe80::1]/x"),
        (f"alpine@{DIGEST}", f"docker.io/library/alpine@{DIGEST}", f"alpine@{DIGEST}"),
        (f"alpine:3@{DIGEST}", f"docker.io/library/alpine:3@{DIGEST}", f"alpine:3@{DIGEST}"),
        ("a__b.c-d--e", "docker.io/library/a__b.c-d--e:latest", "a__b.c-d--e"),
        ("a:" + "t" * 128, "docker.io/library/a:" + "t" * 128, "a:" + "t" * 128),
        ("a:_X.y-Z", "docker.io/library/a:_X.y-Z", "a:_X.y-Z"),
    ],
)
def test_meanings(text: str, full: str, familiar: str) -> None:
    parsed = reference.parse(text)
    assert (str(parsed), parsed.familiar) == (full, familiar)
    assert reference.parse(str(parsed)) == parsed
    assert reference.parse(parsed.familiar) == parsed


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("Alpine", 1),
        ("alPine", 3),
        (" alpine", 1),
        ("alpine ", 7),
        ("alpine:", 8),
        ("alpine:.x", 8),
        ("alpine:a/b", 8),
        ("a//b", 3),
        ("/a", 1),
        ("a/", 3),
        ("-a", 1),
        ("a-", 2),
        ("a..b", 3),
        ("a___b", 4),
        ("a._b", 3),
        ("../x", 1),
        ("a/../b", 3),
        ("a:" + "t" * 129, 131),
        (HEX, 1),
        (f"docker.io/{HEX}", 11),
        ("é", 1),
        ("a\x1b", 2),
        ("a\n", 2),
        ("a\0", 2),
        ("a@sha256:x", 10),
        ("a@sha256:" + "A" * 64, 10),
        (f"a@{DIGEST}0", 75),
        ("a@", 3),
        ("a@md5:" + "0" * 32, 3),
        (f"a@sha256:{HEX[:-1]}", 73),
        ("a@sha256:../../x", 10),
        ("h:0/x", 3),
        ("h:99999/x", 3),
        ("h:x/x", 3),
        ("-h.io/x", 1),
        ("h-.io/x", 2),
        ("h..io/x", 2),
        ("[::1/x", 1),
        ("[::g]/x", 4),
        ("[::1]x/x", 6),
        ("https://h/x", 7),
        ("a" * 300, 256),
    ],
)
def test_mistakes_and_where_they_are(text: str, position: int) -> None:
    with pytest.raises(SbxError) as caught:
        reference.parse(text)
    assert caught.value.code == "reference-invalid"
    assert caught.value.message.endswith(f", at position {position}")
    assert caught.value.message.isprintable()


def test_a_name_has_255_characters_at_most() -> None:
    longest = "h.io/" + "a" * 251
    assert str(reference.parse(longest)) == longest + ":latest"
    with pytest.raises(SbxError, match="at most 255"):
        reference.parse(longest + "a")


def test_equality_and_hash() -> None:
    one, two = reference.parse("alpine"), reference.parse("docker.io/library/alpine:latest")
    assert one == two
    assert hash(one) == hash(two)
    assert one != reference.parse("alpine:edge")
    assert one != "docker.io/library/alpine:latest"


@pytest.mark.parametrize("digest", [DIGEST, "sha384:" + "0" * 96, "sha512:" + "f" * 128])
def test_digests(digest: str) -> None:
    assert reference.check_digest(digest) == digest


@pytest.mark.parametrize(
    "digest", ["", "sha256", "sha256:", DIGEST.upper(), "sha1:" + "0" * 40, DIGEST + "\n", "../x", DIGEST[:-1]]
)
def test_no_digests(digest: str) -> None:
    with pytest.raises(SbxError):
        reference.check_digest(digest)


@given(st.text("aB.:/@-_[]0é \n\x1b", max_size=20))
def test_anything_is_a_reference_or_one_clear_error(text: str) -> None:
    refused: SbxError | None = None
    try:
        parsed = reference.parse(text)
    except SbxError as error:
        refused = error
    if refused:
        assert refused.code == "reference-invalid"
        assert refused.message.isprintable()
        return
    assert reference.parse(str(parsed)) == parsed
    assert parsed.registry
    assert parsed.repository
    assert ".." not in str(parsed).split("/")
