"""One recipe executed natively: two pure, jitted programs, gradients and update, the second over a donated state.

A training step is the one followed by the other. As one program it would not run faster, and XLA would compile it all again:
for deep networks on a CPU that takes longer than the steps of a proof.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from triptych.core.contract import Gradients, TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import Recipe, decays
from triptych.core.spec import TensorSpec
from triptych.in_jax import optim
from triptych.in_jax import weights as checkpoint
from triptych.in_jax.model import Interceptions, Model, apply, numerics

Arrays = dict[str, np.ndarray]


class TrainState(flax.struct.PyTreeNode):
    """The arrays an update replaces. `ema` mirrors the model's variables, or is empty."""

    params: Any
    opt_state: Any
    ema: Any


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: float) -> jax.Array:
    """(N, K) logits, (N,) labels -> mean loss, the smoothing's mass spread over all K classes (Szegedy et al. 2016, §7)."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def loss_and_gradients(
    module: nn.Module,
    label_smoothing: float,
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    rngs: Mapping[str, jax.Array] | None = None,
    *,
    interceptions: Interceptions = (),
) -> tuple[jax.Array, Any, Any]:
    """Loss, gradient of `params`, and the updated statistics, in train mode. Dropout needs its key in `rngs`."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        inputs = {**variables, "params": params}
        logits, statistics = apply(module, inputs, images, interceptions=interceptions, train=True, mutable=["batch_stats"], rngs=rngs)
        return cross_entropy(logits, labels, label_smoothing), statistics

    (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, gradients, statistics


def update(recipe: Recipe, decay_mask: Any, state: TrainState, gradients: Any, statistics: Any, scalars: optim.Scalars) -> TrainState:
    """The state after the optimizer has moved `params` and the EMA has followed; `statistics` are BatchNorm's after the pass."""
    updates, opt_state = optim.optimizer(recipe, decay_mask, scalars).update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state, averaged(recipe.ema_decay, state.ema, {**statistics, "params": params}))


def averaged(decay: float | None, ema: Any, variables: Any) -> Any:
    """decay * old + (1 - decay) * new over all float arrays; counters are copied. Without a decay there is no EMA."""
    if decay is None:
        return ema

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        return decay * old + (1.0 - decay) * new if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(average, ema, variables)


def dropout_key(seed: int, step: int) -> jax.Array:
    """A function of (seed, step), so that a resumed run draws what the uninterrupted one would."""
    return jax.random.fold_in(jax.random.key(seed % 2**32, impl="threefry2x32"), step)


