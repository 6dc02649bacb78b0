"""The values that travel: Image, Rootfs, IdMapping, Mount, SandboxSpec, RunRequest. Either side; imports nothing.

Plain classes with __slots__: the launch path cannot pay for dataclasses (14 ms). Every value is complete and explicit:
the same SandboxSpec gives the same sandbox.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Value:
    """Named fields with defaults: ``_defaults`` lists them; keyword arguments set them; unknown names are an error."""

    __slots__: tuple[str, ...] = ()
    _defaults: dict[str, Any] = {}

    def __init__(self, **fields: Any) -> None:
        for name, default in self._defaults.items():
            value = fields.pop(name, default)
            # A list or dict default is copied, so that no two values share one.
            setattr(self, name, type(value)(value) if value is default and isinstance(value, list | dict) else value)
        if fields:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(fields)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Value) and type(self) is type(other) and self.fields() == other.fields()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.fields().items())})"

    def fields(self) -> dict[str, Any]:
        """Return name → value, in the order of declaration."""
        return {name: getattr(self, name) for name in self._defaults}


class IdMapping(Value):
    """`size` consecutive ids: from `container_id` on inside are `host_id` and up outside: user_namespaces(7)."""

    container_id: int
    host_id: int
    size: int
    _defaults = {"container_id": 0, "host_id": 0, "size": 1}
    __slots__ = tuple(_defaults)


class IdMap(Value):
    """The ids of a sandbox. `mode` is auto, single or keep; `uids` and `gids` are in the order of writing.

    A *single* map holds one id, the caller's: every file belongs to it, and chown is only pretended.
    """

    mode: str
    uids: list[IdMapping]
    gids: list[IdMapping]
    _defaults = {"mode": "auto", "uids": [], "gids": []}
    __slots__ = tuple(_defaults)

    @property
    def key(self) -> str:
        """A text that is equal for two maps exactly when the same unpacked layer serves both."""
        if self.mode == "single":
            return "single"
        return " ".join(f"{m.container_id}:{m.host_id}:{m.size}" for m in [*self.uids, IdMapping(size=0), *self.gids])


class Image(Value):
    """An image in the store, ready to run: what a launch needs of its config, and its unpacked layers.

    `reference` is how it was asked for; `digest` that of its manifest. `layers` are names of folders below
    ``paths.data()/layers``, the top one first, as overlayfs wants them. The rest are the fields of the OCI image
    configuration's ``config``, checked: text without NUL, environment entries with ``=``.
    """

    reference: str
    digest: str
    layers: list[str]
    env: list[str]
    entrypoint: list[str]
    cmd: list[str]
    working_dir: str
    user: str
    stop_signal: str
    _defaults = {
        "reference": "", "digest": "", "layers": [], "env": [], "entrypoint": [], "cmd": [], "working_dir": "",
        "user": "", "stop_signal": "",
    }  # fmt: skip
    __slots__ = tuple(_defaults)


class Rootfs(Value):
    """Where the root filesystem comes from.

    `kind` is ``layers`` (unpacked layers below ``paths.data()/layers``, the top one first), ``folder`` (the plain
    folder `path`, under a writable layer that vanishes) or ``host`` (the host's own root, all of it read-only).
    """

    kind: str
    layers: list[str]
    path: str
    read_only: bool
    _defaults = {"kind": "layers", "layers": [], "path": "", "read_only": False}
    __slots__ = tuple(_defaults)


class Mount(Value):
    """One mount that was asked for. `kind` is bind or tmpfs; `source` is absolute; `options` are a tmpfs's own."""

    kind: str
    source: str
    target: str
    read_only: bool
    noexec: bool
    options: dict[str, str]
    _defaults = {"kind": "bind", "source": "", "target": "", "read_only": False, "noexec": False, "options": {}}
    __slots__ = tuple(_defaults)


class Port(Value):
    """A published port: what comes to `host` at `address` goes to `inside`; `host` 0 is chosen when it is published."""

    address: str
    host: int
    inside: int
    protocol: str
    _defaults = {"address": "127.0.0.1", "host": 0, "inside": 0, "protocol": "tcp"}
    __slots__ = tuple(_defaults)


class Network(Value):
    """How a sandbox is joined to the world.

    `backend` is a row of network.BACKENDS. `peer` is the sandbox whose net namespace is joined, or the network whose
    member this is. `ipv6` tells whether the host has it, `host_loopback` whether the host's 127.0.0.1 can be reached,
    at the address `host` where that is not the gateway's usual one.
    `guarded` sandboxes reach only what `allow` names (`learn`: everything), and what they ask for is recorded in `log`;
    `servers` answer questions, or the host's resolvers.
    With the host's own network, `tcp_ports` (first, last) are all that TCP connects to, unless empty.
    """

    backend: str
    peer: str
    ipv6: bool
    host_loopback: bool
    host: str
    ports: list[Port]
    guarded: bool
    allow: list[str]
    tcp_ports: list[tuple[int, int]]
    learn: bool
    log: str
    servers: list[str]
    _defaults = {
        "backend": "none", "peer": "", "ipv6": False, "host_loopback": False, "host": "", "ports": [], "guarded": False,
        "allow": [],
        "tcp_ports": [], "learn": False, "log": "", "servers": [],
    }  # fmt: skip
    __slots__ = tuple(_defaults)


class SandboxSpec(Value):
    """A sandbox, complete and explicit: the same spec makes the same sandbox.

    name            of the sandbox, and of its folder
    folder          absolute path of that folder, which gets upper, work and root
    idmap           the ids; nested_users: the sandbox has a user namespace of its own inside the mapped one
    namespaces      names that are made anew; `joined` are another sandbox's; the others are shared with the host
    clock_offsets   clock → seconds, with a time namespace of its own
    hostname        empty keeps the host's
    rootfs, mounts  what is where; masked and read_only are absolute paths inside
    fresh           of proc and sysfs: whether a new one can be mounted, else the host's is bound
    files           path inside → text: /etc/hosts, /etc/resolv.conf, /etc/hostname
    devices         absolute paths of further device nodes of the host
    argv, env       of the command, in bytes as they will be passed; `otherwise` is tried if there is no argv[0]
    workdir         absolute path inside
    user, group     name or number, looked up inside
    limits          resource limits: name → (soft, hard)
    capabilities    mask of 1 << CAP_*
    landlock        the command can reach nothing but the sandbox's tree, where the kernel can see to that
    filter_name, filter   the compiled seccomp filter; empty is none
    sysctls         name → value, written before /proc/sys becomes read-only
    terminal        a pty inside as stdin, stdout (and stderr if redirect_stderr)
    pass_fds        descriptors that stay open
    init            pid 1 is ours; else it is the command
    resources       file of a cgroup → value; best_effort tells whether they may be missing
    accounted       a cgroup is wanted for its counters, where there can be one
    inspected       the command waits just before it begins, so that what is in force can be read
    stop_signal     number of the signal that tells it to end; stop_timeout seconds later it is killed
    labels          what the caller noted about it
    notices         what the user should be told, a line each
    """

    name: str
    id: str
    image: str
    folder: str
    idmap: IdMap
    nested_users: bool
    deny_groups: bool
    namespaces: list[str]
    joined: list[str]
    clock_offsets: dict[str, int]
    hostname: str
    rootfs: Rootfs
    mounts: list[Mount]
    fresh_proc: bool
    fresh_sys: bool
    masked: list[str]
    read_only: list[str]
    files: dict[str, str]
    devices: list[str]
    shm_size: int
    argv: list[bytes]
    otherwise: bytes
    env: dict[bytes, bytes]
    workdir: str
    user: str
    group: str
    umask: int
    limits: dict[str, tuple[int, int]]
    oom_score: int
    capabilities: int
    no_new_privileges: bool
    filter_name: str
    filter: bytes
    keyring: bool
    landlock: bool
    sysctls: dict[str, str]
    terminal: bool
    redirect_stderr: bool
    pass_fds: list[int]
    init: bool
    resources: dict[str, str]
    best_effort: bool
    accounted: bool
    inspected: bool
    network: Network
    stop_signal: int
    stop_timeout: float
    labels: dict[str, str]
    notices: list[str]
    _defaults = {
        "name": "", "id": "", "image": "", "folder": "", "idmap": None, "nested_users": True, "deny_groups": True,
        "namespaces": [], "joined": [], "clock_offsets": {}, "hostname": "", "rootfs": None, "mounts": [],
        "fresh_proc": True, "fresh_sys": True, "masked": [], "read_only": [], "files": {}, "devices": [],
        "shm_size": 64 << 20, "argv": [], "otherwise": b"", "env": {},
        "workdir": "/", "user": "0", "group": "", "umask": 0o022, "limits": {},
        "oom_score": 0, "capabilities": 0, "no_new_privileges": True, "filter_name": "", "filter": b"",
        "keyring": True, "landlock": True, "sysctls": {}, "terminal": False, "redirect_stderr": True, "pass_fds": [],
        "init": True, "resources": {}, "best_effort": False, "accounted": False, "inspected": False,
        "network": None, "stop_signal": 15, "stop_timeout": 10.0, "labels": {}, "notices": [],
    }  # fmt: skip
    __slots__ = tuple(_defaults)


def pack(value: object) -> object:
    """Return `value` as plain data that marshal can write: a Value becomes its class's name and its fields."""
    if isinstance(value, Value):
        return ("Value", type(value).__name__, {name: pack(getattr(value, name)) for name in value._defaults})
    if isinstance(value, list) and value and isinstance(value[0], Value):  # all of one kind
        return [pack(item) for item in value]
    return value


def unpack(data: object) -> Any:
    """Return the value that `pack` made `data` of."""
    if isinstance(data, tuple) and len(data) == 3 and data[0] == "Value":
        return _CLASSES[data[1]](**{name: unpack(field) for name, field in data[2].items()})
    if isinstance(data, list):
        return [unpack(item) for item in data]
    return data


_CLASSES = {kind.__name__: kind for kind in (IdMapping, IdMap, Image, Rootfs, Mount, Port, Network, SandboxSpec)}
