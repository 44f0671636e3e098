"""Gradients of our own, by `jax.custom_vjp`, and gradients that stop at chosen operations, by `lax.stop_gradient`.

Free-standing functions, the same in the three rooms: the values are those of the layers they stand for, and so are the gradients unless
something is stopped. What a custom gradient keeps for the backward pass is its own choice, and that is what it is for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import erf

from triptych.core.errors import UsageError

PATHS = ("query", "key", "value")
"""What gradients can be stopped from reaching, in `attention`."""


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), exact (Hendrycks & Gimpel 2016); its derivative is Φ(x) + x φ(x), and x is all it keeps. Any shape -> the same."""
    return x * _normal_cdf(x)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    density = jnp.exp(-0.5 * jnp.square(x)) / math.sqrt(2.0 * math.pi)
    return (dy * (_normal_cdf(x) + x * density),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + erf(x * math.sqrt(0.5)))


def attention(qkv: jax.Array, heads: int, stopped: Collection[str] = ()) -> jax.Array:
    """softmax(q kᵀ / sqrt(size)) v for each head, of queries, keys and values side by side, with a backward pass that computes the
    weights again: it keeps q, k and v, and nothing of tokens² elements (Rabe & Staats 2021, arXiv:2112.05682).

    (N, tokens, 3 * width) -> (N, tokens, width). No gradient flows through the paths (of `PATHS`) in `stopped`; UsageError for others.
    """
    unknown = sorted(set(stopped) - set(PATHS))
    if unknown:
        raise UsageError(f"gradients of {', '.join(unknown)} cannot be stopped; choose from {', '.join(PATHS)}")
    batch, tokens, width = qkv.shape
    parts = jnp.transpose(qkv.reshape(batch, tokens, 3, heads, -1), (2, 0, 3, 1, 4))  # (3, N, heads, tokens, size)
    query, key, value = (lax.stop_gradient(part) if path in stopped else part for path, part in zip(PATHS, parts, strict=True))
    return jnp.swapaxes(_attend(query, key, value), 1, 2).reshape(batch, tokens, width // 3)


# The products of attention in full precision on every device (numerics 28).
_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _weights(query: jax.Array, key: jax.Array) -> jax.Array:
    """(N, heads, tokens, size) twice -> (N, heads, tokens, tokens)."""
    return jax.nn.softmax(_product("nhtd,nhsd->nhts", query / math.sqrt(query.shape[-1]), key), axis=-1)


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return _product("nhts,nhsd->nhtd", _weights(query, key), value)


def _attend_forward(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _attend(query, key, value), (query, key, value)


def _attend_backward(saved: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, ...]:
    # Without the barrier XLA sees that the forward pass computes the same weights, and keeps those.
    query, key, value = lax.optimization_barrier(saved)
    scale = 1.0 / math.sqrt(query.shape[-1])
    weights = _weights(query, key)
    dweights = _product("nhtd,nhsd->nhts", dy, value)
    dscores = scale * weights * (dweights - (dweights * weights).sum(-1, keepdims=True))
    dquery, dkey = _product("nhts,nhsd->nhtd", dscores, key), _product("nhts,nhtd->nhsd", dscores, query)
    return dquery, dkey, _product("nhts,nhtd->nhsd", weights, dy)


_attend.defvjp(_attend_forward, _attend_backward)


def straight_through(operation: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """operation(x), with the gradient of x itself: for operations whose own is zero or none (Bengio et al. 2013, arXiv:1308.3432).

    `operation` keeps the shape. x + (operation(x) - x), as it is often written, would round; here the value is exact.
    """
    return lax.stop_gradient(operation(x)) + (x - lax.stop_gradient(x))
