"""The building blocks that `torch.nn` lacks, and the standard ones with every constant explicit.

Shapes are PyTorch's: images (N, C, H, W), vectors (N, C).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from triptych.core.spec import BatchNormSpec


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Conv2d:
    """A convolution without bias (BatchNorm follows), padded symmetrically; by default as much as keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2 if padding is None else padding, bias=False)


def batch_norm(channels: int, spec: BatchNormSpec) -> nn.BatchNorm2d:
    """PyTorch's own BatchNorm is the canonical one: two-pass variance, unbiased running variance, momentum weighs the new."""
    return nn.BatchNorm2d(channels, eps=spec.epsilon, momentum=spec.momentum)


def relu() -> nn.ReLU:
    """One module a use and never in place, so that hooks see every activation as it was computed."""
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