class Trainer:
    """One recipe on one model; fulfils `core.contract.Trainer`. Dropout is active in `step` alone.

    The weights live in the model, so that `model.predict` sees them move. Their buffers are donated to each update.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        """A trainer at step 0: slots zero, EMA equal to the weights."""
        self.model, self.recipe, self._step_count = model, recipe, 0
        module, parameters = model.module, model.spec.parameters()
        mask = checkpoint.tree(parameters, {tensor.name: decays(recipe, tensor) for tensor in parameters})["params"]
        self._gradients = jax.jit(functools.partial(loss_and_gradients, module, recipe.label_smoothing), static_argnames="interceptions")
        # A lambda, so that `update` is looked up when it is traced.
        self._update = jax.jit(lambda state, *given: update(recipe, mask, state, *given), donate_argnums=0)
        self._has_dropout = any(layer.op == "dropout" for layer in model.spec.layers())
        with numerics(model.precision):
            zeros = optim.optimizer(recipe, mask, optim.scalars(recipe, 0, 0.0))
            self._opt_state = zeros.init(model.variables["params"])
            self._ema = {} if recipe.ema_decay is None else jax.tree.map(jnp.copy, model.variables)

    def gradients(self, images: np.ndarray, labels: np.ndarray) -> Gradients:
        """Loss and gradients in train mode without dropout; nothing is updated."""
        with numerics(self.model.precision):
            loss, gradients, _ = self._differentiate(images, labels)
            return Gradients(float(loss), checkpoint.to_canonical(self.model.spec.parameters(), {"params": gradients}))

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """The optimizer (and EMA) alone, given canonical gradients; BatchNorm statistics stay."""
        with numerics(self.model.precision):
            native = self._native(self.model.spec.parameters(), gradients)["params"]
            self._advance(native, _statistics(self.model.variables), learning_rate)

    def step(self, images: np.ndarray, labels: np.ndarray, learning_rate: float) -> float:
        """One whole training step; returns the loss before the update."""
        with numerics(self.model.precision):
            rngs = {"dropout": dropout_key(self.recipe.seed, self._step_count)} if self._has_dropout else None
            loss, gradients, statistics = self._differentiate(images, labels, rngs)
            self._advance(gradients, statistics, learning_rate)
            return float(loss)

    def state(self) -> TrainingState:
        """The canonical training state, bit for bit; a copy."""
        return self.view().copy()

    def view(self) -> TrainingState:
        """`state()` with each tensor converted when it is read, which must be before the trainer moves on."""
        spec, recipe = self.model.spec, self.recipe
        slots = {
            slot: checkpoint.view(spec.parameters(), {"params": optax.tree.get(self._opt_state, optim.STATE_FIELDS[slot])})
            for slot in recipe.optimizer.slots
        }
        ema = {} if recipe.ema_decay is None else checkpoint.view(spec.tensors(), self._ema)
        return TrainingState(checkpoint.view(spec.tensors(), self.model.variables), slots, ema, self._step_count)

    def load_state(self, state: TrainingState) -> None:
        """Take a canonical training state, bit for bit. InputRefused, before anything is taken, when a part does not fit."""
        model, recipe, parameters = self.model, self.recipe, self.model.spec.parameters()
        if set(state.slots) != set(recipe.optimizer.slots):
            name, slots = recipe.optimizer.name, sorted(recipe.optimizer.slots)
            raise InputRefused(f"the state has optimizer slots {sorted(state.slots)}; {name} has {slots}")
        if recipe.ema_decay is None and state.ema:
            raise InputRefused("the state has an EMA, the recipe has none: set ema_decay, or empty the state's ema")
        for tensors, arrays in ((parameters, slot) for slot in state.slots.values()):
            checkpoint.check(tensors, arrays)
        if recipe.ema_decay is not None:
            checkpoint.check(model.spec.tensors(), state.ema)
        model.load_weights(state.weights)
        self._step_count = state.step
        with numerics(model.precision):  # one part after the other, each in place of the old one: a deep model's state is gigabytes
            for slot, arrays in state.slots.items():
                field = {optim.STATE_FIELDS[slot]: self._native(parameters, arrays)["params"]}
                self._opt_state = optax.tree.set(self._opt_state, **field)
            self._ema = {} if recipe.ema_decay is None else self._native(model.spec.tensors(), state.ema)

    def _differentiate(self, images: np.ndarray, labels: np.ndarray, rngs: Mapping[str, jax.Array] | None = None) -> Any:
        """(loss, gradients, statistics); UsageError unless there is one label in range for each image."""
        model, labels, classes = self.model, np.asarray(labels), self.model.spec.num_classes
        model.check_images(images)
        if labels.shape != (len(images),) or not np.all((labels >= 0) & (labels < classes)):
            raise UsageError(f"labels of shape {labels.shape} for {len(images)} images; give each image one class of 0 ... {classes - 1}")
        batch = model.put(images), jax.device_put(labels.astype(np.int32), model.jax_device)
        return self._gradients(model.variables, *batch, rngs, interceptions=model.interceptions)

    def _advance(self, gradients: Any, statistics: Any, learning_rate: float) -> None:
        values = optim.scalars(self.recipe, self._step_count, learning_rate)
        scalars = {name: self.model.put(np.asarray(value)) for name, value in values.items()}
        state = self._update(TrainState(self.model.variables["params"], self._opt_state, self._ema), gradients, statistics, scalars)
        self.model.variables = {**statistics, "params": state.params}
        self._opt_state, self._ema = state.opt_state, state.ema
        self._step_count += 1

    def _native(self, tensors: tuple[TensorSpec, ...], arrays: Mapping[str, np.ndarray]) -> Any:
        return checkpoint.to_native(tensors, arrays, self.model.precision, self.model.jax_device)


def _statistics(variables: Any) -> Any:
    """All collections but the parameters."""
    return {collection: tree for collection, tree in variables.items() if collection != "params"}
