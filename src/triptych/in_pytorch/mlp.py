"""The multilayer perceptron over flattened images."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from torch import nn

from triptych.core.spec import MLPSpec
from triptych.in_pytorch.layers import relu


class MLP(nn.Sequential):
    """Linear layers and ReLU over flattened images: (N, in_channels, H, W) -> logits (N, num_classes).

    `nn.Flatten` of a (C, H, W) image is the canonical order (numerics 11).
    """

    def __init__(self, spec: MLPSpec) -> None:
        super().__init__(OrderedDict(_layers(spec)))


def _layers(spec: MLPSpec) -> Iterator[tuple[str, nn.Module]]:
    width = spec.in_channels * spec.image_size**2
    yield "flatten", nn.Flatten()
    for i, hidden in enumerate(spec.hidden, start=1):
        yield f"fc{i}", nn.Linear(width, hidden)
        yield f"relu{i}", relu()
        if spec.dropout:
            yield f"dropout{i}", nn.Dropout(spec.dropout)
        width = hidden
    yield "fc", nn.Linear(width, spec.num_classes)
