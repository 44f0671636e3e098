"""What a process that times JAX tells and forgets."""

from __future__ import annotations

from typing import Any

import jax

from triptych.core.environment import variables
from triptych.in_jax import model


def numerics() -> dict[str, str]:
    """What float32 means here, as JAX tells it: in our lanes, and by its defaults in stock ones."""
    config: Any = jax.config  # its stubs know few of its flags
    stock = _precision(config)
    with model.numerics("float32"):
        ours = _precision(config)
    return {
        "matmul precision": ours,
        "matmul precision, stock": stock,
        "x64": "on" if config.jax_enable_x64 else "off",
        "XLA_FLAGS": variables().get("XLA_FLAGS", "not set"),
        "devices": ", ".join(str(device) for device in jax.devices()),
    }


def forget() -> None:
    """Drop the programs of models that are gone."""
    jax.clear_caches()


def _precision(config: Any) -> str:
    return str(config.jax_default_matmul_precision or "the device's default, which on a CPU is full float32")
