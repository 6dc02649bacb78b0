"""Which registries a reference means, by the files people have, and which proxy and what trust a host gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rootless import reference
from rootless.errors import SbxError
from rootless.oci import documents, registries
from rootless.oci.origins import check_url, is_loopback, proxy_for
from rootless.oci.registries import Registries

Write = Callable[..., Registries]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write containers' file and ours, and read what they say together; nothing of the host's counts."""
    monkeypatch.setattr(registries, "_known_images", dict)
    drop_ins = registries._drop_ins
    monkeypatch.setattr(registries, "_drop_ins", lambda folder: drop_ins(folder) if str(tmp_path) in folder else [])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def save(theirs: str = "", ours: str = "", **files: str) -> Registries:
        for name, text in {"containers/registries.conf": theirs, "sbx/registries.conf": ours, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return registries.load()

    return save


def asked(configuration: Registries, name: str) -> list[str]:
    """Return where `name` is looked for, in order, `!` for insecure."""
    return [
        f"{'!' if place.insecure else ''}{place.host}/{place.repository}"
        for wanted in configuration.resolve(name)
        for place in configuration.endpoints(wanted)
    ]


def refused(write: Write, text: str) -> SbxError:
    with pytest.raises(SbxError) as caught:
        write(text)
    assert caught.value.code == "registries-invalid"
    assert "containers/registries.conf" in caught.value.message
    return caught.value


def test_without_files(write: Write) -> None:
    assert asked(write(), "alpine") == ["registry-1.docker.io/library/alpine"]
    assert asked(write(), "me/mine:1") == ["registry-1.docker.io/me/mine"]
    assert asked(write(), "quay.io/a/b@sha256:" + "0" * 64) == ["quay.io/a/b"]
    assert asked(write(), "[::1]:5000/a") == ["[::1]:5000/a"]


def test_a_location(write: Write) -> None:
    files = write('[[registry]]\nprefix = "docker.io"\nlocation = "127.0.0.1:5000/hub"\ninsecure = true\n')
    assert asked(files, "alpine") == ["!127.0.0.1:5000/hub/library/alpine"]
    assert asked(files, "quay.io/a") == ["quay.io/a"]
    assert files.insecure("127.0.0.1:5000")
    assert not files.insecure("127.0.0.1:5001")
    assert not files.insecure("docker.io")


def test_a_login_is_for_the_registry_itself(write: Write) -> None:
    files = write(
        '[[registry]]\nprefix = "docker.io"\nlocation = "evil.example"\n[[registry.mirror]]\nlocation="m.example"\n'
    )
    assert files.itself("docker.io").host == "registry-1.docker.io"
    assert files.itself("docker.io").registry == "docker.io"
    assert not files.itself("localhost:5000").insecure


def test_mirrors_come_first(write: Write) -> None:
    files = write(
        """
        [[registry]]
        location = "docker.io"
        [[registry.mirror]]
        location = "mirror.example/hub"
        insecure = true
        [[registry.mirror]]
        location = "tags.example"
        pull-from-mirror = "tag-only"
        [[registry.mirror]]
        location = "digests.example"
        pull-from-mirror = "digest-only"
        """
    )
    hub = "registry-1.docker.io/library/alpine"
    assert asked(files, "alpine") == ["!mirror.example/hub/library/alpine", "tags.example/library/alpine", hub]
    by_digest = asked(files, "alpine@sha256:" + "0" * 64)
    assert by_digest == ["!mirror.example/hub/library/alpine", "digests.example/library/alpine", hub]
    assert files.insecure("mirror.example")
    assert not files.insecure("docker.io")


def test_the_longest_prefix_counts_and_ends_at_a_boundary(write: Write) -> None:
    files = write(
        """
        [[registry]]
        prefix = "a.example"
        location = "one.example"
        [[registry]]
        prefix = "a.example/b"
        location = "two.example/x"
        [[registry]]
        prefix = "a.example/b/c:tag"
        location = "three.example/y"
        [[registry]]
        prefix = "*.wild.example"
        blocked = true
        """
    )
    assert asked(files, "a.example/z") == ["one.example/z"]
    assert asked(files, "a.example/bz") == ["one.example/bz"]
    assert asked(files, "a.example/b/c") == ["two.example/x/c"]
    assert asked(files, "a.example/b/c:tag") == ["three.example/y"]
    assert asked(files, "wild.example/b") == ["wild.example/b"]
    with pytest.raises(SbxError, match="blocked") as caught:
        asked(files, "deep.er.wild.example/b")
    assert caught.value.code == "registry-blocked"


def test_aliases(write: Write) -> None:
    theirs = '[aliases]\n"fedora" = "registry.example/fedora"\n"gone" = "registry.example/gone"\n'
    files = write(theirs, '[aliases]\ngone = ""\nmine = "127.0.0.1:5000/a/b"\n"team/tool" = "quay.io/t/t"\n')
    assert asked(files, "fedora:41") == ["registry.example/fedora"]
    assert str(files.resolve("fedora:41")[0]) == "registry.example/fedora:41"
    assert str(files.resolve("mine@sha256:" + "0" * 64)[0]) == "127.0.0.1:5000/a/b@sha256:" + "0" * 64
    assert asked(files, "gone") == ["registry-1.docker.io/library/gone"]
    assert asked(files, "team/tool") == ["quay.io/t/t"]
    assert asked(files, "docker.io/library/fedora") == ["registry-1.docker.io/library/fedora"]


def test_search_registries(write: Write) -> None:
    files = write('unqualified-search-registries = ["one.example", "docker.io"]')
    assert asked(files, "a") == ["one.example/a", "registry-1.docker.io/library/a"]
    assert asked(files, "b.example/a") == ["b.example/a"]


def test_ours_wins(write: Write) -> None:
    files = write(
        '[[registry]]\nlocation = "a.example"\nblocked = true\n',
        '[[registry]]\nlocation = "a.example"\ninsecure = true\n',
    )
    assert asked(files, "a.example/b") == ["!a.example/b"]
    drop_in = write(
        "", "", **{"containers/registries.conf.d/9.conf": '[[registry]]\nlocation="b.example"\nblocked=true\n'}
    )
    with pytest.raises(SbxError, match="blocked"):
        asked(drop_in, "b.example/x")


@pytest.mark.parametrize(
    "text",
    [
        "nonsense", "[[registry]]\nlocation = 5\n", '[[registry]]\nlocation = "https://a.example"\n', "[[registry]]\n",
        '[[registry]]\nlocation = "a.example/UPPER"\n', '[[registry]]\nlocation = "a.example:tag:5"\n',
        '[[registry]]\nlocation = "a.example"\ninsecure = "yes"\n', '[registry]\nlocation = "a.example"\n',
        '[[registry]]\nlocation="a.example"\n[[registry.mirror]]\ninsecure=true\n', '[aliases]\nx = "unqualified"\n',
        '[aliases]\nx = "a.example/b:tag"\n', "[registries.search]\nregistries = ['docker.io']\n",
        'unqualified-search-registries = ["a b"]', '[[registry]]\nlocation="a.example/../b"\n', "registry = 5",
        'aliases = 5', 'unqualified-search-registries = 5',
    ],
)  # fmt: skip
def test_a_bad_file_is_named(write: Write, text: str) -> None:
    refused(write, text)


# ── proxies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "no_proxy", "through"),
    [
        ("https://a.example/", "", True),
        ("https://a.example/", "*", False),
        ("https://a.example/", "example", False),
        ("https://a.example/", ".example", False),
        ("https://a.example/", "*.example", False),
        ("https://a.example/", "xample", True),
        ("https://a.example/", "b.example, A.EXAMPLE", False),
        ("https://a.example:5000/", "a.example:5000", False),
        ("https://a.example:5001/", "a.example:5000", True),
        ("https://a.example/", "a.example:443", False),
        ("https://10.1.2.3/", "10.0.0.0/8", False),
        ("https://11.1.2.3/", "10.0.0.0/8", True),
        ("https://[fd00::1]/", "fd00::/8", False),
        ("https://[fd00::1]:5000/", "[fd00::1]:5000", False),
        ("https://127.0.0.1:5000/", "", False),
        ("https://localhost/", "", False),
        ("https://[::1]:5000/", "", False),
    ],
)
def test_no_proxy(url: str, no_proxy: str, through: bool) -> None:
    environ = {"https_proxy": "proxy.example:3128", "NO_PROXY": no_proxy}
    assert proxy_for(url, environ) == ("http://proxy.example:3128" if through else "")


