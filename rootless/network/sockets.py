"""Warm: the filter that leaves a command no way around Landlock's TCP ports, for the host's own network.

Landlock looks at connect(2) on a TCP socket and at nothing else: Multipath TCP and SMC reach the same ports by other
sockets, and a first packet with data (TCP Fast Open) goes out without a connect. So what is neither TCP nor UDP is
refused, as by a kernel that does not have it, and so is that flag. UDP is left, for names are asked for by it.
"""

from __future__ import annotations

from rootless import bpf, syscalls
from rootless.bpf import Node, Word
from rootless.errors import SbxError
from rootless.steps import Child, Step

_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000  # SECCOMP_RET_*; with the errno
_ENOSYS, _EPROTONOSUPPORT, _EOPNOTSUPP, _EAFNOSUPPORT = 38, 93, 95, 97
#: AUDIT_ARCH_*, and the numbers of socket, sendto, sendmsg, sendmmsg
_MACHINES = {"x86_64": (0xC000003E, 41, 44, 46, 307), "aarch64": (0xC00000B7, 198, 206, 211, 269)}
_IO_URING_SETUP = 425  # everywhere
_X32 = 0x40000000  # the other numbers of x86_64; there are none as high elsewhere
_WHOLE = 0xFFFFFFFF

_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM, _TYPE = 1, 2, 0xF  # without SOCK_CLOEXEC and SOCK_NONBLOCK
_TCP, _UDP, _ICMP, _ICMPV6 = 6, 17, 1, 58
_MSG_FASTOPEN = 0x20000000


class HoldSockets(Step):
    """Load the filter."""

    __slots__ = ("program",)

    def __init__(self) -> None:
        self.program = filter_program(syscalls.MACHINE)

    def describe(self) -> str:
        return "refuse sockets that are neither TCP nor UDP"

    def execute(self, child: Child) -> None:
        syscalls.seccomp_load(self.program)


def filter_program(machine: str) -> bytes:
    """Return the filter for `machine` (uname's word). Raises SbxError ``network-conflict`` where it is unknown."""
    if machine not in _MACHINES:
        raise SbxError("network-conflict", f"allow TCP ports with --net host: not on a {machine}",
                       "use --net slirp4netns")  # fmt: skip
    architecture, socket, sendto, sendmsg, sendmmsg = _MACHINES[machine]
    calls = {
        socket: _sockets(),
        sendto: _without_flag(3),
        sendmsg: _without_flag(2),
        sendmmsg: _without_flag(3),
        _IO_URING_SETUP: _REFUSE | _ENOSYS,
    }
    number = Word(bpf.NUMBER, _WHOLE)
    decision: Node | int = _ALLOW
    for call, verdict in calls.items():
        decision = Node(number, bpf.EQUAL, call, verdict, decision)
    decision = Node(number, bpf.AT_LEAST, _X32, _REFUSE | _ENOSYS, decision)
    native = Node(Word(bpf.ARCHITECTURE, _WHOLE), bpf.EQUAL, architecture, decision, _REFUSE | _ENOSYS)
    return bpf.encode(bpf.assemble(native))


def _sockets() -> Node | int:
    """socket(2): families that lead nowhere, and of the internet's TCP, UDP and ping."""
    stream = _one_of(_argument(2), (0, _TCP), _ALLOW, _REFUSE | _EPROTONOSUPPORT)
    datagram = _one_of(_argument(2), (0, _UDP, _ICMP, _ICMPV6), _ALLOW, _REFUSE | _EPROTONOSUPPORT)
    kind = Node(_argument(1, _TYPE), bpf.EQUAL, _DGRAM, datagram, _REFUSE | _EPROTONOSUPPORT)
    internet = Node(_argument(1, _TYPE), bpf.EQUAL, _STREAM, stream, kind)
    others = _one_of(_argument(0), (_UNIX, _NETLINK), _ALLOW, _REFUSE | _EAFNOSUPPORT)
    return _one_of(_argument(0), (_INET, _INET6), internet, others)


def _without_flag(argument: int) -> Node:
    return Node(_argument(argument), bpf.BITS, _MSG_FASTOPEN, _REFUSE | _EOPNOTSUPP, _ALLOW)


def _argument(number: int, mask: int = _WHOLE) -> Word:
    """The low half, which is all that the kernel takes of an int; both machines are little-endian."""
    return Word(bpf.ARGUMENTS + 8 * number, mask)


def _one_of(word: Word, values: tuple[int, ...], yes: Node | int, no: Node | int) -> Node | int:
    for value in values:
        no = Node(word, bpf.EQUAL, value, yes, no)
    return no
