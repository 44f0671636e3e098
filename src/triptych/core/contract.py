"""What a framework package fulfils, and how it is loaded. Standard library only.

The boundary is numpy and plain data: canonical weights (torchvision names, PyTorch layouts), batches (`core/batch.py`: one array, NHWC if
of images, or a mapping of several inputs) and frozen specs go in; numpy comes back. Behind it everything is native. The three packages
are mirrored rooms: same files, same functions.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from triptych.core.errors import FrameworkMissing, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np

    from triptych.core.batch import Inputs
    from triptych.core.contender import Contender
    from triptych.core.preprocess import Transforms
    from triptych.core.recipe import Recipe
    from triptych.core.sampling import Batch
    from triptych.core.spec import Preprocessing, Spec
    from triptych.core.trace import Event

    Arrays = dict[str, np.ndarray]

PRECISIONS = ("float32", "float64")
DEVICES = ("auto", "cpu", "cuda", "mps", "tpu")


@dataclass(frozen=True, slots=True)
class Framework:
    """One row of the framework table: where its room is, which imports it needs, and which extra installs them."""

    name: str
    title: str
    package: str
    needs: tuple[str, ...]
    extra: str


FRAMEWORKS: dict[str, Framework] = {
    row.name: row
    for row in (
        Framework("pytorch", "PyTorch", "triptych.in_pytorch", ("torch", "torchvision"), "pytorch"),
        Framework("tensorflow", "TensorFlow/Keras", "triptych.in_tensorflow", ("tensorflow", "keras"), "tensorflow"),
        Framework("jax", "JAX/Flax", "triptych.in_jax", ("jax", "flax", "optax"), "jax"),
    )
}


@dataclass(slots=True)
class Forward:
    """One forward pass: named intermediates in execution order (NHWC), and the running state after it (canonical names).

    In eval mode `state` is empty. The model itself is left as it was.
    """

    intermediates: Arrays
    state: Arrays = field(default_factory=dict)


@dataclass(slots=True)
class Gradients:
    """Loss (mean over the batch) and the gradient of every parameter, canonical names and layouts."""

    loss: float
    gradients: Arrays


@dataclass(slots=True)
class TrainingState:
    """All that a training step reads and writes, canonical: weights with statistics, optimizer slots by name, EMA, counts.

    `slots` has every parameter, zero for frozen ones. `step` counts the updates that were made, which leaves out steps skipped for an
    overflow; `loss_scale` and `good_steps` are those of dynamic loss scaling (float16; else None and 0).
    """

    weights: Mapping[str, np.ndarray]
    slots: Mapping[str, Mapping[str, np.ndarray]]
    ema: Mapping[str, np.ndarray]
    step: int
    loss_scale: float | None = None
    good_steps: int = 0

    def copy(self) -> TrainingState:
        """The same with every tensor read."""
        slots = {slot: dict(values) for slot, values in self.slots.items()}
        return TrainingState(dict(self.weights), slots, dict(self.ema), self.step, self.loss_scale, self.good_steps)


@dataclass(frozen=True, slots=True)
class Execution:
    """How a recipe is executed, not what it computes: results are equal to rounding.

    `compile` is the framework's compiler where it is not the only way (torch.compile; XLA in TensorFlow); `tuned` the levers that
    measured faster in this room: channels-last in PyTorch, a fused BatchNorm in TensorFlow, faster gradients of convolutions in JAX;
    `deterministic` refuses kernels whose sums depend on the order of threads, as accelerators' do (on a CPU no room uses one; in
    TensorFlow the switch is the process's, and stays).
    """

    compile: bool = False
    tuned: bool = False
    deterministic: bool = False


@dataclass(frozen=True, slots=True)
class Loader:
    """How batches are produced, not what is in them.

    `workers`: processes or threads that prepare batches (None: none for arrays in memory, else up to 4, one a core); `prefetch`:
    batches prepared ahead, for each worker; `cache`: keep decoded images of files in memory ("memory") or in a file (its path).
    """

    workers: int | None = None
    prefetch: int = 2
    cache: str | None = None


DEFAULT_EXECUTION, DEFAULT_LOADER = Execution(), Loader()


class Converted(Mapping[str, "np.ndarray"]):
    """Native tensors by canonical name, each converted when it is read: a copy of all would double a deep model's memory."""

    def __init__(self, native: Mapping[str, Any], convert: Callable[[Any], np.ndarray]) -> None:
        self._native, self._convert = native, convert

    def __getitem__(self, name: str) -> np.ndarray:
        return self._convert(self._native[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._native)

    def __len__(self) -> int:
        return len(self._native)


class Model(Protocol):
    """A native model behind the numpy boundary. Thread-compatible, not thread-safe."""

    framework: str
    spec: Spec
    precision: str
    device: str
    native: Any
    """The nn.Module, the keras.Model, or (flax module, variables): the user's own to use."""

    def predict(self, inputs: Inputs, batch_size: int | None = None) -> np.ndarray:
        """A batch, images preprocessed -> logits (N, *spec.output_shape), in eval mode, `batch_size` at a time.

        UsageError for other inputs than `spec.inputs()` tells, or of another kind or shape.
        """
        ...

    def forward(self, inputs: Inputs, *, training: bool = False, layer_inputs: Mapping[str, np.ndarray] | None = None) -> Forward:
        """One pass with every intermediate of `spec.intermediates()`. Dropout is off in both modes.

        `layer_inputs` replaces the input of the named layers (NHWC): a probe that shows one layer an input of our choice.
        """
        ...

    def weights(self) -> Arrays:
        """The canonical state, bit for bit."""
        ...

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take a canonical state, bit for bit."""
        ...

    def intercept(self, layer: str, wrapper: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
        """While open, `layer` computes `wrapper(native_layer, call, x)` in place of `call(x)`, on native tensors.

        The seam for planted faults and debugging; passes are traced anew inside it and after it.
        """
        ...


class Trainer(Protocol):
    """One recipe executed natively on one model.

    `targets` are (N,) integer classes or (N, classes) shares that add up to one (mixed images); label smoothing applies to both. Where
    every position is classified, each is a sample of the loss: (N, tokens) integer classes, or (N,), which hold for all positions.
    """

    model: Model
    recipe: Recipe

    def gradients(self, inputs: Inputs, targets: np.ndarray) -> Gradients:
        """Loss and gradients in train mode, averaged over the recipe's micro-batches by samples; nothing is updated.

        Before clipping, and without loss scaling; zero for frozen parameters.
        """
        ...

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """Clip, then the optimizer (and EMA) alone, given gradients; BatchNorm statistics stay.

        With loss scaling, gradients that are not finite are an overflow: nothing moves but the loss scale.
        """
        ...

    def step(self, inputs: Inputs, targets: np.ndarray, learning_rate: float) -> float:
        """One whole training step over a global batch, micro-batch by micro-batch; returns the loss before the update.

        Under float16, an overflow skips optimizer and EMA and backs the loss scale off (`core.recipe.next_loss_scale`).
        """
        ...

    def state(self) -> TrainingState:
        """The canonical training state, bit for bit; a copy."""
        ...

    def view(self) -> TrainingState:
        """`state()` with each tensor converted when it is read, which must be before the trainer moves on."""
        ...

    def load_state(self, state: TrainingState) -> None:
        """Take a canonical training state, bit for bit."""
        ...


class Room(Protocol):
    """The functions of a framework package (`triptych.in_jax`, ...)."""

    def create_model(self, spec: Spec, weights: Mapping[str, np.ndarray], *, precision: str, device: str) -> Model:
        """The native model with these canonical weights."""
        ...

    def create_trainer(self, model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> Trainer:
        """A trainer at step 0: slots zero, EMA equal to the weights. UsageError for a recipe that cannot be executed."""
        ...

    def batches(
        self, source: Any, plan: Iterable[Batch], preprocessing: Preprocessing, transforms: Transforms, loader: Loader = DEFAULT_LOADER
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The input pipeline: for each batch of the plan, images (N, crop, crop, C) float32 and its targets.

        `source` is a `triptych.data.Source`: images in one array are transformed a batch at a time, files one by one in the
        background. What happens is `core.preprocess.draw` of the batch's words, the order of things `Transforms` tells.
        """
        ...

    def decode(self, encoded: bytes, channels: int) -> np.ndarray:
        """JPEG or PNG bytes, already vetted by `data.images`, -> (H, W, C) uint8, natively decoded (numerics 19)."""
        ...

    def resize(self, image: np.ndarray, box: Any) -> np.ndarray:
        """(H, W, C) uint8 -> resized and cropped (crop, crop, C) float32 in [0, 255], never rounded (numerics 20)."""
        ...

    def preprocess(self, image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
        """(H, W, C) uint8 -> (crop, crop, C) float32, resized, cropped and normalized natively."""
        ...

    def profile(self, directory: Path) -> contextlib.AbstractContextManager[None]:
        """While open, the framework's own profiler traces what runs; the trace is written under `directory`, for TensorBoard."""
        ...

    def annotate(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """While open, a region of this name in a trace; nothing where none is made."""
        ...

    def operators(self, directory: Path, spec: Spec) -> list[Event]:
        """The operators and regions of the only trace under `directory`, which `profile` wrote in this process, by the kind of work."""
        ...

    def contender(self, spec: Spec, weights: Mapping[str, np.ndarray], lane: str, mode: str) -> Contender:
        """A lane to be timed (`core.contender`), in float32 on the CPU, with these weights; LaneMissing when there is none."""
        ...

    def export(self, model: Model, target: str, path: Path) -> None:
        """Write the model in eval mode, of any batch size, in the format `target` of `export.matrix`; UsageError for one that is not here.

        `images` in the framework's own layout, float32 and preprocessed -> `logits` (N, classes). A room that writes formats whose ranges
        are calibrated takes the images to do so as one argument more.
        """
        ...

    def numerics(self) -> dict[str, str]:
        """What float32 means in this process, as the framework tells it: precision of products, flags, threads."""
        ...

    def forget(self) -> None:
        """Drop what compilers and tracers remember of models that are gone: the next is timed as if it were the first."""
        ...

    def phases(self) -> contextlib.AbstractContextManager[dict[str, float]]:
        """While open, the framework's own clock of a first call: on the way out seconds of `trace`, and of `compile` where it tells.

        Where there is a cache of compiled programs that counts, its `cache_hits` and `cache_misses` meanwhile, too.
        """
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the libraries under this room."""
        ...


def installed() -> list[str]:
    """The frameworks whose libraries can be found, without importing them."""
    return [name for name, row in FRAMEWORKS.items() if all(importlib.util.find_spec(need) for need in row.needs)]


def framework(name: str) -> Framework:
    """The row called `name`; UsageError when there is none."""
    if name not in FRAMEWORKS:
        raise UsageError(f"unknown framework {name!r}; choose from {', '.join(FRAMEWORKS)}")
    return FRAMEWORKS[name]


def load(name: str) -> Any:
    """Import the room of a framework, in an order that is safe whatever was imported before (`_triton_before_tensorflow`).

    Raises FrameworkMissing with the exact pip line, UsageError for an unknown name.
    """
    check_installed(name)
    _triton_before_tensorflow()
    return importlib.import_module(FRAMEWORKS[name].package)


def check_installed(name: str) -> None:
    """FrameworkMissing, with the exact pip line, unless the framework's libraries can be found; UsageError for an unknown name."""
    reason = missing(name)
    if reason is not None:
        raise FrameworkMissing(reason)


def missing(name: str) -> str | None:
    """Why the framework `name` cannot run here, with the exact pip line; None when it can. UsageError for an unknown name."""
    row = framework(name)
    return not_installed(row.title, row.needs, row.extra)


def not_installed(title: str, needs: tuple[str, ...], extra: str) -> str | None:
    """Which of the libraries that something needs are absent, and the pip line of the extra that brings them; None when none is."""
    absent = [need for need in needs if importlib.util.find_spec(need) is None]
    return f"{title} is not installed ({', '.join(absent)} not found). Install it with: pip install 'triptych[{extra}]'" if absent else None


def _triton_before_tensorflow() -> None:
    """Load triton, when installed, before TensorFlow: both carry LLVM, and triton loaded second binds to TensorFlow's and crashes.

    When the caller has imported TensorFlow already, triton is loaded with RTLD_DEEPBIND, which makes it prefer its own symbols.
    """
    if "triton" in sys.modules or importlib.util.find_spec("triton") is None:
        return
    if "tensorflow" not in sys.modules:
        importlib.import_module("triton")
        return
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        importlib.import_module("triton")
    finally:
        sys.setdlopenflags(flags)


def check_precision(precision: str) -> None:
    """UsageError unless `precision` is one we prove."""
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; choose from {', '.join(PRECISIONS)}")


def check_device(device: str) -> None:
    """UsageError unless `device` is one we know by name."""
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}; choose from {', '.join(DEVICES)}")


__all__ = [
    "DEFAULT_EXECUTION", "DEFAULT_LOADER", "DEVICES", "FRAMEWORKS", "PRECISIONS", "Converted", "Execution", "Forward", "Framework",
    "Gradients", "Loader", "Model", "Room", "Trainer", "TrainingState", "check_device", "check_installed", "check_precision", "framework",
    "installed", "load", "missing",
]  # fmt: skip
