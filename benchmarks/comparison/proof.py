"""Equal first, then timed: the lanes of a setting against each other in float64, and each in float32 against that. numpy only.

float64 is held to the tolerances of the project. float32 is held to what rounding does to one lane, the reference: no other lane may be
more than `MARGIN` times as far from float64, and no output further than 1e-5.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from triptych.core.difference import scaled_error
from triptych.core.tolerance import FORWARD, GRADIENT, LOGITS_FLOAT32, MARGIN

Outputs = Mapping[str, Mapping[str, np.ndarray]]
"""Lane (`jax/jit`) -> name -> array."""
ULP = float(np.finfo(np.float32).eps)


def in_float64(outputs: Outputs) -> dict[str, Any]:
    """The worst pair of lanes over every tensor that both of them computed, in units of its tolerance."""
    found = [
        (scaled_error(outputs[a][name], outputs[b][name]), name, (a, b))
        for a, b in itertools.combinations(outputs, 2)
        for name in outputs[a].keys() & outputs[b].keys()
    ]
    if not found:
        return {"passed": False, "reason": "there are no two lanes to compare", "lanes": list(outputs)}
    error, tensor, pair = max(found, key=lambda each: each[0] / tolerance(each[1]))
    alone = sorted(
        name for name, tensors in outputs.items() if not any(tensors.keys() & other.keys() for key, other in outputs.items() if key != name)
    )
    passed = not alone and all(error <= tolerance(name) for error, name, _ in found)
    return {
        "passed": passed, "worst_error": error, "tolerance": tolerance(tensor), "tensor": tensor, "pair": list(pair),
        "lanes": list(outputs), "tensors": len({name for _, name, _ in found}),
    }  # fmt: skip


def tolerance(name: str) -> float:
    """A forward result's, or a gradient's and what follows from one."""
    return FORWARD if name in ("output", "loss") else GRADIENT


def in_float32(outputs: Outputs, exact: Outputs, reference: str) -> dict[str, Any]:
    """How far every lane is from float64, and the bound that the reference lane's own distance sets."""
    truth: dict[str, np.ndarray] = {}
    for tensors in exact.values():
        truth = {**tensors, **truth}
    errors = {lane: {name: scaled_error(array, truth[name]) for name, array in tensors.items()} for lane, tensors in outputs.items()}
    noise = {
        kind: max([ULP, *(e for name, e in errors[reference].items() if kind_of(name) == kind)]) for kind in ("output", "loss", "gradient")
    }
    bounds = {kind: min(MARGIN * value, LOGITS_FLOAT32) if kind == "output" else MARGIN * value for kind, value in noise.items()}
    worst = {lane: max(e / bounds[kind_of(name)] for name, e in mine.items()) for lane, mine in errors.items()}
    return {
        "passed": all(share <= 1.0 for share in worst.values()), "reference": reference, "bounds": bounds,
        "errors": {lane: max(mine.values()) for lane, mine in errors.items()}, "share_of_bound": worst,
    }  # fmt: skip


def kind_of(name: str) -> str:
    """`output`, `loss` or `gradient`."""
    return name if name in ("output", "loss") else "gradient"
