"""Plant one realistic porting fault at a time, in one framework at a time: the proof must be able to fail.

Every row names its cause (a row of docs/numerics.md), the rung that must catch it and the layer it sits in.
Faults of plain data (weights, recipe, boxes) are planted here, on the `Subject`; faults of native code stand in each room's
`faults.py` under the same names. The models themselves know nothing of faults.

A fault of your own: `triptych parity MODEL --fault FILE:function`. The function is called in each framework's worker as
`function(subject)` before anything is computed, with a `parity.subject.Subject`. It may

- replace attributes: `subject.weights[name]`, `subject.spec`, `subject.recipes["sgd"]`, `subject.learning_rate`, ...;
- intercept a layer: `subject.intercept("layer2.0.bn1", lambda native_layer, call, x: ...)` is a context manager on native tensors;
- change `subject.model.native`, or patch anything in `subject.room` (`subject.framework` says which framework it is).

It may return a context manager (or be a generator function used as one with `contextlib.contextmanager`) that takes the fault
out again, or nothing. To leave a framework clean, return `NotImplemented`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from triptych.core import philox
from triptych.core import recipe as formulas
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, Recipe
from triptych.core.sampling import Batch
from triptych.core.spec import Preprocessing, Spec
from triptych.data import Source
from triptych.parity import places
from triptych.parity.places import Select
from triptych.parity.subject import Subject

Plant = Callable[[Subject, str], Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table: `select` finds the layer to plant it in (None: the spec has no such layer, for the reason given)."""

    name: str
    numerics: int
    cause: str
    rung: int
    select: Select
    needs: str
    plant: Plant | None = None  # None: planted natively, by the rooms' `faults.PLANTINGS[name]`
    shows: Select | None = None  # the layer where it shows first, when that is not the layer it is planted in
    earlier: int | None = None  # a rung before `rung` at which some rooms, whose seams are cut otherwise, show it already


class LeftClean(Exception):
    """A fault that its author did not plant in this framework."""


@dataclass(frozen=True, slots=True)
class Planted:
    """A fault bound to a layer of one spec, and the layer that the ladder must name."""

    fault: Fault
    layer: str
    named: str

    @property
    def name(self) -> str:
        """The fault's name in the table, or `FILE:function`."""
        return self.fault.name

    @property
    def rung(self) -> int:
        """The rung that must catch it; the last one to climb."""
        return self.fault.rung

    @property
    def rungs(self) -> tuple[int, ...]:
        """The rungs at which catching it counts."""
        return (self.rung,) if self.fault.earlier is None else (self.fault.earlier, self.rung)

    @property
    def leaves_pipeline(self) -> bool:
        """Whether it is planted behind the input pipeline, which then need not be climbed again. Nobody knows of one from outside."""
        return self.rung > 2 and self.fault.numerics > 0

    @property
    def leaves_model(self) -> bool:
        """Whether it is planted beside the model: in the input pipeline, the loss or the optimizer."""
        return self.rung in (2, 5, 6)

    def plant(self, subject: Subject) -> AbstractContextManager[Any]:
        """Plant it in a subject; it is gone when the context closes. LeftClean when this framework cannot express it."""
        plant = self.fault.plant or subject.room.PLANTINGS.get(self.fault.name)
        planted = NotImplemented if plant is None else plant(subject, self.layer)
        if planted is NotImplemented:
            raise LeftClean(self.fault.name)
        return planted if hasattr(planted, "__exit__") else contextlib.nullcontext()


# --- Faults of plain data ----------------------------------------------------------------------------------------------------


