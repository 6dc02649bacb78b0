"""Warm: what a registry asks of us (WWW-Authenticate), and what we answer.

Basic goes to the registry alone. For Bearer we ask the token server that the registry names, the realm; since a
registry can name any URL, what is sent there is ruled by check_realm(). Follows the distribution project's token
authentication specification, and its OAuth2 form for identity tokens.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from rootless.errors import SbxError
from rootless.oci.credentials import Credential
from rootless.oci.documents import decode
from rootless.oci.origins import check_url, is_loopback, origin
from rootless.oci.transport import Response, Transport, TransportError

TOKEN_LIMIT = 64 << 10  #: characters of a token; it travels in a header
_LIFE = 60.0  #: seconds that a token is good for when the server does not say: the specification's default
_CLIENT = "sbx"

_TOKEN68 = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN68})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN68}))\s*(?:,|$)')
_SCHEME = re.compile(rf"\s*({_TOKEN68})(?:\s+|\s*,|$)")


@dataclass(frozen=True)
class Challenge:
    """One way in, as the registry offers it: a scheme in lower case, and its parameters."""

    scheme: str
    parameters: dict[str, str]


def parse(headers: Iterable[str]) -> list[Challenge]:
    """Return the challenges in WWW-Authenticate `headers`, in order, without what cannot be understood: RFC 9110."""
    challenges = []
    for header in headers:
        place = 0
        while match := _SCHEME.match(header, place):
            parameters: dict[str, str] = {}
            place = match.end()
            while found := _PARAMETER.match(header, place):
                parameters[found[1].lower()] = re.sub(r"\\(.)", r"\1", found[2]) if found[2] is not None else found[3]
                place = found.end()
            challenges.append(Challenge(match[1].lower(), parameters))
    return challenges


def scope(repository: str, *actions: str) -> str:
    """Return the scope that lets us do `actions` (pull, push) in `repository`."""
    return f"repository:{repository}:{','.join(actions)}"


class Authority:
    """Answers one registry's challenges with one credential (or none), and keeps the tokens it was given."""

    def __init__(self, transport: Transport, base: str, credential: Credential | None, insecure: bool) -> None:
        self._transport = transport
        self._base = base
        self._credential = credential
        self._insecure = insecure  # the user's configuration names this registry insecure
        self._challenge: Challenge | None = None
        self._tokens: dict[str, tuple[str, float]] = {}

    @property
    def user(self) -> str:
        """Whom we are there, for messages; empty when anonymous."""
        return (self._credential.user or "the identity token's owner") if self._credential else ""

    def learn(self, response: Response) -> bool:
        """Take note of how the registry wants us to authenticate (from a 401); tell whether we know how."""
        known = {challenge.scheme: challenge for challenge in parse(response.challenges())}
        self._challenge = known.get("bearer") or known.get("basic")
        return self._challenge is not None

    def header(self, scopes: tuple[str, ...], renew: bool = False) -> str:
        """Return the value of the Authorization header for a request that needs `scopes`, or nothing.

        With `renew` a token that we have is not used again.
        """
        if self._credential and self._credential.registry_token:
            return f"Bearer {_check_token(self._credential.registry_token, 'the registrytoken of the credentials')}"
        if self._challenge is None:
            return ""
        if self._challenge.scheme == "basic":
            return self._basic()
        key = " ".join(scopes)
        token, expiry = self._tokens.get(key, ("", 0.0))
        if renew or time.monotonic() >= expiry:
            token, life = self._ask(scopes)
            # a tenth is taken off: the clock of the one who checks is not ours
            self._tokens[key] = token, time.monotonic() + 0.9 * life
        return f"Bearer {token}"

    def _basic(self) -> str:
        if not self._credential or not self._credential.user:
            return ""
        self._may_send_password(self._base)
        return self._credential.basic()

    def _may_send_password(self, url: str) -> None:
        parts, registry = urlsplit(url), urlsplit(self._base)
        if is_loopback(parts.netloc) and is_loopback(registry.netloc):
            return
        # whoever stands between us and a plain registry can name a token server of their own
        if registry.scheme == "http" and parts.hostname != registry.hostname:
            raise SbxError("realm-refused", f"log in at {parts.netloc}: {registry.netloc} named it over plain http")
        # a registry named insecure gets the password that the user stored for it; nobody else gets it unencrypted
        if parts.scheme == "http" and not (self._insecure and origin(url) == origin(self._base)):
            raise SbxError("realm-refused", f"log in at {parts.netloc}: a password would go there unencrypted")

    def _ask(self, scopes: tuple[str, ...]) -> tuple[str, float]:
        """Return a token for `scopes` and its life in seconds, from the realm."""
        assert self._challenge is not None
        realm = check_realm(self._challenge.parameters.get("realm", ""), self._base, self._transport)
        service = self._challenge.parameters.get("service", "")
        credential = self._credential
        if credential and credential.identity_token:
            self._may_send_password(realm)
            return self._ask_oauth(realm, service, scopes, credential.identity_token)
        fields = [("service", service)] if service else []
        fields += [("scope", each) for each in scopes]
        headers = {}
        if credential and credential.user:
            self._may_send_password(realm)
            fields.append(("account", credential.user))
            headers["Authorization"] = credential.basic()
        joint = "&" if urlsplit(realm).query else "?"
        # redirects are not followed: a token server answers itself, and the password is for it alone
        with self._transport.send("GET", f"{realm}{joint}{urlencode(fields)}", headers, follow=False) as response:
            return self._read_token(response, realm)

    def _ask_oauth(self, realm: str, service: str, scopes: tuple[str, ...], token: str) -> tuple[str, float]:
        fields = {"grant_type": "refresh_token", "service": service, "client_id": _CLIENT, "refresh_token": token}
        if scopes:
            fields["scope"] = " ".join(scopes)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        body = urlencode(fields).encode()
        with self._transport.send("POST", realm, headers, body, follow=False) as response:
            return self._read_token(response, realm)

    def _read_token(self, response: Response, realm: str) -> tuple[str, float]:
        host = urlsplit(realm).netloc
        if response.status in (400, 401, 403):
            raise denied(host, self.user, response.status)
        if response.status != 200:
            passing = response.status == 429 or response.status >= 500
            raise TransportError(
                "token-failed", f"ask {host} for a token: HTTP status {response.status}", again=passing
            )
        answer = decode(response.read(1 << 20, f"token from {host}"), f"token from {host}", "token-failed")
        if not isinstance(answer, dict):
            raise SbxError("token-failed", f"ask {host} for a token: the answer is not an object")
        life = answer.get("expires_in")
        seconds = float(life) if isinstance(life, int) and not isinstance(life, bool) and life > 0 else _LIFE
        return _check_token(answer.get("token") or answer.get("access_token"), f"the token from {host}"), seconds


