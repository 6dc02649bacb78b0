"""The resolver in a sandbox's net namespace: it passes questions on to whom the host asks at that moment. Warm.

For pasta, which reads the host's resolv.conf once, when it starts; slirp4netns reads it again itself. And what the
guard, which answers only some, is made of.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from rootless.network import dns, names, resident
from rootless.network.within import Within

_WORKERS = 16
_LARGEST = 4096  #: bytes of an answer by UDP; what is larger is asked for again by TCP
_TRUNCATED = 0x0200


def serve(settings: dict[str, Any]) -> None:
    """Answer, where that is asked for, until ALIVE ends."""
    acts = Resolver([]).listen(Within()) if settings["answers"] else {}
    os.write(resident.READY, b".")
    os.close(resident.READY)
    serve_until_the_end(acts)


def serve_until_the_end(acts: dict[int, Callable[[], None]]) -> None:
    """Do what is due for each descriptor in `acts` that is readable, until ALIVE ends and nothing else is due."""
    while True:
        ready = select.select([*acts, resident.ALIVE], [], [])[0]
        for fd in ready:
            if fd in acts:
                acts[fd]()
        if ready == [resident.ALIVE]:
            return


class Workers:
    """Threads for work that waits for others; no more than there is work for, and not without bounds.

    A ThreadPoolExecutor does as much, but loads logging: 12 ms, which every launch with pasta would wait for.
    """

    def __init__(self) -> None:
        self._due: deque[Callable[[], None]] = deque()
        self._some = threading.Semaphore(0)
        self._idle = threading.Semaphore(0)
        self._count = 0

    def submit(self, work: Callable[[], None]) -> None:
        """Have `work` done, as soon as somebody is free for it. By one thread alone; it must not raise."""
        self._due.append(work)
        self._some.release()
        if not self._idle.acquire(blocking=False) and self._count < _WORKERS:
            self._count += 1
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._some.acquire()
            self._due.popleft()()
            self._idle.release()


class Resolver:
    """Answers questions that are asked in one net namespace: by asking `servers`, or whom the host asks."""

    def __init__(self, servers: list[str]) -> None:
        self._servers = servers
        self._workers = Workers()

    def listen(self, within: Within) -> dict[int, Callable[[], None]]:
        """Return what to do for which descriptor, once sockets for questions are bound there."""
        udp = within.listen("udp", names.LOCAL, 53)
        tcp = within.listen("tcp", names.LOCAL, 53)
        return {udp.fileno(): lambda: self._take_datagram(udp), tcp.fileno(): lambda: self._take_connection(tcp)}

    def upstream(self) -> list[str]:
        """Return the resolvers that were asked for, or those that the host has now."""
        if self._servers:
            return self._servers
        try:
            with open("/etc/resolv.conf", encoding="utf-8", errors="replace") as stream:
                words = [line.split() for line in stream]
        except OSError:
            return []
        return [line[1].partition("%")[0] for line in words if len(line) > 1 and line[0] == "nameserver"][:3]

    def _take_datagram(self, server: socket.socket) -> None:
        """Answer one question by UDP, in a thread of its own."""
        query, client = server.recvfrom(_LARGEST)

        def work() -> None:
            answer = self._answer(query)
            if len(answer) > _LARGEST:
                answer = (
                    answer[:2]
                    + struct.pack("!H", struct.unpack_from("!H", answer, 2)[0] | _TRUNCATED)
                    + dns.reply(query, dns.question(query), 0)[4:]
                )
            try:
                server.sendto(answer, client)
            except OSError:
                pass  # it has gone away

        self._workers.submit(work)

    def _take_connection(self, server: socket.socket) -> None:
        """Answer the questions of one TCP connection, in a thread of its own."""
        client, _ = server.accept()

        def work() -> None:
            with client, client.makefile("rb") as stream:
                client.settimeout(10)
                try:
                    while len(size := stream.read(2)) == 2:
                        answer = self._answer(stream.read(struct.unpack("!H", size)[0]))
                        client.sendall(struct.pack("!H", len(answer)) + answer)
                except OSError:
                    pass

        self._workers.submit(work)

    def _answer(self, query: bytes) -> bytes:
        try:
            asked = dns.question(query)
        except ValueError:
            return dns.reply(query.ljust(12, b"\0"), None, dns.FORMAT_ERROR)
        try:
            return self._answer_question(query, asked)
        except OSError:  # of ours: no descriptor left, or nobody left in the sandbox's net namespace
            return dns.reply(query, asked, dns.SERVER_FAILURE)

    def _answer_question(self, query: bytes, asked: dns.Question) -> bytes:
        return dns.ask(query, asked, self.upstream()) or dns.reply(query, asked, dns.SERVER_FAILURE)
