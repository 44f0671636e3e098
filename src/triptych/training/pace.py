"""How fast a run goes: images a second, the share of time it waits for data, and when it will be done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

RECENT = 50
"""Steps over which the present pace is taken: enough to be steady, few enough to follow a change of image size."""
T = TypeVar("T")


@dataclass(slots=True)
class Pace:
    """Counts time in batches and steps only; evaluations and checkpoints count towards the time that is left."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    recent: deque[tuple[int, float, float]] = field(default_factory=lambda: deque(maxlen=RECENT))
    """(images, seconds, seconds of them waited for the batch) of each step."""
    began: float = field(default_factory=time.perf_counter)
    _asked: float = 0.0
    _waited: float = 0.0

    def batch(self, made: Iterator[T]) -> T:
        """The next batch; a step begins."""
        self._asked = time.perf_counter()
        batch = next(made)
        self._waited = time.perf_counter() - self._asked
        return batch

    def done(self, images: int) -> None:
        """The step on a batch of so many images has ended."""
        seconds = time.perf_counter() - self._asked
        self.recent.append((images, seconds, self._waited))
        self.images, self.seconds, self.waited = self.images + images, self.seconds + seconds, self.waited + self._waited

    def now(self) -> dict[str, float]:
        """Images a second and share of time waited, over the recent steps."""
        images, seconds, waited = map(sum, zip(*self.recent, strict=True))
        return {"images_per_second": images / seconds, "data_wait": waited / seconds}

    def overall(self) -> dict[str, float]:
        """The same over all steps, the first included, in which frameworks compile."""
        seconds = max(self.seconds, 1e-9)
        return {"images_per_second": self.images / seconds, "data_wait": self.waited / seconds}

    def left(self, steps: int) -> float:
        """Seconds that so many more steps will take, with what has come between steps so far."""
        between = (time.perf_counter() - self.began) / max(self.seconds, 1e-9)
        return steps * between * sum(seconds for _, seconds, _ in self.recent) / len(self.recent)
