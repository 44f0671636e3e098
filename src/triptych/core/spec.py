"""What a model is: frozen dataclasses in which every constant is explicit. Standard library only.

A spec expands into one *layer table* (`spec.layers()`), in execution order. Names and shapes of the state
(`spec.tensors()`), named intermediates (`spec.intermediates()`) and cost (`core/cost.py`) are read off that table, so the
three native implementations are held to one description that none of them owns.

Shape legend of the project: N batch, H height, W width, C channels, O/I output/input channels of a weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from triptych.core.architecture import ImageArchitecture
from triptych.core.inputs import Input, Preprocessing
from triptych.core.layer import EMBEDDING, Kind, Layer, TensorSpec
from triptych.core.text_image import TextImageSpec
from triptych.core.transformer import TransformerBlockSpec, ViTSpec

__all__ = [
    "EMBEDDING", "BatchNormSpec", "BlockSpec", "ImageSpec", "Input", "Kind", "Layer", "MLPSpec", "PoolSpec", "Preprocessing", "ResNetSpec",
    "Spec", "StageSpec", "StemSpec", "TensorSpec", "TextImageSpec", "TransformerBlockSpec", "ViTSpec", "from_dict", "to_dict",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class BatchNormSpec:
    """PyTorch's BatchNorm: `momentum` weighs the *new* batch; the running variance is unbiased, n/(n-1); two-pass variance."""

    epsilon: float
    momentum: float


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Max pooling with symmetric padding of minus-infinity semantics (numerics 2, 3)."""

    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True, slots=True)
class StemSpec:
    """The first convolution of a ResNet and the optional max-pool behind it."""

    width: int
    kernel: int
    stride: int
    padding: int
    max_pool: PoolSpec | None


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A run of residual blocks; `stride` is that of its first block."""

    blocks: int
    width: int
    stride: int


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One residual block as the stages expand to it. v1.5: a bottleneck's stride sits on its 3x3 convolution."""

    name: str
    kind: Literal["basic", "bottleneck"]
    in_channels: int
    width: int
    out_channels: int
    stride: int
    shortcut: Literal["identity", "projection", "pad"]


