"""Vision transformers and their block: what they are, every constant explicit. Standard library only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from triptych.core.architecture import Architecture, ImageArchitecture
from triptych.core.inputs import Input, Preprocessing
from triptych.core.layer import EMBEDDING, Layer, TensorSpec


@dataclass(frozen=True, slots=True)
class ViTSpec(ImageArchitecture):
    """A vision transformer (Dosovitskiy et al. 2021) as timm builds it: patches, a class token, learned positions, pre-norm blocks.

    A block is x + attention(norm1(x)), then x + mlp(norm2(x)), with exact GELU (numerics 9). `layer_norm_epsilon` is that of every
    LayerNorm (numerics 8); attention is scaled by 1/sqrt(width / heads), without a mask and with queries, keys and values from one
    projection in this order (numerics 26). Dropout there is none.
    """

    name: str
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    layer_norm_epsilon: float
    num_classes: int
    in_channels: int
    image_size: int
    preprocessing: Preprocessing

    family = "vit"
    head = "head"

    @property
    def tokens(self) -> int:
        """Length of the sequence: the patches and the class token before them."""
        return (self.image_size // self.patch_size) ** 2 + 1

    def tensors(self) -> tuple[TensorSpec, ...]:
        """The whole state, in timm's state-dict order: what belongs to the network itself comes first."""
        return tuple(sorted(ImageArchitecture.tensors(self), key=lambda tensor: "." in tensor.name))

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, in execution order."""
        return tuple(self._layers())

    def _layers(self) -> Iterator[Layer]:
        width, tokens, patch = self.width, self.tokens, self.patch_size
        yield Layer("patch_embed.proj", "conv", self.in_channels, width, self.image_size // patch, patch, patch, bias=True)
        yield Layer(EMBEDDING, "embedding", width, width, 1, tokens=tokens)
        for i in range(self.depth):
            yield from _block_layers(f"blocks.{i}.", width, self.mlp_width, tokens)
        yield Layer("norm", "layer_norm", width, width, 1, tokens=tokens)
        yield Layer(self.head, "linear", width, self.num_classes, 1, bias=True)


@dataclass(frozen=True, slots=True)
class TransformerBlockSpec(Architecture):
    """One block of a `ViTSpec` by itself, as timm's `Block`: features (tokens, width) go in, and features of that shape come out.

    There is no classifier: for a loss, each position's features are the logits of `width` classes.
    """

    name: str
    tokens: int
    width: int
    heads: int
    mlp_width: int
    layer_norm_epsilon: float

    family = "transformer_block"
    head = None
    image_size = None
    in_channels = None
    preprocessing = None

    @property
    def num_classes(self) -> int:
        """Of each position."""
        return self.width

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(tokens, width) of one sample."""
        return (self.tokens, self.width)

    def inputs(self) -> tuple[Input, ...]:
        """The features of every token."""
        return (Input("features", "features", (self.tokens, self.width)),)

    def layers(self) -> tuple[Layer, ...]:
        """The layer table, in execution order."""
        output = Layer("output", "residual", self.width, self.width, 1, tokens=self.tokens)
        return (*_block_layers("", self.width, self.mlp_width, self.tokens), output)


def _block_layers(prefix: str, width: int, mlp_width: int, tokens: int) -> Iterator[Layer]:
    """timm's names; `attn.sdpa` is the scaled dot-product attention between the projections, which timm leaves unnamed."""
    yield Layer(f"{prefix}norm1", "layer_norm", width, width, 1, tokens=tokens)
    yield Layer(f"{prefix}attn.qkv", "linear", width, 3 * width, 1, bias=True, tokens=tokens)
    yield Layer(f"{prefix}attn.sdpa", "attention", 3 * width, width, 1, tokens=tokens)
    yield Layer(f"{prefix}attn.proj", "linear", width, width, 1, bias=True, tokens=tokens)
    yield Layer(f"{prefix}norm2", "layer_norm", width, width, 1, tokens=tokens)
    yield Layer(f"{prefix}mlp.fc1", "linear", width, mlp_width, 1, bias=True, tokens=tokens)
    yield Layer(f"{prefix}mlp.act", "gelu", mlp_width, mlp_width, 1, tokens=tokens)
    yield Layer(f"{prefix}mlp.fc2", "linear", mlp_width, width, 1, bias=True, tokens=tokens)