def _change_tensor(suffix: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    def plant(subject: Subject, layer: str) -> None:
        name = f"{layer}.{suffix}"
        subject.weights[name] = np.ascontiguousarray(change(subject.weights[name]))

    return plant


def _swap_gamma_beta(subject: Subject, layer: str) -> None:
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    subject.weights[weight], subject.weights[bias] = subject.weights[bias], subject.weights[weight]


def _native_initializer(subject: Subject, layer: str) -> None:
    """A truncated normal with fan-in, as Keras' and Flax's defaults draw, in place of the canonical weights."""
    name = f"{layer}.weight"
    shape, like = subject.weights[name].shape, subject.weights[name]
    drawn = np.clip(philox.normal(f"fault/{name}", shape), -2.0, 2.0) * np.sqrt(1.0 / np.prod(shape[1:]))
    subject.weights[name] = drawn.astype(like.dtype)


def _recipe(**changes: Any) -> Plant:
    def plant(subject: Subject, layer: str) -> None:
        for kind, recipe in subject.recipes.items():
            subject.recipes[kind] = dataclasses.replace(recipe, **changes)

    return plant


def _no_nesterov(subject: Subject, layer: str) -> None:
    sgd = subject.recipes["sgd"]
    assert isinstance(sgd.optimizer, SGD)
    subject.recipes["sgd"] = dataclasses.replace(sgd, optimizer=dataclasses.replace(sgd.optimizer, nesterov=False))


def _no_weight_decay(subject: Subject, layer: str) -> None:
    for kind, recipe in subject.recipes.items():
        subject.recipes[kind] = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, weight_decay=0.0))


def _schedule_off_by_one(subject: Subject, layer: str) -> None:
    right = subject.learning_rate
    subject.learning_rate = lambda schedule, step: right(schedule, step + 1)


def _learning_rate_float32(subject: Subject, layer: str) -> None:
    right = subject.learning_rate
    subject.learning_rate = lambda schedule, step: float(np.float32(right(schedule, step)))


def _crop_off_by_one(subject: Subject, layer: str) -> None:
    right = subject.geometry
    subject.geometry = lambda recipe, height, width: dataclasses.replace(
        _moved := right(recipe, height, width), left=max(0, _moved.left - 1)
    )


def _channels_reversed(subject: Subject, layer: str) -> None:
    right = subject.decode
    subject.decode = lambda data, channels: np.ascontiguousarray(right(data, channels)[..., ::-1])


def _normalize_without_mean(subject: Subject, layer: str) -> None:
    recipe = subject.preprocessing
    assert recipe is not None, "`places.images` finds no place without it"
    subject.preprocessing = dataclasses.replace(recipe, mean=(0.0,) * recipe.channels)


def _normalize_by_reciprocal(subject: Subject, layer: str) -> None:
    def reciprocal(image: np.ndarray, recipe: Preprocessing) -> np.ndarray:
        pixels = subject.resize(image, subject.geometry(recipe, *image.shape[:2]))
        mean, std = (np.asarray(row, np.float32) for row in (recipe.mean, recipe.std))
        return np.asarray((pixels * np.float32(1.0 / 255.0) - mean) * (np.float32(1.0) / std), np.float32)

    subject.preprocess = reciprocal


def _batches_of(change: Callable[[Source, Batch], Batch]) -> Plant:
    """The pipeline is given other batches than the plan's."""

    def plant(subject: Subject, layer: str) -> None:
        right = subject.batches
        subject.batches = lambda source, plan, *given: right(source, (change(source, batch) for batch in plan), *given)

    return plant


def _words_of_a_worker(source: Source, batch: Batch) -> Batch:
    """What a worker's own generator gives: a function of what this worker has drawn before, not of the sample (numerics 23)."""
    if batch.words is None:
        return batch
    return dataclasses.replace(batch, words=philox.bits(f"fault/worker/{batch.step}", batch.words.size).reshape(batch.words.shape))


def _labels_by_the_other_share(source: Source, batch: Batch) -> Batch:
    """The targets of mixed images with share and 1 - share exchanged; the pixels stay (numerics 37)."""
    if batch.mix is None:
        return batch
    own = np.eye(batch.targets.shape[1])[source.labels[batch.indices]]
    share, partners = batch.mix.share, own[batch.mix.partner]
    return dataclasses.replace(batch, targets=(1.0 - share) * own + share * partners)