def test_which_proxy() -> None:
    assert proxy_for("http://a.example/", {"https_proxy": "http://x"}) == ""
    assert proxy_for("http://a.example/", {"HTTP_PROXY": "http://x", "http_proxy": "http://y"}) == "http://y"
    assert proxy_for("http://a.example/", {"ALL_PROXY": "http://x"}) == "http://x"
    with pytest.raises(SbxError) as caught:
        proxy_for("http://a.example/", {"ALL_PROXY": "socks5://user:secret@x"})
    assert caught.value.code == "proxy-invalid"
    assert "secret" not in caught.value.message


# ── hosts and documents ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1:5000", True), ("127.9.9.9", True), ("localhost", True), ("localhost:1", True), ("[::1]:5000", True),
        ("0.0.0.0", False), ("localhost.example", False), ("127.0.0.1.example", False),
        ("", False), ("[", False), ("2130706433", False), ("127.1", False),
    ],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_urls() -> None:
    for good in ("https://a/b?c=d%20e", "http://[::1]:5000/", "https://a.example:443"):
        check_url(good)
    for bad in (
        "",
        "a",
        "https:",
        "https://",
        "https://a@b/",
        "javascript:x",
        "http://a\nb/",
        "http://é/",
        "https://a:b/",
    ):
        with pytest.raises(SbxError):
            check_url(bad)


def test_documents() -> None:
    assert documents.decode(b'{"a": [1, 2.5, null, true, "\\u00e9"]}', "x") == {"a": [1, 2.5, None, True, "é"]}
    bombs = [
        b"[" * 100_000, b"9" * 5000, b"1e99999999999999999999999999999999999999999", b"NaN", b'{"a":1,"a":1}', b"\xff",
        b"[" + b"[]," * 70_000 + b"[]]", b'"\\ud800', b"{" * 50_000, b"\x00", b"",
    ]  # fmt: skip
    for bomb in bombs:
        with pytest.raises(SbxError) as caught:
            documents.decode(bomb, "x")
        assert caught.value.code == "document-invalid"
    with pytest.raises(SbxError) as caught:
        documents.decode(b" " * (documents.LIMIT + 1), "x")
    assert caught.value.code == "document-limit"


def test_references_keep_their_meaning(write: Write) -> None:
    for text in ("alpine", "a/b:1", "localhost/x", "q.io/y@sha256:" + "0" * 64):
        assert write().resolve(text) == [reference.parse(text)]
