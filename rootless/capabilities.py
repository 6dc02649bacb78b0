"""Names of capabilities, the default set, and what --cap-add and --cap-drop make of it. Either side; pure.

A set of capabilities is an int with the bit ``1 << number`` for each: what capset(2) takes and /proc/PID/status shows.
"""

from __future__ import annotations

from rootless.errors import SbxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: capabilities(7), at the index that is its number in <linux/capability.h>
NAMES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
    "CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
    "CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
)  # fmt: skip
NUMBERS = {name: number for number, name in enumerate(NAMES)}
EVERY = (1 << len(NAMES)) - 1

#: What root inside keeps. Less than docker's: no NET_RAW (ping needs none: ping_group_range), MKNOD (void in a user
#: namespace) or AUDIT_WRITE.
DEFAULT = 0
for _name in ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP",
              "SETUID", "SYS_CHROOT"):  # fmt: skip
    DEFAULT |= 1 << NUMBERS["CAP_" + _name]


def parse(words: Iterable[str]) -> int:
    """Return the set that `words` name: with or without ``CAP_``, in any case, ALL for every one, commas between.

    Raises SbxError ``capability-unknown`` for a name that is not one.
    """
    mask = 0
    for word in ",".join(words).split(","):
        name = word.strip().upper()
        if not name:
            continue
        if name in ("ALL", "CAP_ALL"):
            mask |= EVERY
            continue
        number = NUMBERS.get(name if name.startswith("CAP_") else "CAP_" + name)
        if number is None:
            raise SbxError(
                "capability-unknown", f"read capability {word.strip()}: no such capability",
                "names are as in capabilities(7), such as NET_RAW, or ALL",
            )  # fmt: skip
        mask |= 1 << number
    return mask


def adjust(base: int, add: Iterable[str], drop: Iterable[str]) -> int:
    """Return `base` without what `drop` names and with what `add` names.

    ``ALL`` in one of them yields to single names in the other, in either direction: ``--cap-drop ALL --cap-add KILL``
    leaves KILL, ``--cap-add ALL --cap-drop KILL`` all but KILL. The same name in both, or ALL in both, has no meaning
    and raises SbxError ``capability-conflict``.
    """
    added, dropped = parse(add), parse(drop)
    both = added & dropped
    if both and (added == EVERY) == (dropped == EVERY):
        which = "ALL" if both == EVERY else ", ".join(names(both))
        raise SbxError("capability-conflict", f"add and drop capability {which}: one excludes the other")
    if dropped == EVERY:
        return added
    if added == EVERY:
        return EVERY & ~dropped
    return base & ~dropped | added


def names(mask: int) -> list[str]:
    """Return the names of the capabilities in `mask`, in the order of their numbers."""
    return [name for number, name in enumerate(NAMES) if mask >> number & 1]
