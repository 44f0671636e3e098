"""The clients that load a server, and the document that shows what they were told."""

from __future__ import annotations

import collections
import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterator

import clients
import pytest
import serve_load
from measuring import RESULTS, marked

RECORDED = json.loads((RESULTS / "serve" / "load.json").read_text())
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 503 Busy\r\nretry-after: 60\r\ncontent-length: 0\r\n\r\n"
BROKEN = b"HTTP/1.1 500 Broken\r\ncontent-length: 0\r\n\r\n"


def test_the_document_has_the_tables_of_the_record() -> None:
    text = serve_load.DOCUMENT.read_text()
    for name, content in serve_load.blocks(RECORDED).items():
        assert marked(name, content) in text, "benchmarks/serve_load.py --write-doc"


def test_no_accepted_request_has_failed_on_record() -> None:
    parts = [*RECORDED["rows"].values(), RECORDED["saturation"], *RECORDED["kills"].values()]
    assert [part["failed"] for part in parts] == [0] * len(parts)
    assert all(part["worker_restarts"] == len(part["kills"]) > 0 for part in RECORDED["kills"].values())
    assert RECORDED["saturation"]["worker_restarts"] == 0


@contextlib.contextmanager
def answering(answer: Callable[[int], bytes]) -> Iterator[tuple[int, collections.Counter[int]]]:
    """A port where request number n, of four bytes, is answered by `answer(n)`, in two pieces, and what was answered, by status.

    An empty answer ends the connection.
    """
    count, answered = iter(range(10**9)), collections.Counter[int]()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.read(4):
                said = answer(next(count))
                answered[int(said[9:12] or 0)] += 1
                self.wfile.write(said[:10])
                time.sleep(0.001)
                self.wfile.write(said[10:])
                if not said:
                    break

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1], answered
        server.shutdown()
        thread.join(10)


def test_answers_are_counted_by_what_they_say() -> None:
    with answering(lambda number: BROKEN if number % 3 == 2 else OK) as (port, answered):
        load = clients.load(port, b"ask!", 5, 0.3)
    assert load.statuses == answered
    assert len(load.seconds) == load.statuses[200] >= 3
    assert load.failed == load.statuses[500] >= 1


def test_who_is_refused_waits_as_told_and_has_not_failed() -> None:
    with answering(lambda number: BUSY if number < 2 else OK) as (port, answered):
        load = clients.load(port, b"ask!", 3, 0.3)
    assert load.statuses == answered
    assert load.statuses[503] == 2, "they were to come back after a minute"
    assert load.statuses[200] >= 1
    assert load.failed == 0


def test_a_connection_that_ends_is_a_failure_and_its_client_asks_again() -> None:
    with answering(lambda number: b"" if number == 0 else OK) as (port, answered):
        load = clients.load(port, b"ask!", 1, 1.0)
    assert load.statuses == answered
    assert load.statuses[clients.UNANSWERED] == load.failed == 1
    assert load.statuses[200] >= 1


def test_a_slope_is_of_what_comes_after_the_first_tenth() -> None:
    points = [(float(second), 5e6 if second < 10 else 1e6 + 1000 * second) for second in range(100)]
    told = serve_load.flatness(points)
    assert (told["start"], told["end"]) == (5e6, 1e6 + 99_000)
    assert told["slope_per_minute"] == pytest.approx(60_000)
