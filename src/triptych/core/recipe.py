"""Hyperparameters, and the reference formulas of everything that turns a gradient into a weight.

A recipe is one pure description; each framework executes it natively. The learning rate enters every step as an argument,
computed here in float64, because optax schedules and Keras optimizers hold it in float32 (numerics 16, 31).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from triptych.core.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class SGD:
    """PyTorch's SGD, dampening 0: g += wd w; v = m v + g; d = g + m v if nesterov else v; w -= lr d (numerics 12-14)."""

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4

    name = "sgd"
    slots = ("momentum",)


@dataclass(frozen=True, slots=True)
class AdamW:
    """PyTorch's AdamW (Loshchilov & Hutter 2019): w -= lr wd w; w -= lr m̂ / (sqrt(v̂) + epsilon), epsilon outside the root."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-2

    name = "adamw"
    slots = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warmup to `peak` over `warmup_steps`, then cosine to `final` at `total_steps` (or constant at `peak`)."""

    peak: float
    warmup_steps: int
    total_steps: int
    final: float = 0.0
    kind: Literal["cosine", "constant"] = "cosine"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that turns images into a trained model, except the model."""

    optimizer: SGD | AdamW
    schedule: Schedule
    global_batch_size: int
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    decay_norm_and_bias: bool = False
    seed: int = 0


def learning_rate(schedule: Schedule, step: int) -> float:
    """The learning rate of step `step` (the first is 0), a pure function: step 0 uses lr(0) = peak / warmup_steps."""
    if step < schedule.warmup_steps:
        return schedule.peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return schedule.peak
    span = max(1, schedule.total_steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return schedule.final + 0.5 * (schedule.peak - schedule.final) * (1.0 + math.cos(math.pi * progress))


def decays(recipe: Recipe, tensor: TensorSpec) -> bool:
    """Weight-decay groups: weights of convolutions and linear layers always; gamma, beta, biases only if the recipe says so."""
    return recipe.decay_norm_and_bias or tensor.kind in ("conv_weight", "linear_weight")


def ema(old: Any, new: Any, decay: float) -> Any:
    """Exponential moving average, updated after the optimizer step: decay * old + (1 - decay) * new.

    It covers parameters and BatchNorm statistics; integer counters are copied.
    """
    return decay * old + (1.0 - decay) * new


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data for JSON; `from_dict` is its inverse."""
    data = dataclasses.asdict(recipe)
    data["optimizer"] = {"name": recipe.optimizer.name, **data["optimizer"]}
    return data


def from_dict(data: dict[str, Any]) -> Recipe:
    """The recipe that `to_dict` described."""
    fields = dict(data)
    optimizer = dict(fields["optimizer"])
    kind = {"sgd": SGD, "adamw": AdamW}[optimizer.pop("name")]
    return Recipe(**{**fields, "optimizer": kind(**optimizer), "schedule": Schedule(**fields["schedule"])})
