"""Certify a model: the ladder in each precision asked for, with the same weights, and one certificate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.errors import UsageError
from triptych.core.initialize import Weights
from triptych.core.spec import Spec
from triptych.parity.observation import write_json
from triptych.parity.plan import ALL_RUNGS, Plan
from triptych.parity.prove import Proof, certificate, prove
from triptych.parity.recipes import describe
from triptych.parity.subject import as_precision

LARGE = 70_000_000
"""Parameters beyond which a model is large: in float64 its weights, gradients, moments and average are 3 GB and more."""


def certify(
    model: str, spec: Spec, weights: Path | None, frameworks: tuple[str, ...], precisions: tuple[str, ...], device: str, run: Path,
    progress: Callable[[str], None], rungs: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Climb the ladder and return the certificate (also written to `run/certificate.json`).

    `rungs` names those to climb in a precision; without it all eight.

    `weights` is a canonical checkpoint of this model; its own spec (classes, channels, size) is what is proven.
    Raises InputRefused for a damaged or foreign checkpoint, UsageError for one of another model.
    """
    given: Mapping[str, np.ndarray] | None = None
    if weights is not None:
        spec, given = _checkpoint(model, weights)
    proofs: list[Proof] = []
    for precision in precisions:
        climbed = (rungs or {}).get(precision, ALL_RUNGS)
        plan = Plan(spec, frameworks, precision, climbed, device, training_batch=training_images(spec), calibrate=given is None)
        # Parity weights are calibrated once; the later precision takes the earlier one's, so that one hash covers both.
        start = as_precision(given, precision) if given is not None else None
        proofs.append(prove(plan, start, run / precision, progress))
        given = given if given is not None else proofs[-1].weights
    result = certificate(model, proofs)
    write_json(run / "certificate.json", result)
    return result


def training_images(spec: Spec) -> int:
    """Images of a training batch: 4, and 1 where four states of a large model leave no memory for the activations of more."""
    return 4 if sum(math.prod(tensor.shape) for tensor in spec.parameters()) <= LARGE else 1


def certify_recipe(name: str, plan: Plan, weights: Path | None, run: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Climb the ladder of a recipe's plan (`recipes.recipe_plan`) and return its certificate (also `run/certificate.json`).

    Raises as `certify` does, and UsageError for a checkpoint of other classes, channels or size than the recipe's data.
    """
    given: Weights | None = None
    if weights is not None:
        spec, held = _checkpoint(plan.spec.name, weights)
        if spec != plan.spec:
            raise UsageError(
                f"{weights} is of another shape than {name} trains: compare `triptych info` of the two; or leave --weights out"
            )
        given = as_precision(held, plan.precision)
    proof = prove(dataclasses.replace(plan, calibrate=given is None), given, run / plan.precision, progress)
    result = {**certificate(plan.spec.name, [proof]), "recipe": {"name": name, **describe(proof.plan)}}
    write_json(run / "certificate.json", result)
    return result


def _checkpoint(model: str, path: Path) -> tuple[Spec, Weights]:
    from triptych.core import checkpoint

    loaded = checkpoint.load(path)
    if loaded.spec.name != model:
        raise UsageError(f"{path} holds a {loaded.spec.name}, not a {model}; run `triptych parity {loaded.spec.name} --weights {path}`")
    return loaded.spec, loaded.weights
