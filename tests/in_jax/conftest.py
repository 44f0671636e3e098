"""A bench of very small models, batches and recipes for the JAX room. XLA compiles every pass: the fewer layers, the better."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize, philox
from triptych.core.batch import drawn
from triptych.core.recipe import SGD, AdamW, Recipe, Schedule
from triptych.core.spec import ResNetSpec, Spec, StageSpec


class Lab:
    """Makes what the tests need, on the CPU and in float64 unless asked otherwise."""

    def __init__(self) -> None:
        self.room = contract.load("jax")
        self.kept: dict[Any, Any] = {}

    def spec(self, name: str, **options: Any) -> Spec:
        """A spec of the catalogued family: of a ResNet, the stem and two stages of one block."""
        spec = catalog.tiny(catalog.get_spec(name))
        if isinstance(spec, ResNetSpec):
            stages = (StageSpec(1, 8, 1), StageSpec(1, 16, 2))
            spec = catalog.with_options(dataclasses.replace(spec, stages=stages), image_size=16 if spec.stem.max_pool else 8)
        return catalog.with_options(spec, **options)

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
        """A new, very small model."""
        spec = self.spec(name, **options)
        return self.room.create_model(spec, self.weights(spec, precision), precision=precision, device="cpu")

    def shared(self, name: str) -> Any:
        """A model compiled once for all tests that leave it as it is."""
        if name not in self.kept:
            self.kept[name] = self.model(name)
        return self.kept[name]

    def batch(self, spec: Spec, size: int = 6) -> tuple[Any, np.ndarray]:
        """(inputs, floats in float64, labels (N,))."""
        inputs = drawn(spec, size, lambda name, shape: philox.normal(f"images{name}", shape), philox.uniform)
        return inputs, np.arange(size) % spec.num_classes

    def recipe(self, optimizer: SGD | AdamW | None = None, **options: Any) -> Recipe:
        """A recipe with label smoothing and EMA, unless `options` say otherwise."""
        schedule = Schedule(peak=0.1, warmup_steps=2, total_steps=10)
        return Recipe(optimizer or SGD(), schedule, 6, **{"label_smoothing": 0.1, "ema_decay": 0.9, **options})

    def trainer(self, name: str, optimizer: SGD | AdamW | None = None, **options: Any) -> Any:
        """A trainer of a new, very small model."""
        return self.room.create_trainer(self.model(name), self.recipe(optimizer, **options))


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The bench; the room is loaded in a safe order."""
    return Lab()
