"""Residual networks (He et al. 2015, arXiv:1512.03385) in Flax linen: ImageNet v1.5 and CIFAR.

A module's path, joined with dots, is its canonical name: `("layer1", "0", "conv1")` is `layer1.0.conv1`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from triptych.core.spec import BlockSpec, ResNetSpec
from triptych.in_jax.layers import BatchNorm, Conv, Dense, Folded, GlobalAveragePool, MaxPool, PadShortcut, ReLU, fast_convolution


class Projection(nn.Module):
    """Option B: a strided 1x1 convolution and BatchNorm bring the shortcut to the block's output shape."""

    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(N, H, W, C) -> (N, H / stride, W / stride, features)."""
        x = self.conv(self.features, (1, 1), strides=self.stride, padding=0, name="0")(x)
        return self.norm(name="1")(x, use_running_average=not train)


class Block(nn.Module):
    """What both residual blocks share: convolutions with BatchNorm, ReLU between them, and the shortcut."""

    spec: BlockSpec
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """(features, kernel, stride) of each convolution."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """(N, H, W, in_channels) -> (N, H / stride, W / stride, out_channels)."""
        y, last = x, len(self.convolutions())
        for i, (features, kernel, stride) in enumerate(self.convolutions(), start=1):
            y = self.conv(features, (kernel, kernel), strides=stride, padding=kernel // 2, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y, use_running_average=not train)
            if i < last:
                y = ReLU(name=f"relu{i}")(y)
        if self.spec.shortcut == "projection":
            x = Projection(self.spec.out_channels, self.spec.stride, self.conv, self.norm, name="downsample")(x, train=train)
        elif self.spec.shortcut == "pad":
            x = PadShortcut(self.spec.out_channels, self.spec.stride, name="downsample")(x)
        return ReLU(name=f"relu{last}")(x + y)


class BasicBlock(Block):
    """Two 3x3 convolutions; the first carries the stride."""

    def convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """(features, kernel, stride) of each convolution."""
        return ((self.spec.width, 3, self.spec.stride), (self.spec.out_channels, 3, 1))


class Bottleneck(Block):
    """1x1 down, 3x3, 1x1 up. v1.5: the stride sits on the 3x3 (numerics 10)."""

    def convolutions(self) -> tuple[tuple[int, int, int], ...]:
        """(features, kernel, stride) of each convolution."""
        return ((self.spec.width, 1, 1), (self.spec.width, 3, self.spec.stride), (self.spec.out_channels, 1, 1))


BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class Stage(nn.Module):
    """A run of residual blocks, named by their number."""

    blocks: tuple[BlockSpec, ...]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, C) -> (N, H', W', C')."""
        for i, spec in enumerate(self.blocks):
            block = BLOCKS[spec.kind]
            if self.remat:
                block = nn.remat(block, static_argnums=(2,))  # self, x, train
            x = block(spec, self.conv, self.norm, name=str(i))(x, train)
        return x


class ResNet(nn.Module):
    """The network a `ResNetSpec` describes. `train=True` normalizes by batch statistics and updates `batch_stats`.

    `dtype` is that of convolutions and products, by default the parameters'. With `remat` the backward pass computes each residual
    block's activations again; `tuned` convolutions, BatchNorm and max-pool train by the `fast_` functions. Neither changes a
    name, nor a result but for rounding. `parts` computes only these of `stem`, `layer1`, ..., `head`, from what the part before gave.
    """

    spec: ResNetSpec
    param_dtype: Any = jnp.float32
    dtype: Any = None
    remat: bool = False
    tuned: bool = False
    parts: tuple[str, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, in_channels) -> (N, num_classes) logits."""
        spec, stem, kinds = self.spec, self.spec.stem, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        given = spec.batch_norm
        conv = functools.partial(Conv, **kinds, use_bias=given is None, conv_general_dilated=fast_convolution if self.tuned else None)
        norm = Folded if given is None else functools.partial(BatchNorm, given.epsilon, given.momentum, self.param_dtype, self.tuned)
        if self._has("stem"):
            x = conv(stem.width, (stem.kernel, stem.kernel), strides=stem.stride, padding=stem.padding, name="conv1")(x)
            x = norm(name="bn1")(x, use_running_average=not train)
            x = ReLU(name="relu")(x)
            if stem.max_pool is not None:
                x = MaxPool(stem.max_pool.kernel, stem.max_pool.stride, stem.max_pool.padding, self.tuned, name="maxpool")(x)
        for name, blocks in itertools.groupby(spec.blocks(), key=_stage_name):
            if self._has(name):
                x = Stage(tuple(blocks), conv, norm, self.remat, name=name)(x, train=train)
        if self._has("head"):
            x = GlobalAveragePool(name="avgpool")(x)
            x = Dense(spec.num_classes, **kinds, name=spec.head)(x)
        return x

    def _has(self, part: str) -> bool:
        return self.parts is None or part in self.parts


def _stage_name(block: BlockSpec) -> str:
    """`layer1.0` -> `layer1`."""
    return block.name.partition(".")[0]
