"""Set the sandbox's IPv6 address and default route, by rtnetlink(7). Inside.

A user-mode stack would announce them, but whenever it comes to that: the command would start without.
"""

from __future__ import annotations

import os
import sys

from rootless import syscalls
from rootless.steps import Child, Step

_RTM_NEWADDR, _RTM_NEWROUTE = 20, 24
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_CREATE, _NLM_F_EXCL = 1, 4, 0x400, 0x200
_IFA_ADDRESS, _IFA_LOCAL, _RTA_OIF, _RTA_GATEWAY = 1, 2, 4, 5
_AF_INET6, _IFA_F_NODAD, _EEXIST = 10, 2, 17
_RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST = 254, 4, 0, 1


class Configure(Step):
    """Give `interface` the address (a /64), and the route to everywhere through `gateway`."""

    __slots__ = ("address", "gateway", "interface")

    def __init__(self, interface: str, address: str, gateway: str) -> None:
        self.interface = interface
        self.address = address
        self.gateway = gateway

    def describe(self) -> str:
        return f"set the address {self.address} on {self.interface}"

    def execute(self, child: Child) -> None:
        index = syscalls.interface_index(self.interface)
        own, gateway = syscalls.packed_address(self.address), syscalls.packed_address(self.gateway)
        link = syscalls.netlink_route_socket()
        try:
            # struct ifaddrmsg: family, prefix length, flags, scope, index
            header = bytes((_AF_INET6, 64, _IFA_F_NODAD, _RT_SCOPE_UNIVERSE)) + _word(index)
            _ask(link, _RTM_NEWADDR, header + _attribute(_IFA_LOCAL, own) + _attribute(_IFA_ADDRESS, own))
            # struct rtmsg: family, lengths of destination and source, tos, table, protocol, scope, type, flags
            header = bytes(
                (_AF_INET6, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, _RT_SCOPE_UNIVERSE, _RTN_UNICAST)
            ) + _word(0)
            _ask(link, _RTM_NEWROUTE, header + _attribute(_RTA_GATEWAY, gateway) + _attribute(_RTA_OIF, _word(index)))
        finally:
            os.close(link)


def _ask(link: int, kind: int, body: bytes) -> None:
    """Send one request and wait for its answer, an error number. That something is there already is none."""
    flags = _NLM_F_REQUEST | _NLM_F_ACK | _NLM_F_CREATE | _NLM_F_EXCL
    os.write(link, _word(16 + len(body)) + _half(kind) + _half(flags) + _word(1) + _word(0) + body)
    number = -int.from_bytes(os.read(link, 4096)[16:20], sys.byteorder, signed=True)
    if number not in (0, _EEXIST):
        raise OSError(number, os.strerror(number))


def _attribute(kind: int, value: bytes) -> bytes:
    return _half(4 + len(value)) + _half(kind) + value


def _word(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def _half(value: int) -> bytes:
    return value.to_bytes(2, sys.byteorder)
