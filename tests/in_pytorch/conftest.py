"""A bench of tiny models, batches and recipes for the PyTorch room."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize, philox
from triptych.core.batch import drawn
from triptych.core.contract import TrainingState
from triptych.core.recipe import SGD, AdamW, Recipe, Schedule
from triptych.core.spec import Spec


class Lab:
    """Makes what the tests need, on the CPU and in float64 unless asked otherwise."""

    def __init__(self) -> None:
        self.room = contract.load("pytorch")

    def spec(self, name: str, **options: Any) -> Spec:
        """A tiny spec of the catalogued family."""
        return catalog.with_options(catalog.tiny(catalog.get_spec(name)), **options)

    def weights(self, spec: Spec, precision: str = "float64") -> dict[str, np.ndarray]:
        """Parity weights with running statistics in which every term counts."""
        values = initialize.parity_weights(spec, 0, precision)
        for tensor in spec.tensors():
            noise = philox.uniform(f"statistics/{tensor.name}", tensor.shape)
            if tensor.kind == "running_mean":
                values[tensor.name] = noise.astype(precision)
            elif tensor.kind == "running_var":
                values[tensor.name] = (0.5 + noise).astype(precision)
            elif tensor.kind == "batch_counter":
                values[tensor.name] = np.array(7)
        return values

    def model(self, name: str, precision: str = "float64", **options: Any) -> Any:
        """A tiny model."""
        spec = self.spec(name, **options)
        return self.room.create_model(spec, self.weights(spec, precision), precision=precision, device="cpu")

    def batch(self, spec: Spec, size: int = 6) -> tuple[Any, np.ndarray]:
        """(inputs, floats in float64, labels (N,))."""
        inputs = drawn(spec, size, lambda name, shape: philox.normal(f"images{name}", shape), philox.uniform)
        return inputs, np.arange(size) % spec.num_classes

    def recipe(self, optimizer: SGD | AdamW | None = None, **options: Any) -> Recipe:
        """A recipe with label smoothing and EMA, unless `options` say otherwise."""
        schedule = Schedule(peak=0.1, warmup_steps=2, total_steps=10)
        return Recipe(optimizer or SGD(), schedule, 6, **{"label_smoothing": 0.1, "ema_decay": 0.9, **options})

    def trainer(self, name: str, optimizer: SGD | AdamW | None = None, **options: Any) -> Any:
        """A trainer of a new tiny model."""
        return self.room.create_trainer(self.model(name), self.recipe(optimizer, **options))

    def trainer_in_float32(self, name: str, **options: Any) -> Any:
        """A trainer of a new tiny model in float32."""
        return self.room.create_trainer(self.model(name, "float32"), self.recipe(**options))

    def run(self, trainer: Any, steps: int = 2, targets: np.ndarray | None = None) -> list[float]:
        """Losses of a few steps over six images."""
        images, labels = self.batch(trainer.model.spec)
        return [trainer.step(images, labels if targets is None else targets, rate) for rate in (0.05, 0.1, 0.02)[:steps]]

    def assert_close(self, left: TrainingState, right: TrainingState, tolerance: float) -> None:
        """Equal counts, and tensors within `tolerance` of the largest value of each."""
        assert (left.step, left.loss_scale, left.good_steps) == (right.step, right.loss_scale, right.good_steps)
        pairs = [(left.weights, right.weights), (left.ema, right.ema), *((left.slots[slot], right.slots[slot]) for slot in left.slots)]
        for x, y in pairs:
            assert list(x) == list(y)
            for name in x:
                assert np.abs(x[name] - y[name]).max() <= tolerance * max(np.abs(y[name]).max(), 1e-300), name


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The bench; the room is loaded in a safe order."""
    return Lab()


@pytest.fixture(scope="session")
def room(lab: Lab) -> Any:
    """`triptych.in_pytorch`."""
    return lab.room


@pytest.fixture(autouse=True)
def one_thread(lab: Lab) -> Iterator[None]:
    """Tiny models gain nothing from a second thread, and on a busy machine lose twentyfold by waiting for it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
