"""A user's program in Flax: the zoo's network with parameters of the wrong size, and a call.

A Flax layer takes its number of inputs from what it is called with; what can be of the wrong size is its parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import triptych
from debugging.bugs import BATCH, CLASSES, MODEL, PIXELS, Bug, channels


def network(bug: Bug) -> tuple[Any, Any]:
    """The module, and its variables with the bug in them."""
    module, variables = triptych.create_model(MODEL, framework="jax", device="cpu").native
    variables = jax.tree.map(lambda leaf: leaf, variables)
    if bug.name == "linear":
        variables["params"]["fc"]["kernel"] = jnp.zeros((bug.wrong, CLASSES))
    elif bug.name == "convolution":
        variables["params"]["layer2"]["0"]["conv1"]["kernel"] = jnp.zeros((3, 3, bug.wrong, 32))
    return module, variables


def call(model: tuple[Any, Any], bug: Bug, mode: str) -> None:
    """One forward pass."""
    module, variables = model
    predict = jax.jit(module.apply) if mode == "compiled" else module.apply
    predict(variables, jnp.zeros((BATCH, PIXELS, PIXELS, channels(bug))))
