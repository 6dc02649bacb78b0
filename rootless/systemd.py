"""The user's systemd, over D-Bus: a scope of its own for a sandbox. Outside; warm.

org.freedesktop.systemd1(5). Reached only when a limit was asked for and the caller's own cgroup is not delegated.
"""

from __future__ import annotations

import os
from typing import Any

from rootless.errors import SbxError, printable

BUS, PATH, MANAGER = "org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"
SECONDS = 25.0  #: the D-Bus convention for an answer


def start_scope(name: str, pids: list[int]) -> None:
    """Have systemd make the transient scope `name`, delegated, with the processes `pids` in it; return when it is.

    The scope ends with its last process. Raises SbxError ``cgroup-missing`` where systemd cannot be reached or refuses.
    """
    with _connect() as bus:
        from jeepney import MatchRule
        from jeepney.bus_messages import message_bus

        ends = MatchRule(type="signal", interface=MANAGER, member="JobRemoved", path=PATH)
        _call(bus, message_bus.AddMatch(ends))
        _call(bus, _message("Subscribe"))
        properties = [
            ("Description", ("s", "sbx sandbox")),
            ("Delegate", ("b", True)),
            ("PIDs", ("au", pids)),
            ("CollectMode", ("s", "inactive-or-failed")),
        ]
        with bus.filter(ends) as jobs:
            (job,) = _call(bus, _message("StartTransientUnit", "ssa(sv)a(sa(sv))", (name, "fail", properties, [])))
            while True:
                _, path, _, result = bus.recv_until_filtered(jobs, timeout=SECONDS).body
                if path == job:
                    break
        if result != "done":
            raise SbxError(
                "cgroup-missing",
                f"start scope {name}: systemd says {printable(result)}",
                "see: journalctl --user -n 20",
            )


def attach(unit: str, below: str, pid: int) -> None:
    """Have systemd move the process `pid` into the cgroup `below` of `unit`, which is delegated."""
    with _connect() as bus:
        _call(bus, _message("AttachProcessesToUnit", "ssau", (unit, below, [pid])))


def _connect() -> Any:
    from jeepney.io.blocking import open_dbus_connection

    address = "SYSTEM" if os.geteuid() == 0 else _session_address()
    try:
        return open_dbus_connection(address)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise SbxError(
            "cgroup-missing",
            f"ask your systemd for a cgroup: no connection to {printable(address)}: {printable(str(error))}",
            f"log in (su and sudo do not start your systemd), or as root: loginctl enable-linger {os.geteuid()}",
        ) from None


def _session_address() -> str:
    """Return the address of the bus of the user's systemd, also where the login did not set the variables."""
    if address := os.environ.get("DBUS_SESSION_BUS_ADDRESS", ""):
        return address
    return f"unix:path={os.environ.get('XDG_RUNTIME_DIR') or f'/run/user/{os.geteuid()}'}/bus"


def _message(method: str, signature: str = "", body: tuple[object, ...] = ()) -> Any:
    from jeepney import DBusAddress, new_method_call

    return new_method_call(DBusAddress(PATH, BUS, MANAGER), method, signature or None, body)


def _call(bus: Any, message: Any) -> tuple[Any, ...]:
    from jeepney import MessageType

    try:
        reply = bus.send_and_get_reply(message, timeout=SECONDS)
    except (OSError, TimeoutError) as error:
        raise SbxError("cgroup-missing", f"ask systemd for a cgroup: {printable(str(error))}") from None
    if reply.header.message_type is MessageType.error:
        said = reply.body[0] if reply.body else "refused"
        raise SbxError(
            "cgroup-missing", f"ask systemd for a cgroup: {printable(str(said))}", "see: journalctl --user -n 20"
        )
    return tuple(reply.body)
