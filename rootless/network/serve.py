"""Entry of the resident programs: ``python -I -S -E serve.py ROLE``, with resident.py's descriptors. Warm."""

from __future__ import annotations

import marshal
import os
import sys

if not __package__:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from rootless import syscalls
from rootless.errors import SbxError
from rootless.network import resident


def main(role: str) -> int:
    """Do the work of `role` until ALIVE ends; report a failure on READY."""
    syscalls.close_on_exec_from(3)
    with open(resident.SETTINGS, "rb") as stream:
        settings = marshal.loads(stream.read())
    try:
        if role == "forwarder":
            from rootless.network import forward

            forward.serve(settings)
        elif role == "resolver":
            from rootless.network import resolver

            resolver.serve(settings)
        elif role == "guard":
            from rootless.network import guard

            guard.serve(settings)
        return 0
    except (SbxError, OSError) as error:
        known = error if isinstance(error, SbxError) else SbxError("network-failed", f"serve the network: {error}")
        try:
            os.write(resident.READY, "\0".join((known.code, known.message, known.hint)).encode("utf-8", "replace"))
        except OSError:
            sys.stderr.write(f"{known}\n")
        return 1
    finally:
        if link := settings.get("unlink"):
            _unlink(link)


def _unlink(link: str) -> None:
    """Delete what ends another helper program: if all that know of it were killed, somebody must."""
    try:
        os.unlink(link)
    except OSError:
        pass  # somebody was faster


if __name__ == "__main__":
    os._exit(main(sys.argv[1]))
