"""Clients of `triptych serve`, many in one thread: each sends one request at a time and waits for its answer.

A thread a client would spend as much of the machine as the server that it measures; here a request costs its client some 50 us.
"""

from __future__ import annotations

import collections
import heapq
import re
import select
import socket
import time
from dataclasses import dataclass, field

LENGTH, RETRY = re.compile(rb"\r\ncontent-length: (\d+)", re.I), re.compile(rb"\r\nretry-after: (\d+)", re.I)
UNANSWERED = 0
"""The status of a request whose connection ended without an answer."""
REFUSED = 503
LAST_SECONDS = 60.0
"""How long answers are waited for at the end."""


@dataclass(slots=True, order=True)
class Client:
    """One connection, what has arrived of its answer, and since when it waits for that."""

    socket: socket.socket = field(compare=False)
    since: float = 0.0
    answer: bytes = b""


@dataclass(slots=True)
class Load:
    """What clients were told: seconds of each answer 200, statuses, answers a second; and the processor time of the clients themselves."""

    seconds: list[float] = field(default_factory=list)
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    answers_per_second: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def failed(self) -> int:
        """Requests that were neither computed nor refused before they were accepted."""
        return sum(count for status, count in self.statuses.items() if status not in (200, REFUSED))


def load(port: int, sent: bytes, clients: int, seconds: float) -> Load:
    """Have so many clients ask a port of this machine for some seconds, and wait for the answers that are not there yet."""
    asking = Clients(port, sent, clients)
    try:
        return asking.run(seconds)
    finally:
        asking.close()


class Clients:
    """`count` clients that send the same request."""

    def __init__(self, port: int, sent: bytes, count: int) -> None:
        self._port, self._sent, self._poll = port, sent, select.epoll()
        self._by_descriptor: dict[int, Client] = {}
        self._later: list[tuple[float, Client]] = []
        self._load = Load()
        for _ in range(count):
            self._connect()

    def run(self, seconds: float) -> Load:
        """Ask, then wait for a minute at most."""
        load, began, computed = self._load, time.perf_counter(), time.process_time()
        for client in list(self._by_descriptor.values()):
            self._send(client)
        while (now := time.perf_counter()) < began + seconds:
            while self._later and self._later[0][0] <= now:
                self._send(heapq.heappop(self._later)[1])
            self._turn(again=True)
        load.answers_per_second = load.statuses[200] / (time.perf_counter() - began)
        while self._waiting() and time.perf_counter() < began + seconds + LAST_SECONDS:
            self._turn(again=False)
        load.statuses[UNANSWERED] += self._waiting()
        load.cpu_seconds = time.process_time() - computed
        return load

    def _waiting(self) -> int:
        return sum(bool(client.since) for client in self._by_descriptor.values())

    def close(self) -> None:
        """Close every connection."""
        for client in self._by_descriptor.values():
            client.socket.close()
        self._poll.close()

    def _turn(self, again: bool) -> None:
        for descriptor, _ in self._poll.poll(0.05):
            client = self._by_descriptor[descriptor]
            try:
                more = client.socket.recv(65536)
            except ConnectionError:
                more = b""
            if more:
                client.answer += more
                self._read(client, again)
            else:
                self._lost(client, again)

    def _read(self, client: Client, again: bool) -> None:
        head, found, body = client.answer.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not found or length is None or len(body) < int(length[1]):
            return
        now, status = time.perf_counter(), int(head[9:12])
        self._load.statuses[status] += 1
        if status == 200:
            self._load.seconds.append(now - client.since)
        client.answer, client.since = b"", 0.0
        retry = RETRY.search(head)
        if retry is not None:
            heapq.heappush(self._later, (now + int(retry[1]), client))
        elif again:
            self._send(client)

    def _lost(self, client: Client, again: bool) -> None:
        """The connection ended; the client opens another one, for its next request where it waited for an answer."""
        waited, client.answer, client.since = bool(client.since), b"", 0.0
        self._load.statuses[UNANSWERED] += waited
        del self._by_descriptor[client.socket.fileno()]
        client.socket.close()
        self._connect(client)
        if again and waited:
            self._send(client)

    def _connect(self, client: Client | None = None) -> None:
        connection = socket.create_connection(("127.0.0.1", self._port), 60)
        client = client or Client(connection)
        client.socket = connection
        self._by_descriptor[connection.fileno()] = client
        self._poll.register(connection.fileno(), select.EPOLLIN)

    def _send(self, client: Client) -> None:
        client.since = time.perf_counter()
        client.socket.sendall(self._sent)
