"""Warm: the client's side of the distribution protocol, for one repository at one endpoint.

Follows the OCI distribution specification 1.1 and what docker's registry does beside it. Requests are tried again when
that can help (a broken connection, 429, 5xx), counted, with a growing pause, or the one that Retry-After asks for. What
comes back is bounded here; whether a blob is what its digest says is for the one who reads it to the end to find out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import quote

from rootless.errors import SbxError, printable
from rootless.oci import documents, registries
from rootless.oci.attempts import Attempts
from rootless.oci.auth import Authority, denied, scope
from rootless.oci.credentials import Credential
from rootless.oci.origins import origin
from rootless.oci.pace import Patience
from rootless.oci.registries import Endpoint
from rootless.oci.transport import Response, Transport, TransportError
from rootless.reference import check_digest

#: media types of manifests and indexes that we understand, as the Accept header of a request
MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_PROGRESS = 1 << 20  #: bytes after which a blob's broken connection counts as the first one again
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})

#: a registry may check a large blob before it answers that it has it
_HEAD_SECONDS = {"PUT": 600.0}

Body = bytes | Callable[[], Iterable[bytes]]


@dataclass(frozen=True)
class Document:
    """A manifest or an index as the registry sent it: its bytes, the media type it said, and the bytes' digest."""

    data: bytes
    media_type: str
    digest: str


