"""The lanes of JAX that a benchmark times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.errors import LaneMissing
from triptych.core.spec import Spec
from triptych.in_jax import stock
from triptych.in_jax.model import Model
from triptych.in_jax.train import create_trainer, executed


def contender(spec: Spec, weights: Mapping[str, np.ndarray], lane: str, mode: str) -> Contender:
    """`lane` (of `core.contender.LANES`, or stock) of `mode`, in float32 on the CPU. LaneMissing when there is none."""
    if lane == STOCK:
        return stock.contender(spec, weights, mode)
    execution = LANES[lane]
    if execution.compile:
        raise LaneMissing(f"JAX is compiled in every lane, and has no {lane}: see default and tuned")
    model = Model(spec, weights, "float32", "cpu")
    return inference(model, execution) if mode == "inference" else training(model, execution)


def inference(model: Model, execution: Execution) -> Contender:
    """Logits. `predict` reads them to the host, which waits for them."""
    module, variables = model.native
    model.native = executed(module, RECIPE, execution), variables
    return Contender(ready, lambda batch: model.predict(batch[0]), compiles=True, levers=levers(execution))


def training(model: Model, execution: Execution) -> Contender:
    """The loss of one whole step, which JAX hands back before the update is done: all that the step leaves is waited for."""
    trainer = create_trainer(model, RECIPE, execution)
    start = trainer.state()

    def run(batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        loss = trainer.step(*batch, RATE)
        trainer.wait()
        return np.asarray(loss)

    return Contender(ready, run, lambda: trainer.load_state(start), compiles=True, levers=levers(execution))


def levers(execution: Execution) -> tuple[str, ...]:
    """What an execution switches on."""
    return ("convolutions, max-pool and BatchNorm with gradients of our own",) * execution.tuned
