"""The lanes of PyTorch that a benchmark times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np

from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.folding import fold
from triptych.core.recipe import initial_state
from triptych.core.spec import Spec
from triptych.in_pytorch import stock
from triptych.in_pytorch.inference import program
from triptych.in_pytorch.model import Model, create_model
from triptych.in_pytorch.train import create_trainer


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
    """Logits."""
    if execution == Execution():
        return Contender(ready, lambda batch: model.predict(batch[0]))
    run, pulled = program(model, execution)
    return Contender(ready, lambda batch: run(batch[0]), compiles=True, levers=pulled)


def training(model: Model, execution: Execution) -> Contender:
    """The loss of one whole step."""
    trainer = create_trainer(model, RECIPE, execution)
    return Contender(
        ready,
        lambda batch: np.asarray(trainer.step(batch[0], batch[1], RATE)),
        lambda weights: trainer.load_state(initial_state(RECIPE, weights, model.spec)),
        compiles=execution.compile,
        levers=levers(execution),
    )


def levers(execution: Execution) -> tuple[str, ...]:
    """What an execution switches on."""
    return ("channels-last",) * execution.tuned + ("torch.compile",) * execution.compile


@contextlib.contextmanager
def phases() -> Iterator[dict[str, float]]:
    """While open, seconds of `trace` and `compile` as dynamo's clocks tell them, on the way out: it and its backend, inductor.

    `cache_hits` and `cache_misses` are inductor's, of graphs.
    """
    seconds: dict[str, float] = {}
    start = _clocks()
    try:
        yield seconds
    finally:
        whole, backend, hits, misses = (after - before for after, before in zip(_clocks(), start, strict=True))
        seconds |= {"trace": whole - backend, "compile": backend, "cache_hits": hits, "cache_misses": misses}


def _clocks() -> tuple[float, ...]:
    """Seconds in dynamo, and those of them in its backend; graphs found in inductor's cache, and those not; since the process began."""
    # No public name: imported here, so that a version without it costs a benchmark and not the room.
    from torch._dynamo.utils import compilation_time_metrics, counters

    seconds = (sum(compilation_time_metrics.get(key, ())) for key in ("_compile.compile_inner", "OutputGraph.call_user_compiler"))
    return *seconds, *(counters["inductor"][f"fxgraph_cache_{found}"] for found in ("hit", "miss"))
