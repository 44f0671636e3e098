"""When a batch begins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence

import numpy as np

from triptych.serving.batching import Batcher
from triptych.serving.metrics import Metrics
from triptych.serving.options import Options


class Model:
    """Notes the size of each batch when it is begun, and answers when it is told to."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.answer = asyncio.Event()

    def run(self, parts: Sequence[np.ndarray]) -> Awaitable[np.ndarray]:
        self.begun.append(sum(map(len, parts)))
        return self._logits(self.begun[-1])

    async def _logits(self, count: int) -> np.ndarray:
        await self.answer.wait()
        return np.zeros((count, 10), np.float32)


def images(count: int) -> np.ndarray:
    return np.zeros((count, 3, 2, 2), np.float32)


def test_a_batch_begins_as_soon_as_it_is_due_and_the_next_one_gathers_meanwhile():
    """While requests are read one after the other, none of which lets others have a turn."""

    async def check() -> None:
        model = Model()
        batcher = Batcher(model.run, Options(max_batch=8, max_delay=0.02), Metrics("m"))
        answers = [batcher.submit(images(2))]
        assert model.begun == [], "it waits for company"
        time.sleep(0.03)
        answers.append(batcher.submit(images(3)))
        assert model.begun == [5], "time is up"
        answers += [batcher.submit(images(4)) for _ in range(5)]
        assert model.begun == [5, 8], "one that is computed, and a full one that the model has at hand"
        time.sleep(0.03)
        answers.append(batcher.submit(images(1)))
        assert model.begun == [5, 8], "no third one"
        model.answer.set()
        assert [len((await answer).logits) for answer in answers] == [2, 3, 4, 4, 4, 4, 4, 1]
        assert model.begun == [5, 8, 8, 5], "full at once, the rest when its time is up"
        await batcher.stop()

    asyncio.run(check())


def test_a_full_batch_does_not_wait():
    async def check() -> None:
        model = Model()
        batcher = Batcher(model.run, Options(max_batch=4, max_delay=60.0), Metrics("m"))
        batcher.submit(images(3))
        answer = batcher.submit(images(1))
        assert model.begun == [4]
        model.answer.set()
        assert (await answer).batch == 4
        await batcher.stop()

    asyncio.run(check())


def test_seconds_of_a_batch_begin_when_the_one_before_has_ended():
    """Else a batch that lay ready would be told as one that took twice as long."""

    async def check() -> None:
        turn = asyncio.Lock()

        async def one_by_one(count: int) -> np.ndarray:
            async with turn:
                await asyncio.sleep(0.2)
            return np.zeros((count, 10), np.float32)

        batcher = Batcher(lambda parts: one_by_one(sum(map(len, parts))), Options(max_batch=1), Metrics("m"))
        answers = await asyncio.gather(*(batcher.submit(images(1)) for _ in range(2)))
        assert all(0.15 < answer.compute_seconds < 0.35 for answer in answers)
        assert answers[1].queue_seconds > 0.15
        await batcher.stop()

    asyncio.run(check())