@dataclass(frozen=True, slots=True)
class ResNetSpec(ImageArchitecture):
    """A residual network for classification: ImageNet v1.5 (He et al. 2015 with the stride on the 3x3) or CIFAR (§4.2).

    `shortcut` says how a block that changes shape joins: `projection` (option B: 1x1 convolution + BatchNorm) or `pad`
    (option A: subsample, then zero channels on both sides; no parameters). Without a `batch_norm` the convolutions have biases
    in its place: what `core/folding.py` makes of a trained network.
    """

    name: str
    block: Literal["basic", "bottleneck"]
    stem: StemSpec
    stages: tuple[StageSpec, ...]
    shortcut: Literal["projection", "pad"]
    batch_norm: BatchNormSpec | None
    num_classes: int
    in_channels: int
    image_size: int
    preprocessing: Preprocessing

    family = "resnet"
    head = "fc"

    @property
    def expansion(self) -> int:
        """Output channels of a block over its width: 4 for bottlenecks, 1 for basic blocks."""
        return 4 if self.block == "bottleneck" else 1

    @property
    def proof_image_size(self) -> int:
        """Image size of the training rungs of a proof: as the network is convolutional, 64 pixels show what 224 do."""
        return min(self.image_size, 64)

    @property
    def branch_ends(self) -> frozenset[str]:
        """The BatchNorm layers that end a residual branch; none where it is folded."""
        last = 2 if self.block == "basic" else 3
        return frozenset(f"{block.name}.bn{last}" for block in self.blocks() if self.batch_norm is not None)

    def blocks(self) -> Iterator[BlockSpec]:
        """The residual blocks in execution order, named as torchvision names them (`layer1.0`, ...)."""
        channels = self.stem.width
        for i, stage in enumerate(self.stages, start=1):
            out_channels = stage.width * self.expansion
            for j in range(stage.blocks):
                stride = stage.stride if j == 0 else 1
                changes = stride != 1 or channels != out_channels
                shortcut = self.shortcut if changes else "identity"
                yield BlockSpec(f"layer{i}.{j}", self.block, channels, stage.width, out_channels, stride, shortcut)
                channels = out_channels

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, in execution order."""
        layers = tuple(self._layers())
        if self.batch_norm is not None:
            return layers
        return tuple(dataclasses.replace(layer, bias=layer.op in ("conv", "linear")) for layer in layers if layer.op != "batch_norm")

    def _layers(self) -> Iterator[Layer]:
        stem, size = self.stem, self.image_size
        size = _out(size, stem.kernel, stem.stride, stem.padding)
        yield Layer("conv1", "conv", self.in_channels, stem.width, size, stem.kernel, stem.stride, stem.padding)
        yield Layer("bn1", "batch_norm", stem.width, stem.width, size)
        yield Layer("relu", "relu", stem.width, stem.width, size)
        if stem.max_pool is not None:
            pool = stem.max_pool
            size = _out(size, pool.kernel, pool.stride, pool.padding)
            yield Layer("maxpool", "max_pool", stem.width, stem.width, size, pool.kernel, pool.stride, pool.padding)
        channels = stem.width
        for block in self.blocks():
            yield from _block_layers(block, size)
            size, channels = _out(size, 3, block.stride, 1), block.out_channels
        yield Layer("avgpool", "global_average_pool", channels, channels, 1, kernel=size)
        yield Layer(self.head, "linear", channels, self.num_classes, 1, bias=True)


def _block_layers(block: BlockSpec, size: int) -> Iterator[Layer]:
    after = _out(size, 3, block.stride, 1)
    if block.kind == "basic":
        convolutions = [(block.in_channels, block.width, 3, block.stride, after), (block.width, block.out_channels, 3, 1, after)]
    else:
        convolutions = [
            (block.in_channels, block.width, 1, 1, size),
            (block.width, block.width, 3, block.stride, after),
            (block.width, block.out_channels, 1, 1, after),
        ]
    last = len(convolutions)
    for i, (inputs, outputs, kernel, stride, out_size) in enumerate(convolutions, start=1):
        yield Layer(f"{block.name}.conv{i}", "conv", inputs, outputs, out_size, kernel, stride, kernel // 2)
        yield Layer(f"{block.name}.bn{i}", "batch_norm", outputs, outputs, out_size)
        if i < last:
            yield Layer(f"{block.name}.relu{i}", "relu", outputs, outputs, out_size)
    if block.shortcut == "projection":
        yield Layer(f"{block.name}.downsample.0", "conv", block.in_channels, block.out_channels, after, 1, block.stride)
        yield Layer(f"{block.name}.downsample.1", "batch_norm", block.out_channels, block.out_channels, after)
    elif block.shortcut == "pad":
        yield Layer(f"{block.name}.downsample", "pad_shortcut", block.in_channels, block.out_channels, after, 1, block.stride)
    yield Layer(f"{block.name}.relu{last}", "relu", block.out_channels, block.out_channels, after)


def _out(size: int, kernel: int, stride: int, padding: int) -> int:
    """Output length of a convolution or pooling: floor((size + 2 padding - kernel) / stride) + 1."""
    return (size + 2 * padding - kernel) // stride + 1


@dataclass(frozen=True, slots=True)
class MLPSpec(ImageArchitecture):
    """A multilayer perceptron over flattened images: `fc1 relu1 [dropout1] fc2 relu2 [dropout2] ... fc`.

    Images are flattened in PyTorch's (C, H, W) order, whatever the native layout (numerics 11).
    """

    name: str
    hidden: tuple[int, ...]
    dropout: float
    num_classes: int
    in_channels: int
    image_size: int
    preprocessing: Preprocessing

    family = "mlp"
    head = "fc"

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, in execution order."""
        return tuple(self._layers())

    def _layers(self) -> Iterator[Layer]:
        width = self.in_channels * self.image_size**2
        yield Layer("flatten", "flatten", self.in_channels, width, 1)
        for i, hidden in enumerate(self.hidden, start=1):
            yield Layer(f"fc{i}", "linear", width, hidden, 1, bias=True)
            yield Layer(f"relu{i}", "relu", hidden, hidden, 1)
            if self.dropout:
                yield Layer(f"dropout{i}", "dropout", hidden, hidden, 1)
            width = hidden
        yield Layer(self.head, "linear", width, self.num_classes, 1, bias=True)


ImageSpec = ResNetSpec | MLPSpec | ViTSpec
"""The models that images alone go into: what a data set of images can train."""
Spec = ImageSpec | TransformerBlockSpec | TextImageSpec

_NESTED: dict[str, Any] = {
    "stem": StemSpec, "max_pool": PoolSpec, "batch_norm": BatchNormSpec, "preprocessing": Preprocessing, "stages": StageSpec,
}  # fmt: skip
_FAMILIES: dict[str, Any] = {spec.family: spec for spec in (ResNetSpec, MLPSpec, ViTSpec, TransformerBlockSpec, TextImageSpec)}


def to_dict(spec: Spec) -> dict[str, Any]:
    """Plain data for JSON; `from_dict` is its inverse."""
    return {"family": spec.family, **dataclasses.asdict(spec)}


def from_dict(data: dict[str, Any]) -> Spec:
    """The spec that `to_dict` described. ValueError for an unknown family, or missing or unknown fields."""
    fields = dict(data)
    family = fields.pop("family", None)
    if family not in _FAMILIES:
        raise ValueError(f"unknown model family {family!r}; known: {', '.join(_FAMILIES)}")
    try:
        spec: Spec = _FAMILIES[family](**{name: _revive(name, value) for name, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"malformed {family} spec: {error}") from None
    return spec


def _revive(name: str, value: Any) -> Any:
    if isinstance(value, dict):
        return _NESTED[name](**{key: _revive(key, item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(_NESTED[name](**item) if isinstance(item, dict) else item for item in value)
    return value
