"""What a benchmark times: one lane of one framework, ready to take turns. The rooms make them; nothing here knows a framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from triptych.core.batch import Inputs
from triptych.core.contract import Execution
from triptych.core.recipe import SGD, Recipe, Schedule

MODES = ("inference", "training_step")
WITH_DATA = "training_step_with_data"
"""What a benchmark also times: a training step together with the making of its batch by the room's own input pipeline."""
STOCK = "stock"
"""The lane of what a user of the framework writes without us: torchvision, keras.applications, plain Flax."""
LANES = {
    "default": Execution(),
    "tuned": Execution(tuned=True),
    "compiled": Execution(compile=True),
    "tuned_compiled": Execution(compile=True, tuned=True),
}
"""Our own lanes. JAX knows no other way than compiled and has the first two."""

RATE = 0.01
RECIPE = Recipe(SGD(momentum=0.9, nesterov=False, weight_decay=1e-4), Schedule(RATE, 0, 1, kind="constant"), 1, decay_norm_and_bias=True)
"""The training step that is timed: the one that torchvision's reference, `keras.optimizers.SGD` and `optax.sgd` can all express."""


def _nothing(weights: Mapping[str, np.ndarray]) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Contender:
    """One lane, built and holding its weights.

    `stage(inputs, labels)`, not timed, gives what `run` takes: for our lanes the numpy arrays themselves, a batch and (N,), which `run`
    checks and converts; for stock ones native tensors that are ready. `run(batch)`, timed, returns the logits (N, classes) or the
    loss () as numpy when *all* that it computes is there, new weights included. `start_from(weights)` begins the training anew from these
    canonical weights, in its first state but for them; it does nothing to inference, nor to a lane with weights of its own.
    """

    stage: Callable[[Any, np.ndarray], Any]
    run: Callable[[Any], np.ndarray]
    start_from: Callable[[Mapping[str, np.ndarray]], None] = _nothing
    compiles: bool = False
    """Whether the first call traces or compiles; an eager lane's first call only warms up."""
    levers: tuple[str, ...] = ()
    """What the lane switches on, in the framework's own terms."""
    unequal: str | None = None
    """Why the lane computes another model, and its outputs are not held to ours."""
    macs: int | None = None
    """Multiply-accumulates of a forward pass of one image, where they are not the spec's."""


def ready(inputs: Inputs, labels: np.ndarray) -> tuple[Inputs, np.ndarray]:
    """The staging of our own lanes: none."""
    return inputs, labels