class Registry:
    """One repository at one endpoint. Makes no request until asked for something.

    `actions` is what we want to be allowed (``pull``, or ``pull`` and ``push``).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        configuration: registries.Registries,
        credential: Credential | None = None,
        patience: Patience | None = None,
        actions: tuple[str, ...] = ("pull",),
    ) -> None:
        self.endpoint = endpoint
        self._transport = Transport(configuration.insecure, patience)
        self.patience = self._transport.patience
        self._credential = credential
        self.scopes = (scope(endpoint.repository, *actions),)
        self._base = ""
        self._authority: Authority | None = None

    def __str__(self) -> str:
        return str(self.endpoint)

    def forget_connections(self) -> None:
        """In a forked child: leave the parent's connections alone. The tokens and the scheme stay known."""
        self._transport.forget()

    # ── getting in ────────────────────────────────────────────────────────────────────────────────────────────────

    def probe(self) -> None:
        """Find out how to speak to the host (``/v2/``): its scheme, and how it wants us to log in. Once is enough.

        https, and http after it only where the registry may be plain. Raises SbxError ``registry-unsupported`` when
        what answers there is not a registry.
        """
        if self._authority:
            return
        plain = registries.may_be_plain(self.endpoint)
        try:
            self._probe("https")
        except TransportError as error:
            # a registry named insecure may well drop what comes to port 443
            if not plain or not (error.plain or self.endpoint.insecure):
                raise
            self._probe("http")

    def _probe(self, scheme: str) -> None:
        base = f"{scheme}://{self.endpoint.host}"
        authority = Authority(self._transport, base, self._credential, self.endpoint.insecure)
        with self.retried(lambda: self._transport.send("GET", f"{base}/v2/"), f"ask {self.endpoint.host}") as response:
            if response.status == 401 and not authority.learn(response):
                raise SbxError(
                    "registry-unauthorized", f"log in at {self.endpoint.host}: it does not say how it wants that"
                )
            # some answer 403 here and let us in one door further
            if response.status not in (200, 401, 403):
                raise SbxError(
                    "registry-unsupported",
                    f"ask {self.endpoint.host}: no registry of version 2 is there (/v2/ gives {response.status})",
                )
            response.discard()
        self._base, self._authority = base, authority

    def log_in(self) -> None:
        """Check that the credential is good, or raise SbxError ``registry-unauthorized``."""
        self.probe()
        assert self._authority is not None
        headers = {"Authorization": header} if (header := self._authority.header(())) else {}
        with self._transport.send("GET", f"{self._base}/v2/", headers) as response:
            if response.status in (401, 403):
                raise denied(self.endpoint.host, self._authority.user, 401)
            if response.status != 200:
                raise self.unexpected(response, f"log in at {self.endpoint.host}")

    # ── manifests ─────────────────────────────────────────────────────────────────────────────────────────────────

    def manifest(self, tag_or_digest: str) -> Document:
        """Return the manifest or index, at most 4 MiB, whose bytes have the digest that was asked for.

        Raises SbxError ``image-unknown``, ``digest-mismatch``, ``document-limit``.
        """
        what = f"{self}{'@' if ':' in tag_or_digest else ':'}{tag_or_digest}"
        with self.request("GET", self._manifest_path(tag_or_digest), f"get {what}", _ACCEPT) as response:
            if response.status != 200:
                raise self._no_manifest(response, what)
            data = response.read(documents.LIMIT, f"manifest {what}")
            said = response.headers.get("Docker-Content-Digest", "")
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        wanted = tag_or_digest if ":" in tag_or_digest else said
        digest = _verified(data, wanted, said, f"manifest {what}")
        return Document(data, media_type, digest)

    def manifest_digest(self, tag: str) -> str:
        """Return the digest that the registry says `tag` has now (HEAD), or nothing if it does not say."""
        what = f"{self}:{tag}"
        with self.request("HEAD", self._manifest_path(tag), f"get {what}", _ACCEPT) as response:
            if response.status != 200:
                raise self._no_manifest(response, what)
            said = response.headers.get("Docker-Content-Digest", "") or response.headers.get("ETag", "").strip('"')
        try:
            return check_digest(said)
        except SbxError:
            return ""

    def put_manifest(self, tag_or_digest: str, data: bytes, media_type: str) -> None:
        """Store a manifest under a tag or its digest; the blobs that it names must be there."""
        what = f"push {self}:{tag_or_digest}"
        path = self._manifest_path(tag_or_digest)
        with self.request("PUT", path, what, {"Content-Type": media_type}, data) as response:
            if response.status not in (200, 201, 202):
                raise self.unexpected(response, what)

    def _manifest_path(self, tag_or_digest: str) -> str:
        return f"manifests/{quote(tag_or_digest, safe=':')}"

    def _no_manifest(self, response: Response, what: str) -> SbxError:
        if response.status == 404:
            return SbxError("image-unknown", f"get {what}: the registry has no such image")
        return self.unexpected(response, f"get {what}")

    # ── blobs, down ───────────────────────────────────────────────────────────────────────────────────────────────

    def has_blob(self, digest: str) -> bool:
        """Tell whether the repository has the blob (HEAD)."""
        with self.request("HEAD", f"blobs/{digest}", f"look for {digest} in {self}") as response:
            if response.status not in (200, 404):
                raise self.unexpected(response, f"look for {digest} in {self}")
            return response.status == 200

    def blob(self, digest: str, size: int, offset: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a blob from `offset` to its end at `size`, across broken connections (Range).

        Never more than `size` says: SbxError ``size-mismatch`` where the registry has more, or less. The digest is not
        checked here.
        """
        what = f"get blob {digest} of {self}"
        place = mark = offset
        attempts = Attempts(self.patience)
        while place < size:
            headers = {"Range": f"bytes={place}-{size - 1}"} if place else {}
            response = self.request("GET", f"blobs/{digest}", what, headers)
            try:
                for chunk in self._rest(response, size, place, what):
                    place += len(chunk)
                    yield chunk
            except TransportError as error:
                if place - mark >= _PROGRESS:
                    attempts.progress()
                    mark = place
                attempts.failed(error)

    def _rest(self, response: Response, size: int, place: int, what: str) -> Iterator[bytes]:
        """Yield what an answer brings of a blob's bytes from `place` on."""
        with response:
            if response.status == 404:
                raise SbxError("blob-unknown", f"{what}: the registry does not have it")
            if response.status == 416:
                raise SbxError("size-mismatch", f"{what}: it has fewer bytes than {size}, which its descriptor says")
            if response.status not in (200, 206):
                raise self.unexpected(response, what)
            # a registry that knows no ranges sends all of it: what we have is passed over
            skip = place if response.status == 200 else 0
            if response.status == 206:
                _check_range(response.headers.get("Content-Range", ""), place, size, what)
            if response.length not in (None, size - place + skip):
                raise SbxError(
                    "size-mismatch",
                    f"{what}: it has {response.length + place - skip} bytes, its descriptor says {size}",
                )
            yield from self._exactly(response, size - place, skip, what)

    def _exactly(self, response: Response, count: int, skip: int, what: str) -> Iterator[bytes]:
        """Yield `count` bytes after `skip`, and make sure that no more come."""
        for chunk in response.chunks():
            if skip >= len(chunk):
                skip -= len(chunk)
                continue
            piece, skip = (chunk[skip:], 0) if skip else (chunk, 0)
            if len(piece) > count:
                raise SbxError("size-mismatch", f"{what}: more bytes come than its descriptor says")
            count -= len(piece)
            yield piece
        if not count:
            return
        if "chunked" in response.headers.get("Transfer-Encoding", ""):
            raise SbxError("size-mismatch", f"{what}: it ends {count} bytes before the size that its descriptor says")
        raise TransportError("registry-broken", f"{what}: the connection broke off", again=True)

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────

    def request(
        self,
        method: str,
        path: str,
        what: str,
        headers: dict[str, str] | None = None,
        body: Body | None = None,
        scopes: tuple[str, ...] = (),
    ) -> Response:
        """Send a request for this repository; tried again as often as we have patience."""
        self.probe()
        url = f"{self._base}/v2/{self.endpoint.repository}/{path}"
        return self.retried(lambda: self.send(method, url, what, headers, body, scopes), what)

    def send(
        self,
        method: str,
        url: str,
        what: str,
        headers: dict[str, str] | None = None,
        body: Body | None = None,
        scopes: tuple[str, ...] = (),
    ) -> Response:
        """Send one request with what the registry wants us to show; once more after a 401, with a fresh token."""
        assert self._authority is not None
        scopes = scopes or self.scopes
        # an upload may be sent to another host: what we show is for the registry's own
        ours = origin(url) == origin(self._base)
        for renew in (False, True):
            extra = {"Authorization": header} if ours and (header := self._authority.header(scopes, renew)) else {}
            payload = body() if callable(body) else body
            response = self._transport.send(
                method, url, {**(headers or {}), **extra}, payload, _HEAD_SECONDS.get(method, 0.0)
            )
            if response.status != 401 or not ours or origin(response.url) != origin(self._base):
                return self._checked(response, what)
            response.discard()
            if not self._authority.learn(response):
                break
        raise denied(self.endpoint.host, self._authority.user, 401)

    def _checked(self, response: Response, what: str) -> Response:
        if response.status in (401, 403):
            reason = _reason(response)
            error = denied(self.endpoint.host, self._authority.user if self._authority else "", 403)
            raise SbxError(error.code, f"{what}: access denied{reason}", error.hint)
        return response

    def retried(self, send: Callable[[], Response], what: str) -> Response:
        """Return the answer to what `send` sends, tried again where that can help."""
        attempts = Attempts(self.patience)
        while True:
            try:
                response = send()
            except TransportError as error:
                attempts.failed(error)
                continue
            if response.status not in _AGAIN:
                return response
            asked = _retry_after(response)
            reason = self._busy(response, what, asked)
            response.close()
            if not attempts.next(asked=asked):
                raise reason

    def follow(self, response: Response) -> str:
        """Return the URL in a response's Location header: it may be relative, and on another host."""
        return self._transport.follow(response.url, response.headers.get("Location", ""), self._base.partition(":")[0])

    def _busy(self, response: Response, what: str, asked: float) -> SbxError:
        if response.status == 429:
            hint = f"it asks to come back in {asked:.0f} s" if asked else "log in: many registries then allow more"
            return SbxError("registry-rate-limited", f"{what}: too many requests (429){_reason(response)}", hint)
        return self.unexpected(response, what)

    def unexpected(self, response: Response, what: str) -> SbxError:
        return SbxError("registry-failed", f"{what}: HTTP status {response.status}{_reason(response)}")


_ACCEPT = {"Accept": ", ".join(MANIFESTS)}


def _verified(data: bytes, wanted: str, said: str, what: str) -> str:
    """Return the digest of `data`, which must be what was wanted and what was said, where these are not empty."""
    for claim in (wanted, said):
        if not claim:
            continue
        try:
            algorithm = check_digest(claim).partition(":")[0]
        except SbxError:
            raise SbxError("digest-mismatch", f"verify {what}: the registry says {claim[:80]!r}, no digest") from None
        found = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
        if found != claim:
            raise SbxError("digest-mismatch", f"verify {what}: its digest is {found}, not {claim}")
    return wanted or f"sha256:{hashlib.sha256(data).hexdigest()}"


def _check_range(header: str, start: int, size: int, what: str) -> None:
    if header.replace(" ", "") not in (f"bytes{start}-{size - 1}/{size}", f"bytes{start}-{size - 1}/*"):
        raise SbxError(
            "size-mismatch", f"{what}: asked for bytes from {start} to {size - 1}, it sends {printable(header)[:80]!r}"
        )


def _retry_after(response: Response) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date, or 0: RFC 9110."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _reason(response: Response) -> str:
    """Return what the registry says of its refusal, or nothing; read within bounds."""
    try:
        answer = documents.decode(response.read(64 << 10, "an error"), "an error")
        first = answer["errors"][0]
        text = str(first.get("message") or first.get("code") or "")
    except (SbxError, LookupError, TypeError, AttributeError):
        return ""
    return f": {printable(text)[:200]}" if text else ""
