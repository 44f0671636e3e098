"""A multilayer perceptron in Flax linen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from triptych.core.spec import MLPSpec
from triptych.in_jax.layers import Dense, Flatten, ReLU


class MLP(nn.Module):
    """The network an `MLPSpec` describes. Dropout needs `train=True` *and* a `dropout` key; without the key it is off."""

    spec: MLPSpec
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, in_channels) -> (N, num_classes) logits."""
        deterministic = not (train and self.has_rng("dropout"))
        x = Flatten(name="flatten")(x)
        for i, width in enumerate(self.spec.hidden, start=1):
            x = Dense(width, param_dtype=self.param_dtype, name=f"fc{i}")(x)
            x = ReLU(name=f"relu{i}")(x)
            if self.spec.dropout:
                x = nn.Dropout(self.spec.dropout, deterministic=deterministic, name=f"dropout{i}")(x)
        return Dense(self.spec.num_classes, param_dtype=self.param_dtype, name=self.spec.head)(x)
