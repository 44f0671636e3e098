"""`torch.optim`, driven by a recipe: weight-decay groups, a learning rate given at every step, slots by canonical name.

PyTorch's SGD and AdamW *are* the canonical formulas (`core/recipe.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from triptych.core import recipe as recipes
from triptych.core.recipe import Clip, Recipe
from triptych.core.spec import Spec

# Canonical slot -> its key in `optimizer.state[parameter]`.
SLOTS = {"momentum": "momentum_buffer", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def create_optimizer(native: nn.Module, spec: Spec, recipe: Recipe) -> Optimizer:
    """The recipe's optimizer over two groups, with and without weight decay, all slots zero.

    The learning rate is 0 until `update` is given one.
    """
    groups = decay_groups(native, spec, recipe)
    kind = recipe.optimizer
    if isinstance(kind, recipes.SGD):
        # torch refuses Nesterov without momentum; there the two formulas are the same.
        nesterov = kind.nesterov and kind.momentum > 0
        optimizer: Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=kind.momentum, dampening=0.0, nesterov=nesterov)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(kind.beta1, kind.beta2), eps=kind.epsilon)
    clear_slots(optimizer, native, kind.slots)
    set_steps(optimizer, 0)
    return optimizer


def decay_groups(native: nn.Module, spec: Spec, recipe: Recipe) -> list[dict[str, object]]:
    """Parameter groups of what is not frozen: those that `core.recipe.decays` names get the weight decay, the others none.

    Empty groups are left out.
    """
    parameters = dict(native.named_parameters())
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for tensor in recipes.trainable(recipe, spec):
        groups[recipes.decays(recipe, tensor)].append(parameters[tensor.name])
    decay = recipe.optimizer.weight_decay
    return [{"params": group, "weight_decay": decay if decays else 0.0} for decays, group in groups.items() if group]


def clear_slots(optimizer: Optimizer, native: nn.Module, names: tuple[str, ...]) -> None:
    """Slots of zeros, from which torch computes just as from those it creates at the first step; frozen parameters have them, too."""
    for parameter in native.parameters():
        optimizer.state[parameter].update({SLOTS[slot]: torch.zeros_like(parameter) for slot in names})


def set_steps(optimizer: Optimizer, steps: int) -> None:
    """How many steps the optimizer believes to have taken; only AdamW's bias correction reads it."""
    if isinstance(optimizer, torch.optim.AdamW):
        for parameter in _parameters(optimizer):
            # A float32 tensor on the CPU is how torch itself counts: exact up to 2^24 steps.
            optimizer.state[parameter]["step"] = torch.tensor(float(steps), dtype=torch.float32)


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def slots(optimizer: Optimizer, native: nn.Module, names: tuple[str, ...]) -> dict[str, dict[str, Tensor]]:
    """{slot: {parameter name: tensor}}, the optimizer's own tensors."""
    return {slot: {name: optimizer.state[p][SLOTS[slot]] for name, p in native.named_parameters()} for slot in names}


def clip(parameters: Iterable[nn.Parameter], limits: Clip | None) -> None:
    """Clip the gradients in `.grad`: each value, or all by their common norm, to which PyTorch adds 1e-6 (numerics 18)."""
    if limits is not None and limits.value is not None:
        nn.utils.clip_grad_value_(parameters, limits.value)
    elif limits is not None and limits.norm is not None:
        nn.utils.clip_grad_norm_(parameters, limits.norm)


def update(optimizer: Optimizer, learning_rate: float) -> None:
    """One step of the optimizer, given gradients in `.grad`, at this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()


def update_average(average: Mapping[str, Tensor], state: Mapping[str, Tensor], decay: float) -> None:
    """Exponential moving average in place, `decay * old + (1 - decay) * new` (`core.recipe.ema`); integer counters are copied."""
    with torch.no_grad():
        for name, old in average.items():
            if old.is_floating_point():
                old.mul_(decay).add_(state[name], alpha=1.0 - decay)
            else:
                old.copy_(state[name])
