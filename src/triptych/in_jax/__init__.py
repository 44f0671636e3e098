"""The JAX/Flax room: fulfils `core.contract.Room`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

import numpy as np

from triptych.core.spec import Spec
from triptych.in_jax.data import batches, decode, preprocess, resize
from triptych.in_jax.export import export
from triptych.in_jax.faults import PLANTINGS
from triptych.in_jax.lanes import contender, phases
from triptych.in_jax.model import Model
from triptych.in_jax.process import forget, numerics
from triptych.in_jax.profile import annotate, operators, profile
from triptych.in_jax.train import Trainer, create_trainer


def create_model(spec: Spec, weights: Mapping[str, np.ndarray], *, precision: str = "float32", device: str = "auto") -> Model:
    """The Flax model with these canonical weights."""
    return Model(spec, weights, precision, device)


def versions() -> dict[str, str]:
    """Versions of the libraries under this room."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "pillow")}


__all__ = [
    "Model", "PLANTINGS", "Trainer", "annotate", "batches", "contender", "create_model", "create_trainer", "decode", "export", "forget",
    "numerics", "operators", "phases", "preprocess", "profile", "resize", "versions",
]  # fmt: skip
