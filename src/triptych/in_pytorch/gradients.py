"""Gradients of our own, by `torch.autograd.Function`, and gradients that stop at chosen operations, by `detach`.

Free-standing functions, the same in the three rooms: the values are those of the layers they stand for, and so are the gradients unless
something is stopped. What a custom gradient keeps for the backward pass is its own choice, and that is what it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from triptych.core.errors import UsageError

PATHS = ("query", "key", "value")
"""What gradients can be stopped from reaching, in `attention`."""


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), exact (Hendrycks & Gimpel 2016); its derivative is Φ(x) + x φ(x), and x is all it keeps. Any shape -> the same."""
    return _GELU.apply(x)


class _GELU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * _normal_cdf(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2.0 * math.pi)
        return dy * (_normal_cdf(x) + x * density)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))


def attention(qkv: Tensor, heads: int, stopped: Collection[str] = ()) -> Tensor:
    """softmax(q kᵀ / sqrt(size)) v for each head, of queries, keys and values side by side, with a backward pass that computes the
    weights again: it keeps q, k and v, and nothing of tokens² elements (Rabe & Staats 2021, arXiv:2112.05682).

    (N, tokens, 3 * width) -> (N, tokens, width). No gradient flows through the paths (of `PATHS`) in `stopped`; UsageError for others.
    """
    unknown = sorted(set(stopped) - set(PATHS))
    if unknown:
        raise UsageError(f"gradients of {', '.join(unknown)} cannot be stopped; choose from {', '.join(PATHS)}")
    parts = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, tokens, size)
    query, key, value = (part.detach() if path in stopped else part for path, part in zip(PATHS, parts, strict=True))
    return _Attend.apply(query, key, value).transpose(1, 2).flatten(2)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """(N, heads, tokens, size) twice -> (N, heads, tokens, tokens)."""
    return torch.softmax(query / math.sqrt(query.shape[-1]) @ key.mT, dim=-1)


class _Attend(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _weights(query, key) @ value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        query, key, value = ctx.saved_tensors
        scale = 1.0 / math.sqrt(query.shape[-1])
        weights = _weights(query, key)
        dweights = dy @ value.mT
        dscores = scale * weights * (dweights - (dweights * weights).sum(-1, keepdim=True))
        return dscores @ key, dscores.mT @ query, weights.mT @ dy


def straight_through(operation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """operation(x), with the gradient of x itself: for operations whose own is zero or none (Bengio et al. 2013, arXiv:1308.3432).

    `operation` keeps the shape. x + (operation(x) - x), as it is often written, would round; here the value is exact.
    """
    return operation(x).detach() + (x - x.detach())
