"""A registry of our own on loopback that behaves as badly as a test asks it to.

It serves one good image. A test takes a rule from the list below, or writes one: a function that is called with the
request in place of the good answer.

    with HostileRegistry(image) as registry:
        registry.on("GET", "/blobs/", cut_after(1000))

Each request is noted in `registry.requests`.
"""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

from real_registry import SmallImage, digest


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]


class Rule(NamedTuple):
    method: str
    pattern: re.Pattern[str]
    act: Callable[[Handler], None]


class HostileRegistry(ThreadingHTTPServer):
    """Serves `image` as any repository with any tag. Use it as a context."""

    daemon_threads = True
    # the last test's connections must not hold this one up
    block_on_close = False

    def __init__(self, image: SmallImage | None = None, address: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), Handler)
        self.image = image or SmallImage({"hello": b"hello\n"})
        self.requests: list[Request] = []
        self.rules: list[Rule] = []
        self.ended = threading.Event()
        self.host = f"{f'[{address}]' if ':' in address else address}:{self.server_address[1]}"
        self.url = f"http://{self.host}"
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def on(self, method: str, pattern: str, act: Callable[[Handler], None], times: int = -1) -> None:
        """Let `act` answer requests whose path holds `pattern`, so many `times` (-1: always); the last rule wins."""
        left = [times]

        def limited(handler: Handler) -> None:
            left[0] -= 1
            if left[0] == 0:
                self.rules.remove(rule)
            act(handler)

        rule = Rule(method, re.compile(pattern), limited)
        self.rules.insert(0, rule)

    def count(self, method: str, pattern: str) -> int:
        """Return how many requests there were."""
        return len(self.asked(method, pattern))

    def asked(self, method: str, pattern: str) -> list[Request]:
        return [each for each in self.requests if each.method == method and re.search(pattern, each.path)]

    def handle_error(self, *_: object) -> None:
        """A client that goes away in the middle is what many tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: HostileRegistry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET

    def _answer(self) -> None:
        self.server.requests.append(Request(self.command, self.path, dict(self.headers)))
        for rule in self.server.rules:
            if rule.method == self.command and rule.pattern.search(self.path):
                return rule.act(self)
        return self.good()

    def good(self) -> None:
        """Answer as a registry should."""
        path = urlsplit(self.path).path  # as a proxy it is asked with whole URLs
        if path == "/v2/":
            self.reply(200, b"{}")
        elif "/manifests/" in path:
            self._good_manifest(path.rpartition("/")[2])
        elif "/blobs/" in path and (blob := self.server.image.blobs.get(path.rpartition("/")[2])) is not None:
            self._good_blob(blob)
        else:
            self.reply(404, b'{"errors":[{"code":"UNKNOWN","message":"nothing here"}]}')

    def _good_manifest(self, name: str) -> None:
        data = self.server.image.manifest
        if ":" in name and name != digest(data):
            return self.reply(404, b"{}")
        return self.reply(200, data, {"Content-Type": SmallImage.MANIFEST, "Docker-Content-Digest": digest(data)})

    def _good_blob(self, blob: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self.reply(200, blob)
        start, end = int(found[1]), int(found[2] or len(blob) - 1)
        headers = {"Content-Range": f"bytes {start}-{end}/{len(blob)}"}
        return self.reply(206, blob[start : end + 1], headers)

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Send an answer; a Content-Length in `headers` counts before the body's own."""
        self.head(status, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def wait(self) -> None:
        """Send nothing more until the test is over."""
        self.server.ended.wait()

    def cut(self) -> None:
        """Break the connection."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


# ── bad ways ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def says(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Callable[[Handler], None]:
    """Answer with this."""
    return lambda handler: handler.reply(status, body, headers)


def says_json(document: object, media_type: str, status: int = 200) -> Callable[[Handler], None]:
    return says(status, json.dumps(document).encode(), {"Content-Type": media_type})


def redirects(location: str, status: int = 307) -> Callable[[Handler], None]:
    return says(status, b"", {"Location": location})


def cut_after(count: int) -> Callable[[Handler], None]:
    """Send so many bytes of the good answer's body, from where the client asks, and break the connection."""

    def act(handler: Handler) -> None:
        blob = handler.server.image.blobs[handler.path.rpartition("/")[2]]
        found = re.fullmatch(r"bytes=(\d+)-\d*", handler.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        headers = {"Content-Length": str(len(blob) - start)}
        if found:
            headers["Content-Range"] = f"bytes {start}-{len(blob) - 1}/{len(blob)}"
        handler.head(206 if found else 200, headers)
        handler.wfile.write(blob[start : start + count])
        handler.cut()

    return act


def endless(declared: bool) -> Callable[[Handler], None]:
    """Send bytes until the client has had enough, with a good Content-Length or chunked without one."""

    def act(handler: Handler) -> None:
        blob = handler.server.image.blobs[handler.path.rpartition("/")[2]]
        head = {"Content-Length": str(len(blob))} if declared else {"Transfer-Encoding": "chunked"}
        handler.head(200, head)
        piece = bytes(1 << 16)
        while not handler.server.ended.is_set():
            handler.wfile.write(piece if declared else b"%x\r\n%s\r\n" % (len(piece), piece))

    return act


def trickles(every: float, body: bool) -> Callable[[Handler], None]:
    """Send a byte now and then: of the body, or of a header that never ends."""

    def act(handler: Handler) -> None:
        if body:
            handler.head(200, {"Content-Length": "1000000"})
        else:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Header: ")
        while not handler.server.ended.wait(every):
            handler.wfile.write(b"x")

    return act


def silent(handler: Handler) -> None:
    """Take the request and say nothing."""
    handler.wait()
