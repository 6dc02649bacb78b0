"""Warm: blobs on their way up: mounted from another repository, in one request, or chunk by chunk.

The upload part of the OCI distribution specification 1.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from urllib.parse import urlencode

from rootless.errors import SbxError
from rootless.oci.attempts import Attempts
from rootless.oci.auth import scope
from rootless.oci.registry import Registry
from rootless.oci.transport import Response, TransportError

Read = Callable[[int, int], Iterable[bytes]]


class Uploads:
    """Puts blobs into the repository of `registry`, whose actions hold ``push``."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def mount(self, digest: str, source: str) -> bool:
        """Let the repository have a blob of the repository `source` at the same registry; False when it will not."""
        scopes = (*self._registry.scopes, scope(source, "pull"))
        query = urlencode({"mount": digest, "from": source})
        what = f"mount {digest} of {source} in {self._registry}"
        try:
            with self._registry.request("POST", f"blobs/uploads/?{query}", what, body=b"", scopes=scopes) as response:
                return response.status == 201
        except SbxError as error:
            # not allowed to read there: then it is uploaded
            if error.code in ("registry-unauthorized", "registry-denied"):
                return False
            raise

    def upload(self, digest: str, size: int, read: Read, chunk: int = 0) -> None:
        """Upload a blob; ``read(start, end)`` gives its bytes, again if asked again.

        In one request, or with `chunk` in requests of so many bytes, after each of which a broken connection goes on
        from what the registry says it has.
        """
        what = f"push {digest} to {self._registry}"
        attempts = Attempts(self._registry.patience)
        while True:
            try:
                if chunk:
                    return self._upload_chunks(digest, size, read, chunk, what)
                return self._upload_whole(digest, size, read, what)
            except TransportError as error:
                attempts.failed(error)

    def _start_upload(self, what: str) -> Response:
        response = self._registry.request("POST", "blobs/uploads/", what, body=b"")
        if response.status != 202:
            raise self._registry.unexpected(response, what)
        response.discard()
        return response

    def _upload_whole(self, digest: str, size: int, read: Read, what: str) -> None:
        url = self._registry.follow(self._start_upload(what))
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._registry.send("PUT", _with_digest(url, digest), what, headers, lambda: read(0, size)) as response:
            self._check_uploaded(response, what)

    def _upload_chunks(self, digest: str, size: int, read: Read, chunk: int, what: str) -> None:
        started = self._start_upload(what)
        url, place, attempts = self._registry.follow(started), 0, Attempts(self._registry.patience)
        # a registry may want larger chunks than we do: distribution specification 1.1
        least = started.headers.get("OCI-Chunk-Min-Length", "")
        chunk = max(chunk, int(least)) if least.isascii() and least.isdigit() and len(least) < 12 else chunk
        while place < size:
            end = min(place + chunk, size)
            try:
                url, reached = self._upload_chunk(url, place, end, read, what)
                if reached > size:
                    raise SbxError(
                        "registry-failed", f"{what}: the registry says that it has {reached} of {size} bytes"
                    )
                if reached <= place:
                    raise TransportError("registry-failed", f"{what}: the registry takes no more", again=True)
                place = reached
                attempts.progress()
            except TransportError as error:
                attempts.failed(error)
                url, place = self._upload_state(url, what)
        headers = {"Content-Length": "0", "Content-Type": "application/octet-stream"}
        with self._registry.send("PUT", _with_digest(url, digest), what, headers, b"") as response:
            self._check_uploaded(response, what)

    def _upload_chunk(self, url: str, start: int, end: int, read: Read, what: str) -> tuple[str, int]:
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(end - start),
            "Content-Range": f"{start}-{end - 1}",
        }
        with self._registry.send("PATCH", url, what, headers, lambda: read(start, end)) as response:
            if response.status == 416:
                return self._upload_state(url, what)
            if response.status not in (202, 204):
                raise self._refused(response, what)
            return self._registry.follow(response), _upload_end(response, end, what)

    def _upload_state(self, url: str, what: str) -> tuple[str, int]:
        """Return where an upload goes on, and how many bytes of it the registry has."""
        with self._registry.send("GET", url, what) as response:
            if response.status not in (202, 204):
                raise self._refused(response, what)
            if response.headers.get("Location"):
                url = self._registry.follow(response)
            return url, _upload_end(response, 0, what)

    def _check_uploaded(self, response: Response, what: str) -> None:
        if response.status not in (201, 204):
            raise self._refused(response, what)

    def _refused(self, response: Response, what: str) -> SbxError:
        if response.status == 404:
            # docker's registry forgets an upload whose connection broke in the middle of a chunk: from the start, then
            return TransportError("registry-broken", f"{what}: the registry has forgotten the upload", again=True)
        return self._registry.unexpected(response, what)


def _with_digest(url: str, digest: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{urlencode({'digest': digest})}"


def _upload_end(response: Response, default: int, what: str) -> int:
    """Return how many bytes of an upload the registry has, from its Range header (``0-LAST``)."""
    header = response.headers.get("Range", "").removeprefix("bytes=")
    if not header:
        return default
    first, dash, last = header.partition("-")
    if first != "0" or not dash or not (last.isascii() and last.isdigit() and len(last) < 20):
        raise SbxError("registry-failed", f"{what}: the registry says that it has {header[:80]!r}")
    # "0-0" is what it says of nothing, and of one byte: the byte sent twice is then refused by its place
    return int(last) + 1 if int(last) else 0
