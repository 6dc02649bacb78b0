"""Warm: what we know of a host before we speak to it: its URL, whether it is loopback, its proxy, its authorities."""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from rootless.errors import SbxError, printable

URL_LIMIT = 16 << 10  #: signed URLs of object stores are long; what is longer than this is no URL any more


def certificate_folders(host: str) -> list[str]:
    """Return the folders of certificates for `host` (``name:port``) that exist: containers-certs.d(5)."""
    home = os.environ.get("HOME", "")
    config = os.environ.get("XDG_CONFIG_HOME", "") or f"{home}/.config"
    bases = ["/etc/docker/certs.d", "/etc/containers/certs.d"]
    if home:
        bases = [f"{config}/sbx/certs.d", f"{config}/containers/certs.d", f"{home}/.docker/certs.d", *bases]
    return [folder for base in bases if os.path.isdir(folder := f"{base}/{host}")]


def load_certificates(context: ssl.SSLContext, folder: str) -> None:
    """Trust each ``*.crt`` as an authority; show each ``X.cert`` with ``X.key`` as our own certificate."""
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        try:
            if name.endswith(".crt"):
                context.load_verify_locations(cafile=path)
            elif name.endswith(".cert"):
                context.load_cert_chain(path, path.removesuffix(".cert") + ".key")
        except (OSError, ssl.SSLError) as error:
            raise SbxError("certificate-invalid", f"load certificate {path}: {error.strerror or error}") from None


# ── addresses ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_url(url: str) -> SplitResult:
    """Return the parts of `url`, or raise SbxError ``url-invalid``: http(s), a host, no user, only printable ASCII."""
    bad = SbxError("url-invalid", f"bad URL {printable(url[:200])!r}")
    if len(url) > URL_LIMIT or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise bad
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise bad from None
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or port == 0:
        raise bad
    return parts


def origin(url: str) -> str:
    """Return scheme, host and port of `url` in one spelling, to compare."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def is_loopback(host: str) -> bool:
    """Tell whether `host` (``name``, ``name:port`` or ``[address]:port``) names this machine's loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def proxy_for(url: str, environ: Mapping[str, str]) -> str:
    """Return the proxy that the environment names for `url`, or nothing.

    As Go and curl have it: ``https_proxy`` and ``http_proxy``, then ``all_proxy``, in lower or upper case; ``no_proxy``
    holds host names (and what is below them), addresses, networks, each with or without a port, or ``*``. Loopback is
    never asked for through a proxy.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)

    def setting(name: str) -> str:
        return environ.get(name, "") or environ.get(name.upper(), "")

    proxy = setting(f"{parts.scheme}_proxy") or setting("all_proxy")
    if not proxy or is_loopback(parts.netloc) or _bypassed(host, port, setting("no_proxy")):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        scheme = proxy.partition(":")[0]
        raise SbxError(
            "proxy-invalid", f"use proxy from the environment: unknown scheme {scheme!r}", "use an http:// proxy"
        )
    return proxy


def _bypassed(host: str, port: int, rules: str) -> bool:
    for rule in rules.replace(",", " ").split():
        if rule == "*":
            return True
        name, colon, number = rule.rpartition(":")
        if colon and number.isdigit() and "]" not in number and (name.count(":") == 0 or name.endswith("]")):
            if int(number) != port:
                continue
            rule = name
        if _matches(host, rule.strip("[]").lower()):
            return True
    return False


def _matches(host: str, rule: str) -> bool:
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule, strict=False)
    except ValueError:
        rule = rule.removeprefix("*").lstrip(".")
        return bool(rule) and (host == rule or host.endswith("." + rule))
