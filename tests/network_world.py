"""A small internet in namespaces of its own: ``unshare -Urnm python3 network_world.py RESOLV_CONF COMMAND…``.

Everything is on the loopback interface of a new net namespace: addresses from the documentation ranges, a server that
answers each connection with the address it came to, a resolver for a few names, one that a VPN would bring, and one
that is mute. COMMAND runs there, as the only one; its exit status is ours.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading

ADDRESSES = ("198.51.100.1", "198.51.100.2", "203.0.113.9")
PORTS = (80, 443)
#: name → addresses, seconds
NAMES = {
    "good.example": (["198.51.100.1"], 60),
    "www.good.example": (["198.51.100.2"], 60),
    "other.example": (["203.0.113.9"], 60),
    "metadata.example": (["169.254.169.254"], 60),
    "lan-only": (["198.51.100.2"], 60),
    "bare.example": ([], 60),
    "liar.example": (["10.93.0.9", "10.93.0.2"], 60),
}
BROKEN = "broken.example"  #: the resolver fails on it
MUTE = "127.0.0.8"
VPN = "127.0.0.7"
VPN_NAMES = {"lan.vpn.example": (["192.0.2.77"], 60)}


def encode(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"


def resolve(address: str, known: dict[str, tuple[list[str], int]], asked: list[str]) -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind((address, 53))
    while True:
        query, client = server.recvfrom(2000)
        position, labels = 12, []
        while query[position]:
            labels.append(query[position + 1 : position + 1 + query[position]].decode())
            position += 1 + query[position]
        name = ".".join(labels).lower()
        (kind,) = struct.unpack_from("!H", query, position + 1)
        asked.append(name)
        addresses, seconds = known.get(name, ([], 0))
        found = [socket.inet_aton(address) for address in addresses] if kind == 1 else []
        # An address of somebody else's in the answer: nobody asked for it, and it must not be let in
        stray = encode("other.example") + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton("203.0.113.9")
        records = [b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, seconds, 4) + data for data in found] + (
            [stray] if found else []
        )
        flags = 0x8180 if name in known else 0x8182 if name == BROKEN else 0x8183
        head = query[:2] + struct.pack("!HHHHH", flags, 1, len(records), 0, 0)
        server.sendto(head + query[12 : position + 5] + b"".join(records), client)


def serve(address: str, port: int) -> None:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    while True:
        client, _ = listener.accept()
        client.sendall(f"{address} {port}\n".encode())
        client.close()


def main() -> int:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for address in ADDRESSES:
        subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
    with open(sys.argv[1], "w") as stream:
        # On a busy machine an answer may take longer than the five seconds that are usual
        stream.write("options timeout:20\nnameserver 127.0.0.1\n")
    subprocess.run(["mount", "--bind", sys.argv[1], os.path.realpath("/etc/resolv.conf")], check=True)
    mute = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    mute.bind((MUTE, 53))
    asked: list[str] = []
    threading.Thread(target=resolve, args=("127.0.0.1", NAMES, asked), daemon=True).start()
    threading.Thread(target=resolve, args=(VPN, VPN_NAMES, asked), daemon=True).start()
    for address in ADDRESSES:
        for port in PORTS:
            threading.Thread(target=serve, args=(address, port), daemon=True).start()
    done = subprocess.run(sys.argv[2:], stdin=subprocess.DEVNULL)
    mute.close()
    with open(sys.argv[1] + ".asked", "w") as stream:
        json.dump(asked, stream)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
