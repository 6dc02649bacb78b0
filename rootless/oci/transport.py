"""Warm: HTTP requests under limits: pace, redirects, proxies, TLS trust. The only file that knows urllib3.

What is promised to callers: a request ends. A head that does not come within its time, a body slower than a minimum
rate, a redirect that loops or leads from https to http end in an SbxError. Credentials go to the origin they are for
and to no other. Bytes of bodies are given as they came: no Content-Encoding is ever undone, since digests are of the
bytes as stored.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import urljoin, urlsplit

# 35 ms to import and no dependencies of its own; from loopback it gives 4 times the bytes for each second of processor
# time that httpx gives (0.06 against 0.24 s for a GB), and leaves redirects, retries and ranges to us.
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    IncompleteRead,
    InvalidHeader,
    LocationParseError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)

from rootless.errors import SbxError, printable
from rootless.oci.origins import certificate_folders, check_url, is_loopback, load_certificates, origin, proxy_for
from rootless.oci.pace import PacedResponse, Patience

# who names a registry insecure does not need to be told at each request
urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)

CHUNK = 1 << 18
REDIRECTS = 8  #: followed before a redirect counts as a loop
USER_AGENT = "sbx"


def _pool_classes(patience: Patience) -> dict[str, type[HTTPConnectionPool]]:
    """Return pools whose connections read at the pace of `patience`."""
    response = type("PacedResponse", (PacedResponse,), {"patience": patience})
    plain = type("PacedConnection", (HTTPConnection,), {"response_class": response})
    tls = type("PacedTLSConnection", (HTTPSConnection,), {"response_class": response})
    return {
        "http": type("PacedPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("PacedTLSPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
    }


class Response:
    """The head of an answer, and its body as it comes. Close it, or use it as a context."""

    def __init__(self, raw: urllib3.BaseHTTPResponse, url: str) -> None:
        self._raw = raw
        self.url = url
        self.status = raw.status
        self.headers: Mapping[str, str] = raw.headers

    def __enter__(self) -> Response:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def length(self) -> int | None:
        """The body's length in bytes as declared, or None (chunked, or until the end of the connection)."""
        text = self.headers.get("Content-Length", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None

    def challenges(self) -> list[str]:
        """Return each WWW-Authenticate header."""
        return list(self._raw.headers.getlist("WWW-Authenticate"))

    def read(self, limit: int, what: str) -> bytes:
        """Return the whole body, or raise SbxError ``document-limit`` before more than `limit` bytes are kept."""
        too_large = SbxError("document-limit", f"read {what}: it is larger than {limit} bytes")
        if (self.length or 0) > limit:
            raise too_large
        parts, size = [], 0
        for chunk in self.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size > limit:
                raise too_large
        return b"".join(parts)

    def chunks(self) -> Iterator[bytes]:
        """Yield the body's bytes as they come in; SbxError ``registry-broken`` or ``-timeout`` when they stop."""
        try:
            # read1: what one receive gives, so that a broken connection loses nothing that had come
            while chunk := self._raw.read1(CHUNK):
                yield chunk
        except (HTTPError, OSError, http.client.HTTPException) as error:
            raise failure(error, self.url) from None

    def discard(self) -> None:
        """Let go of the answer; the connection is used again when the rest of the body is short."""
        try:
            if (self.length or 0) <= CHUNK:
                self._raw.drain_conn()
        except (HTTPError, OSError, http.client.HTTPException):
            pass
        self.close()

    def close(self) -> None:
        """Close the answer; a body not read to its end takes the connection with it."""
        self._raw.release_conn() if self._raw.closed else self._raw.close()


class Transport:
    """Sends requests. `insecure` tells whether a ``host:port`` was named insecure by the user's configuration.

    Not shared with a forked child: call forget() there before the first request.
    """

    def __init__(self, insecure: Callable[[str], bool], patience: Patience | None = None) -> None:
        self._insecure = insecure
        self.patience = patience or Patience()
        self._pools = _pool_classes(self.patience)
        self._managers: dict[str, urllib3.PoolManager] = {}

    def forget(self) -> None:
        """Leave connections to the process that made them."""
        self._managers = {}

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        head: float = 0.0,
        follow: bool = True,
    ) -> Response:
        """Send one request, follow redirects of GET and HEAD, and return the answer, whatever its status.

        Authorization is sent to the origin of `url` only. `body` given as an iterable needs a Content-Length header.
        Nothing is tried again. Raises SbxError (see failure()).
        """
        headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **(headers or {})}
        first = check_url(url)
        seen = 0
        while True:
            response = self._send_one(method, url, headers, body, head)
            target = response.headers.get("Location", "")
            if not follow or response.status not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
                return response
            response.discard()
            seen += 1
            url = self.follow(url, target, first.scheme)
            if seen > REDIRECTS:
                raise SbxError("redirect-refused", f"follow redirects from {first.netloc}: more than {REDIRECTS}")
            if origin(url) != origin(first.geturl()):
                headers.pop("Authorization", None)

    def follow(self, base: str, target: str, scheme: str = "") -> str:
        """Return the URL that a Location header means, or raise SbxError ``redirect-refused``.

        https never becomes http, and http is only for loopback and for registries named insecure.
        """
        here = urlsplit(base)
        try:
            url = urljoin(base, target)
            there = check_url(url if target else "")
        except (SbxError, ValueError):
            raise SbxError(
                "redirect-refused", f"follow redirect from {here.netloc}: bad URL {target[:200]!r}"
            ) from None
        if there.scheme == "http" and "https" in (here.scheme, scheme):
            raise SbxError("redirect-refused", f"follow redirect from {here.netloc}: it leads from https to http")
        if there.scheme == "http" and not self.may_be_plain(there.netloc):
            raise SbxError(
                "redirect-refused", f"follow redirect from {here.netloc}: it leads to {there.netloc} over plain http"
            )
        return url

    def may_be_plain(self, host: str) -> bool:
        """Tell whether `host` (``name:port``) may be spoken to over http: loopback, or named insecure."""
        return is_loopback(host) or self._insecure(host)

    def _send_one(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | Iterable[bytes] | None, head: float
    ) -> Response:
        timeout = urllib3.Timeout(connect=self.patience.connect, read=head or self.patience.head)
        try:
            raw = self._manager(url).urlopen(
                method, url, headers=dict(headers), body=body, timeout=timeout,
                redirect=False, retries=False, preload_content=False, decode_content=False,
            )  # fmt: skip
        except (HTTPError, OSError, http.client.HTTPException, ValueError) as error:
            raise failure(error, url) from None
        return Response(raw, url)

    def _manager(self, url: str) -> urllib3.PoolManager:
        """Return the connections to the origin of `url`: each origin has its own trust and its own proxy."""
        key = origin(url)
        if key not in self._managers:
            host = urlsplit(url).netloc
            kwargs = {"maxsize": 4, "block": False, "ssl_context": self._context(host) if url[:6] == "https:" else None}
            proxy = proxy_for(url, os.environ)
            manager = urllib3.ProxyManager(proxy, **kwargs) if proxy else urllib3.PoolManager(**kwargs)  # type: ignore[arg-type]
            manager.pool_classes_by_scheme = self._pools
            self._managers[key] = manager
        return self._managers[key]

    def _context(self, host: str) -> ssl.SSLContext:
        # The default context honours SSL_CERT_FILE and SSL_CERT_DIR, and holds the system's authorities.
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for folder in certificate_folders(host):
            load_certificates(context, folder)
        if self._insecure(host):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class TransportError(SbxError):
    """A request that got no answer, or not all of it; it may be tried again when `again`."""

    def __init__(self, code: str, message: str, hint: str = "", again: bool = False, plain: bool = False) -> None:
        super().__init__(code, message, hint)
        self.again = again
        self.plain = plain  #: the other side does not speak TLS, or nobody listens there


