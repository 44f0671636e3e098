"""The layer table's row and the tensors it owns. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Op = Literal[
    "conv", "batch_norm", "relu", "max_pool", "pad_shortcut", "global_average_pool", "flatten", "linear", "dropout",
    "embedding", "layer_norm", "attention", "gelu", "residual",
]  # fmt: skip
Kind = Literal[
    "conv_weight", "linear_weight", "bias", "norm_weight", "norm_bias", "running_mean", "running_var", "batch_counter",
    "class_token", "positions",
]  # fmt: skip

TRAINABLE: frozenset[str] = frozenset({"conv_weight", "linear_weight", "bias", "norm_weight", "norm_bias", "class_token", "positions"})
# The layer that adds class token and positions to a ViT's patches. In the state its tensors bear no layer's name: timm has them at the top.
EMBEDDING = "pos_drop"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a model's state: canonical (torchvision) name, PyTorch layout, and what it is."""

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def trainable(self) -> bool:
        """Whether an optimizer moves it; the others are BatchNorm statistics and counters."""
        return self.kind in TRAINABLE

    @property
    def layer(self) -> str:
        """The layer that owns it: `layer1.0.bn1.weight` -> `layer1.0.bn1`, `cls_token` -> `pos_drop`."""
        return self.name.rpartition(".")[0] or EMBEDDING


@dataclass(frozen=True, slots=True)
class Layer:
    """One row of the layer table. `size` is the output's height (= width); 1 after global pooling or flattening.

    `tokens` is the length of an output that is a sequence, (N, tokens, out_channels); 0 for images (N, H, W, C) and vectors (N, C).
    """

    name: str
    op: Op
    in_channels: int
    out_channels: int
    size: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    bias: bool = False
    tokens: int = 0

    def tensors(self) -> Iterator[TensorSpec]:
        """The state this layer owns, in state-dict order."""
        if self.op == "conv":
            yield TensorSpec(f"{self.name}.weight", (self.out_channels, self.in_channels, self.kernel, self.kernel), "conv_weight")
        elif self.op == "linear":
            yield TensorSpec(f"{self.name}.weight", (self.out_channels, self.in_channels), "linear_weight")
        elif self.op == "batch_norm":
            yield TensorSpec(f"{self.name}.weight", (self.out_channels,), "norm_weight")
            yield TensorSpec(f"{self.name}.bias", (self.out_channels,), "norm_bias")
            yield TensorSpec(f"{self.name}.running_mean", (self.out_channels,), "running_mean")
            yield TensorSpec(f"{self.name}.running_var", (self.out_channels,), "running_var")
            yield TensorSpec(f"{self.name}.num_batches_tracked", (), "batch_counter")
        elif self.op == "layer_norm":
            yield TensorSpec(f"{self.name}.weight", (self.out_channels,), "norm_weight")
            yield TensorSpec(f"{self.name}.bias", (self.out_channels,), "norm_bias")
        elif self.op == "embedding":
            yield TensorSpec("cls_token", (1, 1, self.out_channels), "class_token")
            yield TensorSpec("pos_embed", (1, self.tokens, self.out_channels), "positions")
        if self.bias:
            yield TensorSpec(f"{self.name}.bias", (self.out_channels,), "bias")
