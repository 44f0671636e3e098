"""SGD and AdamW as optax chains, to PyTorch's semantics.

The chain is built inside the jitted step from traced scalars: the learning rate comes from `core.recipe`, in the precision of
the run, because optax holds schedules in float32 (numerics 31).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from triptych.core.recipe import CLIP_EPSILON, SGD, AdamW, Clip, Recipe

Scalars = dict[str, Any]

# Canonical slot -> the field of the optax state that holds it.
STATE_FIELDS = {"momentum": "trace", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def scalars(recipe: Recipe, step: int, learning_rate: float) -> dict[str, float]:
    """What the optimizer of step `step` (the first is 0) takes besides arrays, in float64.

    optax computes 1 - beta**t in the precision of the run: 1.3e-5 off in float32 at the first step. PyTorch does it in Python.
    """
    hyper = recipe.optimizer
    if isinstance(hyper, SGD):
        return {"learning_rate": learning_rate}
    corrections = {"bias_correction1": 1.0 - hyper.beta1 ** (step + 1), "bias_correction2": 1.0 - hyper.beta2 ** (step + 1)}
    return {"learning_rate": learning_rate, **corrections}


def clip(gradients: Any, limits: Clip | None) -> Any:
    """Each value into [-value, value], or all by their common norm, to which PyTorch adds 1e-6 and optax nothing (numerics 18)."""
    if limits is None:
        return gradients
    if limits.value is not None:
        return optax.tree.clip(gradients, -limits.value, limits.value)
    coefficient = jnp.minimum(1.0, limits.norm / (optax.tree.norm(gradients) + CLIP_EPSILON))
    return optax.tree.scale(coefficient, gradients)


def optimizer(recipe: Recipe, decay_mask: Any, values: Scalars) -> optax.GradientTransformation:
    """The recipe's optimizer for one step; `decay_mask` is a tree of bools, which parameters weight decay touches."""
    hyper = recipe.optimizer
    return sgd(hyper, decay_mask, values) if isinstance(hyper, SGD) else adamw(hyper, decay_mask, values)


def sgd(hyper: SGD, decay_mask: Any, values: Scalars) -> optax.GradientTransformation:
    """g += wd w; v = m v + g; d = g + m v if nesterov else v; w -= lr d (numerics 12-14)."""
    return optax.chain(
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.trace(hyper.momentum, hyper.nesterov),
        optax.scale_by_learning_rate(values["learning_rate"]),
    )


def adamw(hyper: AdamW, decay_mask: Any, values: Scalars) -> optax.GradientTransformation:
    """w -= lr (m̂ / (sqrt(v̂) + epsilon) + wd w) (Loshchilov & Hutter 2019)."""
    return optax.chain(
        scale_by_adam(hyper, values),
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.scale_by_learning_rate(values["learning_rate"]),
    )


class AdamState(NamedTuple):
    """First and second moments."""

    exp_avg: Any
    exp_avg_sq: Any


def scale_by_adam(hyper: AdamW, values: Scalars) -> optax.GradientTransformation:
    """Adam's direction in PyTorch's formula, with the bias corrections given (Kingma & Ba 2015)."""

    def init(params: Any) -> AdamState:
        return AdamState(optax.tree.zeros_like(params), optax.tree.zeros_like(params))

    def update(gradients: Any, state: AdamState, params: Any = None) -> tuple[Any, AdamState]:
        exp_avg = jax.tree.map(lambda m, g: m + (1.0 - hyper.beta1) * (g - m), state.exp_avg, gradients)
        exp_avg_sq = jax.tree.map(lambda v, g: hyper.beta2 * v + (1.0 - hyper.beta2) * g * g, state.exp_avg_sq, gradients)
        updates = jax.tree.map(lambda m, v: adam_direction(m, v, hyper.epsilon, values), exp_avg, exp_avg_sq)
        return updates, AdamState(exp_avg, exp_avg_sq)

    return optax.GradientTransformation(init, update)


def adam_direction(exp_avg: jax.Array, exp_avg_sq: jax.Array, epsilon: float, values: Scalars) -> jax.Array:
    """m̂ / (sqrt(v̂) + epsilon): epsilon outside of the bias-corrected root (numerics 15)."""
    denominator = jnp.sqrt(exp_avg_sq) / jnp.sqrt(values["bias_correction2"]) + epsilon
    return exp_avg / values["bias_correction1"] / denominator
