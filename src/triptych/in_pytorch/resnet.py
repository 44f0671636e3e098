"""Residual networks (He et al. 2015): ImageNet v1.5 and the CIFAR family of §4.2.

Module names are torchvision's, so a `state_dict()` of `ResNet` loads strictly into `torchvision.models.resnet50` and back.
"""

from __future__ import annotations

from torch import Tensor, nn

from triptych.core.spec import BatchNormSpec, BlockSpec, ResNetSpec
from triptych.in_pytorch.layers import GlobalAveragePool, PadShortcut, batch_norm, convolution, relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; the first one carries the stride.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, spec: BlockSpec, norm: BatchNormSpec | None) -> None:
        super().__init__()
        self.conv1 = convolution(spec.in_channels, spec.width, kernel=3, stride=spec.stride, norm=norm)
        self.bn1 = batch_norm(spec.width, norm)
        self.relu1 = relu()
        self.conv2 = convolution(spec.width, spec.out_channels, kernel=3, norm=norm)
        self.bn2 = batch_norm(spec.out_channels, norm)
        self.downsample = shortcut(spec, norm)
        self.relu2 = relu()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up around a shortcut. v1.5: the stride sits on the 3x3, not on the first 1x1 (numerics 10).

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).
    """

    def __init__(self, spec: BlockSpec, norm: BatchNormSpec | None) -> None:
        super().__init__()
        self.conv1 = convolution(spec.in_channels, spec.width, kernel=1, norm=norm)
        self.bn1 = batch_norm(spec.width, norm)
        self.relu1 = relu()
        self.conv2 = convolution(spec.width, spec.width, kernel=3, stride=spec.stride, norm=norm)
        self.bn2 = batch_norm(spec.width, norm)
        self.relu2 = relu()
        self.conv3 = convolution(spec.width, spec.out_channels, kernel=1, norm=norm)
        self.bn3 = batch_norm(spec.out_channels, norm)
        self.downsample = shortcut(spec, norm)
        self.relu3 = relu()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + self.downsample(x))


def shortcut(spec: BlockSpec, norm: BatchNormSpec | None) -> nn.Module:
    """What carries a block's input around it: nothing at all, a padded subsample (option A) or a projection (option B)."""
    if spec.shortcut == "identity":
        return nn.Identity()
    if spec.shortcut == "pad":
        return PadShortcut(spec.in_channels, spec.out_channels, spec.stride)
    return nn.Sequential(
        convolution(spec.in_channels, spec.out_channels, kernel=1, stride=spec.stride, norm=norm),
        batch_norm(spec.out_channels, norm),
    )


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average, classifier: (N, in_channels, H, W) -> logits (N, num_classes)."""

    def __init__(self, spec: ResNetSpec) -> None:
        super().__init__()
        stem, norm = spec.stem, spec.batch_norm
        self.conv1 = convolution(spec.in_channels, stem.width, stem.kernel, stem.stride, stem.padding, norm=norm)
        self.bn1 = batch_norm(stem.width, norm)
        self.relu = relu()
        pool = stem.max_pool
        self.maxpool = nn.Identity() if pool is None else nn.MaxPool2d(pool.kernel, pool.stride, pool.padding)
        self.stages = [f"layer{i}" for i in range(1, len(spec.stages) + 1)]
        for name in self.stages:
            blocks = (BLOCKS[block.kind](block, norm) for block in spec.blocks() if block.name.startswith(f"{name}."))
            self.add_module(name, nn.Sequential(*blocks))
        self.avgpool = GlobalAveragePool()
        self.fc = nn.Linear(spec.stages[-1].width * spec.expansion, spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = getattr(self, name)(x)
        return self.fc(self.avgpool(x))