def _micro_batches(share: Callable[[float, int], float]) -> Plant:
    """Micro-batches that count by another share: a function of the right one and of how many there are."""
    right = formulas.micro_batches

    def wrong(recipe: Recipe, samples: int) -> list[tuple[slice, float]]:
        parts = right(recipe, samples)
        return [(part, share(of_samples, len(parts))) for part, of_samples in parts]

    return lambda subject, layer: patch.object(formulas, "micro_batches", wrong)


@contextlib.contextmanager
def _relu_missing(subject: Subject, layer: str) -> Iterator[None]:
    with subject.intercept(layer, lambda native, call, x: x):
        yield


# --- The table ---------------------------------------------------------------------------------------------------------------

_BATCH_NORM, _CONV, _NO_BN = places.middle("batch_norm"), places.middle("conv"), "a BatchNorm layer"
_LAYER_NORM, _ATTENTION, _NO_LN = places.middle("layer_norm"), places.middle("attention"), "a LayerNorm"
_STRIDED = places.first(lambda layer: layer.op == "conv" and layer.stride == 2 and layer.kernel == 3)
_MAX_POOL = places.first(lambda layer: layer.op == "max_pool")
_PAD = places.first(lambda layer: layer.op == "pad_shortcut")
_V1 = places.block(lambda block: block.kind == "bottleneck" and block.stride == 2)
_LINEAR = places.middle("linear")

