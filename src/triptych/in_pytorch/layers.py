"""The building blocks that `torch.nn` lacks, and the standard ones with every constant explicit.

Shapes are PyTorch's: images (N, C, H, W), vectors (N, C).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triptych.core.spec import BatchNormSpec


def convolution(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int | None = None, *, norm: BatchNormSpec | None
) -> nn.Conv2d:
    """A convolution with a bias unless BatchNorm follows, padded symmetrically; by default as much as keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding, bias=norm is None)


class BatchNorm2d(nn.BatchNorm2d):
    """PyTorch's own BatchNorm, with sums in pairs where a float64 batch is trained on.

    The CPU kernel adds a channel's N*H*W values one after the other, so its rounding grows with their number: 80 units in the last place
    of a mean of 5,000 pixels, where sums in pairs are off by one (numerics 38). A float32 batch keeps the kernel, which is faster.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1]
        if not self.training or x.dtype != torch.float64 or count < 2:  # PyTorch refuses to learn from a single value
            return super().forward(x)
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        centered = x - mean
        var = centered.square().mean(dim=(0, 2, 3), keepdim=True)
        self._update(mean.detach().flatten(), var.detach().flatten(), count)
        return centered * torch.rsqrt(var + self.eps) * self.weight[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Moves the running statistics as the kernel does: towards the mean and the unbiased variance of `count` values."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)


def batch_norm(channels: int, spec: BatchNormSpec | None) -> nn.Module:
    """PyTorch's BatchNorm is the canonical one: two-pass variance, unbiased running variance, momentum weighs the new. None: folded."""
    if spec is None:
        return nn.Identity()
    return BatchNorm2d(channels, eps=spec.epsilon, momentum=spec.momentum)


def relu() -> nn.ReLU:
    """One module a use, and not in place, so that hooks see every activation as it was computed; see `train.in_place`."""
    return nn.ReLU(inplace=False)


class PadShortcut(nn.Module):
    """Option A of He et al. 2015, §3.3: take every `stride`-th pixel, fill the missing channels with zeros on both sides.

    (N, in_channels, H, W) -> (N, out_channels, ceil(H / stride), ceil(W / stride)), without parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        missing = self.out_channels - self.in_channels
        before, after = missing // 2, missing - missing // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) -> (N, C): the mean over all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


class ScaledDotProductAttention(nn.Module):
    """softmax(q kᵀ / sqrt(width / heads)) v for each head, without a mask, of queries, keys and values side by side (numerics 26).

    (N, tokens, 3 * width) -> (N, tokens, width).
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor) -> Tensor:
        heads = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, tokens, width / heads)
        query, key, value = heads.unbind()
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class GlobalMaxPool(nn.Module):
    """(N, C, H, W) -> (N, C): the largest of all pixels; the gradient is shared by equal ones (numerics 40)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=(2, 3))


class Concatenate(nn.Module):
    """Several (N, C) -> (N, sum of C), side by side; a module so that it has a name."""

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(x), dim=1)
