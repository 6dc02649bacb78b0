"""Warm: user names and passwords for registries, as people have them.

Read, the first that knows the registry wins: our own file (``auth.json`` in the config folder, written by `sbx login`),
REGISTRY_AUTH_FILE, containers' auth.json (containers-auth.json(5)), docker's config.json. Each may name credential
helpers (``credHelpers`` for one registry, ``credsStore`` for all), which are asked over docker's protocol: the program
``docker-credential-NAME get`` gets the server on stdin and prints JSON. A secret is never an argument, never printed.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rootless import paths
from rootless.errors import SbxError
from rootless.oci.documents import decode

HUB = "docker.io"
#: what docker has always called its own registry in these files
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "registry-1.docker.io")
_TOKEN_USER = "<token>"  # a helper's word for: the secret is an identity token
_HELPER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HELPER_SECONDS = 60  # a helper may ask the user to unlock a key ring


@dataclass(frozen=True)
class Credential:
    """Who we are at a registry: user and password, or an identity token, or a registry token used as it is."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)
    source: str = ""  #: the file or helper it came from

    def basic(self) -> str:
        """Return the value of an Authorization header: RFC 7617."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def own_file() -> str:
    """Return the path of the file that login writes."""
    return f"{paths.config()}/auth.json"


def files() -> list[str]:
    """Return the files that may hold credentials, the first one to ask first; they need not exist."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    config = os.environ.get("XDG_CONFIG_HOME", "") or f"{paths.home()}/.config"
    docker = os.environ.get("DOCKER_CONFIG", "") or f"{paths.home()}/.docker"
    candidates = [
        own_file(),
        os.environ.get("REGISTRY_AUTH_FILE", ""),
        f"{runtime}/containers/auth.json" if runtime else "",
        f"{config}/containers/auth.json",
        f"{docker}/config.json",
    ]
    return [path for path in candidates if path]


def find(registry: str, repository: str = "") -> Credential | None:
    """Return the credential for `registry` (``host:port``), for the longest part of `repository` first, or None.

    A file that cannot be read or understood is an error that names it, not a reason to go on without credentials.
    """
    for path in files():
        document = _read(path)
        if document and (found := _find_in(document, path, registry, repository)):
            return found
    return None


def store(registry: str, credential: Credential, path: str = "") -> str:
    """Keep `credential` for `registry` in `path`, our own file by default, and return where.

    The file is 0600 and replaced atomically; two logins at a time both stay.
    """
    path = path or own_file()
    entry = {"auth": base64.b64encode(f"{credential.user}:{credential.password}".encode()).decode()}
    if credential.identity_token:
        entry = {"auth": entry["auth"], "identitytoken": credential.identity_token}
    with _Change(path) as document:
        document.setdefault("auths", {})[registry] = entry
    return path


def erase(registry: str = "", path: str = "") -> bool:
    """Forget `registry`, or all of them, in `path` (our own file by default); tell whether there was anything."""
    path = path or own_file()
    document = _read(path)
    if not document or not (_keys(document, registry) if registry else document.get("auths")):
        return False
    with _Change(path) as document:
        for key in _keys(document, registry) if registry else list(document["auths"]):
            del document["auths"][key]
    return True


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 20)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise _invalid(path, error.strerror or "") from None
    document = decode(data, f"credentials {path}", "credentials-invalid") if data.strip() else {}
    if not isinstance(document, dict) or not isinstance(document.get("auths", {}), dict):
        raise _invalid(path, "not an object with auths")
    return document


def _find_in(document: dict[str, Any], path: str, registry: str, repository: str) -> Credential | None:
    helpers = document.get("credHelpers")
    helper = next((helpers[key] for key in _names(registry) if key in helpers), "") if isinstance(helpers, dict) else ""
    if helper and (found := _ask(helper, registry)):
        return found
    for key in _specific(registry, repository):
        if (found := _entry(document["auths"].get(key), path, key)) if "auths" in document else None:
            return found
    for key in _keys(document, registry):
        if found := _entry(document["auths"][key], path, key):
            return found
    store_name = document.get("credsStore")
    return _ask(store_name, registry) if store_name and not helper else None


def _specific(registry: str, repository: str) -> Iterator[str]:
    """Yield ``registry/a/b``, ``registry/a``: containers' files may hold credentials for a part of a registry."""
    parts = repository.split("/") if repository else []
    for count in range(len(parts), 0, -1):
        yield f"{registry}/{'/'.join(parts[:count])}"