FAULTS: tuple[Fault, ...] = (
    Fault("kernel_transposed", 11, "a convolution kernel's height and width exchanged by the converter", 1, _STRIDED, "a 3x3 convolution",
          _change_tensor("weight", lambda w: w.swapaxes(2, 3))),
    Fault("gamma_beta_swapped", 11, "BatchNorm's gamma and beta exchanged by the converter", 1, _BATCH_NORM, _NO_BN, _swap_gamma_beta),
    Fault("native_initializer", 24, "a layer keeps the framework's own initial weights", 1, _LINEAR, "a linear layer", _native_initializer),
    Fault("jpeg_fast_dct", 19, "JPEG decoded with the fast inverse transform", 2, places.image_files, "image files"),
    Fault("channels_reversed", 11, "BGR in place of RGB", 2, places.colour, "colour images", _channels_reversed),
    Fault("resize_no_antialias", 20, "resize without antialiasing", 2, places.image_files, "image files"),
    Fault("resize_uint8", 21, "resize rounds to integers", 2, places.image_files, "image files"),
    Fault("crop_off_by_one", 22, "the crop's corner rounded the other way", 2, places.image_files, "image files", _crop_off_by_one),
    Fault("normalize_without_mean", 22, "scaled but not centred", 2, places.images, "images", _normalize_without_mean),
    Fault("normalize_by_reciprocal", 36, "divisions replaced by multiplication with the rounded reciprocal", 2, places.images, "images",
          _normalize_by_reciprocal),
    Fault("augmentation_per_worker", 23, "augmentation drawn from a stream of each worker's own", 2, places.images, "images",
          _batches_of(_words_of_a_worker)),
    Fault("jitter_brightness_adds", 32, "brightness added in place of multiplied", 2, places.image_files, "image files"),
    Fault("jitter_native_contrast", 32, "contrast about each channel's own mean", 2, places.colour, "colour images"),
    Fault("mix_share_swapped", 37, "labels mixed by the partner's share", 2, places.images, "images",
          _batches_of(_labels_by_the_other_share)),
    Fault("conv_same_padding", 1, "SAME padding at stride 2: the odd pixel goes behind", 3, _STRIDED, "a 3x3 convolution with stride 2"),
    Fault("max_pool_same_padding", 3, "SAME in the stem's max-pool: same shape, other windows", 3, _MAX_POOL, "a max-pool"),
    Fault("batch_norm_epsilon", 4, "Keras' BatchNorm epsilon 1e-3", 3, _BATCH_NORM, _NO_BN),
    Fault("batch_norm_batch_statistics_in_eval", 5, "a forgotten eval mode: batch statistics in inference", 3, _BATCH_NORM, _NO_BN),
    Fault("layer_norm_epsilon", 8, "Keras' LayerNorm epsilon 1e-3", 3, _LAYER_NORM, _NO_LN),
    Fault("gelu_tanh", 9, "GELU approximated by tanh", 3, places.middle("gelu"), "a GELU"),
    Fault("attention_unscaled", 26, "attention without 1/sqrt(width / heads)", 3, _ATTENTION, "attention"),
    Fault("attention_float32", 26, "attention's products and softmax in float32", 3, _ATTENTION, "attention"),
    Fault("attention_heads_first", 26, "queries, keys and values split within each head", 3, _ATTENTION, "attention"),
    Fault("stride_on_first_convolution", 10, "v1 in place of v1.5: the stride on the first 1x1", 3, _V1, "a strided bottleneck"),
    Fault("flatten_native_order", 11, "flattened as (H, W, C)", 3, places.flattened_channels, "a flatten of several channels"),
    Fault("low_precision_layer", 28, "one layer computed in bfloat16, as TF32-like defaults do", 3, _CONV, "a convolution"),
    Fault("pad_shortcut_one_side", 1, "option A pads all new channels behind", 3, _PAD, "an option-A shortcut"),
    Fault("pad_shortcut_average_pool", 27, "option A averages in place of subsampling", 3, _PAD, "an option-A shortcut"),
    Fault("dropout_in_eval", 23, "dropout left on in inference", 3, places.middle("relu", "gelu"), "an activation"),
    Fault("relu_missing", 10, "an activation forgotten", 3, places.middle("relu"), "an activation", _relu_missing),
    Fault("batch_norm_frozen_in_training", 5, "running statistics used in training", 4, _BATCH_NORM, _NO_BN),
    Fault("batch_norm_fast_variance", 7, "batch variance as E[x²] - E[x]²", 4, _BATCH_NORM, _NO_BN),
    Fault("layer_norm_fast_variance", 7, "LayerNorm's variance as E[x²] - E[x]²", 4, _LAYER_NORM, _NO_LN),
    Fault("batch_norm_momentum", 5, "BatchNorm momentum weighs the old in place of the new", 4, _BATCH_NORM, _NO_BN),
    Fault("batch_norm_biased_variance", 6, "biased running variance", 4, _BATCH_NORM, _NO_BN),
    Fault("label_smoothing_missing", 17, "label smoothing forgotten", 5, places.anywhere, "a loss", _recipe(label_smoothing=0.0)),
    Fault("label_smoothing_other_classes", 17, "smoothing mass on the other classes only", 5, places.anywhere, "a loss"),
    Fault("loss_float32", 31, "the loss computed in float32", 5, places.anywhere, "a loss"),
    Fault("loss_sum", 29, "the loss summed in place of averaged", 5, places.anywhere, "a loss"),
    Fault("accumulation_sum", 29, "gradients of micro-batches summed in place of averaged", 5, places.anywhere, "a loss",
          _micro_batches(lambda share, parts: 1.0)),
    Fault("accumulation_mean_of_means", 29, "an uneven last micro-batch counts as much as a whole one", 5, places.anywhere, "a loss",
          _micro_batches(lambda share, parts: 1.0 / parts)),
    Fault("gradient_stopped_shortcut", 33, "no gradient through a shortcut", 5, places.shortcut, "a shortcut that changes shape",
          shows=places.before_shortcut),
    Fault("momentum_convention", 12, "Keras' momentum: the learning rate inside the velocity", 6, places.anywhere, "an optimizer"),
    Fault("nesterov_formula", 13, "a wrong Nesterov update", 6, places.anywhere, "an optimizer"),
    Fault("nesterov_missing", 13, "plain momentum in place of Nesterov", 6, places.anywhere, "an optimizer", _no_nesterov),
    Fault("weight_decay_decoupled", 14, "SGD with decoupled weight decay", 6, places.anywhere, "an optimizer"),
    Fault("weight_decay_missing", 14, "weight decay forgotten", 6, places.anywhere, "an optimizer", _no_weight_decay),
    Fault("decay_norm_and_bias", 14, "weight decay on BatchNorm, biases", 6, places.anywhere, "an optimizer",
          _recipe(decay_norm_and_bias=True)),
    Fault("adam_epsilon_hat", 15, "AdamW's epsilon inside the bias correction", 6, places.anywhere, "an optimizer"),
    Fault("schedule_off_by_one", 16, "the schedule read one step late", 6, places.anywhere, "an optimizer", _schedule_off_by_one),
    Fault("learning_rate_float32", 31, "the learning rate held in float32", 6, places.anywhere, "an optimizer", _learning_rate_float32),
    Fault("ema_decay_complement", 16, "the average weighs the new by the decay", 6, places.anywhere, "an optimizer",
          _recipe(ema_decay=0.1)),
    Fault("ema_before_step", 16, "the moving average takes the weights before the update", 6, places.anywhere, "an optimizer"),
    Fault("clip_no_epsilon", 18, "clipped by the bare norm, without PyTorch's 1e-6", 6, places.anywhere, "an optimizer"),
    Fault("clip_per_tensor", 18, "each gradient clipped by its own norm", 6, places.anywhere, "an optimizer"),
    # PyTorch's GradScaler scales and unscales also the gradients that `apply` is given.
    Fault("clip_before_unscale", 18, "clipped while multiplied by the loss scale", 7, places.anywhere, "an optimizer", earlier=6),
)  # fmt: skip