def failure(error: BaseException, url: str) -> TransportError:
    """Return what the user is told when a request to `url` ended in `error`."""
    host = printable(urlsplit(url).netloc)
    reason = _root_cause(error)
    if isinstance(error, ProxyError):
        return TransportError("proxy-failed", f"reach {host} through the proxy: {_text(reason)}", _PROXY_HINT)
    if isinstance(error, NameResolutionError) or isinstance(reason, socket.gaierror):
        return TransportError("registry-unknown-host", f"reach {host}: the name is not known", _NAME_HINT)
    if isinstance(reason, ConnectionRefusedError):
        return TransportError("registry-refused", f"reach {host}: connection refused", plain=True)
    if isinstance(reason, OSError) and reason.errno in _UNREACHABLE:
        return TransportError("registry-unreachable", f"reach {host}: {_text(reason)}", again=True)
    if isinstance(error, (ConnectTimeoutError, NewConnectionError)):
        return TransportError("registry-timeout", f"reach {host}: no answer", again=True)
    if isinstance(error, SSLError) or isinstance(reason, ssl.SSLError):
        return _tls_failure(reason, host)
    if isinstance(error, ReadTimeoutError) or isinstance(reason, TimeoutError):
        return TransportError("registry-timeout", f"read from {host}: it sends nothing, or too slowly", again=True)
    if isinstance(error, (InvalidHeader, LocationParseError)):
        return TransportError("url-invalid", f"ask {host}: {_text(reason)}")
    return TransportError("registry-broken", f"read from {host}: {_broken(error, reason)}", again=True)


