"""A real registry on loopback: Debian's docker-registry, plain or with TLS, htpasswd or token authentication.

Also what goes with it: authorities and certificates made by openssl(1), a token server, and small images as OCI layouts
that skopeo(1) copies there.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import subprocess
import tarfile
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

USER, PASSWORD = "ada", "correct horse"
#: bcrypt of PASSWORD
_HTPASSWD = f"{USER}:$2b$04$ocVBc4nM8eeo.PwSLEyzCugWwZ0PDJrSO8xJn2M2AP6NQyRzd3XQO\n"
_LISTENING = re.compile(rb"listening on \S*?:(\d+)")


# ── the registry ──────────────────────────────────────────────────────────────────────────────────────────────────────


class RealRegistry:
    """docker-registry as a child process, listening when the constructor returns. Use it as a context."""

    def __init__(self, folder: Path, extra: Mapping[str, Any] | None = None, tls: Pair | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
            "http": {"addr": "127.0.0.1:0"},
            **(extra or {}),
        }
        if tls:
            config["http"]["tls"] = {"certificate": str(tls.certificate), "key": str(tls.key)}
        path = folder / "config.yml"
        path.write_text(json.dumps(config))  # YAML holds JSON
        self._process = subprocess.Popen(
            ["docker-registry", "serve", path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.host = f"127.0.0.1:{self._read_port()}"
        # what it says from here on must go somewhere, or it blocks
        threading.Thread(target=self._drain, daemon=True).start()

    def _read_port(self) -> int:
        assert self._process.stderr
        for line in self._process.stderr:
            if found := _LISTENING.search(line):
                return int(found[1])
        raise AssertionError("docker-registry ended before it listened")

    def _drain(self) -> None:
        assert self._process.stderr
        for _ in self._process.stderr:
            pass

    def __enter__(self) -> RealRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def htpasswd(folder: Path) -> dict[str, Any]:
    """Return the registry's settings for USER with PASSWORD."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "htpasswd").write_text(_HTPASSWD)
    return {"auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}}


# ── certificates ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Pair(NamedTuple):
    """A certificate and its key, as PEM files."""

    certificate: Path
    key: Path


def make_authority(folder: Path) -> Pair:
    """Make a certificate authority of our own."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = Pair(folder / "ca.crt", folder / "ca.key")
    _openssl(
        "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test authority",
        "-keyout", pair.key, "-out", pair.certificate,
    )  # fmt: skip
    return pair


def make_certificate(folder: Path, authority: Pair, names: Sequence[str] = ("IP:127.0.0.1", "DNS:localhost")) -> Pair:
    """Make a server's certificate for `names`, signed by `authority`."""
    folder.mkdir(parents=True, exist_ok=True)
    pair = Pair(folder / "server.crt", folder / "server.key")
    request, extensions = folder / "server.csr", folder / "server.ext"
    extensions.write_text(f"subjectAltName={','.join(names)}\n")
    _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=server", "-keyout", pair.key, "-out", request)
    _openssl(
        "x509", "-req", "-in", request, "-CA", authority.certificate, "-CAkey", authority.key, "-CAcreateserial",
        "-days", "2", "-extfile", extensions, "-out", pair.certificate,
    )  # fmt: skip
    return pair


def _openssl(*arguments: str | Path, input: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *arguments], input=input, capture_output=True, check=True).stdout


# ── the token server ──────────────────────────────────────────────────────────────────────────────────────────────────