def check_realm(realm: str, base: str, transport: Transport) -> str:
    """Return `realm`, or raise SbxError ``realm-refused``: a registry says where to ask, but not everything goes.

    It is an https URL; http only when the registry itself (`base`) is spoken to over http and the realm's host is
    loopback or named insecure. No user, no fragment, nothing that is not printable ASCII.
    """
    registry = urlsplit(base)
    try:
        parts = check_url(realm)
    except SbxError:
        raise SbxError("realm-refused", f"ask {registry.netloc}'s token server: bad URL {realm[:200]!r}") from None
    if parts.fragment:
        raise SbxError("realm-refused", f"ask {registry.netloc}'s token server: bad URL {realm[:200]!r}")
    if parts.scheme == "http" and (registry.scheme == "https" or not transport.may_be_plain(parts.netloc)):
        raise SbxError(
            "realm-refused", f"ask {registry.netloc}'s token server: {parts.netloc} is not asked over plain http"
        )
    if is_loopback(parts.netloc) and not is_loopback(registry.netloc):
        raise SbxError(
            "realm-refused", f"ask {registry.netloc}'s token server: it is said to be on this machine's loopback"
        )
    return realm


def _check_token(token: object, what: str) -> str:
    """Return `token` if it can stand in a header: printable ASCII without blanks."""
    if not isinstance(token, str) or not token:
        raise SbxError("token-failed", f"use {what}: there is none")
    if len(token) > TOKEN_LIMIT or not token.isascii() or not token.isprintable() or " " in token:
        raise SbxError("token-failed", f"use {what}: it holds characters that a token cannot have, or is too long")
    return token


def denied(host: str, user: str, status: int) -> SbxError:
    """Return the error for a 401 or 403 of `host`, whom we asked as `user` (empty: anonymous)."""
    if status == 403:
        return SbxError("registry-denied", f"ask {host}: access denied{' to ' + user if user else ''} (403)")
    if user:
        return SbxError(
            "registry-unauthorized", f"log in at {host} as {user}: refused", f"log in again: sbx login {host}"
        )
    return SbxError(
        "registry-unauthorized",
        f"ask {host}: it wants a login, or the image is not there",
        f"log in: sbx login {host}",
    )
