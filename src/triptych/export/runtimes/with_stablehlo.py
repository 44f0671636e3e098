"""A StableHLO module that `jax.export` wrote, in JAX: without Flax, and without the model's code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.export
import numpy as np

from triptych.core.errors import InputRefused

OWN_CALLS = {"shape_assertion", "Sharding"}
"""What jax.export itself puts into a module: checks of symbolic shapes."""


def opened(artefact: Path) -> Callable[[np.ndarray], np.ndarray]:
    """(N, H, W, C) -> logits (N, classes)."""
    try:
        exported = jax.export.deserialize(bytearray(artefact.read_bytes()))
    except Exception as error:  # a damaged flatbuffer can fail in any way
        raise InputRefused(f"{artefact} is not what jax.export writes ({type(error).__name__})") from None
    foreign = set(re.findall(r"custom_call\s*@([\w.]+)", exported.mlir_module())) - OWN_CALLS
    if foreign:
        raise InputRefused(f"{artefact} calls {', '.join(sorted(foreign))}, code outside of StableHLO; a classifier needs none")
    call = jax.jit(exported.call)
    return lambda x: np.asarray(call(x))


def versions() -> dict[str, str]:
    """The runtime's version."""
    return {"jax": jax.__version__}
