"""An LSTM with PyTorch's two biases (Hochreiter & Schmidhuber 1997; gates as Gers et al. 2000), in Flax linen over `lax.scan`."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Carry = tuple[jax.Array, jax.Array]


def uniform_by_features(features: int) -> Any:
    """PyTorch's initializer of all parameters of an LSTM: uniform on ±1/sqrt(features)."""
    bound = features**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


class LSTM(nn.Module):
    """The hidden state after the last token that counts; padding leaves the state as it is, wherever it stands (numerics 25, 39).

    Parameters `kernel`, `recurrent_kernel`, `bias`, `recurrent_bias`, the four gates i, f, g, o side by side; Flax's own cells have a
    kernel a gate and one bias in place of two: the same function, but half the step while training. `dtype` is that of the products.
    """

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array) -> jax.Array:
        """(N, tokens, width), (N, tokens) bool, true where a token counts -> (N, features)."""
        gates, drawn = 4 * self.features, uniform_by_features(self.features)
        kernel = self.param("kernel", drawn, (x.shape[-1], gates), self.param_dtype)
        recurrent_kernel = self.param("recurrent_kernel", drawn, (self.features, gates), self.param_dtype)
        bias = self.param("bias", drawn, (gates,), self.param_dtype)
        recurrent_bias = self.param("recurrent_bias", drawn, (gates,), self.param_dtype)
        x, kernel, recurrent_kernel, bias, recurrent_bias = nn.dtypes.promote_dtype(
            x, kernel, recurrent_kernel, bias, recurrent_bias, dtype=self.dtype
        )
        # The inputs' share of the gates has no past: one product for all tokens.
        given = jnp.dot(x, kernel, precision=lax.Precision.HIGHEST) + both_biases(bias, recurrent_bias)
        start = jnp.zeros((x.shape[0], self.features), given.dtype)
        advance = functools.partial(step, recurrent_kernel)
        (hidden, _), _ = lax.scan(advance, (start, start), (given.swapaxes(0, 1), mask.T))
        return hidden


def step(recurrent_kernel: jax.Array, state: Carry, token: tuple[jax.Array, jax.Array]) -> tuple[Carry, None]:
    """(h, c) after one token of each text: (N, 4 features) of its gates, and (N,) whether it counts."""
    (hidden, carry), (given, counts) = state, token
    i, f, g, o = split_gates(given + jnp.dot(hidden, recurrent_kernel, precision=lax.Precision.HIGHEST))
    moved = nn.sigmoid(f) * carry + nn.sigmoid(i) * jnp.tanh(g)
    after, counts = nn.sigmoid(o) * jnp.tanh(moved), counts[:, None]
    return (jnp.where(counts, after, hidden), jnp.where(counts, moved, carry)), None


def split_gates(gates: jax.Array) -> list[jax.Array]:
    """(N, 4 features) -> i, f, g, o, in this order, of (N, features) each."""
    return jnp.split(gates, 4, axis=-1)


def both_biases(bias: jax.Array, recurrent_bias: jax.Array) -> jax.Array:
    """That of the inputs and that of the state add up: (4 features,)."""
    return bias + recurrent_bias
