"""The lanes of TensorFlow that a benchmark times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.folding import fold
from triptych.core.recipe import initial_state
from triptych.core.spec import Spec
from triptych.in_tensorflow import stock
from triptych.in_tensorflow.inference import program
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
    """Logits, by one `tf.function`."""
    if execution == Execution():
        return Contender(ready, lambda batch: model.predict(batch[0]), compiles=True)
    run, pulled = program(model, execution)
    return Contender(ready, lambda batch: run(batch[0]), compiles=True, levers=pulled)


def training(model: Model, execution: Execution) -> Contender:
    """The loss of one whole step."""
    trainer = create_trainer(model, RECIPE, execution)
    return Contender(
        ready,
        lambda batch: np.asarray(trainer.step(batch[0], batch[1], RATE)),
        lambda weights: trainer.load_state(initial_state(RECIPE, weights, model.spec)),
        compiles=True,
        levers=levers(execution),
    )


def levers(execution: Execution) -> tuple[str, ...]:
    """What an execution switches on."""
    return ("fused BatchNorm",) * execution.tuned + ("XLA (jit_compile)",) * execution.compile


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
