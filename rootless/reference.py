"""Image references: ``alpine`` is docker.io/library/alpine:latest. Either side; imports only leaves.

Grammar: the distribution project's `reference` package, which docker and podman follow:
``[registry[:port]/]path[:tag][@algorithm:hex]``.
"""

from __future__ import annotations

from rootless.errors import SbxError, printable

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
NAME_LIMIT = 255  #: characters of registry and repository together

_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789")
_WORD = _LOWER | frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_HEX = frozenset("0123456789abcdef")
_DIGEST_LENGTH = {"sha256": 64, "sha384": 96, "sha512": 128}


class Reference:
    """A name for an image: registry, repository, and a tag or a digest (one of the two is never empty)."""

    __slots__ = ("digest", "registry", "repository", "tag")

    def __init__(self, registry: str, repository: str, tag: str = "", digest: str = "") -> None:
        self.registry = registry
        self.repository = repository
        self.tag = tag
        self.digest = digest

    def __str__(self) -> str:
        return f"{self.name}{':' + self.tag if self.tag else ''}{'@' + self.digest if self.digest else ''}"

    def __repr__(self) -> str:
        return f"Reference({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def familiar(self) -> str:
        """The shortest spelling that parses to the same reference, as docker shows it."""
        text = str(self)
        if self.registry == DEFAULT_REGISTRY:
            text = text.removeprefix(DEFAULT_REGISTRY + "/").removeprefix("library/")
        return text.removesuffix(":" + DEFAULT_TAG) if not self.digest else text


def parse(text: str) -> Reference:
    """Return the Reference that `text` means, with docker's defaults filled in.

    Raises SbxError ``reference-invalid`` that names the position of the first bad character, counted from 1.
    """
    rest, at, digest = text.partition("@")
    if at:
        check_digest(digest, text)
    slash = rest.rfind("/")
    colon = rest.rfind(":")
    tag = ""
    if colon > slash:
        rest, tag = rest[:colon], rest[colon + 1 :]
        _check_tag(tag, colon + 1, text)
    first, slash_found, remainder = rest.partition("/")
    # docker's rule: the first part is a registry when it looks like a host, or when it is not a lower-case word
    if slash_found and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        registry, repository = first, remainder
        _check_registry(registry, text)
    else:
        registry, repository = DEFAULT_REGISTRY, rest
    _check_repository(repository, len(rest) - len(repository), text)
    if registry in ("index.docker.io", DEFAULT_REGISTRY):
        registry = DEFAULT_REGISTRY
        repository = repository if "/" in repository else "library/" + repository
    if len(registry) + len(repository) > NAME_LIMIT:
        raise _bad(text, NAME_LIMIT, f"a name has at most {NAME_LIMIT} characters")
    return Reference(registry, repository, tag or ("" if digest else DEFAULT_TAG), digest)


def check_digest(digest: str, text: str = "") -> str:
    """Return `digest` if it is ``sha256:`` (or sha384, sha512) and as many lower-case hex digits as that needs.

    Digests become file names; nothing that fails this may be used as one (CVE-2024-3727).
    """
    whole = text or digest
    offset = len(whole) - len(digest)
    algorithm, colon, encoded = digest.partition(":")
    if not colon or algorithm not in _DIGEST_LENGTH:
        raise _bad(whole, offset, "a digest is sha256:, sha384: or sha512: and hex digits")
    for place, char in enumerate(encoded, offset + len(algorithm) + 1):
        if char not in _HEX:
            raise _bad(whole, place, f"{char!r} is not a lower-case hex digit")
    if len(encoded) != _DIGEST_LENGTH[algorithm]:
        raise _bad(
            whole, len(whole), f"a {algorithm} digest has {_DIGEST_LENGTH[algorithm]} hex digits, not {len(encoded)}"
        )
    return digest


def _check_tag(tag: str, offset: int, text: str) -> None:
    """A tag is a word character, then up to 127 of word characters, ``.`` and ``-``."""
    if not tag:
        raise _bad(text, offset, "the tag is empty")
    for place, char in enumerate(tag):
        if char not in _WORD and (place == 0 or char not in ".-"):
            raise _bad(
                text, offset + place, f"{char!r} cannot stand in a tag" + (" at its start" if place == 0 else "")
            )
    if len(tag) > 128:
        raise _bad(text, offset + 128, "a tag has at most 128 characters")


def _check_registry(registry: str, text: str) -> None:
    """A registry is a host name, an IPv4 address or an IPv6 address in brackets, with an optional port."""
    host, port = registry, ""
    if registry.startswith("["):
        host, bracket, rest = registry[1:].partition("]")
        if not bracket:
            raise _bad(text, 0, "the bracket of the address is not closed")
        for place, char in enumerate(host, 1):
            if char not in _HEX and char not in "ABCDEF:":
                raise _bad(text, place, f"{char!r} cannot stand in an IPv6 address")
        port = rest
        if rest and not rest.startswith(":"):
            raise _bad(text, len(host) + 2, "after an address comes ':' and a port")
        port = rest[1:]
        has_port = bool(rest)
    else:
        host, colon, port = registry.partition(":")
        has_port = bool(colon)
        for label_end in _label_ends(host):
            if host[label_end - 1 : label_end] in ("", ".", "-"):
                raise _bad(text, max(label_end - 1, 0), "a part of a host name is empty or ends in '-'")
        for place, char in enumerate(host):
            starts = place == 0 or host[place - 1] == "."
            if char.lower() not in _LOWER and (char not in ".-" or starts):
                raise _bad(text, place, f"{char!r} cannot stand {'there ' if starts else ''}in a host name")
    if has_port and not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise _bad(text, len(registry) - len(port), "a port is a number from 1 to 65535")


def _label_ends(host: str) -> list[int]:
    return [place for place, char in enumerate(host) if char == "."] + [len(host)]


def _check_repository(repository: str, offset: int, text: str) -> None:
    """A repository is parts between slashes; a part is lower-case words joined by ``.``, ``_``, ``__`` or dashes."""
    if len(repository) == 64 and not set(repository) - _HEX:
        raise _bad(text, offset, "64 hex digits are an image id, not a name")
    place = offset
    for part in repository.split("/"):
        if not part:
            raise _bad(text, place, "a part of the name is empty")
        _check_part(part, place, text)
        place += len(part) + 1


def _check_part(part: str, offset: int, text: str) -> None:
    separator = ""
    for place, char in enumerate(part):
        if char in _LOWER:
            separator = ""
            continue
        separator += char
        if char not in "._-":
            raise _bad(
                text,
                offset + place,
                f"{char!r} cannot stand in a name" + (", names are lower case" if char.isupper() else ""),
            )
        if place == 0 or not (separator in (".", "_", "__") or not separator.strip("-")):
            raise _bad(text, offset + place, f"{char!r} cannot stand there in a name")
    if separator:
        raise _bad(text, offset + len(part) - 1, f"a name cannot end in {separator!r}")


def _bad(text: str, place: int, why: str) -> SbxError:
    hint = f"write it without {printable(text.partition('://')[0])}://" if "://" in text else ""
    if text.startswith(("/", ".")):
        hint = "a folder with a root filesystem is run with --rootfs"
    return SbxError("reference-invalid", f"bad reference {printable(text)!r}: {why}, at position {place + 1}", hint)
