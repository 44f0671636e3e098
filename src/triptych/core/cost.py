"""Parameters and arithmetic of a model, read off its layer table: computed analytically, once, for every framework. Standard library only.

Unit: one MAC is one multiply-accumulate; 1 MAC = 2 FLOPs. Counted are the multiply-accumulates of convolutions, linear layers and the
two products of attention (what fvcore and torchvision's `GFLOPS` call "flops": 4.09 G for ResNet-50 and 17.56 G for ViT-Base/16, both at
224 pixels). Not counted, as in those: bias additions, normalizations, activations, softmax, pooling, the residual additions and copies;
together they are about 1% of a ResNet-50.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from triptych.core.spec import Layer, Spec

CONVENTION = (
    "1 MAC = 2 FLOPs; convolutions, linear layers and the products of attention are counted, "
    "bias, normalization, activations, pooling and additions are not"
)


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one row of the layer table costs for one image. `output` is (H, W, C), (tokens, C) of a sequence, or (C,)."""

    name: str
    op: str
    output: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model costs for one image, or other sample, layer by layer in execution order. `image_size` is None without images."""

    model: str
    image_size: int | None
    layers: tuple[LayerCost, ...]

    @property
    def parameters(self) -> int:
        """Trainable scalars; BatchNorm statistics and counters are not parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one image."""
        return sum(layer.macs for layer in self.layers)

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass of one image: two a multiply-accumulate."""
        return 2 * self.macs


def cost(spec: Spec) -> Cost:
    """Parameters and MACs of `spec`, per layer and in total."""
    rows, flat = [], False
    for layer in spec.layers():
        flat = flat or layer.op in ("flatten", "global_average_pool", "embedding")
        places = (layer.tokens,) if layer.tokens else () if flat else (layer.size, layer.size)
        output = (*places, layer.out_channels)
        rows.append(LayerCost(layer.name, layer.op, output, _parameters(layer), _macs(layer)))
    return Cost(spec.name, spec.image_size, tuple(rows))


def _parameters(layer: Layer) -> int:
    return sum(prod(tensor.shape) for tensor in layer.tensors() if tensor.trainable)


def _macs(layer: Layer) -> int:
    """A convolution does kernel² · C_in multiply-accumulates for each of its H · W · C_out outputs; a linear layer is H = W = 1, a token.

    Attention multiplies every token's query with every key, and the softmax of that with every value.
    """
    if layer.op == "attention":
        return 2 * layer.tokens**2 * layer.out_channels
    if layer.op not in ("conv", "linear"):
        return 0
    return layer.kernel**2 * layer.in_channels * layer.size**2 * max(layer.tokens, 1) * layer.out_channels
