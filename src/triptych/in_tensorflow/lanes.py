"""The lanes of TensorFlow that a benchmark times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.errors import LaneMissing
from triptych.core.spec import Spec
from triptych.in_tensorflow import stock
from triptych.in_tensorflow.model import Model, create_model
from triptych.in_tensorflow.train import create_trainer


def contender(spec: Spec, weights: Mapping[str, np.ndarray], lane: str, mode: str) -> Contender:
    """`lane` (of `core.contender.LANES`, or stock) of `mode`, in float32 on the CPU. LaneMissing when there is none."""
    if lane == STOCK:
        return stock.contender(spec, weights, mode)
    model = create_model(spec, weights, precision="float32", device="cpu")
    return inference(model, LANES[lane]) if mode == "inference" else training(model, LANES[lane])


def inference(model: Model, execution: Execution) -> Contender:
    """Logits, by one `tf.function`."""
    if execution.tuned:
        raise LaneMissing("TensorFlow's room tunes training only: time its inference in the lanes default and compiled")
    if not execution.compile:
        return Contender(ready, lambda batch: model.predict(batch[0]), compiles=True)
    function = tf.function(lambda images: model.native(images, training=False), autograph=False, jit_compile=True)

    def run(batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        model.check_images(batch[0])
        with model.running():
            return np.asarray(function(model.tensor(batch[0])).numpy())

    return Contender(ready, run, compiles=True, levers=levers(execution))


def training(model: Model, execution: Execution) -> Contender:
    """The loss of one whole step."""
    trainer = create_trainer(model, RECIPE, execution)
    start = trainer.state()
    return Contender(
        ready,
        lambda batch: np.asarray(trainer.step(batch[0], batch[1], RATE)),
        lambda: trainer.load_state(start),
        compiles=True,
        levers=levers(execution),
    )


def levers(execution: Execution) -> tuple[str, ...]:
    """What an execution switches on."""
    return ("fused BatchNorm",) * execution.tuned + ("XLA (jit_compile)",) * execution.compile
