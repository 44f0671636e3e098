"""The lanes of TensorFlow that a benchmark times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.folding import fold
from triptych.core.spec import Spec
from triptych.in_tensorflow import stock
from triptych.in_tensorflow.model import Model, create_model
from triptych.in_tensorflow.train import create_trainer


def contender(spec: Spec, weights: Mapping[str, np.ndarray], lane: str, mode: str) -> Contender:
    """`lane` (of `core.contender.LANES`, or stock) of `mode`, in float32 on the CPU. LaneMissing when there is none."""
    if lane == STOCK:
        return stock.contender(spec, weights, mode)
    execution = LANES[lane]
    if mode == "inference" and execution.tuned:
        spec, weights = fold(spec, weights)
    model = create_model(spec, weights, precision="float32", device="cpu")
    return inference(model, execution) if mode == "inference" else training(model, execution)


def inference(model: Model, execution: Execution) -> Contender:
    """Logits, by one `tf.function`. Tuned, of a model without BatchNorm: constant weights, unless XLA compiles it."""
    if execution == Execution():
        return Contender(ready, lambda batch: model.predict(batch[0]), compiles=True)
    function = compiled(model) if execution.compile else frozen(model)

    def run(batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        model.check_images(batch[0])
        with model.running():
            return np.asarray(function(model.tensor(batch[0])).numpy())

    freezing = ("constant weights",) * (not execution.compile)
    return Contender(ready, run, compiles=True, levers=(*("folded BatchNorm",) * execution.tuned, *freezing, *xla(execution)))


def compiled(model: Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """The eval pass, compiled by XLA."""
    return tf.function(lambda images: model.native(images, training=False), autograph=False, jit_compile=True)


def frozen(model: Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """The eval pass with its weights as constants of the graph, as TensorFlow freezes it for inference.

    Grappler then fuses every convolution with its bias, the shortcut's addition and ReLU, and oneDNN lays out the weights once.
    """
    function = tf.function(lambda images: model.native(images, training=False), autograph=False)
    signature = tf.TensorSpec((None, *model.spec.input_shape), model.precision)
    with model.running():
        constant = convert_variables_to_constants_v2(function.get_concrete_function(signature))
    return lambda images: constant(images)[0]


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
    return ("fused BatchNorm",) * execution.tuned + xla(execution)


def xla(execution: Execution) -> tuple[str, ...]:
    """The lever of compiling."""
    return ("XLA (jit_compile)",) * execution.compile


@contextlib.contextmanager
def phases() -> Iterator[dict[str, float]]:
    """While open, seconds of `trace` as TensorFlow's counter of graph building tells them, on the way out; XLA has no clock here."""
    seconds: dict[str, float] = {}
    before = _built_microseconds()
    try:
        yield seconds
    finally:
        seconds["trace"] = (_built_microseconds() - before) / 1e6


def _built_microseconds() -> int:
    """Since the process began; of functions inside functions once."""
    # No public name: imported here, so that a version without it costs a benchmark and not the room.
    from tensorflow.python.eager.polymorphic_function import tracing_compilation

    return int(tracing_compilation._graph_building_time_counter.get_cell().value())
