"""What a training run is: plain data, the same for every framework."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from triptych.core import catalog, recipe
from triptych.core.contract import DEFAULT_EXECUTION, DEFAULT_LOADER, Execution, Loader
from triptych.core.errors import UsageError
from triptych.core.preprocess import NO_TRANSFORMS, ColorJitter, RandomErasing, RandomResizedCrop, Transforms
from triptych.core.recipe import SGD, LossScaling, Recipe, Schedule
from triptych.core.spec import ImageSpec
from triptych.data import Source, open_source


@dataclass(frozen=True, slots=True)
class Intervals:
    """How often things happen, in steps (None: never, or only at the end)."""

    evaluate: int | None = None
    checkpoint: int | None = None
    keep_last: int = 2
    keep_best: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends or shrinks a run: `max_steps` and `max_time` (seconds) stop it early; `limit_batches` limits each epoch and evaluation to
    so many batches; `overfit_batches` trains on the same first batches again and again, and evaluates on them; with `dry_run` everything is
    checked and nothing trained."""

    max_steps: int | None = None
    max_time: float | None = None
    limit_batches: int | None = None
    overfit_batches: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Watch:
    """What a run writes to be looked at: TensorBoard's event files with scalars and the first `images` images as the model gets them.

    `histograms` adds every weight's at each evaluation; `profile_steps` a trace by the framework's own profiler of so many early steps.
    """

    tensorboard: bool = True
    images: int = 8
    histograms: bool = False
    profile_steps: int | None = None


DEFAULT_INTERVALS, NO_LIMITS, DEFAULT_WATCH = Intervals(), Limits(), Watch()


def check_parts(intervals: Intervals, limits: Limits, loader: Loader, watch: Watch, scaling: LossScaling | None) -> None:
    """UsageError, naming the value as a recipe names it, for one out of its range."""
    for name, value, allowed, fits in _ranges(intervals, limits, loader, watch, scaling or LossScaling()):
        if value is not None and not (fits and math.isfinite(value)):
            raise UsageError(f"{name}={value!r} is out of range; it must be {allowed}")
    if loader.cache is not None and not loader.cache.strip():
        raise UsageError(f"loader.cache={loader.cache!r} is neither 'memory' nor the path of a file; leave it out for no cache")


def _ranges(
    intervals: Intervals, limits: Limits, loader: Loader, watch: Watch, scaling: LossScaling
) -> Iterator[tuple[str, float | None, str, bool]]:
    """(name, value, what is allowed, whether it is) of every number."""
    least: list[tuple[str, float | None, int]] = [
        ("intervals.evaluate", intervals.evaluate, 1), ("intervals.checkpoint", intervals.checkpoint, 1),
        ("intervals.keep_last", intervals.keep_last, 1), ("intervals.keep_best", intervals.keep_best, 0),
        ("limits.max_steps", limits.max_steps, 1), ("limits.limit_batches", limits.limit_batches, 1),
        ("limits.overfit_batches", limits.overfit_batches, 1),
        ("loader.workers", loader.workers, 0), ("loader.prefetch", loader.prefetch, 1),
        ("watch.images", watch.images, 0), ("watch.profile_steps", watch.profile_steps, 1),
        ("loss_scaling.interval", scaling.interval, 1),
    ]  # fmt: skip
    for name, value, smallest in least:
        yield name, value, f"{smallest} or more", value is None or value >= smallest
    yield "limits.max_time", limits.max_time, "above 0", limits.max_time is None or limits.max_time > 0
    yield "loss_scaling.initial", scaling.initial, "above 0", scaling.initial > 0
    yield "loss_scaling.growth", scaling.growth, "above 1", scaling.growth > 1
    yield "loss_scaling.backoff", scaling.backoff, "between 0 and 1, exclusive", 0 < scaling.backoff < 1


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one model on one data set: a resolved recipe, plain data, the same for every framework.

    `precision` is that of the weights; `recipe.mixed_precision` that of products. `progressive` is ((first step, image size), ...):
    the run changes to that size at that step. `start_from` is a checkpoint to fine-tune; with `new_head` all of it but the classifier.
    `perturbation` moves the initial weights by one unit in the last place (None: not). Raises UsageError for a number out of its range.
    """

    model: str
    data: str
    recipe: Recipe
    steps: int
    precision: str = "float32"
    device: str = "cpu"
    options: dict[str, Any] = field(default_factory=dict)
    transforms: Transforms = NO_TRANSFORMS
    uneven: Literal["drop", "pad"] = "drop"
    progressive: tuple[tuple[int, int], ...] = ()
    start_from: str | None = None
    new_head: bool = False
    execution: Execution = DEFAULT_EXECUTION
    loader: Loader = DEFAULT_LOADER
    intervals: Intervals = DEFAULT_INTERVALS
    limits: Limits = NO_LIMITS
    perturbation: int | None = None
    keep_sketches: bool = False
    watch: Watch = DEFAULT_WATCH

    def __post_init__(self) -> None:
        check_parts(self.intervals, self.limits, self.loader, self.watch, self.recipe.loss_scaling)

    def spec(self, source: Source) -> ImageSpec:
        """The model's spec with the data's classes, channels and size, unless `options` says otherwise.

        Raises UsageError when the model, what `options` says, or a missing label makes training on the data impossible.
        """
        channels = self.options.get("in_channels", catalog.fed_by_images(catalog.get_spec(self.model)).in_channels)
        images = source.take(1).arrays(channels)[0]
        fitted = {"num_classes": len(source.classes), "in_channels": images.shape[3], "image_size": min(images.shape[1:3])}
        spec = catalog.fed_by_images(catalog.get_spec(self.model, **{**fitted, **self.options}))
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
        fields = {"schema": 1, **dataclasses.asdict(self), "recipe": recipe.to_dict(self.recipe)}
        plain: dict[str, Any] = json.loads(json.dumps(fields))  # tuples become lists
        return plain

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """The job that `to_json` described."""
        fields = {key: value for key, value in data.items() if key != "schema"}
        fields["recipe"] = recipe.from_dict(fields["recipe"])
        for name, kind in _PARTS.items():
            if isinstance(fields.get(name), Mapping):
                fields[name] = _revived(kind, fields[name])
        fields["progressive"] = tuple((int(step), int(size)) for step, size in fields.get("progressive", ()))
        return cls(**fields)

    def sha256(self) -> str:
        """Hash of the job, by which a finished run is found again."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


_PARTS: dict[str, Any] = {
    "transforms": Transforms, "execution": Execution, "loader": Loader, "intervals": Intervals, "limits": Limits, "watch": Watch,
    "random_resized_crop": RandomResizedCrop, "jitter": ColorJitter, "erasing": RandomErasing,
}  # fmt: skip


def _revived(kind: Any, data: Mapping[str, Any]) -> Any:
    """A frozen dataclass from what `asdict` and JSON made of it."""
    values = {name: _revived(_PARTS[name], value) if isinstance(value, Mapping) else value for name, value in data.items()}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


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
