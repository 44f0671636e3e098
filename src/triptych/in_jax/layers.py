"""The layers our networks are made of, in Flax linen: every constant explicit, every step of a forward pass a named module.

Layout is NHWC and HWIO. `Conv` and `Dense` are Flax's own with the precision pinned; `BatchNorm` is ours, because Flax's keeps
the biased running variance and computes E[x²] - E[x]² by default (numerics 6, 7). All of them work in any Flax model.
"""

from __future__ import annotations

import functools
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


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last, with PyTorch's running statistics (Ioffe & Szegedy 2015).

    `momentum` is the weight of the *new* batch; the running variance is unbiased, n/(n-1); the batch variance is two-pass.
    Parameters `scale`, `bias`; collection `batch_stats`: `mean`, `var`, `num_batches_tracked` (int32). Of an input in half precision
    statistics and normalization are computed in `param_dtype`, and the result is rounded back.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    param_dtype: Any = jnp.float32

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
        mean, var = batch_statistics(x)
        if not self.is_initializing():
            running_mean.value += self.momentum * (mean - running_mean.value)
            running_var.value += self.momentum * (unbiased(var, x.size // x.shape[-1]) - running_var.value)
            batches.value += 1
        return normalize(x, mean, var, scale, bias, self.epsilon).astype(given)


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


class ReLU(nn.Module):
    """max(x, 0), as a module so that it has a name."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Any shape -> the same shape."""
        return nn.relu(x)


class MaxPool(nn.Module):
    """Max pooling; the symmetric padding never wins: it is minus infinity (numerics 2, 3)."""

    kernel: int
    stride: int
    padding: int

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) -> (N, H', W', C)."""
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
