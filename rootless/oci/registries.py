"""Warm: which registries a reference means: aliases, locations, mirrors, blocked and insecure ones.

The files are containers-registries.conf(5), version 2, and ours of the same shape at ``registries.conf`` in the config
folder, which wins. What our file says of a prefix replaces what the others say of it.
"""

from __future__ import annotations

import contextlib
import marshal
import os
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from rootless import paths, reference, state, store
from rootless.errors import SbxError
from rootless.oci.origins import is_loopback
from rootless.reference import Reference

#: docker.io's API lives at a host of its own
_API_HOSTS = {"docker.io": "registry-1.docker.io"}


@dataclass(frozen=True)
class Endpoint:
    """One place to ask for an image: a host, and the repository's name there."""

    host: str  #: ``name:port`` to connect to
    repository: str
    insecure: bool = False  #: named so: certificates are not verified, and plain http will do
    mirror: bool = False
    registry: str = ""  #: the name under which credentials are stored

    def __str__(self) -> str:
        return f"{self.registry or self.host}/{self.repository}"


@dataclass(frozen=True)
class _Mirror:
    location: str
    insecure: bool = False
    pull: str = "all"  #: all, digest-only, tag-only


@dataclass(frozen=True)
class _Rule:
    prefix: str
    location: str
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[_Mirror, ...] = ()

    def matches(self, name: str) -> int:
        """Return how many characters of `name` (``registry/repository[:tag][@digest]``) the prefix covers."""
        if self.prefix.startswith("*."):
            host = name.partition("/")[0]
            return (
                len(host) if host.partition(":")[0].endswith(self.prefix[1:]) or host.endswith(self.prefix[1:]) else 0
            )
        if not name.startswith(self.prefix):
            return 0
        return len(self.prefix) if name[len(self.prefix) : len(self.prefix) + 1] in ("", "/", ":", "@") else 0


@dataclass
class Registries:
    """What the configuration files say, put together."""

    rules: dict[str, _Rule] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    search: list[str] = field(default_factory=list)

    def resolve(self, text: str) -> list[Reference]:
        """Return what `text` may mean, the first that exists counts: an alias, the search registries, or docker.io.

        A name with a registry means itself alone. Search registries are asked for names without one only where a file
        lists them; docker.io is then asked only if it is listed.
        """
        parsed = reference.parse(text)
        name, tail = _split_short(text)
        if not _is_short(text):
            return [parsed]
        if name in self.aliases:
            return [reference.parse(self.aliases[name] + tail)]
        if not self.search:
            return [parsed]
        return [reference.parse(f"{registry}/{text}") for registry in self.search]

    def endpoints(self, wanted: Reference) -> list[Endpoint]:
        """Return where `wanted` may be had, in the order in which to ask: mirrors, then the registry itself.

        Raises SbxError ``registry-blocked`` where a file forbids it.
        """
        rule = self._rule(str(wanted))
        if rule is None:
            return [_endpoint(wanted.name, wanted.registry)]
        if rule.blocked:
            raise SbxError("registry-blocked", f"ask for {wanted}: {rule.prefix} is blocked in registries.conf")
        rest = wanted.name[rule.matches(str(wanted)) :]
        places = [
            replace(_endpoint(mirror.location + rest), insecure=mirror.insecure, mirror=True)
            for mirror in rule.mirrors
            if mirror.pull == "all" or (mirror.pull == "digest-only") == bool(wanted.digest)
        ]
        location = rule.location + rest if rule.location else wanted.name
        own = "" if rule.location not in ("", rule.prefix) else wanted.registry
        return [*places, replace(_endpoint(location, own), insecure=rule.insecure)]

    def itself(self, registry: str) -> Endpoint:
        """Return the endpoint of `registry` (``name:port``) alone, wherever the files send what is asked for there.

        For a login: a password is for the registry that was named, and nobody who stands in for it.
        """
        return replace(_endpoint(f"{registry}/x"), insecure=self.insecure(registry))

    def insecure(self, host: str) -> bool:
        """Tell whether any file names `host` (``name:port``) insecure, as a registry or as a mirror."""
        for rule in self.rules.values():
            if rule.insecure and (rule.location or rule.prefix).partition("/")[0] == host:
                return True
            if any(mirror.insecure and mirror.location.partition("/")[0] == host for mirror in rule.mirrors):
                return True
            if rule.insecure and rule.prefix.startswith("*.") and rule.matches(host):
                return True
        return False

    def _rule(self, name: str) -> _Rule | None:
        best = max(self.rules.values(), key=lambda rule: rule.matches(name), default=None)
        return best if best and best.matches(name) else None