def _names(registry: str) -> tuple[str, ...]:
    return (registry, *_HUB_KEYS) if registry == HUB or registry in _HUB_KEYS else (registry,)


def _keys(document: dict[str, Any], registry: str) -> list[str]:
    """Return the keys that mean the whole of `registry`: as such, or in docker's old spelling as a URL."""
    auths = document.get("auths", {})
    wanted = _names(registry)
    exact = [key for key in wanted if key in auths]
    spelled = [key for key in auths if key not in exact and _host_of(key) in wanted]
    return exact + spelled


def _host_of(key: str) -> str:
    """Return the host of a key such as ``https://host:port/v1/``, or nothing for one that names a repository."""
    bare = key.removeprefix("https://").removeprefix("http://")
    host, _, path = bare.partition("/")
    return host if bare != key or path in ("", "v1", "v1/", "v2", "v2/") else ""


def _entry(entry: object, path: str, key: str) -> Credential | None:
    if not isinstance(entry, dict):
        return None
    texts = {
        name: str(entry.get(name) or "") for name in ("auth", "username", "password", "identitytoken", "registrytoken")
    }
    user, password = texts["username"], texts["password"]
    if texts["auth"]:
        try:
            user, _, password = base64.b64decode(texts["auth"], validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise _invalid(path, f"the entry for {key} is not base64 of user:password") from None
    # docker pads the password of some entries with NUL
    found = Credential(user, password.rstrip("\0"), texts["identitytoken"], texts["registrytoken"], path)
    return found if found.user or found.identity_token or found.registry_token else None


class _Change:
    """A context that gives the document at `path`, holds its lock, and replaces the file on the way out."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> dict[str, Any]:
        folder = os.path.dirname(os.path.abspath(self._path))
        paths.ensure(folder)
        try:
            # A file of its own: the one that holds the credentials is replaced, and its lock would go with it.
            self._lock = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unwritable(self._path, error) from None
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._document = _read(self._path)
        return self._document

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            os.close(self._lock)

    def _write(self) -> None:
        fresh = f"{self._path}.{os.getpid()}"
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(self._document, file, indent="\t")
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self._path)
        except OSError as error:
            raise _unwritable(self._path, error) from None


def _invalid(path: str, why: str) -> SbxError:
    return SbxError("credentials-invalid", f"read credentials {path}: {why}")


def _unwritable(path: str, error: OSError) -> SbxError:
    return SbxError("credentials-unwritable", f"write credentials {path}: {error.strerror}")


# ── helpers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ask(helper: object, registry: str) -> Credential | None:
    """Ask ``docker-credential-HELPER`` for `registry`; None when it has none."""
    # The name becomes part of a program's name: nothing that could lead out of PATH.
    if not isinstance(helper, str) or not _HELPER_NAME.fullmatch(helper):
        raise SbxError("credential-helper-failed", f"ask credential helper {helper!r}: not a name")
    program = f"docker-credential-{helper}"
    server = _HUB_KEYS[0] if registry == HUB else registry
    try:
        done = subprocess.run(
            [program, "get"], input=f"{server}\n".encode(), capture_output=True, timeout=_HELPER_SECONDS, check=False
        )
    except FileNotFoundError:
        raise _helper_failed(program, "it is not installed") from None
    except subprocess.TimeoutExpired:
        raise _helper_failed(program, f"no answer in {_HELPER_SECONDS} s") from None
    except OSError as error:
        raise _helper_failed(program, error.strerror or "") from None
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip()).decode(errors="replace")[:200]
        # the protocol has no other sign for "nothing here" than this text
        if "credentials not found" in said:
            return None
        raise _helper_failed(program, said or f"exit status {done.returncode}")
    answer = decode(done.stdout, f"answer of {program}", "credential-helper-failed")
    user, secret = (
        (str(answer.get(key) or "") for key in ("Username", "Secret")) if isinstance(answer, dict) else ("", "")
    )
    if user == _TOKEN_USER:
        return Credential(identity_token=secret, source=program)
    return Credential(user, secret, source=program) if user else None


def _helper_failed(program: str, why: str) -> SbxError:
    return SbxError(
        "credential-helper-failed",
        f"ask {program}: {why}",
        "the file that names it is ~/.docker/config.json or containers' auth.json (credHelpers, credsStore)",
    )
