"""Requests that arrive together are computed together: one batch after the other, from a queue that has an end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from triptych.serving.metrics import Metrics
from triptych.serving.options import Options, busy

IN_FLIGHT = 2
"""Batches that the model has been given: the one that it computes, and one to go on with when that is done. The event loop reads requests
then, and would come to the next batch only after some milliseconds, in which the model had nothing to do."""

Run = Callable[[Sequence[np.ndarray]], Awaitable[np.ndarray]]
"""Begin on arrays of images that make one batch; its logits (N, classes) are awaited."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The logits of one request, (N, classes); seconds it waited, seconds its batch took, and how many images that batch had."""

    logits: np.ndarray
    queue_seconds: float
    compute_seconds: float
    batch: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    images: np.ndarray
    answer: asyncio.Future[Answer]
    since: float


class Batcher:
    """The queue and who works on it. All methods belong to one event loop."""

    def __init__(self, run: Run, options: Options, metrics: Metrics) -> None:
        self._run, self._options, self._metrics = run, options, metrics
        self._queue: deque[_Waiting] = deque()
        self._images = 0
        self._in_flight: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_an_image = 0.0
        self._ended = 0.0

    async def stop(self) -> None:
        """End; who still waits is told that the server ends."""
        while self._queue:
            self._fail([self._queue.popleft()], busy("the server ends", 1))
        if self._timer is not None:
            self._timer.cancel()
        for work in self._in_flight:
            work.cancel()
        await asyncio.gather(*self._in_flight, return_exceptions=True)

    def submit(self, images: np.ndarray) -> asyncio.Future[Answer]:
        """Queue N images, at most a batch of them. Raises Refused (503) when the queue has no room."""
        if self._images + len(images) > self._options.max_queue:
            raise busy(f"{self._images} images wait already, of {self._options.max_queue} that may", self._images * self._seconds_an_image)
        waiting = _Waiting(images, asyncio.get_running_loop().create_future(), perf_counter())
        self._queue.append(waiting)
        self._count(len(images))
        self._go_on()
        return waiting.answer

    def _go_on(self) -> None:
        """Give a batch to the model that has room for it, when it is due: full, or its oldest image has waited for its time; else see to
        it later.

        At once, and not in a task, which would have its turn when all requests that are there are read: the model would have nothing to do
        meanwhile, and who reads requests nothing while it computes.
        """
        while self._queue and len(self._in_flight) < IN_FLIGHT:
            left = self._queue[0].since + self._options.max_delay - perf_counter()
            if self._images < self._options.max_batch and left > 0:
                self._timer = self._timer or asyncio.get_running_loop().call_later(left, self._time_is_up)
                return
            batch = self._take()
            if batch:
                began = perf_counter()
                logits = self._run([each.images for each in batch])
                self._in_flight.add(work := asyncio.get_running_loop().create_task(self._compute(batch, logits, began)))
                work.add_done_callback(self._done)

    def _time_is_up(self) -> None:
        self._timer = None
        self._go_on()

    def _take(self) -> list[_Waiting]:
        """The oldest requests that fit into one batch; who has gone meanwhile is left out."""
        batch: list[_Waiting] = []
        room = self._options.max_batch
        while self._queue and len(self._queue[0].images) <= room:
            waiting = self._queue.popleft()
            self._count(-len(waiting.images))
            if not waiting.answer.done():
                batch.append(waiting)
                room -= len(waiting.images)
        return batch

    async def _compute(self, batch: list[_Waiting], computed: Awaitable[np.ndarray], began: float) -> None:
        try:
            self._tell(batch, await computed, began)
        except Exception as error:  # whatever the runtime raises is the answer of all who were in the batch
            self._fail(batch, error)

    def _done(self, work: asyncio.Task[None]) -> None:
        self._in_flight.discard(work)
        if not work.cancelled():
            self._go_on()

    def _tell(self, batch: list[_Waiting], logits: np.ndarray, began: float) -> None:
        began = max(began, self._ended)  # of the batch before, which the model computed first
        self._ended = perf_counter()
        seconds, first = self._ended - began, 0
        self._seconds_an_image = seconds / len(logits)
        self._metrics.batch(len(logits), seconds)
        for each in batch:
            rows = logits[first : first + len(each.images)]
            first += len(each.images)
            self._metrics.queue_seconds.observe(began - each.since)
            if not each.answer.done():
                each.answer.set_result(Answer(rows, began - each.since, seconds, len(logits)))

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        for each in batch:
            if not each.answer.done():
                each.answer.set_exception(error)

    def _count(self, images: int) -> None:
        self._images += images
        self._metrics.queue.set(self._images)