class TokenServer(ThreadingHTTPServer):
    """Gives tokens that docker-registry believes: pull for anybody, push for USER with PASSWORD.

    `asked` holds each request's query; a refresh token that is PASSWORD counts as USER. `life` is that of a token.
    """

    daemon_threads = True
    SERVICE = "test registry"

    def __init__(self, folder: Path, life: int = 300) -> None:
        super().__init__(("127.0.0.1", 0), _TokenHandler)
        self.signer = make_authority(folder)
        self.life = life
        self.asked: list[dict[str, list[str]]] = []
        self.realm = f"http://127.0.0.1:{self.server_address[1]}/token"
        self._thread = threading.Thread(target=self.serve_forever, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def settings(self) -> dict[str, Any]:
        """Return the registry's settings that send clients here."""
        bundle = str(self.signer.certificate)
        return {
            "auth": {
                "token": {"realm": self.realm, "service": self.SERVICE, "issuer": "tests", "rootcertbundle": bundle}
            }
        }

    def token(self, scopes: Sequence[str], user: str) -> str:
        """Return a signed token (RFC 7519) for what of `scopes` is allowed to `user`."""
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = [action for action in actions.split(",") if action == "pull" or user]
            access.append({"type": kind, "name": name, "actions": allowed})
        pem = self.signer.certificate.read_text()
        chain = "".join(line for line in pem.splitlines() if not line.startswith("-----"))
        now = int(time.time())
        claims = {
            "iss": "tests", "aud": self.SERVICE, "sub": user, "iat": now, "nbf": now - 5, "exp": now + self.life,
            "jti": str(now), "access": access,
        }  # fmt: skip
        parts = [json.dumps(part).encode() for part in ({"typ": "JWT", "alg": "RS256", "x5c": [chain]}, claims)]
        unsigned = b".".join(_base64url(part) for part in parts)
        signature = _openssl("dgst", "-sha256", "-sign", self.signer.key, input=unsigned)
        return (unsigned + b"." + _base64url(signature)).decode()


class _TokenHandler(BaseHTTPRequestHandler):
    server: TokenServer

    def do_GET(self) -> None:
        self._answer(parse_qs(urlsplit(self.path).query), self._basic_user())

    def do_POST(self) -> None:
        fields = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        fields["scope"] = [scope for text in fields.get("scope", []) for scope in text.split()]
        self._answer(fields, USER if fields.get("refresh_token") == [PASSWORD] else None)

    def _basic_user(self) -> str | None:
        """Return the user, empty for none, or None for one who has not the password."""
        header = self.headers.get("Authorization", "")
        if not header:
            return ""
        return USER if base64.b64decode(header.removeprefix("Basic ")).decode() == f"{USER}:{PASSWORD}" else None

    def _answer(self, fields: dict[str, list[str]], user: str | None) -> None:
        self.server.asked.append(fields)
        body = b"{}" if user is None else self._token(fields.get("scope", []), user)
        self.send_response(401 if user is None else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _token(self, scopes: Sequence[str], user: str) -> bytes:
        return json.dumps({"token": self.server.token(scopes, user), "expires_in": self.server.life}).encode()

    def log_message(self, *_: object) -> None:
        pass


def _base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


# ── images ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def layer_tar(files: Mapping[str, bytes]) -> bytes:
    """Return a tar with `files`; a name that ends with a slash is a folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.mode = 0o755
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class SmallImage:
    """An image in memory: `blobs` by digest, the manifest's bytes, and the digests of its layers."""

    MANIFEST = "application/vnd.oci.image.manifest.v1+json"
    LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
    CONFIG = "application/vnd.oci.image.config.v1+json"

    def __init__(self, *layers: Mapping[str, bytes], architecture: str = "amd64") -> None:
        tars = [layer_tar(layer) for layer in layers]
        packed = [gzip.compress(tar, mtime=0) for tar in tars]
        self.config = json.dumps({
            "architecture": architecture, "os": "linux", "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [digest(tar) for tar in tars]},
        }).encode()  # fmt: skip
        self.layers = [digest(blob) for blob in packed]
        self.diff_ids = [digest(tar) for tar in tars]
        self.blobs = {digest(blob): blob for blob in [*packed, self.config]}
        self.document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": self.MANIFEST,
            "config": self._descriptor(self.CONFIG, self.config),
            "layers": [self._descriptor(self.LAYER, blob) for blob in packed],
        }

    @property
    def manifest(self) -> bytes:
        return json.dumps(self.document).encode()

    def _descriptor(self, media_type: str, data: bytes) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def write_layout(self, folder: Path, tag: str = "latest") -> Path:
        """Write an OCI image layout with this image under `tag`."""
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        for name, data in {**self.blobs, digest(self.manifest): self.manifest}.items():
            (blobs / name.removeprefix("sha256:")).write_bytes(data)
        entry = self._descriptor(self.MANIFEST, self.manifest)
        entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return folder


def copy_to(registry: str, name: str, layout: Path, tag: str = "latest", *options: str) -> None:
    """Copy the image `tag` of `layout` to the plain `registry` with skopeo."""
    subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", *options,
         f"oci:{layout}:{tag}", f"docker://{registry}/{name}"],
        check=True, capture_output=True,
    )  # fmt: skip