NOT_EXPRESSIBLE: dict[int, str] = {
    2: "zero padding before the stem's max-pool: harmless behind a ReLU, where no value is below zero; no catalogued model pools elsewhere",
    25: "LSTM gate order and biases: no catalogued model has an LSTM yet (text_image, planned)",
    30: "metric traps: a property of the comparer, not of a framework; tests/parity/test_compare.py plants them there",
    34: "layout noise: the yardstick of float32 claims, not a fault",
    35: "thread counts: recorded with every result, not a fault",
    38: "how a channel's values are summed: rounding, not a mistake; tests/rooms/test_batch_norm.py holds every framework to it",
}
"""Rows of docs/numerics.md that nothing in the catalogue can express, with the reason."""


def find(name: str, spec: Spec) -> Planted:
    """The fault called `name` bound to a layer of `spec`; `FILE:function` loads one from outside.

    Raises UsageError for an unknown name, or when the spec cannot express it.
    """
    if ":" in name:
        return Planted(Fault(name, 0, "planted from outside", 7, places.anywhere, "", _external(name)), "", "")
    fault = next((row for row in FAULTS if row.name == name), None)
    if fault is None:
        raise UsageError(f"unknown fault {name!r}; choose from {', '.join(row.name for row in FAULTS)}, all, or FILE:function")
    layer = fault.select(spec)
    if layer is None:
        raise UsageError(f"{spec.name} cannot express the fault {name!r}: it has no {fault.needs}")
    return Planted(fault, layer, (fault.shows(spec) or layer) if fault.shows else layer)


def expressible(spec: Spec) -> tuple[list[str], dict[str, str]]:
    """Names of the faults that `spec` can express; and for the others, the reason."""
    can = [fault.name for fault in FAULTS if fault.select(spec) is not None]
    cannot = {
        fault.name: f"{spec.name} has no {fault.needs.removeprefix('a ').removeprefix('an ')}" for fault in FAULTS if fault.name not in can
    }
    return can, cannot


def _external(reference: str) -> Plant:
    path, _, function = reference.rpartition(":")
    if not Path(path).is_file():
        raise UsageError(f"--fault {reference}: no file {path!r}; give FILE:function, with a Python file")
    spec = importlib.util.spec_from_file_location("triptych_external_fault", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--fault {reference}: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plant = getattr(module, function, None)
    if not callable(plant):
        raise UsageError(f"--fault {reference}: {path!r} defines no function {function!r}")
    return lambda subject, layer: _entered(plant(subject))


def _entered(result: Any) -> Any:
    """What an outside function returned: a context manager, a bare generator, NotImplemented (clean), or nothing."""
    return contextlib.contextmanager(lambda: result)() if inspect.isgenerator(result) else result
