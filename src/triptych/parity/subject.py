"""One framework's side of a proof: everything the ladder asks of it, replaceable piece by piece by a planted fault."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np

from triptych.core import batch, contract, initialize, preprocess, recipe
from triptych.core.batch import Inputs
from triptych.core.contract import Model, Trainer, TrainingState
from triptych.core.initialize import Weights
from triptych.core.preprocess import Geometry
from triptych.core.recipe import Recipe, Schedule
from triptych.core.spec import Preprocessing, Spec
from triptych.parity import plan as plans
from triptych.parity.plan import Plan


class Subject:
    """What the rungs climb. A fault may replace any public attribute, patch the room, or intercept a layer.

    `spec`, `training_spec`, `recipes`, `weights` and `preprocessing` are read when the model or trainer is first asked for;
    `decode`, `resize`, `preprocess`, `batches`, `training_batch` and `learning_rate` are called through the subject.
    """

    def __init__(
        self, framework: str, plan: Plan, weights: Mapping[str, np.ndarray], *, precision: str | None = None, inputs: str | None = None,
        model: Model | None = None,
    ) -> None:  # fmt: skip
        self.framework = framework
        self.room = contract.load(framework)
        self.plan = plan
        self.precision = precision or plan.precision
        # Inputs are rounded to this precision first: a float64 run on float32's inputs is what float32 is measured against.
        self.input_precision = inputs or self.precision
        self.spec: Spec = plan.spec
        self.training_spec: Spec = plan.training_spec
        self.preprocessing: Preprocessing | None = plan.spec.preprocessing
        self.recipes: dict[str, Recipe] = plan.recipes
        self.weights: MutableMapping[str, np.ndarray] = Kept(weights, self.precision)
        self.decode: Callable[[bytes, int], np.ndarray] = self.room.decode
        self.resize: Callable[[np.ndarray, Geometry], np.ndarray] = self.room.resize
        self.preprocess: Callable[[np.ndarray, Preprocessing], np.ndarray] = self.room.preprocess
        self.batches: Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]] = self.room.batches
        self.training_batch: Callable[[int], tuple[Inputs, np.ndarray]] = functools.partial(plans.training_batch, plan)
        self.geometry: Callable[[Preprocessing, int, int], Geometry] = preprocess.geometry
        self.learning_rate: Callable[[Schedule, int], float] = recipe.learning_rate
        self._models: dict[Spec, Model] = {} if model is None else {self.spec: model}
        self._trainers: dict[str, Trainer] = {}  # one at a time: the slots of two would be gigabytes for a deep model

    @property
    def recipe(self) -> Recipe:
        """The SGD recipe, which most rungs use."""
        return self.recipes["sgd"]

    @property
    def model(self) -> Model:
        """The model at the spec's image size, with the plan's weights."""
        return self._model(self.spec)

    @property
    def training_model(self) -> Model:
        """The model at the image size of the training rungs; the same object when the sizes coincide."""
        return self._model(self.training_spec)

    def _model(self, spec: Spec) -> Model:
        if spec not in self._models:
            self._models[spec] = self.room.create_model(spec, self.weights, precision=self.precision, device=self.plan.device)
        return self._models[spec]

    def release(self) -> None:
        """Forget the model of the forward rung, when it is another than that of the training rungs: memory stays bounded."""
        if self.spec != self.training_spec:
            self._models.pop(self.spec, None)

    @property
    def trainer(self) -> Trainer:
        """The SGD trainer."""
        return self._trainer("sgd")

    def _trainer(self, kind: str) -> Trainer:
        if kind not in self._trainers:
            self._trainers.clear()
            give_back()
            self._trainers[kind] = self.room.create_trainer(self.training_model, self.recipes[kind], self.plan.execution)
        return self._trainers[kind]

    def trainer_from(self, kind: str, state: TrainingState | None = None) -> Trainer:
        """The trainer of recipe `kind` ("sgd", "adamw") set to `state`, or to the start of training."""
        trainer = self._trainer(kind)
        trainer.load_state(state or recipe.initial_state(self.recipes[kind], self.weights, self.training_spec))
        return trainer

    def as_input(self, values: np.ndarray) -> np.ndarray:
        """A float64 array as this subject computes with it."""
        return values.astype(self.input_precision, copy=False).astype(self.precision, copy=False)

    def as_inputs(self, inputs: Inputs) -> Inputs:
        """A float64 batch as this subject computes with it; ids stay."""
        return batch.cast(inputs, self.input_precision, self.precision)

    @contextlib.contextmanager
    def intercept(self, layer: str, wrapper: Callable[..., Any]) -> Iterator[None]:
        """`Model.intercept` on every model this subject uses."""
        with contextlib.ExitStack() as stack:
            for model in {id(m): m for m in (self.model, self.training_model)}.values():
                stack.enter_context(model.intercept(layer, wrapper))
            yield


class Kept(MutableMapping[str, np.ndarray]):
    """Weights in one precision: each is converted, or read from its file, when it is asked for, unless a fault has put another there.

    A large model's are a gigabyte, which its native copy already holds.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], precision: str) -> None:
        self._weights, self._precision, self._put = weights, precision, dict[str, np.ndarray]()

    def __getitem__(self, name: str) -> np.ndarray:
        return self._put[name] if name in self._put else in_precision(self._weights[name], self._precision)

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        self._put[name] = value

    def __delitem__(self, name: str) -> None:
        raise TypeError("a model without one of its weights is none")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def give_back() -> None:
    """Free what is not needed any more: a Keras model and its traces refer to each other, and glibc keeps what compilers have freed."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def as_precision(weights: Mapping[str, np.ndarray], precision: str) -> Weights:
    """Floating tensors cast to `precision`; counters stay."""
    return {name: in_precision(value, precision) for name, value in weights.items()}


def in_precision(value: np.ndarray, precision: str) -> np.ndarray:
    """The tensor cast to `precision`, unless it counts."""
    return value if value.dtype == np.int64 else value.astype(precision, copy=False)


def calibrate(subject: Subject, inputs: Inputs) -> Weights:
    """The subject's weights with running statistics from one train-mode pass over `inputs`."""
    after = subject.model.forward(inputs, training=True).state
    momentum = getattr(subject.spec, "batch_norm", None)
    return initialize.calibrated(subject.spec, subject.weights, after, momentum.momentum) if momentum else dict(subject.weights)
