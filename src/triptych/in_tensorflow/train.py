"""One recipe executed natively on one Keras model (`core.contract.Trainer`): `GradientTape` under `tf.function`, or `fit()`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from triptych.core import batch as batches
from triptych.core import recipe as formulas
from triptych.core.batch import Inputs
from triptych.core.contract import DEFAULT_EXECUTION, Execution, Gradients, TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import LossScaling, Recipe
from triptych.core.trace import OPTIMIZER
from triptych.in_tensorflow import optim
from triptych.in_tensorflow import weights as canonical
from triptych.in_tensorflow.layers import BatchNormalization
from triptych.in_tensorflow.model import Model, Traces, changed, dropout_off, layers_of, segments

LossAndGradients = tuple[tf.Tensor, list[tf.Tensor]]


def create_trainer(model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> Trainer:
    """A trainer at step 0: slots zero, EMA (when the recipe has one) equal to the weights.

    Raises UsageError for a recipe that cannot be executed.
    """
    formulas.check(recipe, model.spec)
    return Trainer(model, recipe, execution)


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor, label_smoothing: float) -> tf.Tensor:
    """Mean over the batch of the cross entropy; smoothing spreads its mass over all classes (numerics 17).

    (N, K) logits, (N,) integer classes or (N, K) shares -> scalar in the logits' precision; `keras.losses` would return float32
    (numerics 31).
    """
    classes = logits.shape[-1]
    smoothed = (1.0 - label_smoothing) * as_shares(targets, classes, logits.dtype) + label_smoothing / classes
    return -tf.reduce_mean(tf.reduce_sum(smoothed * tf.nn.log_softmax(logits), axis=-1))


def as_shares(targets: tf.Tensor, classes: int, dtype: tf.DType) -> tf.Tensor:
    """(N,) integer classes, or (N, classes) shares already -> (N, classes) shares."""
    return tf.one_hot(targets, classes, dtype=dtype) if targets.shape.rank == 1 else tf.cast(targets, dtype)


def unscale(trainer: Trainer, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The gradients of the loss, from those of the loss times the trainer's loss scale."""
    return [gradient / tf.cast(trainer.loss_scale, gradient.dtype) for gradient in gradients]


def update(trainer: Trainer, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor, step: tf.Tensor) -> None:
    """The optimizer, then the moving average of what it left."""
    trainer.optimizer.apply(gradients, learning_rate, step)
    trainer.average()


