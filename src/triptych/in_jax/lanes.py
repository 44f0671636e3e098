"""The lanes of JAX that a benchmark times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from triptych.core.batch import Inputs
from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.errors import LaneMissing
from triptych.core.folding import fold
from triptych.core.recipe import initial_state
from triptych.core.spec import Spec
from triptych.in_jax import stock
from triptych.in_jax.inference import program
from triptych.in_jax.model import Model
from triptych.in_jax.train import create_trainer


def contender(spec: Spec, weights: Mapping[str, np.ndarray], lane: str, mode: str) -> Contender:
    """`lane` (of `core.contender.LANES`, or stock) of `mode`, in float32 on the CPU. LaneMissing when there is none."""
    if lane == STOCK:
        return stock.contender(spec, weights, mode)
    execution = LANES[lane]
    if execution.compile:
        raise LaneMissing(f"JAX is compiled in every lane, and has no {lane}: see default and tuned")
    if mode == "inference" and execution.tuned:
        spec, weights = fold(spec, weights)
    model = Model(spec, weights, "float32", "cpu")
    return inference(model, execution) if mode == "inference" else training(model, execution)


def inference(model: Model, execution: Execution) -> Contender:
    """Logits, read to the host, which waits for them."""
    if not execution.tuned:
        return Contender(ready, lambda batch: model.predict(batch[0]), compiles=True)
    run, pulled = program(model, execution)
    return Contender(ready, lambda batch: run(batch[0]), compiles=True, levers=pulled)


def training(model: Model, execution: Execution) -> Contender:
    """The loss of one whole step, which JAX hands back before the update is done: all that the step leaves is waited for."""
    trainer = create_trainer(model, RECIPE, execution)

    def start_from(weights: Mapping[str, np.ndarray]) -> None:
        trainer.load_state(initial_state(RECIPE, weights, model.spec))

    def run(batch: tuple[Inputs, np.ndarray]) -> np.ndarray:
        loss = trainer.step(*batch, RATE)
        trainer.wait()
        return np.asarray(loss)

    return Contender(ready, run, start_from, compiles=True, levers=levers(execution))


def levers(execution: Execution) -> tuple[str, ...]:
    """What an execution switches on."""
    return ("convolutions, max-pool and BatchNorm with gradients of our own",) * execution.tuned


PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "trace",
    "/jax/core/compile/backend_compile_duration": "compile",
}
"""JAX's events by our names; lowering to StableHLO counts as tracing. A program found in the persistent cache is compiled in no time."""


CACHE = {"/jax/compilation_cache/cache_hits": "cache_hits", "/jax/compilation_cache/cache_misses": "cache_misses"}
"""Of the persistent cache, where there is one."""


@contextlib.contextmanager
def phases() -> Iterator[dict[str, float]]:
    """While open, seconds of `trace` and `compile` as JAX's monitoring tells them, and the programs found in its cache, and not."""
    seconds = dict.fromkeys((*PHASES.values(), *CACHE.values()), 0.0)

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in PHASES:
            seconds[PHASES[event]] += duration_secs

    def count(event: str, **kwargs: str | int) -> None:
        if event in CACHE:
            seconds[CACHE[event]] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(count)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        jax.monitoring.unregister_event_listener(count)
