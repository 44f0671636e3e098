"""What a training run is: plain data, the same for every framework."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.core import catalog, recipe
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, Recipe, Schedule
from triptych.core.spec import Spec
from triptych.data import Source, open_source


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one model on one data set. `perturbation` moves the initial weights by one unit in the last place (None: not)."""

    model: str
    data: str
    recipe: Recipe
    steps: int
    precision: str = "float32"
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    perturbation: int | None = None
    keep_sketches: bool = False

    def spec(self, source: Source) -> Spec:
        """The model's spec with the data's classes, channels and size, unless `options` says otherwise.

        Raises UsageError when what `options` says, or a missing label, makes training on the data impossible.
        """
        channels = self.options.get("in_channels", catalog.get_spec(self.model).in_channels)
        images = source.take(1).arrays(channels)[0]
        fitted = {"num_classes": len(source.classes), "in_channels": images.shape[3], "image_size": min(images.shape[1:3])}
        spec = catalog.get_spec(self.model, **{**fitted, **self.options})
        if spec.in_channels != images.shape[3]:
            raise UsageError(f"{source.name} has images of {images.shape[3]} channels, {spec.name} is to take {spec.in_channels}")
        if not 0 <= source.labels.min() <= source.labels.max() < spec.num_classes:
            span = f"{source.labels.min()} to {source.labels.max()} (-1: unknown)"
            raise UsageError(
                f"{source.name} has labels {span}; {spec.name} with {spec.num_classes} classes learns 0 to {spec.num_classes - 1}"
            )
        if source.name == "digits" and spec.in_channels == 1:
            return dataclasses.replace(spec, preprocessing=dataclasses.replace(catalog.DIGITS, crop=spec.image_size))
        return spec

    def source(self, split: str) -> Source:
        """The images of a split, opened anew."""
        return open_source(self.data, split)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `Job.from_json` is its inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": 1, **fields, "recipe": recipe.to_dict(self.recipe)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The job that `to_json` described."""
        fields = {key: value for key, value in data.items() if key != "schema"}
        return cls(**{**fields, "recipe": recipe.from_dict(fields["recipe"])})

    def sha256(self) -> str:
        """Hash of the job, by which a finished run is found again."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def standard_recipe(
    *, samples: int, epochs: float, batch_size: int, peak: float, warmup_epochs: float = 1.0, seed: int = 0, **changes: Any
) -> tuple[Recipe, int]:
    """SGD with Nesterov momentum, warmup and cosine to zero over `epochs`, and the number of steps it takes.

    The usual CIFAR recipe of He et al. 2015 with a cosine in place of steps; `changes` replaces fields of `Recipe`.
    """
    per_epoch = samples // batch_size
    steps = max(1, round(epochs * per_epoch))
    warmup = min(steps - 1, round(warmup_epochs * per_epoch))
    made = Recipe(SGD(momentum=0.9, nesterov=True, weight_decay=5e-4), Schedule(peak, warmup, steps), batch_size, seed=seed)
    return dataclasses.replace(made, **changes), steps


def describe(run: Path) -> Job:
    """The job of a run directory."""
    return Job.from_json(json.loads((run / "job.json").read_text()))
