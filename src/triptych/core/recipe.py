"""Hyperparameters, and the reference formulas of everything that turns a gradient into a weight.

A recipe is one pure description; each framework executes it natively. The learning rate enters every step as an argument,
computed here in float64, because optax schedules and Keras optimizers hold it in float32 (numerics 16, 31).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from triptych.core.contract import TrainingState
from triptych.core.errors import UsageError
from triptych.core.spec import Spec, TensorSpec

# PyTorch's: added to the norm that gradients are clipped by (numerics 18).
CLIP_EPSILON = 1e-6
# The kinds of tensors that weight decay is for: what is multiplied or looked up, not what is added or scales (numerics 14).
DECAYING = ("conv_weight", "linear_weight", "lookup_weight", "lstm_input_weight", "lstm_state_weight")
# torch.optim.lr_scheduler.ReduceLROnPlateau's: an evaluation counts as better when it is below the best by this share of it.
PLATEAU_THRESHOLD = 1e-4


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
    """The learning rate over the steps of a run. Linear warmup to `peak` over `warmup_steps`, then by `kind`:

    `cosine`: down to `final` at `total_steps` (Loshchilov & Hutter 2017); `constant`: stay; `one_cycle`: the warmup starts at
    peak / 25 and a straight line leads down to `final` at the last step (Smith & Topin 2019, as torch's OneCycleLR with
    `anneal_strategy="linear"`); `step`: times `gamma` at each of `milestones`; `plateau`: times `gamma` whenever the
    evaluation loss has not become better for more than `patience` evaluations.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    final: float = 0.0
    kind: Literal["cosine", "constant", "one_cycle", "step", "plateau"] = "cosine"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    patience: int = 2


@dataclass(frozen=True, slots=True)
class Clip:
    """What gradients are clipped by, after unscaling and before weight decay: their common norm, or each value; one of the two."""

    norm: float | None = None
    value: float | None = None


