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
        return type(self) is type(other) and self.fields() == other.fields()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.fields().items())})"

    def fields(self) -> dict[str, Any]:
        """Return name → value, in the order of declaration."""
        return {name: getattr(self, name) for name in self._defaults}


class IdMapping(Value):
    """`size` consecutive ids: from `container_id` on inside are those from `host_id` on outside (user_namespaces(7))."""

    container_id: int
    host_id: int
    size: int
    _defaults = {"container_id": 0, "host_id": 0, "size": 1}
    __slots__ = tuple(_defaults)


class IdMap(Value):
    """The ids of a sandbox. `mode` is auto, single or keep; `uids` and `gids` are in the order in which they are written.

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
