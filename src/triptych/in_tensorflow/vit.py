"""Vision transformers and their block as functional Keras models (Dosovitskiy et al. 2021, arXiv:2010.11929).

Every layer is called as its row of `spec.layers()`, which is timm's name: `model.get_layer("blocks.0.attn.qkv")`. A layer takes its dtype
from its input, so no global policy is read or set. Images are (N, H, W, C), sequences (N, tokens, width).
"""

from __future__ import annotations

import keras
from keras import KerasTensor, layers

from triptych.core.spec import EMBEDDING, TransformerBlockSpec, ViTSpec
from triptych.in_tensorflow.layers import ExactGELU, PaddedConv2D, ScaledDotProductAttention, TokenEmbedding


def vit(spec: ViTSpec, dtype: str = "float32") -> keras.Model:
    """The network of `spec`: images (N, H, W, C) -> logits (N, classes). Weights are zeros until some are loaded."""
    images = keras.Input(spec.input_shape, dtype=dtype, name="images")
    patch, epsilon = spec.patch_size, spec.layer_norm_epsilon
    x = PaddedConv2D(spec.width, patch, strides=patch, kernel_initializer="zeros", dtype=dtype, name="patch_embed.proj")(images)
    x = layers.Reshape((-1, spec.width), dtype=dtype, name="patch_embed.flatten")(x)
    x = TokenEmbedding(dtype=dtype, name=EMBEDDING)(x)
    for i in range(spec.depth):
        x = transformer_block(x, spec.heads, spec.mlp_width, epsilon, f"blocks.{i}.")
    x = norm(x, epsilon, "norm")
    return keras.Model(images, linear(x[:, 0], spec.num_classes, spec.head), name=spec.name)


def bare_block(spec: TransformerBlockSpec, dtype: str = "float32") -> keras.Model:
    """A block as a model of its own, its sum under a name: features (N, tokens, width) -> (N, tokens, width)."""
    (features,) = spec.inputs()
    x = keras.Input(features.shape, dtype=dtype, name=features.name)
    y = transformer_block(x, spec.heads, spec.mlp_width, spec.layer_norm_epsilon, "")
    return keras.Model(x, layers.Identity(dtype=dtype, name="output")(y), name=spec.name)


def transformer_block(x: KerasTensor, heads: int, mlp_width: int, epsilon: float, prefix: str) -> KerasTensor:
    """Attention and MLP, each behind a LayerNorm and around a shortcut (pre-norm): (N, tokens, width) -> (N, tokens, width).

    `prefix` begins the name of each layer: "blocks.3.".
    """
    y = attention(norm(x, epsilon, f"{prefix}norm1"), heads, f"{prefix}attn")
    x = layers.Add(dtype=x.dtype, name=f"{prefix}add1")([x, y])
    y = feed_forward(norm(x, epsilon, f"{prefix}norm2"), mlp_width, f"{prefix}mlp")
    return layers.Add(dtype=x.dtype, name=last_layer(prefix))([x, y])


def last_layer(prefix: str) -> str:
    """The name of the layer whose output is that of the block of this prefix."""
    return f"{prefix}add2"


def attention(x: KerasTensor, heads: int, name: str) -> KerasTensor:
    """Multi-head self-attention between two projections."""
    width = x.shape[-1]
    x = ScaledDotProductAttention(heads, dtype=x.dtype, name=f"{name}.sdpa")(linear(x, 3 * width, f"{name}.qkv"))
    return linear(x, width, f"{name}.proj")


def feed_forward(x: KerasTensor, hidden: int, name: str) -> KerasTensor:
    """Two linear layers around an exact GELU (numerics 9), token by token."""
    y = ExactGELU(dtype=x.dtype, name=f"{name}.act")(linear(x, hidden, f"{name}.fc1"))
    return linear(y, x.shape[-1], f"{name}.fc2")


def norm(x: KerasTensor, epsilon: float, name: str) -> KerasTensor:
    """LayerNorm over the width, with the spec's epsilon (numerics 8)."""
    return layers.LayerNormalization(epsilon=epsilon, dtype=x.dtype, name=name)(x)


def linear(x: KerasTensor, units: int, name: str) -> KerasTensor:
    """A linear layer with bias, over the last axis."""
    return layers.Dense(units, kernel_initializer="zeros", dtype=x.dtype, name=name)(x)
