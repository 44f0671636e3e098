"""The lanes of PyTorch that a benchmark times."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender, ready
from triptych.core.contract import Execution
from triptych.core.folding import fold
from triptych.core.spec import Spec
from triptych.in_pytorch import stock
from triptych.in_pytorch.model import Model, create_model, full_precision
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
    """Logits. Tuned, of a model without BatchNorm: channels-last, and constant weights where it compiles (inductor's freezing)."""
    if execution == Execution():
        return Contender(ready, lambda batch: model.predict(batch[0]))
    native: Any = model.native
    if execution.tuned:
        native = native.to(memory_format=torch.channels_last)
    if execution.compile:
        native = torch.compile(native, options={"freezing": True} if execution.tuned else None)
    layout = torch.channels_last if execution.tuned else torch.contiguous_format

    def run(batch: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        model.check_images(batch[0])
        with full_precision(), torch.no_grad():
            x = torch.from_numpy(batch[0]).permute(0, 3, 1, 2).contiguous(memory_format=layout)
            return np.asarray(native(x).numpy())

    more = ("folded BatchNorm",) * execution.tuned + ("freezing",) * (execution.tuned and execution.compile)
    return Contender(ready, run, compiles=execution.compile, levers=(*levers(execution), *more))


def training(model: Model, execution: Execution) -> Contender:
    """The loss of one whole step."""
    trainer = create_trainer(model, RECIPE, execution)
    start = trainer.state()
    return Contender(
        ready,
        lambda batch: np.asarray(trainer.step(batch[0], batch[1], RATE)),
        lambda: trainer.load_state(start),
        compiles=execution.compile,
        levers=levers(execution),
    )


def levers(execution: Execution) -> tuple[str, ...]:
    """What an execution switches on."""
    return ("channels-last",) * execution.tuned + ("torch.compile",) * execution.compile


@contextlib.contextmanager
def phases() -> Iterator[dict[str, float]]:
    """While open, seconds of `trace` and `compile` as dynamo's clocks tell them, on the way out: it and its backend, inductor."""
    seconds: dict[str, float] = {}
    whole, backend = _clocks()
    try:
        yield seconds
    finally:
        whole, backend = (after - before for after, before in zip(_clocks(), (whole, backend), strict=True))
        seconds |= {"trace": whole - backend, "compile": backend}


def _clocks() -> tuple[float, float]:
    """Seconds in dynamo, and those of them in its backend, since the process began."""
    # No public name: imported here, so that a version without it costs a benchmark and not the room.
    from torch._dynamo.utils import compilation_time_metrics

    whole, backend = (sum(compilation_time_metrics.get(key, ())) for key in ("_compile.compile_inner", "OutputGraph.call_user_compiler"))
    return whole, backend
