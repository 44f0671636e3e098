"""Requests that arrive together are computed together: one batch at a time, in a thread, from a queue that has an end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from triptych.serving.metrics import Metrics
from triptych.serving.options import Options, busy


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
    """The queue and who works on it. All methods belong to one event loop; `run` is called in a thread of its own."""

    def __init__(self, run: Callable[[np.ndarray], np.ndarray], options: Options, metrics: Metrics) -> None:
        self._run, self._options, self._metrics = run, options, metrics
        self._queue: deque[_Waiting] = deque()
        self._images = 0
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._work: asyncio.Task[None] | None = None
        self._seconds_an_image = 0.0

    def start(self) -> None:
        """Begin to work."""
        self._work = asyncio.get_running_loop().create_task(self._forever())

    async def stop(self) -> None:
        """End; who still waits is told that the server ends."""
        if self._work is not None:
            self._work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._work
        while self._queue:
            self._fail([self._queue.popleft()], busy("the server ends", 1))
        self._thread.shutdown(wait=False)

    async def warm_up(self, shape: tuple[int, ...]) -> None:
        """Compute the smallest and the largest batch once: what a runtime allocates first is there before the first request."""
        loop = asyncio.get_running_loop()
        for size in (1, self._options.max_batch):
            await loop.run_in_executor(self._thread, self._run, np.zeros((size, *shape), np.float32))

    def submit(self, images: np.ndarray) -> asyncio.Future[Answer]:
        """Queue N images, at most a batch of them. Raises Refused (503) when the queue has no room."""
        if self._images + len(images) > self._options.max_queue:
            raise busy(f"{self._images} images wait already, of {self._options.max_queue} that may", self._images * self._seconds_an_image)
        waiting = _Waiting(images, asyncio.get_running_loop().create_future(), perf_counter())
        self._queue.append(waiting)
        self._count(len(images))
        self._arrived.set()
        return waiting.answer

    async def _forever(self) -> None:
        while True:
            await self._gather()
            batch = self._take()
            if batch:
                await self._compute(batch)

    async def _gather(self) -> None:
        """Wait for a first request, then for company until the batch is full or its time is up."""
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        ends = self._queue[0].since + self._options.max_delay
        while self._images < self._options.max_batch and (left := ends - perf_counter()) > 0:
            self._arrived.clear()
            try:
                async with asyncio.timeout(left):
                    await self._arrived.wait()
            except TimeoutError:
                return

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

    async def _compute(self, batch: list[_Waiting]) -> None:
        began = perf_counter()
        try:
            logits = await asyncio.get_running_loop().run_in_executor(self._thread, self._joined, [each.images for each in batch])
        except Exception as error:  # whatever the runtime raises is the answer of all who were in the batch
            self._fail(batch, error)
            return
        seconds, first = perf_counter() - began, 0
        self._seconds_an_image = seconds / len(logits)
        self._metrics.batch(len(logits), seconds)
        for each in batch:
            rows = logits[first : first + len(each.images)]
            first += len(each.images)
            self._metrics.queue_seconds.observe(began - each.since)
            if not each.answer.done():
                each.answer.set_result(Answer(rows, began - each.since, seconds, len(logits)))

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        return self._run(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _fail(self, batch: list[_Waiting], error: Exception) -> None:
        for each in batch:
            if not each.answer.done():
                each.answer.set_exception(error)

    def _count(self, images: int) -> None:
        self._images += images
        self._metrics.queue.set(self._images)
