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
        answers += [batcher.submit(images(4)) for _ in range(3)]
        assert model.begun == [5], "one at a time"
        model.answer.set()
        assert [len((await answer).logits) for answer in answers] == [2, 3, 4, 4, 4]
        assert model.begun == [5, 8, 4], "full at once, the rest when its time is up"
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
