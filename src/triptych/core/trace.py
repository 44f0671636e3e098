"""What a profiler saw, in the terms of no framework: operators, when they ran, and the kind of work they did. Standard library only.

The rooms read their own profiler's trace into these (`in_*/profile.py`); `bench/attribution.py` adds them up.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from triptych.core.spec import Spec

CATEGORIES = ("convolution", "matrix_product", "normalization", "elementwise", "optimizer", "data", "other")
"""Kinds of work. `elementwise`: activations, pooling, residual additions; `optimizer`: clipping and EMA included; `data`: making the batch
and handing it to the framework; `other`: an operator of no other kind, as those of the loss."""
STEP, DATA = "step", "data"
"""The regions that whoever profiles marks with `Room.annotate`: the whole step, and in it the making of its batch."""
OPTIMIZER = "optimizer"
"""The region, or scope of names, in which the rooms update the weights."""

OF_LAYER = {
    "conv": "convolution", "linear": "matrix_product", "attention": "matrix_product", "lstm": "matrix_product",
    "batch_norm": "normalization", "layer_norm": "normalization",
}  # fmt: skip
"""Kinds of work by the layer table's operations; all others are elementwise."""


@dataclass(frozen=True, slots=True)
class Event:
    """An operator or a region, in microseconds of the profiler's clock.

    Events of one `track` are nested or disjoint. `category` None: unknown by itself; it counts for what encloses it. `also` are the other
    kinds of work that a compiler fused into it, which cannot be told apart.
    """

    operation: str
    start: float
    stop: float
    track: str
    category: str | None = None
    layer: str = ""
    also: tuple[str, ...] = ()
    region: bool = False


def layers(spec: Spec) -> dict[str, str]:
    """The kind of work of each layer of a model, by its name."""
    return {layer.name: OF_LAYER.get(layer.op, "elementwise") for layer in spec.layers()}


def layer_of(path: str, known: Mapping[str, str]) -> str:
    """The layer that a scoped name speaks of, `gradient_tape/net/layer1.0.bn1_1/mul` or `jit(f)/net/layer1/0/bn1/mul`; "" for none.

    Numbers that make a name unique, as in `bn1_1`, are dropped. Of several layers that it could mean, it is the one of the longest name.
    """
    return _longest(path, frozenset(known))


@functools.lru_cache(maxsize=2**14)
def _longest(path: str, known: frozenset[str]) -> str:
    parts = [re.sub(r"_\d+$", "", part) for part in path.split("/")]
    words = ".".join(parts).split(".")
    spans = (".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
    return max((span for span in spans if span in known), key=len, default="")


def disjoint(events: list[Event], track: str) -> list[Event]:
    """The same events on as few tracks, `track 1`, ..., as keep those of each from overlapping: for operators that run at the same time."""
    ends: list[float] = []
    placed = []
    for event in sorted(events, key=lambda event: event.start):
        lane = next((i for i, end in enumerate(ends) if end <= event.start), len(ends))
        ends[lane : lane + 1] = [event.stop]
        placed.append(_on(event, f"{track} {lane + 1}"))
    return placed


def _on(event: Event, track: str) -> Event:
    return Event(event.operation, event.start, event.stop, track, event.category, event.layer, event.also, event.region)
