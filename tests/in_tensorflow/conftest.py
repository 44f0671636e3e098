"""Loads the room through the contract, which makes the import order safe, before any test module imports TensorFlow or Keras."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract
from triptych.core.batch import drawn
from triptych.core.initialize import parity_weights
from triptych.core.recipe import SGD, Recipe, Schedule
from triptych.core.spec import ResNetSpec, Spec, StageSpec

ROOM = contract.load("tensorflow")


def smallest(name: str) -> Spec:
    """Two stages of one narrow block: every kind of layer of `name`, traced in about a second."""
    spec = catalog.tiny(catalog.get_spec(name))
    if not isinstance(spec, ResNetSpec):
        return spec
    return dataclasses.replace(spec, stages=(StageSpec(1, 8, 1), StageSpec(1, 16, 2)))


@dataclasses.dataclass
class Subject:
    """What a planting gets: a model, its trainer (made on first use), spec and recipe."""

    model: Any
    recipe: Recipe

    @property
    def spec(self) -> Spec:
        """The model's spec."""
        return self.model.spec

    @functools.cached_property
    def trainer(self) -> Any:
        """A trainer of the model."""
        return ROOM.create_trainer(self.model, self.recipe)

    def batch(self, size: int = 4) -> tuple[Any, np.ndarray]:
        """Inputs and labels that fit the spec, with uneven statistics."""
        generator = np.random.default_rng(7)
        inputs = drawn(
            self.spec, size,
            lambda name, shape: generator.normal(0.3, 1.2, shape).astype(np.float32), lambda name, shape: generator.random(shape),
        )  # fmt: skip
        return inputs, generator.integers(0, self.spec.num_classes, size)


def make_subject(spec: Spec, recipe: Recipe, precision: str = "float64") -> Subject:
    """A model of `spec` with parity weights, on the CPU."""
    return Subject(ROOM.create_model(spec, parity_weights(spec, 1, precision), precision=precision, device="cpu"), recipe)


SGD_RECIPE = Recipe(SGD(), Schedule(0.1, 0, 10), global_batch_size=4, label_smoothing=0.1, ema_decay=0.9)


@pytest.fixture(scope="session")
def room() -> Any:
    """`triptych.in_tensorflow`."""
    return ROOM


@pytest.fixture(scope="session")
def subject() -> Callable[..., Subject]:
    """Makes subjects; those with equal arguments are fresh ones all the same."""

    def make(name: str, recipe: Recipe = SGD_RECIPE, precision: str = "float64", **options: Any) -> Subject:
        spec = smallest(name)
        return make_subject(catalog.with_options(spec, **options) if options else spec, recipe, precision)

    return make