def _broken(error: BaseException, reason: BaseException) -> str:
    if isinstance(reason, http.client.RemoteDisconnected):
        return "it closed the connection without an answer"
    if isinstance(error, IncompleteRead) or isinstance(reason, http.client.IncompleteRead):
        return "the connection broke off"
    if isinstance(reason, http.client.HTTPException):
        return "what it sends is not HTTP"
    return _text(reason)


_PROXY_HINT = "http_proxy, https_proxy and no_proxy in the environment say which proxy is used"
_NAME_HINT = "check the spelling and the network; names without a registry are looked up at docker.io"
_UNREACHABLE = (100, 101, 112, 113)  # ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH


_NOT_TLS = frozenset({
    "WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_EOF_WHILE_READING", "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
})  # fmt: skip


def _tls_failure(reason: BaseException, host: str) -> TransportError:
    library = getattr(reason, "reason", "") or ""
    if library in _NOT_TLS:
        return TransportError(
            "registry-tls", f"reach {host} with TLS: it answers in plain text, or not at all",
            "name it insecure in registries.conf to use plain http",
            plain=True,
        )  # fmt: skip
    if isinstance(reason, ssl.SSLCertVerificationError):
        return TransportError(
            "registry-tls", f"reach {host} with TLS: {reason.verify_message}",
            f"put its authority at ~/.config/containers/certs.d/{host}/ca.crt, or name it in SSL_CERT_FILE",
        )  # fmt: skip
    return TransportError(
        "registry-tls", f"reach {host} with TLS: {library.lower().replace('_', ' ') or _text(reason)}"
    )


def _root_cause(error: BaseException) -> BaseException:
    """Return the exception at the end of the chain, which holds the errno."""
    while True:
        inner = error.__cause__  # the context may hold the failure of an earlier request
        for candidate in (getattr(error, "original_error", None), getattr(error, "reason", None), *error.args):
            if isinstance(candidate, BaseException):
                inner = candidate
        if inner is None or inner is error:
            return error
        error = inner


def _text(error: BaseException) -> str:
    """Return an exception's cause in our style: lower case, no full stop, no class names."""
    text = (error.strerror or "") if isinstance(error, OSError) else str(error)
    text = text or type(error).__name__
    return text[:1].lower() + text[1:200].rstrip(".")
