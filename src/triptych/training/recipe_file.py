"""Recipes as YAML files: read, checked and resolved into a `Job`. pydantic only parses; every formula is in `core/recipe.py`."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from triptych.core import catalog, yaml_file
from triptych.core.contract import Execution, Loader
from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import Transforms
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling, Recipe, Schedule
from triptych.training.job import Intervals, Job, Limits, Watch, check_parts

FOLDER = "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class OptimizerSection(_Section):
    """`core.recipe.SGD` or `AdamW`, whose own weight decay stands when none is given; `learning_rate` is the schedule's peak."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    decay_norm_and_bias: bool = False
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)

    def optimizer(self) -> SGD | AdamW:
        """The optimizer it describes."""
        decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
        if self.name == "sgd":
            return SGD(momentum=self.momentum, nesterov=self.nesterov, **decay)
        return AdamW(beta1=self.beta1, beta2=self.beta2, epsilon=self.epsilon, **decay)


class ScheduleSection(_Section):
    """`core.recipe.Schedule` in epochs; `warmup_steps` wins over `warmup_epochs`."""

    kind: Literal["cosine", "constant", "one_cycle", "step", "plateau"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_steps: int | None = Field(default=None, ge=0)
    final: float = Field(default=0.0, ge=0)
    milestones: tuple[float, ...] = ()
    gamma: float = Field(default=0.1, gt=0)
    patience: int = Field(default=2, ge=0)

    def schedule(self, peak: float, per_epoch: int, total: int) -> Schedule:
        """In steps, of `per_epoch` an epoch."""
        warmup = round(self.warmup_epochs * per_epoch) if self.warmup_steps is None else self.warmup_steps
        milestones = tuple(round(epoch * per_epoch) for epoch in self.milestones)
        return Schedule(peak, min(warmup, max(0, total - 1)), total, self.final, self.kind, milestones, self.gamma, self.patience)


class FineTuneSection(_Section):
    """Start from a checkpoint, with a new head or without; `frozen` names layers that stay as they are."""

    start_from: str | None = None
    new_head: bool = False
    frozen: tuple[str, ...] = ()


class RecipeFile(_Section):
    """Everything of a run except the framework: one resolved recipe. The field's own docstrings are in `core` and `training.job`."""

    model: str
    options: dict[str, Any] = Field(default_factory=dict)
    data: str = "digits"
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    global_batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    uneven: Literal["drop", "pad"] = "drop"
    progressive: tuple[tuple[int, float], ...] = ()
    transforms: Transforms = Transforms()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    clip: Clip | None = None
    ema: float | None = Field(default=None, ge=0, lt=1)
    fine_tune: FineTuneSection = FineTuneSection()
    remat: bool = False
    precision: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    loss_scaling: LossScaling | None = None
    device: Literal["auto", "cpu", "cuda", "mps", "tpu"] = "auto"
    execution: Execution = Execution()
    loader: Loader = Loader()
    intervals: Intervals = Intervals()
    limits: Limits = Limits()
    watch: Watch = Watch()
    seed: int = Field(default=0, ge=0)

    def job(self, samples: int) -> Job:
        """The run over this many training images. UsageError when epochs, steps and sizes do not fit together."""
        catalog.get_spec(self.model, **self.options)
        check_parts(self.intervals, self.limits, self.loader, self.watch, self.loss_scaling)
        if self.fine_tune.new_head and self.fine_tune.start_from is None:
            raise UsageError("fine_tune.new_head keeps the rest of a checkpoint: name it, --set fine_tune.start_from=DIRECTORY")
        per_epoch = self._steps_per_epoch(samples)
        total, progressive = self._length(per_epoch)
        half = self.precision if self.precision in ("bfloat16", "float16") else None
        scaling = LossScaling() if half == "float16" and self.loss_scaling is None else self.loss_scaling
        recipe = Recipe(
            self.optimizer.optimizer(), self.schedule.schedule(self.optimizer.learning_rate, per_epoch, total), self.global_batch_size,
            self.label_smoothing, self.ema, self.optimizer.decay_norm_and_bias, self.seed, self.micro_batch_size, self.clip,
            self.fine_tune.frozen, self.remat, half, scaling,
        )  # fmt: skip
        return Job(
            self.model, self.data, recipe, total, "float64" if self.precision == "float64" else "float32", self.device, dict(self.options),
            self.transforms, self.uneven, progressive, self.fine_tune.start_from, self.fine_tune.new_head, self.execution, self.loader,
            self.intervals, self.limits, watch=self.watch,
        )  # fmt: skip

    def _steps_per_epoch(self, samples: int) -> int:
        batches = [self.limits.overfit_batches, self.limits.limit_batches]
        limit = next((each for each in batches if each is not None), None)
        available = samples if limit is None else min(samples, limit * self.global_batch_size)
        whole, rest = divmod(available, self.global_batch_size)
        steps = whole + bool(rest and self.uneven == "pad")
        if not steps:
            raise UsageError(f"global_batch_size={self.global_batch_size} is more than the {samples} training images of {self.data}")
        return steps

    def _length(self, per_epoch: int) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Steps in all, and the first step of each image size."""
        given = [name for name in ("epochs", "steps", "progressive") if getattr(self, name)]
        if len(given) != 1:
            raise UsageError(f"the length of a run is told by one of epochs, steps and progressive; given: {', '.join(given) or 'none'}")
        if not self.progressive:
            return max(1, round(self.epochs * per_epoch)) if self.epochs is not None else int(self.steps or 1), ()
        starts, done = [], 0.0
        for size, epochs in self.progressive:
            starts.append((round(done * per_epoch), size))
            done += epochs
        return max(1, round(done * per_epoch)), tuple(starts)

    def resolved(self) -> str:
        """The whole recipe as YAML, defaults included; `loads` of it is this recipe again."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
        return text


def names() -> list[str]:
    """The shipped recipes."""
    return yaml_file.shipped(FOLDER)


def is_recipe(name: str) -> bool:
    """Whether `name` is meant as a recipe: a shipped one, or a path that ends like one."""
    return name.endswith(yaml_file.ENDINGS) or name in names()


def load(name: str, overrides: Sequence[str] = ()) -> RecipeFile:
    """A shipped recipe, or the file at a path, with `KEY=VALUE` overrides (dotted keys, YAML values; the last one wins).

    Raises UsageError for an unknown name or a wrong override, InputRefused for a file that is no recipe.
    """
    data = yaml_file.mapping(yaml_file.read(name, "recipe", FOLDER), name, "recipe")
    _check_keys(data, RecipeFile, name, InputRefused)
    if overrides:
        yaml_file.checked(RecipeFile, data, InputRefused, name)
    for override in overrides:
        _override(data, override)
        yaml_file.checked(RecipeFile, data, UsageError, f"--set {override}")
    return yaml_file.checked(RecipeFile, data, InputRefused, name)


def loads(text: str, source: str = "recipe") -> RecipeFile:
    """The recipe in a YAML text."""
    data = yaml_file.mapping(text, source, "recipe")
    _check_keys(data, RecipeFile, source, InputRefused)
    return yaml_file.checked(RecipeFile, data, InputRefused, source)


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override}: give KEY=VALUE, for instance optimizer.learning_rate=0.1")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {override}: {value!r} is not a YAML value") from None
    change: dict[str, Any] = {}
    *parents, last = key.split(".")
    place = change
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = parsed
    _check_keys(change, RecipeFile, "--set", UsageError)
    _merge(data, change)


def _merge(data: dict[str, Any], change: Mapping[str, Any]) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            _merge(data[key], value)
        else:
            data[key] = value


def _check_keys(data: Mapping[str, Any], kind: Any, source: str, error: type[InputRefused] | type[UsageError], prefix: str = "") -> None:
    """`error` for the first key that does not exist, by its whole name, with the nearest one."""
    fields = _fields(kind)
    for key, value in data.items():
        if fields and key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{prefix}{close[0]}'? " if close else ""
            raise error(f"{source}: unknown key '{prefix}{key}'; {hint}allowed: {', '.join(prefix + name for name in fields)}")
        if isinstance(value, Mapping) and fields:
            _check_keys(value, fields[key], source, error, f"{prefix}{key}.")


def _fields(kind: Any) -> dict[str, Any]:
    """Names and types of what a section may hold; nothing for a plain value."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next((each for each in typing.get_args(kind) if _fields(each)), None)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return typing.get_type_hints(kind)
    return {}
