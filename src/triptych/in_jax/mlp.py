"""A multilayer perceptron in Flax linen."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from triptych.core.spec import MLPSpec
from triptych.in_jax.layers import Dense, Flatten, ReLU


class MLP(nn.Module):
    """The network an `MLPSpec` describes. Dropout needs `train=True` *and* a `dropout` key; without the key it is off.

    `dtype` is that of the products, by default the parameters'.
    """

    spec: MLPSpec
    param_dtype: Any = jnp.float32
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, in_channels) -> (N, num_classes) logits."""
        deterministic = not (train and self.has_rng("dropout"))
        dense = functools.partial(Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        x = Flatten(name="flatten")(x)
        for i, width in enumerate(self.spec.hidden, start=1):
            x = dense(width, name=f"fc{i}")(x)
            x = ReLU(name=f"relu{i}")(x)
            if self.spec.dropout:
                x = nn.Dropout(self.spec.dropout, deterministic=deterministic, name=f"dropout{i}")(x)
        return dense(self.spec.num_classes, name=self.spec.head)(x)
