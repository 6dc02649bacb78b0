"""Networks of several sandboxes: what is written down of them. Outside.

    networks/NAME/config    marshal, written and renamed: subnet; ipv6; internal, or net, the way out's back end; host,
                            the address of the host's loopback where members may reach that
    networks/NAME/lock      held (flock(2)) while its keeper is looked for or started
    networks/NAME/keeper    the keeper's socket, while sandboxes are in the network

A network that nobody is in is its config alone.
"""

from __future__ import annotations

import fcntl
import marshal
import os

from rootless import paths
from rootless.errors import SbxError, printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SOCKET = "keeper"
_PATIENCE = 3.0  #: seconds for a keeper's answer; who asks a resolver for a name tries again after five
_RESERVED = ("auto", "none", "host", "slirp4netns", "pasta", "bridge", "default", "sandbox", "private")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def folder(name: str) -> str:
    """Return the folder of the network `name`, which need not exist. Raises SbxError ``name-invalid``."""
    if not name or set(name) - _NAME or not name[0].isalnum() or len(name) > 63 or name in _RESERVED:
        raise SbxError("name-invalid", f"bad network name {printable(name)!r}: it is letters, digits, '_', '.' and "
                       "'-', at most 63, and not that of a back end")  # fmt: skip
    return f"{paths.data()}/networks/{name}"


def exists(name: str) -> bool:
    """Whether there is a network `name`."""
    return not set(name) - _NAME and name not in _RESERVED and os.path.exists(f"{paths.data()}/networks/{name}/config")


def read(name: str) -> dict[str, Any]:
    """Return the config of the network `name`. Raises SbxError ``network-unknown``."""
    try:
        with open(folder(name) + "/config", "rb") as stream:
            config = marshal.loads(stream.read())
    except (OSError, ValueError, EOFError, TypeError):
        raise SbxError("network-unknown", f"find network {printable(name)}: there is none of that name",
                       f"make it: sbx network create {printable(name)}; or see: sbx network ls") from None  # fmt: skip
    assert isinstance(config, dict)
    return {"net": "" if config["internal"] else "slirp4netns", "host": "", **config}


def members(folder: str) -> list[dict[str, Any]]:
    """Return who is in the network of that folder: name and addresses of each; nobody where it has no keeper."""
    import socket

    above = os.open(folder, os.O_PATH | os.O_CLOEXEC)
    link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link.settimeout(_PATIENCE)
    try:
        link.connect(f"/proc/self/fd/{above}/{SOCKET}")
        link.send(marshal.dumps({"act": "list"}, 4))
        found = marshal.loads(link.recv(1 << 20))["members"]
        assert isinstance(found, list)
        return found
    except (OSError, EOFError):
        return []
    finally:
        link.close()
        os.close(above)


def names() -> list[str]:
    """Return the names of the networks."""
    try:
        return sorted(name for name in os.listdir(f"{paths.data()}/networks") if exists(name))
    except OSError:
        return []


class Lock:
    """Hold the network's lock for a block; nobody else starts or ends its keeper meanwhile."""

    __slots__ = ("_fd", "_path")

    def __init__(self, name: str) -> None:
        self._path = folder(name) + "/lock"

    def __enter__(self) -> None:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)
