"""The ladder for any recipe: what of a training run a proof takes over, and how it fits a proof's few steps."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from triptych.core import recipe as formulas
from triptych.core.contract import DEFAULT_EXECUTION, Execution
from triptych.core.preprocess import Transforms
from triptych.core.recipe import SGD, AdamW, Recipe, Schedule
from triptych.core.spec import Spec
from triptych.parity.plan import Plan

STEPS = 50
BATCH = 18
"""Images, unless told otherwise: in four micro-batches the last is an uneven one."""
# What a recipe is about; the model's own forward passes are proven by `triptych parity MODEL`.
RUNGS = (1, 2, 5, 6, 7, 8)
# AdamW magnifies rounding where a gradient is near its epsilon, which a few elements of a tensor are: a small sketch would miss them.
SKETCH = 2**16
# An exchanged optimizer comes with its own defaults, and with a peak that suits it.
EXCHANGED: dict[str, tuple[SGD | AdamW, float]] = {"sgd": (SGD(), 1e-2), "adamw": (AdamW(), 1e-3)}


def recipe_plan(
    spec: Spec, recipe: Recipe, transforms: Transforms, data: str, frameworks: tuple[str, ...], *, steps: int = STEPS,
    batch_size: int | None = None, uneven: Literal["drop", "pad"] = "drop", execution: Execution = DEFAULT_EXECUTION, device: str = "cpu",
) -> Plan:  # fmt: skip
    """A float64 climb in which the training rungs follow `recipe`, once with its own optimizer and once with the other, on `data`.

    Raises UsageError for a recipe that cannot be executed.
    """
    fitted = fit(recipe, steps, batch_size or min(BATCH, recipe.global_batch_size))
    formulas.check(fitted, spec)
    return Plan(
        spec, frameworks, "float64", RUNGS, device=device, training_batch=fitted.global_batch_size, steps=steps, adamw_steps=steps,
        free=("sgd", "adamw"), sketch=SKETCH, sgd=with_optimizer(fitted, "sgd"),
        adamw=with_optimizer(fitted, "adamw"), transforms=transforms, data=data, uneven=uneven, execution=execution,
    )  # fmt: skip


def fit(recipe: Recipe, steps: int, batch_size: int) -> Recipe:
    """The recipe at another batch size, in as many micro-batches as before, with its whole schedule in so many steps.

    In float64 half precision is left out; loss scaling stays, which is exact there.
    """
    micro = recipe.micro_batch_size
    if micro is not None:
        parts = -(-recipe.global_batch_size // micro)
        micro = -(-batch_size // parts)
    return dataclasses.replace(
        recipe, global_batch_size=batch_size, micro_batch_size=micro, schedule=squeezed(recipe.schedule, steps), mixed_precision=None
    )


def squeezed(schedule: Schedule, steps: int) -> Schedule:
    """The schedule with warmup, milestones and end drawn nearer, when it is longer than `steps`: so that they are passed all of them."""
    if schedule.total_steps <= steps:
        return schedule
    share = steps / schedule.total_steps
    warmup = max(1, round(schedule.warmup_steps * share)) if schedule.warmup_steps else 0
    milestones = tuple(max(1, round(milestone * share)) for milestone in schedule.milestones)
    return dataclasses.replace(schedule, warmup_steps=warmup, total_steps=steps, milestones=milestones)


def with_optimizer(recipe: Recipe, kind: str) -> Recipe:
    """The recipe with an optimizer of this kind: its own, or the other one, whose peak is its own, too."""
    if recipe.optimizer.name == kind:
        return recipe
    optimizer, peak = EXCHANGED[kind]
    final = recipe.schedule.final * peak / recipe.schedule.peak
    return dataclasses.replace(recipe, optimizer=optimizer, schedule=dataclasses.replace(recipe.schedule, peak=peak, final=final))


def describe(plan: Plan) -> dict[str, Any]:
    """What a recipe's certificate says beside the rungs: both recipes as they were climbed, transforms and data."""
    fields = plan.to_json()
    return {
        name: fields[name] for name in ("sgd", "adamw", "transforms", "data", "uneven", "execution", "steps", "adamw_steps", "free_steps")
    }
