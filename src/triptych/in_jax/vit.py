"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929), and their block by itself, in Flax linen.

A module's path, joined with dots, is its canonical name, which is timm's: `("blocks", "0", "attn", "qkv")` is `blocks.0.attn.qkv`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from triptych.core.spec import EMBEDDING, TransformerBlockSpec, ViTSpec
from triptych.in_jax.layers import GELU, UNIFORM_FAN_IN, Conv, Dense, Identity, LayerNorm, ScaledDotProductAttention


class PatchEmbedding(nn.Module):
    """Every patch becomes a token, row by row."""

    spec: ViTSpec
    kinds: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, in_channels) -> (N, patches, width)."""
        patch = (self.spec.patch_size,) * 2
        conv = functools.partial(Conv, use_bias=True, kernel_init=UNIFORM_FAN_IN, **self.kinds)
        x = conv(self.spec.width, patch, strides=patch, padding=0, name="proj")(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Embedding(nn.Module):
    """The class token in front of the patches, and a learned position added to every token."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, patches, width) -> (N, patches + 1, width)."""
        batch, patches, width = x.shape
        normal = nn.initializers.normal(0.02)
        token = self.param("cls_token", normal, (1, 1, width), self.param_dtype).astype(x.dtype)
        positions = self.param("pos_embed", normal, (1, patches + 1, width), self.param_dtype).astype(x.dtype)
        return jnp.concatenate([jnp.broadcast_to(token, (batch, 1, width)), x], axis=1) + positions


class Attention(nn.Module):
    """Multi-head self-attention between two projections."""

    heads: int
    kinds: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, tokens, width) -> (N, tokens, width)."""
        width = x.shape[-1]
        qkv = Dense(3 * width, **self.kinds, name="qkv")(x)
        return Dense(width, **self.kinds, name="proj")(ScaledDotProductAttention(self.heads, name="sdpa")(qkv))


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU (numerics 9), token by token."""

    hidden: int
    kinds: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, tokens, width) -> (N, tokens, width)."""
        hidden = GELU(name="act")(Dense(self.hidden, **self.kinds, name="fc1")(x))
        return Dense(x.shape[-1], **self.kinds, name="fc2")(hidden)


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and around a shortcut (pre-norm)."""

    spec: ViTSpec | TransformerBlockSpec
    kinds: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, tokens, width) -> (N, tokens, width)."""
        spec = self.spec
        norm = functools.partial(LayerNorm, spec.layer_norm_epsilon, **self.kinds)
        x = x + Attention(spec.heads, self.kinds, name="attn")(norm(name="norm1")(x))
        return x + FeedForward(spec.mlp_width, self.kinds, name="mlp")(norm(name="norm2")(x))


class BareTransformerBlock(nn.Module):
    """A block as a model of its own, its sum under a name; `train` changes nothing, and `dtype` is that of a `VisionTransformer`."""

    spec: TransformerBlockSpec
    param_dtype: Any = jnp.float32
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Features (N, tokens, width) -> (N, tokens, width)."""
        block = TransformerBlock(self.spec, {"dtype": self.dtype, "param_dtype": self.param_dtype})
        nn.share_scope(self, block)  # its layers have no prefix
        return Identity(name="output")(block(x))


class Blocks(nn.Module):
    """The transformer blocks, named by their number."""

    spec: ViTSpec
    kinds: dict[str, Any]
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, tokens, width) -> (N, tokens, width)."""
        block = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        for i in range(self.spec.depth):
            x = block(self.spec, self.kinds, name=str(i))(x)
        return x


class VisionTransformer(nn.Module):
    """The network a `ViTSpec` describes; `train` changes nothing, as it has neither BatchNorm nor dropout.

    `dtype` is that of convolutions and products, by default the parameters'. With `remat` the backward pass computes each block's
    activations again: no name changes, nor a result but for rounding.
    """

    spec: ViTSpec
    param_dtype: Any = jnp.float32
    dtype: Any = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, H, W, in_channels) -> (N, num_classes) logits, of the class token."""
        spec, kinds = self.spec, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Embedding(self.param_dtype, name=EMBEDDING)(PatchEmbedding(spec, kinds, name="patch_embed")(x))
        x = Blocks(spec, kinds, self.remat, name="blocks")(x)
        x = LayerNorm(spec.layer_norm_epsilon, **kinds, name="norm")(x)
        return Dense(spec.num_classes, **kinds, name=spec.head)(x[:, 0])
