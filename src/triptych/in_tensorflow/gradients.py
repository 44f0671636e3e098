"""Gradients of our own, by `tf.custom_gradient`, and gradients that stop at chosen operations, by `tf.stop_gradient`.

Free-standing functions, the same in the three rooms: the values are those of the layers they stand for, and so are the gradients unless
something is stopped. What a custom gradient keeps for the backward pass is its own choice, and that is what it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import tensorflow as tf

from triptych.core.errors import UsageError

PATHS = ("query", "key", "value")
"""What gradients can be stopped from reaching, in `attention`."""


@tf.custom_gradient
def gelu(x: tf.Tensor) -> Any:
    """x Φ(x), exact (Hendrycks & Gimpel 2016); its derivative is Φ(x) + x φ(x), and x is all it keeps. Any shape -> the same."""

    def backward(dy: tf.Tensor) -> tf.Tensor:
        density = tf.exp(-0.5 * tf.square(x)) / math.sqrt(2.0 * math.pi)
        return dy * (_normal_cdf(x) + x * density)

    return x * _normal_cdf(x), backward


def _normal_cdf(x: tf.Tensor) -> tf.Tensor:
    return 0.5 * (1.0 + tf.math.erf(x * math.sqrt(0.5)))


def attention(qkv: tf.Tensor, heads: int, stopped: Collection[str] = ()) -> tf.Tensor:
    """softmax(q kᵀ / sqrt(size)) v for each head, of queries, keys and values side by side, with a backward pass that computes the
    weights again: it keeps q, k and v, and nothing of tokens² elements (Rabe & Staats 2021, arXiv:2112.05682).

    (N, tokens, 3 * width) -> (N, tokens, width). No gradient flows through the paths (of `PATHS`) in `stopped`; UsageError for others.
    """
    unknown = sorted(set(stopped) - set(PATHS))
    if unknown:
        raise UsageError(f"gradients of {', '.join(unknown)} cannot be stopped; choose from {', '.join(PATHS)}")
    _, tokens, width = qkv.shape
    parts = tf.transpose(tf.reshape(qkv, (-1, tokens, 3, heads, width // (3 * heads))), (2, 0, 3, 1, 4))  # (3, N, heads, tokens, size)
    query, key, value = (tf.stop_gradient(part) if path in stopped else part for path, part in zip(PATHS, tf.unstack(parts), strict=True))
    return tf.reshape(tf.transpose(_attend(query, key, value), (0, 2, 1, 3)), (-1, tokens, width // 3))


def _weights(query: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """(N, heads, tokens, size) twice -> (N, heads, tokens, tokens)."""
    return tf.nn.softmax(tf.matmul(query / math.sqrt(query.shape[-1]), key, transpose_b=True), axis=-1)


@tf.custom_gradient
def _attend(query: tf.Tensor, key: tf.Tensor, value: tf.Tensor) -> Any:
    def backward(dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
        scale = 1.0 / math.sqrt(query.shape[-1])
        weights = _weights(query, key)
        dweights = tf.matmul(dy, value, transpose_b=True)
        dscores = scale * weights * (dweights - tf.reduce_sum(dweights * weights, axis=-1, keepdims=True))
        return tf.matmul(dscores, key), tf.matmul(dscores, query, transpose_a=True), tf.matmul(weights, dy, transpose_a=True)

    return tf.matmul(_weights(query, key), value), backward


def straight_through(operation: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> tf.Tensor:
    """operation(x), with the gradient of x itself: for operations whose own is zero or none (Bengio et al. 2013, arXiv:1308.3432).

    `operation` keeps the shape. x + (operation(x) - x), as it is often written, would round; here the value is exact.
    """
    return tf.stop_gradient(operation(x)) + (x - tf.stop_gradient(x))