@dataclass(frozen=True, slots=True)
class LossScaling:
    """Dynamic loss scaling of float16, torch.amp.GradScaler's rule; bfloat16 has float32's range and needs none."""

    initial: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that turns batches into a trained model, except the model and where the batches come from.

    `micro_batch_size` (None: the global batch at once) splits a batch; gradients are averaged by samples, BatchNorm sees the parts.
    `frozen` names layers (`layer1` stands for all below it) that keep their parameters and normalize by their running statistics.
    `remat` recomputes activations in the backward pass. `mixed_precision` computes products and convolutions in half precision;
    weights, BatchNorm, softmax, loss and optimizer stay in the model's precision. float16 needs `loss_scaling`; in any other
    precision it is allowed, and changes nothing but rounding: so a proof in float64 can see it.
    """

    optimizer: SGD | AdamW
    schedule: Schedule
    global_batch_size: int
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    decay_norm_and_bias: bool = False
    seed: int = 0
    micro_batch_size: int | None = None
    clip: Clip | None = None
    frozen: tuple[str, ...] = ()
    remat: bool = False
    mixed_precision: Literal["bfloat16", "float16"] | None = None
    loss_scaling: LossScaling | None = None


def check(recipe: Recipe, spec: Spec) -> None:
    """UsageError for a combination that cannot be executed; every room asks before it builds a trainer."""
    clip, micro, classes = recipe.clip, recipe.micro_batch_size, spec.num_classes
    if clip is not None and (clip.norm is None) == (clip.value is None):
        raise UsageError(f"clip.norm={clip.norm} and clip.value={clip.value}: gradients are clipped by one of the two")
    limit = None if clip is None else clip.norm if clip.value is None else clip.value
    if limit is not None and not limit > 0.0:
        raise UsageError(f"gradients cannot be clipped by {limit}; the limit must be positive")
    if micro is not None and not 1 <= micro <= recipe.global_batch_size:
        raise UsageError(f"micro_batch_size={micro} must be between 1 and global_batch_size={recipe.global_batch_size}")
    if recipe.mixed_precision == "float16" and recipe.loss_scaling is None:
        raise UsageError("float16 has too small a range for gradients: give the recipe a loss_scaling, or use bfloat16")
    if not 0.0 <= recipe.label_smoothing < 1.0:
        raise UsageError(f"label_smoothing={recipe.label_smoothing} must be in [0, 1); {spec.name} has {classes} classes")
    layers = [layer.name for layer in spec.layers()]
    for name in recipe.frozen:
        if not any(covers(name, layer) for layer in layers):
            raise UsageError(f"frozen: {spec.name} has no layer {name!r}; `triptych info {spec.name}` lists them")
    if not trainable(recipe, spec):
        raise UsageError(f"frozen={list(recipe.frozen)} leaves nothing of {spec.name} to train")


def covers(prefix: str, layer: str) -> bool:
    """Whether `layer` is `prefix` or lies below it: `layer1` covers `layer1.0.conv1`, not `layer10`."""
    return layer == prefix or layer.startswith(f"{prefix}.")


def is_frozen(recipe: Recipe, layer: str) -> bool:
    """Whether the recipe keeps a layer as it is: no gradient, no update, running statistics used and left alone."""
    return any(covers(prefix, layer) for prefix in recipe.frozen)


def trainable(recipe: Recipe, spec: Spec) -> tuple[TensorSpec, ...]:
    """The parameters that the recipe moves, in state-dict order."""
    return tuple(tensor for tensor in spec.parameters() if not is_frozen(recipe, tensor.layer))


def initial_state(recipe: Recipe, weights: Mapping[str, np.ndarray], spec: Spec) -> TrainingState:
    """Step 0: slots zero, the average equal to the weights, the loss scale at its first value.

    The zeros take no memory (`zeros_like` would fill them): a large model's are a gigabyte and more, beside a whole training state.
    """
    kinds = {tensor.name: (weights[tensor.name].shape, weights[tensor.name].dtype) for tensor in spec.parameters()}
    slots = {slot: {name: np.zeros(*kind) for name, kind in kinds.items()} for slot in recipe.optimizer.slots}
    ema = weights if recipe.ema_decay is not None else {}
    return TrainingState(weights, slots, ema, 0, recipe.loss_scaling.initial if recipe.loss_scaling else None)


def learning_rate(schedule: Schedule, step: int, reductions: int = 0) -> float:
    """The learning rate of step `step` (the first is 0), a pure function: step 0 uses lr(0) = peak / warmup_steps.

    `reductions` is for `plateau` alone: how often the rate has been reduced so far (`plateau_reductions`).
    """
    peak, warmup = schedule.peak, schedule.warmup_steps
    if schedule.kind == "one_cycle":
        return _one_cycle(schedule, step)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "step":
        return peak * schedule.gamma ** sum(step >= milestone for milestone in schedule.milestones)
    if schedule.kind == "plateau":
        return peak * schedule.gamma**reductions
    span = max(1, schedule.total_steps - warmup)
    progress = min(1.0, (step - warmup) / span)
    return schedule.final + 0.5 * (peak - schedule.final) * (1.0 + math.cos(math.pi * progress))


def _one_cycle(schedule: Schedule, step: int) -> float:
    peak, top, last = schedule.peak, max(schedule.warmup_steps - 1, 0), schedule.total_steps - 1
    if step < top:
        return peak / 25.0 + (peak - peak / 25.0) * step / top
    return peak + (schedule.final - peak) * min(1.0, (step - top) / max(1, last - top))


def plateau_reductions(schedule: Schedule, losses: Sequence[float]) -> int:
    """How often `plateau` has reduced the rate after evaluations with these losses, oldest first (ReduceLROnPlateau, mode min)."""
    best, waited, reductions = math.inf, 0, 0
    for loss in losses:
        better = loss < best * (1.0 - PLATEAU_THRESHOLD) if math.isfinite(best) else loss < best
        best, waited = (loss, 0) if better else (best, waited + 1)
        if waited > schedule.patience:
            reductions, waited = reductions + 1, 0
    return reductions


def decays(recipe: Recipe, tensor: TensorSpec) -> bool:
    """Weight-decay groups: weights that are multiplied or looked up always; gamma, beta, biases only if the recipe says so."""
    return recipe.decay_norm_and_bias or tensor.kind in DECAYING


def micro_batches(recipe: Recipe, samples: int) -> list[tuple[slice, float]]:
    """How a batch of `samples` is split: each part and its share of the samples, by which its mean gradient counts (numerics 29)."""
    size = recipe.micro_batch_size or max(1, samples)
    parts = [slice(start, min(start + size, samples)) for start in range(0, max(1, samples), size)]
    return [(part, (part.stop - part.start) / max(1, samples)) for part in parts]


def clip_coefficient(norm: Any, limit: float) -> Any:
    """What gradients of this common norm are multiplied by, at most 1: limit / (norm + 1e-6), as torch.nn.utils.clip_grad_norm_."""
    return np.minimum(1.0, limit / (norm + CLIP_EPSILON))


def next_loss_scale(scaling: LossScaling, scale: float, good_steps: int, *, overflow: bool) -> tuple[float, int]:
    """Scale and good steps after a step: an overflow backs off and is skipped, `interval` good steps in a row let the scale grow."""
    if overflow:
        return scale * scaling.backoff, 0
    if good_steps + 1 >= scaling.interval:
        return scale * scaling.growth, 0
    return scale, good_steps + 1


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
    """The recipe that `to_dict` described, today's or that of an earlier version, which lacked some fields."""
    fields = dict(data)
    optimizer = dict(fields["optimizer"])
    kind = {"sgd": SGD, "adamw": AdamW}[optimizer.pop("name")]
    schedule = Schedule(**{name: _tuple(value) for name, value in fields["schedule"].items()})
    clip, scaling = fields.get("clip"), fields.get("loss_scaling")
    return Recipe(**{
        **fields, "optimizer": kind(**optimizer), "schedule": schedule, "clip": Clip(**clip) if clip else None,
        "frozen": tuple(fields.get("frozen", ())), "loss_scaling": LossScaling(**scaling) if scaling else None,
    })  # fmt: skip


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