def next_loss_scale(scaling: LossScaling, scale: tf.Tensor, good_steps: tf.Tensor, overflow: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """`core.recipe.next_loss_scale` of tensors."""
    grows = good_steps + 1 >= scaling.interval
    moved = tf.where(overflow, scale * scaling.backoff, tf.where(grows, scale * scaling.growth, scale))
    return moved, tf.where(overflow | grows, tf.zeros_like(good_steps), good_steps + 1)


def rematerialized(segment: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """A training pass of a part of the network that keeps none of its activations: the backward pass computes them again.

    The second time from the same random seeds, and nothing that layers keep, such as BatchNorm statistics, moves again.
    """
    kept = segment.non_trainable_variables
    states = [layer.seed_generator.state for layer in layers_of(segment, keras.layers.Dropout)]
    seeds = [(state, tf.identity(state.value)) for state in states]
    passes = itertools.count()

    def compute(x: tf.Tensor) -> tf.Tensor:
        with keras.StatelessScope(state_mapping=seeds) as scope:
            y = segment(x, training=True)
        if next(passes) == 0:
            for variable in kept:
                value = scope.get_current_value(variable)
                if value is not None:
                    variable.assign(value)
        return y

    return tf.recompute_grad(compute)


class Trainer:
    """Weights, statistics, slots, EMA and counts live in variables; every call is one `tf.function`. Fulfils `core.contract.Trainer`.

    Dropout, when the spec has it, is active in `step` alone; its stream is a function of the recipe's seed and the number of updates.
    """

    generation = 0
    """Moves on when something changes that every trainer is traced from, such as the loss."""

    def __init__(self, model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> None:
        self.model = model
        self.recipe = recipe
        self.execution = execution
        if execution.deterministic:
            tf.config.experimental.enable_op_determinism()
        self.parameters = tuple(b for b in model.bindings if b.tensor.trainable)
        scaling = recipe.loss_scaling
        with model.running():
            self.optimizer = optim.Optimizer(recipe, self.parameters)
            averaged = () if recipe.ema_decay is None else model.bindings
            self.averages = [tf.Variable(b.variable.value, trainable=False) for b in averaged]
            self.steps = tf.Variable(0, dtype=tf.int64, trainable=False)
            self.loss_scale = tf.Variable(scaling.initial if scaling else 1.0, dtype=tf.float64, trainable=False)
            self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._averaged = averaged
        self._segments = segments(model.native, model.spec) if recipe.remat else []
        # Micro-batches are cut while tracing, so a trace is for one size of batch.
        self._traces = Traces(model, Trainer, jit_compile=True if execution.compile else None)

    def gradients(self, inputs: Inputs, targets: np.ndarray) -> Gradients:
        """Loss and gradients in train mode, dropout off; nothing is updated. Zero for frozen parameters."""
        batch = self._batch(inputs, targets)
        with self.model.running():
            loss, tensors = self._traces(self._gradients)(*batch)
        moved = {id(variable): tensor for variable, tensor in zip(self.optimizer.variables, tensors, strict=True)}
        zeros = {b.name: np.zeros(b.variable.shape, b.variable.dtype) for b in self.parameters if id(b.variable.value) not in moved}
        every = [zeros.get(b.name, moved.get(id(b.variable.value))) for b in self.parameters]
        return Gradients(float(loss), canonical.read(self.parameters, every))

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """Clip, then the optimizer and EMA alone, given canonical gradients; BatchNorm statistics stay. Frozen parameters take none."""
        canonical.check(self.parameters, gradients, "gradients")
        held = {id(b.variable.value): b for b in self.parameters}
        moved = [held[id(variable)] for variable in self.optimizer.variables]
        tensors = [self.model.tensor(b.to_native(np.asarray(gradients[b.name]))) for b in moved]
        with self.model.running():
            self._traces(self._advance)(tensors, self._rate(learning_rate))

    def step(self, inputs: Inputs, targets: np.ndarray, learning_rate: float) -> float:
        """One whole training step; returns the loss before the update."""
        batch, rate = self._batch(inputs, targets), self._rate(learning_rate)
        with self.model.running():
            return float(self._traces(self.training_step)(*batch, rate))

    def state(self) -> TrainingState:
        """The canonical training state, bit for bit; a copy."""
        return self.view().copy()

    def view(self) -> TrainingState:
        """`state()` with each tensor converted when it is read, which must be before the trainer moves on."""
        slots = {name: canonical.view(self.parameters, variables) for name, variables in self.optimizer.slots.items()}
        weights, ema = canonical.view(self.model.bindings), canonical.view(self._averaged, self.averages)
        scale = float(self.loss_scale) if self.recipe.loss_scaling else None
        return TrainingState(weights, slots, ema, int(self.steps), scale, int(self.good_steps))

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
        self.steps.assign(state.step)
        if self.recipe.loss_scaling:
            self.loss_scale.assign(state.loss_scale or self.recipe.loss_scaling.initial)
            self.good_steps.assign(state.good_steps)

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

    def training_step(self, inputs: Any, targets: tf.Tensor, learning_rate: tf.Tensor) -> tf.Tensor:
        """One whole training step inside a graph, on tensors in the model's precision; returns the loss before the update."""
        self._seed_dropout()
        if self.recipe.loss_scaling is None:
            loss, gradients = self._accumulate(inputs, targets, lambda loss: loss)
        else:
            scale = tf.cast(self.loss_scale, self.model.precision)
            loss, gradients = self._accumulate(inputs, targets, lambda loss: loss * scale)
            gradients = unscale(self, gradients)
        self._advance(gradients, learning_rate)
        return loss

    def _gradients(self, inputs: Any, targets: tf.Tensor) -> LossAndGradients:
        with dropout_off(self.model.native):
            return self._accumulate(inputs, targets, lambda loss: loss, track=False)

    def _accumulate(
        self, inputs: Any, targets: tf.Tensor, objective: Callable[[tf.Tensor], tf.Tensor], *, track: bool = True
    ) -> LossAndGradients:
        """The loss and the gradients of its `objective`, averaged over the micro-batches by their shares of the samples."""
        parts = self._parts(tf.nest.flatten(inputs)[0].shape[0])
        if len(parts) == 1:
            return self._differentiate(inputs, targets, objective, track)
        size = parts[0][0].stop - parts[0][0].start
        even = sum(part.stop - part.start == size for part, _ in parts)
        shares = tf.constant([share for _, share in parts], self.model.precision)
        whole = (inputs, targets)
        stacked = tf.nest.map_structure(lambda x: tf.reshape(x[: even * size], (even, size, *x.shape[1:])), whole)

        def add(total: LossAndGradients, share: tf.Tensor, part: tuple[Any, tf.Tensor]) -> LossAndGradients:
            found = self._differentiate(part[0], part[1], objective, track)
            return tf.nest.map_structure(lambda old, new: old + share * new, total, found)

        def add_even(i: tf.Tensor, *total: Any) -> tuple[Any, ...]:
            return (i + 1, *add((total[0], total[1]), shares[i], tf.nest.map_structure(lambda x: x[i], stacked)))

        nothing = (tf.zeros((), self.model.precision), [tf.zeros_like(variable) for variable in self.optimizer.variables])
        # One part after the other, traced once: BatchNorm sees them in order, and no two hold their activations at the same time.
        _, *summed = tf.while_loop(lambda i, *_: i < even, add_even, (0, *nothing), parallel_iterations=1)
        total = (summed[0], summed[1])
        return total if even == len(parts) else add(total, shares[-1], tf.nest.map_structure(lambda x: x[even * size :], whole))

    def _parts(self, samples: int | None) -> list[tuple[slice, float]]:
        if samples is not None:
            return formulas.micro_batches(self.recipe, samples)
        if self.recipe.micro_batch_size is None:
            return [(slice(None), 1.0)]
        raise UsageError("gradients are accumulated over batches of a known size: dataset.batch(..., drop_remainder=True)")

    def _differentiate(self, inputs: Any, targets: tf.Tensor, objective: Callable[[tf.Tensor], tf.Tensor], track: bool) -> LossAndGradients:
        # Inside a StatelessScope Keras drops the assignments of the BatchNorms.
        with self._executing(), contextlib.nullcontext() if track else keras.StatelessScope():
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(self.optimizer.variables)
                loss = self._loss(tf.cast(self._forward(inputs), self.model.precision), targets)
                minimized = objective(loss)
            return loss, tape.gradient(minimized, self.optimizer.variables)

    def _loss(self, logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
        """Every position is a sample of its own."""
        rows = tf.reshape(logits, (-1, logits.shape[-1])) if logits.shape.rank > 2 else logits
        classes = targets if targets.dtype.is_floating else tf.reshape(targets, (-1,))
        return cross_entropy(rows, classes, self.recipe.label_smoothing)

    def _forward(self, inputs: Any) -> tf.Tensor:
        if not self.recipe.remat:
            return self.model.native(inputs, training=True)
        x = inputs
        for segment in self._segments:
            x = rematerialized(segment)(x)
        return x

    @contextlib.contextmanager
    def _executing(self) -> Iterator[None]:
        """The layers as the recipe wants them while they are traced."""
        native = self.model.native
        with contextlib.ExitStack() as stack:
            frozen = [layer for layer in native.layers if formulas.is_frozen(self.recipe, layer.name)]
            stack.enter_context(changed(frozen, trainable=False))
            if self.recipe.mixed_precision:
                # Policies of layers, never Keras' global one: products and convolutions cast what they are given.
                computing = [layer for layer in native.layers if not isinstance(layer, keras.layers.InputLayer)]
                stack.enter_context(changed(computing, dtype_policy=keras.DTypePolicy(f"mixed_{self.recipe.mixed_precision}")))
            if self.execution.tuned:
                stack.enter_context(changed(layers_of(native, BatchNormalization), fused=True))
            yield

    def _advance(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor) -> None:
        """Clip and update, unless the gradients of a scaled loss overflowed; move the loss scale."""
        scaling = self.recipe.loss_scaling
        if scaling is None:
            self._move(gradients, learning_rate)
            return
        overflow = ~tf.reduce_all([tf.reduce_all(tf.math.is_finite(gradient)) for gradient in gradients])
        tf.cond(overflow, lambda: None, lambda: self._move(gradients, learning_rate))
        scale, good_steps = next_loss_scale(scaling, self.loss_scale, self.good_steps, overflow)
        self.loss_scale.assign(scale)
        self.good_steps.assign(good_steps)

    def _move(self, gradients: Sequence[tf.Tensor], learning_rate: tf.Tensor) -> None:
        with tf.name_scope(OPTIMIZER):
            update(self, optim.clip(gradients, self.recipe.clip), learning_rate, self.steps + 1)
        self.steps.assign_add(1)

    def _batch(self, inputs: Inputs, targets: np.ndarray) -> tuple[Any, tf.Tensor]:
        """Checked native inputs and targets: int64 classes, or shares in the model's precision."""
        named = self.model.check_inputs(inputs)
        wanted = batches.checked_targets(self.model.spec, targets, batches.samples(named))
        shares = np.issubdtype(wanted.dtype, np.floating)
        return self.model.native_inputs(named), self.model.tensor(wanted) if shares else tf.constant(wanted)

    def _rate(self, learning_rate: float) -> tf.Tensor:
        if not math.isfinite(learning_rate):
            raise UsageError(f"learning_rate={learning_rate!r} must be a finite number")
        return tf.constant(learning_rate, dtype=self.model.precision)

    def _seed_dropout(self) -> None:
        for i, layer in enumerate(layers_of(self.model.native, keras.layers.Dropout)):
            seed = tf.constant((self.recipe.seed * 1009 + i) % 2**31, tf.int64)
            layer.seed_generator.state.assign(tf.stack([seed, self.steps]))


class TrainingModel(keras.Model):
    """The trainer's model as a `keras.Model` whose `fit(dataset)` takes the very steps of `Trainer.step`.

    The dataset gives native inputs, floats in the model's precision, and targets, one a row of logits; the learning rate is that of the
    recipe's schedule at the number of the batch. Raises UsageError for the plateau schedule, which waits for evaluations.
    """

    def __init__(self, trainer: Trainer) -> None:
        native, schedule = trainer.model.native, trainer.recipe.schedule
        if schedule.kind == "plateau":
            raise UsageError("fit() knows the learning rate of every step beforehand, which plateau does not; use Trainer.step")
        super().__init__(native.input, native.output, name=f"{native.name}.training")
        self.recipe_trainer = trainer
        rates = [formulas.learning_rate(schedule, step) for step in range(max(1, schedule.total_steps))]
        with trainer.model.running():
            self._rates = tf.constant(rates, dtype=trainer.model.precision)
            self._batches = tf.Variable(trainer.steps, trainable=False)
        self._mean_loss = keras.metrics.Mean(name="loss")
        self.compile(optimizer=None, jit_compile=trainer.execution.compile)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """`keras.Model.fit` on the model's device and in full float32, in the order of the dataset."""
        with self.recipe_trainer.model.running():
            return super().fit(*args, **{"shuffle": False, **kwargs})

    def train_step(self, data: Any) -> dict[str, Any]:
        """One batch: (inputs, targets)."""
        inputs, targets = data
        rate = self._rates[tf.minimum(self._batches, len(self._rates) - 1)]
        loss = self.recipe_trainer.training_step(inputs, targets, rate)
        self._batches.assign_add(1)
        self._mean_loss.update_state(loss)
        return {"loss": self._mean_loss.result()}

    @property
    def metrics(self) -> list[Any]:
        """The mean loss, which every epoch begins anew."""
        return [self._mean_loss]