def load(environ: dict[str, str] | None = None) -> Registries:
    """Return the configuration of this user: the files that exist, each over the one before it.

    Raises SbxError ``registries-invalid`` that names the file and the line or the entry.
    """
    result = Registries(aliases=_known_images())
    for path in _files(dict(os.environ) if environ is None else environ):
        _merge(result, _parse(path), path)
    return result


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _files(environ: dict[str, str]) -> list[str]:
    """Return the files in the order in which they are read, which is the order of the manual page, then ours."""
    main = environ.get("CONTAINERS_REGISTRIES_CONF", "") or _first(*_main_files(environ))
    system, user, ours = _folders(environ)
    files = [main, *_drop_ins(system), *_drop_ins(user), _first(_our_file()), *_drop_ins(ours)]
    return [path for path in files if path]


def _main_files(environ: dict[str, str]) -> list[str]:
    """Return the places of the first file, of which one counts."""
    return [f"{_config(environ)}/containers/registries.conf", "/etc/containers/registries.conf",
            "/usr/share/containers/registries.conf"]  # fmt: skip


def _folders(environ: dict[str, str]) -> list[str]:
    """Return the folders of drop-in files: the machine's, the user's, and that for us alone."""
    return ["/etc/containers/registries.conf.d", f"{_config(environ)}/containers/registries.conf.d",
            f"{paths.config()}/registries.conf.d"]  # fmt: skip


def _config(environ: dict[str, str]) -> str:
    return environ.get("XDG_CONFIG_HOME", "") or f"{paths.home()}/.config"


def _our_file() -> str:
    return f"{paths.config()}/registries.conf"


def _first(*candidates: str) -> str:
    return next((path for path in candidates if os.path.isfile(path)), "")


def _drop_ins(folder: str) -> list[str]:
    try:
        return [f"{folder}/{name}" for name in sorted(os.listdir(folder)) if name.endswith(".conf")]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []


def _parse(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise _invalid(path, error.strerror or "") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _invalid(path, str(error)) from None


def _merge(result: Registries, document: dict[str, Any], path: str) -> None:
    if "registries" in document:
        raise _invalid(
            path, "it is in the format of version 1", "use [[registry]] tables: containers-registries.conf(5)"
        )
    for table in _tables(document, "registry", path):
        rule = _read_rule(table, path)
        result.rules[rule.prefix] = rule
    aliases = document.get("aliases", {})
    if not isinstance(aliases, dict):
        raise _invalid(path, "aliases is a table: [aliases]")
    for name, target in aliases.items():
        # an empty target takes an alias of an earlier file away
        if target:
            result.aliases[name] = _check_alias(name, target, path)
        else:
            result.aliases.pop(name, None)
    search = document.get("unqualified-search-registries", result.search)
    if not isinstance(search, list):
        raise _invalid(path, "unqualified-search-registries is a list")
    result.search = [_check_location(each, path) for each in search]


def _read_rule(table: dict[str, Any], path: str) -> _Rule:
    location = table.get("location", "")
    prefix = table.get("prefix", "") or location
    if not isinstance(prefix, str) or not prefix or (prefix.startswith("*.") and "/" in prefix):
        raise _invalid(path, "a [[registry]] needs a location, or a prefix such as *.example.com")
    if not prefix.startswith("*."):
        # a prefix may go as far as a tag or a digest
        _check_location(_split_short(prefix)[0] if "/" in prefix else prefix, path)
    if location:
        _check_location(location, path)
    mirrors = tuple(_read_mirror(mirror, table, path) for mirror in _tables(table, "mirror", path))
    return _Rule(prefix, location, _flag(table, "insecure", path), _flag(table, "blocked", path), mirrors)


def _read_mirror(table: dict[str, Any], rule: dict[str, Any], path: str) -> _Mirror:
    pull = str(
        table.get("pull-from-mirror", "") or ("digest-only" if rule.get("mirror-by-digest-only") is True else "all")
    )
    if pull not in ("all", "digest-only", "tag-only"):
        raise _invalid(path, f"pull-from-mirror is all, digest-only or tag-only, not {pull!r}")
    return _Mirror(_check_location(table.get("location"), path), _flag(table, "insecure", path), pull)


def _tables(document: dict[str, Any], key: str, path: str) -> Iterator[dict[str, Any]]:
    tables = document.get(key, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise _invalid(path, f"{key} is a list of tables: [[{key}]]")
    yield from tables


def _flag(table: dict[str, Any], key: str, path: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _invalid(path, f"{key} is true or false, not {value!r}")
    return value


def _check_location(location: object, path: str) -> str:
    """A location is a host with an optional port and a path: what a reference begins with."""
    text = location if isinstance(location, str) else ""
    host = text.partition("/")[0]
    try:
        if not text or "://" in text:
            raise ValueError
        # parse() takes a first part for a registry when it has a dot or a port; a bare name is one here as well
        parsed = reference.parse((text if _looks_like_host(host) else text.replace(host, host + ":1", 1)) + "/x")
        if parsed.tag != reference.DEFAULT_TAG or parsed.digest:
            raise ValueError
    except (SbxError, ValueError):
        raise _invalid(path, f"{location!r} is not a location: HOST[:PORT][/PATH]") from None
    return text


def _looks_like_host(host: str) -> bool:
    return "." in host or ":" in host or host == "localhost"


def _check_alias(name: str, target: object, path: str) -> str:
    try:
        parsed = reference.parse(target) if isinstance(target, str) else None
    except SbxError as error:
        raise _invalid(path, f"alias {name}: {error.message}") from None
    if parsed is None or _is_short(str(target)) or ":" in str(target).rpartition("/")[2] or parsed.digest:
        raise _invalid(path, f"alias {name}: {target!r} is not REGISTRY/NAME")
    return str(target)


def _known_images() -> dict[str, str]:
    """Return the short names of the images that we know (images/*.toml), each with its reference without a tag.

    Only those that live elsewhere than at docker.io need a word: the others mean what they say.
    """
    try:
        folder = paths.shipped("images")
        names = sorted(name for name in os.listdir(folder) if name.endswith(".toml"))
    except (SbxError, OSError):
        return {}
    found = {}
    for name in names:
        table = _parse(f"{folder}/{name}")
        target = table.get("reference")
        if isinstance(target, str) and not _is_short(target):
            found[str(table.get("name") or name.removesuffix(".toml"))] = reference.parse(target).name
    return found


def _invalid(path: str, why: str, hint: str = "") -> SbxError:
    return SbxError("registries-invalid", f"read {path}: {why}", hint)


# ── what a launch remembers ───────────────────────────────────────────────────────────────────────────────────────────

_SETTLED = 2_000_000_000  #: nanoseconds after which a change of a file has another time than the one before


def stamps() -> list[tuple[str, tuple[int, ...]]]:
    """Return each path that `load` looks at, there or not, with a stamp that changes when it does."""
    environ = dict(os.environ)
    folders = _folders(environ)
    looked_at = [environ.get("CONTAINERS_REGISTRIES_CONF", ""), *_main_files(environ), _our_file(), *folders]
    looked_at += [file for folder in folders for file in _drop_ins(folder)]
    with contextlib.suppress(SbxError, OSError):
        images = paths.shipped("images")
        looked_at += [images, *(f"{images}/{name}" for name in os.listdir(images))]
    return [(path, store.stamp(path)) for path in looked_at if path]


def remember(text: str, target: Reference, seen: list[tuple[str, tuple[int, ...]]]) -> None:
    """Note for the next launch that the short name `text` is an alias of `target`, if it is, by the files of `seen`.

    Not where a file has changed just now: another change might not be told from it.
    """
    if not _is_short(text) or "@" in text or load().resolve(text) != [target] or target == reference.parse(text):
        return
    newest = max((stamp[4] for _, stamp in seen if stamp), default=0)
    path = store.alias_path(text)
    if time.time_ns() - newest < _SETTLED or os.path.basename(path) != store.escape(text):
        return
    with contextlib.suppress(OSError, SbxError):  # what cannot be remembered is found out again
        content = marshal.dumps((text, str(target), store.alias_variables(), seen), 4)
        state.write_atomically(paths.ensure(os.path.dirname(path)), os.path.basename(path), content)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_short(text: str) -> bool:
    """Tell whether `text` names no registry."""
    name, _ = _split_short(text)
    first, slash, _ = name.partition("/")
    return not slash or not (_looks_like_host(first) or first != first.lower())


def _split_short(text: str) -> tuple[str, str]:
    """Return `text` as the name and what follows it (``:tag``, ``@digest``)."""
    bare, at, digest = text.partition("@")
    slash = bare.rfind("/")
    colon = bare.find(":", slash + 1)
    name = bare if colon < 0 else bare[:colon]
    return name, bare[len(name) :] + at + digest


def _endpoint(name: str, registry: str = "") -> Endpoint:
    """Return the endpoint for ``host[:port]/repository``; docker.io's host and its library/ are filled in."""
    host, _, repository = name.partition("/")
    if host == reference.DEFAULT_REGISTRY and "/" not in repository:
        repository = f"library/{repository}"
    return Endpoint(_API_HOSTS.get(host, host), repository, registry=registry or host)


def may_be_plain(endpoint: Endpoint) -> bool:
    """Tell whether `endpoint` may be asked over http: it was named insecure, or it is loopback."""
    return endpoint.insecure or is_loopback(endpoint.host)
