"""Vision transformers (Dosovitskiy et al. 2021, arXiv:2010.11929), and their block by itself.

Module and parameter names are timm's, so a `state_dict()` of `VisionTransformer` loads strictly into `timm.create_model` and back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triptych.core.spec import TransformerBlockSpec, ViTSpec
from triptych.in_pytorch.layers import ScaledDotProductAttention


class PatchEmbedding(nn.Module):
    """Every patch becomes a token, row by row: (N, in_channels, H, W) -> (N, patches, width)."""

    def __init__(self, in_channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention between two projections: (N, tokens, width) -> (N, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.sdpa = ScaledDotProductAttention(heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.sdpa(self.qkv(x)))


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU (numerics 9), token by token: (N, tokens, width) -> (N, tokens, width)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="none")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and around a shortcut (pre-norm): (N, tokens, width) -> (N, tokens, width)."""

    def __init__(self, width: int, heads: int, mlp_width: int, epsilon: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=epsilon)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=epsilon)
        self.mlp = FeedForward(width, mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class BareTransformerBlock(TransformerBlock):
    """A block as a model of its own, its sum under a name: features (N, tokens, width) -> (N, tokens, width)."""

    def __init__(self, spec: TransformerBlockSpec) -> None:
        super().__init__(spec.width, spec.heads, spec.mlp_width, spec.layer_norm_epsilon)
        self.output = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(super().forward(x))


class VisionTransformer(nn.Module):
    """Patches, class token, positions, blocks, classifier of the class token: (N, in_channels, H, W) -> logits (N, num_classes)."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        width, epsilon = spec.width, spec.layer_norm_epsilon
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.tokens, width))
        self.patch_embed = PatchEmbedding(spec.in_channels, width, spec.patch_size)
        self.pos_drop = nn.Identity()  # timm's name for the tokens with their positions
        self.blocks = nn.Sequential(*(TransformerBlock(width, spec.heads, spec.mlp_width, epsilon) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(width, eps=epsilon)
        self.head = nn.Linear(width, spec.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        x = self.blocks(self.pos_drop(tokens + self.pos_embed))
        return self.head(self.norm(x)[:, 0])
