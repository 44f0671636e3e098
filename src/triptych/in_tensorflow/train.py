"""One recipe executed natively on one Keras model (`core.contract.Trainer`): `GradientTape` under `tf.function`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from triptych.core import recipe as formulas
from triptych.core.contract import Gradients, TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import Recipe
from triptych.in_tensorflow import weights as canonical
from triptych.in_tensorflow.model import Model, Traces, dropout_off
from triptych.in_tensorflow.optim import Optimizer


def create_trainer(model: Model, recipe: Recipe) -> Trainer:
    """A trainer at step 0: slots zero, EMA (when the recipe has one) equal to the weights."""
    return Trainer(model, recipe)


def cross_entropy(logits: tf.Tensor, labels: tf.Tensor, label_smoothing: float) -> tf.Tensor:
    """Mean over the batch of the cross entropy; smoothing spreads its mass over all classes (numerics 17).

    (N, K) logits, (N,) integer labels -> scalar in the logits' precision; `keras.losses` would return float32 (numerics 31).
    """
    classes = logits.shape[-1]
    targets = (1.0 - label_smoothing) * tf.one_hot(labels, classes, dtype=logits.dtype) + label_smoothing / classes
    return -tf.reduce_mean(tf.reduce_sum(targets * tf.nn.log_softmax(logits), axis=-1))


def update(trainer: Trainer, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
    """The optimizer, then the moving average of what it left."""
    trainer.optimizer.apply(gradients, learning_rate, step)
    trainer.average()


class Trainer:
    """Weights, statistics, slots and EMA live in variables; every call is one `tf.function`. Fulfils `core.contract.Trainer`.

    Dropout, when the spec has it, is active in `step` alone; its stream is a function of the recipe's seed and the step.
    """

    generation = 0
    """Moves on when something changes that every trainer is traced from, such as the loss."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.parameters = tuple(b for b in model.bindings if b.tensor.trainable)
        with model.running():
            self.optimizer = Optimizer(recipe, self.parameters)
            averaged = () if recipe.ema_decay is None else model.bindings
            self.averages = [tf.Variable(b.variable.value, trainable=False) for b in averaged]
        self._averaged = averaged
        self._dropouts = [layer for layer in model.native.layers if isinstance(layer, keras.layers.Dropout)]
        self._step = 0
        self._traces = Traces(model, Trainer)

    def gradients(self, images: np.ndarray, labels: np.ndarray) -> Gradients:
        """Loss and gradients in train mode, dropout off; nothing is updated."""
        batch = self._batch(images, labels)
        with self.model.running():
            loss, gradients = self._traces(self._gradients)(*batch)
        return Gradients(float(loss), canonical.read(self.parameters, gradients))

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """The optimizer and EMA alone, given canonical gradients; BatchNorm statistics stay."""
        canonical.check(self.parameters, gradients, "gradients")
        tensors = [self.model.tensor(b.to_native(np.asarray(gradients[b.name]))) for b in self.parameters]
        with self.model.running():
            self._traces(self._apply)(tensors, *self._clock(learning_rate))
        self._step += 1

    def step(self, images: np.ndarray, labels: np.ndarray, learning_rate: float) -> float:
        """One whole training step; returns the loss before the update."""
        batch = self._batch(images, labels)
        self._seed_dropout()
        with self.model.running():
            loss = self._traces(self._train)(*batch, *self._clock(learning_rate))
        self._step += 1
        return float(loss)

    def state(self) -> TrainingState:
        """The canonical training state, bit for bit; a copy."""
        return self.view().copy()

    def view(self) -> TrainingState:
        """`state()` with each tensor converted when it is read, which must be before the trainer moves on."""
        slots = {name: canonical.view(self.parameters, variables) for name, variables in self.optimizer.slots.items()}
        return TrainingState(canonical.view(self.model.bindings), slots, canonical.view(self._averaged, self.averages), self._step)

    def load_state(self, state: TrainingState) -> None:
        """Take a canonical training state, bit for bit. InputRefused, before anything is changed, when a part does not fit."""
        if set(state.slots) != set(self.optimizer.slots):
            name, expected = self.recipe.optimizer.name, sorted(self.optimizer.slots)
            raise InputRefused(f"optimizer slots {sorted(state.slots)} given; {name} has {expected}")
        for name in self.optimizer.slots:
            canonical.check(self.parameters, state.slots[name], f"slots {name!r}")
        canonical.check(self._averaged, state.ema, "averaged weights")
        self.model.load_weights(state.weights)
        for name, variables in self.optimizer.slots.items():
            canonical.assign(self.parameters, variables, state.slots[name])
        canonical.assign(self._averaged, self.averages, state.ema)
        self._step = state.step

    def average(self) -> None:
        """Move the averages, when the recipe has them, towards the weights and statistics; counters are copied."""
        decay = self.recipe.ema_decay
        if decay is None:
            return
        moved: list[tf.Variable] = []
        for binding, average in zip(self._averaged, self.averages, strict=True):
            with tf.control_dependencies(moved):  # one after the other, as the optimizer
                value = tf.convert_to_tensor(binding.variable.value)
                moved = [average.assign(formulas.ema(average, value, decay) if value.dtype.is_floating else value)]

    def _gradients(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        # Inside this scope Keras drops the assignments of the BatchNorms.
        with dropout_off(self.model.native), keras.StatelessScope():
            return self._differentiate(images, labels)

    def _train(self, images: tf.Tensor, labels: tf.Tensor, learning_rate: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        loss, gradients = self._differentiate(images, labels)
        update(self, gradients, learning_rate, step)
        return loss

    def _apply(self, gradients: list[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
        update(self, gradients, learning_rate, step)

    def _differentiate(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            logits = self.model.native(images, training=True)
            loss = cross_entropy(logits, labels, self.recipe.label_smoothing)
        return loss, tape.gradient(loss, self.optimizer.variables)

    def _batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
        self.model.check_images(images)
        labels = np.asarray(labels)
        classes = self.model.spec.num_classes
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"labels of shape {labels.shape} and type {labels.dtype} given, ({len(images)},) integers expected")
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise UsageError(f"labels from {labels.min()} to {labels.max()} given, 0 to {classes - 1} expected")
        return self.model.tensor(images), tf.constant(labels, dtype=tf.int64)

    def _clock(self, learning_rate: float) -> tuple[tf.Tensor, tf.Tensor]:
        if not math.isfinite(learning_rate):
            raise UsageError(f"learning_rate={learning_rate!r} must be a finite number")
        return tf.constant(learning_rate, dtype=self.model.precision), tf.constant(self._step + 1, dtype=tf.int64)

    def _seed_dropout(self) -> None:
        for i, layer in enumerate(self._dropouts):
            layer.seed_generator.state.assign([(self.recipe.seed * 1009 + i) % 2**31, self._step])
