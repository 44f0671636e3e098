"""The layers our networks are made of, in Flax linen: every constant explicit, every step of a forward pass a named module.

Layout is NHWC and HWIO. `Conv` and `Dense` are Flax's own with the precision pinned; `BatchNorm` is ours, because Flax's keeps
the biased running variance and computes E[x²] - E[x]² by default (numerics 6, 7). All of them work in any Flax model.
`tuned` layers, and the `fast_` functions, are for training on a CPU: the same to rounding.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from triptych.core.errors import UsageError

# He et al. 2015 as torchvision draws it: normal, fan-out, not truncated.
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's nn.Linear: uniform on ±1/sqrt(fan_in).
UNIFORM_FAN_IN = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")

# The default precision of a product varies by device: TF32 on GPUs, bfloat16 on TPUs (numerics 28).
Conv = functools.partial(nn.Conv, use_bias=False, precision=lax.Precision.HIGHEST, kernel_init=HE_NORMAL)
Dense = functools.partial(
    nn.Dense, use_bias=True, precision=lax.Precision.HIGHEST, kernel_init=UNIFORM_FAN_IN, bias_init=nn.initializers.zeros_init()
)

# Two passes, because the default E[x²] - E[x]² cancels (numerics 7).
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, with PyTorch's running statistics (Ioffe & Szegedy 2015).

    `momentum` is the weight of the *new* batch; the running variance is unbiased, n/(n-1); the batch variance is two-pass.
    Parameters `scale`, `bias`; collection `batch_stats`: `mean`, `var`, `num_batches_tracked` (int32). Of an input in half precision
    statistics and normalization are computed in `param_dtype`, and the result is rounded back. `tuned` trains by `fast_normalize`.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    param_dtype: Any = jnp.float32
    tuned: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """(..., C) -> (..., C). UsageError when a batch to learn from holds a single value per channel."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        batches = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        given, x = x.dtype, x.astype(self.param_dtype)
        if use_running_average:
            return normalize(x, running_mean.value, running_var.value, scale, bias, self.epsilon).astype(given)
        if self.tuned:
            y, mean, var = fast_normalize(x, scale, bias, self.epsilon)
        else:
            mean, var = batch_statistics(x)
            y = normalize(x, mean, var, scale, bias, self.epsilon)
        if not self.is_initializing():
            running_mean.value += self.momentum * (mean - running_mean.value)
            running_var.value += self.momentum * (unbiased(var, x.size // x.shape[-1]) - running_var.value)
            batches.value += 1
        return y.astype(given)


class Folded(nn.Module):
    """What stands in the place of a BatchNorm that the convolution before it has taken in: nothing."""

    def __call__(self, x: jax.Array, *, use_running_average: bool) -> jax.Array:
        """Any shape -> itself."""
        return x


def batch_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance per channel, (C,) each: two passes, because E[x²] - E[x]² cancels."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x - mean).mean(axes)


def unbiased(var: jax.Array, n: int) -> jax.Array:
    """The unbiased variance of n values from their biased one."""
    if n < 2:
        raise UsageError(f"BatchNorm needs more than {n} value per channel while training; use a larger batch or larger images")
    return var * (n / (n - 1))


def normalize(x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, per channel."""
    return (x - mean) * (lax.rsqrt(var + epsilon) * scale) + bias


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fast_normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`normalize` by the batch's own statistics, and these; only the first has a gradient.

    By Ioffe & Szegedy's formula, which passes over the batch half as often as automatic differentiation of the forward pass.
    """
    return _normalize_forward(x, scale, bias, epsilon)[0]


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[Any, tuple[jax.Array, ...]]:
    mean, var = batch_statistics(x)
    return (normalize(x, mean, var, scale, bias, epsilon), mean, var), (x, mean, var, scale)


def _normalize_backward(epsilon: float, saved: tuple[jax.Array, ...], given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    (x, mean, var, scale), (dy, _, _) = saved, given
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    inverse, centred = lax.rsqrt(var + epsilon), x - mean
    dbias, projected = dy.sum(axes), (dy * centred).sum(axes)
    dx = (dy - centred * (inverse * inverse * projected / count) - dbias / count) * (scale * inverse)
    return dx, inverse * projected, dbias


fast_normalize.defvjp(_normalize_forward, _normalize_backward)


class ReLU(nn.Module):
    """max(x, 0), as a module so that it has a name."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape -> the same shape."""
        return nn.relu(x)


class GELU(nn.Module):
    """x Φ(x), exact, where Flax's default is an approximation by tanh (numerics 9)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape -> the same shape."""
        return nn.gelu(x, approximate=False)


class ScaledDotProductAttention(nn.Module):
    """softmax(q kᵀ / sqrt(width / heads)) v for each head, without a mask, of queries, keys and values side by side (numerics 26).

    Of an input in half precision the softmax is computed in float32.
    """

    heads: int

    @nn.compact
    def __call__(self, qkv: jax.Array) -> jax.Array:
        """(N, tokens, 3 * width) -> (N, tokens, width)."""
        batch, tokens, width = qkv.shape
        query, key, value = jnp.moveaxis(qkv.reshape(batch, tokens, 3, self.heads, width // (3 * self.heads)), 2, 0)
        half = jnp.finfo(qkv.dtype).bits < 32
        y = nn.dot_product_attention(query, key, value, precision=lax.Precision.HIGHEST, force_fp32_for_softmax=half)
        return y.reshape(batch, tokens, width // 3).astype(qkv.dtype)


class Identity(nn.Module):
    """Its input, under a name."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape -> the same."""
        return x


class MaxPool(nn.Module):
    """Max pooling; the symmetric padding never wins: it is minus infinity (numerics 2, 3)."""

    kernel: int
    stride: int
    padding: int
    tuned: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, H', W', C); `tuned` by `fast_max_pool`."""
        if self.tuned:
            return fast_max_pool(x, self.kernel, self.stride, self.padding)
        padding = ((self.padding, self.padding),) * 2
        return nn.max_pool(x, (self.kernel, self.kernel), (self.stride, self.stride), padding)


class PadShortcut(nn.Module):
    """Option A of He et al. 2015, §3.3: subsample by `stride`, then zero channels on both sides up to `features`."""

    features: int
    stride: int

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), features)."""
        missing = self.features - x.shape[-1]
        return zero_channels(x[:, :: self.stride, :: self.stride, :], missing // 2, missing - missing // 2)


def zero_channels(x: jax.Array, before: int, after: int) -> jax.Array:
    """(N, H, W, C) -> (N, H, W, before + C + after), zeros around the channels."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, after)))


class GlobalAveragePool(nn.Module):
    """Mean over height and width."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, C)."""
        return x.mean((1, 2))


class Flatten(nn.Module):
    """Flatten in PyTorch's (C, H, W) order, so that dense weights mean the same in every framework (numerics 11)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, C * H * W)."""
        return x.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)


# Training on a CPU.
#
# XLA:CPU turns a weight gradient into a convolution whose operands are transposed, and fuses what made the operands, the passes of
# BatchNorm and ReLU, into that transposition: they are computed again element by element, in the wrong order of memory. More than half
# of ResNet-20's training step goes there. Remedies:
#
# - A 1x1 convolution is a matrix product, and so are its gradients.
# - In other weight gradients both operands go through a product with the identity first. XLA fuses nothing into products, so that
#   the transposition copies an array that exists. `lax.optimization_barrier` would say it plainly, but XLA:CPU drops it before it fuses.
#
# Forward pass and input gradient of larger kernels stay XLA's. Of ResNet-20's stride-1 layers at a batch of 128, products over im2col
# or by kernel position took 4 to 9 times as long as XLA's own convolution at 16 channels of 32 px, and 1.2 to 2.4 times at 64 channels
# of 8 px: each timed alone, float32, jaxlib 0.10, two cores of an AMD EPYC. Where XLA chooses other kernels, measure again.

# Channels that share one identity: the product costs this many multiply-adds an element.
BLOCK = 16
NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))

Padding = tuple[tuple[int, int], ...]
Geometry = tuple[tuple[int, ...], Padding | str, Any]  # strides, padding, precision


def fast_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    **options: Any,
) -> jax.Array:
    """`lax.conv_general_dilated`, for `flax.linen.Conv(conv_general_dilated=...)`: (N, H, W, C), (kh, kw, C, K) -> (N, H', W', K).

    Any stride and padding; a convolution with groups, with dilation, of another layout or with further options is left to lax.
    """
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    grouped = feature_group_count != 1 or batch_group_count != 1
    if numbers != NHWC or dilated or grouped or any(value is not None for value in options.values()):
        options |= {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation, "dimension_numbers": numbers, "precision": precision}
        options |= {"feature_group_count": feature_group_count, "batch_group_count": batch_group_count}
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    fixed = padding if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding)
    unpadded = isinstance(fixed, str) or not any(map(any, fixed))  # "SAME" and "VALID" add nothing to a 1x1 kernel
    if rhs.shape[:2] == (1, 1) and unpadded:
        return _product(lhs, rhs, window_strides, precision)
    return _convolution(lhs, rhs, (tuple(window_strides), fixed, precision))


def _product(x: jax.Array, kernel: jax.Array, strides: Sequence[int], precision: Any) -> jax.Array:
    """A 1x1 convolution without padding. Of a matrix: XLA turns products over several axes, as the weight gradient's, into copies."""
    x = x[:, :: strides[0], :: strides[1]]
    return jnp.dot(x.reshape(-1, x.shape[-1]), kernel[0, 0], precision=precision).reshape(*x.shape[:-1], -1)


def _plain(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    strides, padding, precision = geometry
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's convolution, with a weight gradient of our own."""
    return _plain(x, kernel, geometry)


def _forward(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(x, kernel, geometry), (x, kernel)


def _backward(geometry: Geometry, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of input and kernel."""
    x, kernel = saved
    dy = materialized(dy)
    (dx,) = jax.linear_transpose(lambda x: _plain(x, kernel, geometry), x)(dy)
    x = materialized(x)
    (dkernel,) = jax.linear_transpose(lambda kernel: _plain(x, kernel, geometry), kernel)(dy)
    return dx, dkernel


_convolution.defvjp(_forward, _backward)


def _windows(x: jax.Array, kernel: int, stride: int, padding: int, fill: float = 0.0) -> list[jax.Array]:
    """(N, H, W, C) -> kernel² of (N, H', W', C): for each place in a window, row by row, what all windows see there."""
    rows, columns = (range(0, size + 2 * padding - kernel + 1, stride) for size in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
    places = itertools.product(range(kernel), repeat=2)
    return [x[:, row : row + rows[-1] + 1 : stride, column : column + columns[-1] + 1 : stride] for row, column in places]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def fast_max_pool(x: jax.Array, kernel: int, stride: int, padding: int) -> jax.Array:
    """`MaxPool`, whose gradient goes to the first of equal values, as in PyTorch: (N, H, W, C) -> (N, H', W', C).

    The index of each winner is kept from the forward pass; XLA:CPU's own gradient looks for it again in a reduction over pairs.
    """
    return _pool_forward(x, kernel, stride, padding)[0]


def _pool_forward(x: jax.Array, kernel: int, stride: int, padding: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    best, *others = _windows(x, kernel, stride, padding, fill=-jnp.inf)
    winner = jnp.zeros(best.shape, jnp.int8)
    for place, other in enumerate(others, start=1):
        winner = jnp.where(other > best, jnp.int8(place), winner)
        best = jnp.maximum(best, other)
    return best, (winner, x)


def _pool_backward(kernel: int, stride: int, padding: int, saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    winner, x = saved
    parts = [jnp.where(winner == place, dy, 0) for place in range(kernel * kernel)]
    (dx,) = jax.linear_transpose(lambda x: _windows(x, kernel, stride, padding), x)(parts)
    return (dx,)


fast_max_pool.defvjp(_pool_forward, _pool_backward)


def materialized(x: jax.Array) -> jax.Array:
    """(..., C) -> the same array, as the result of a product, which XLA writes to memory before it goes on.

    Exact for finite numbers; one that is not makes up to `BLOCK` channels of its pixel NaN, as a gradient that has overflowed may.
    """
    block = math.gcd(x.shape[-1], BLOCK) if x.shape[-1] > BLOCK else x.shape[-1]
    rows = x.reshape(-1, block)
    return jnp.dot(rows, jnp.eye(block, dtype=x.dtype), precision=lax.Precision.HIGHEST).reshape(x.shape)
