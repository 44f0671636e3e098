"""One recipe executed natively: pure, jitted programs for gradients and update, the second over a donated state.

A training step is the gradients of each micro-batch, their sum, and the update. As one program it would not run faster, and XLA
would compile it all again: for deep networks on a CPU that takes longer than the steps of a proof.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from triptych.core import batch as batches
from triptych.core import recipe as formulas
from triptych.core.batch import Inputs
from triptych.core.contract import DEFAULT_EXECUTION, Execution, Gradients, TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import Recipe, decays, is_frozen
from triptych.core.spec import Spec, TensorSpec
from triptych.core.trace import OPTIMIZER
from triptych.in_jax import optim
from triptych.in_jax import weights as checkpoint
from triptych.in_jax.model import Interception, Interceptions, Model, apply, numerics
from triptych.in_jax.resnet import ResNet
from triptych.in_jax.vit import VisionTransformer

Arrays = dict[str, np.ndarray]


class TrainState(flax.struct.PyTreeNode):
    """The arrays an update replaces. `ema` mirrors the model's variables, or is empty."""

    params: Any
    opt_state: Any
    ema: Any


def create_trainer(model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> Trainer:
    """A trainer at step 0: slots zero, EMA equal to the weights. UsageError for a recipe that cannot be executed."""
    formulas.check(recipe, model.spec)
    return Trainer(model, recipe, execution)


def cross_entropy(logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    """Mean loss, the smoothing's mass spread over all K classes (Szegedy et al. 2016, §7).

    (N, K) logits, (N,) integer classes or (N, K) shares -> scalar.
    """
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(as_shares(targets, logits), label_smoothing)).mean()


def as_shares(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """(N,) integer classes, or (N, K) shares already -> (N, K) shares."""
    return targets if targets.ndim == 2 else jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)


def loss_and_gradients(
    module: nn.Module,
    recipe: Recipe,
    moves: Any,
    variables: Any,
    inputs: Sequence[jax.Array],
    targets: jax.Array,
    loss_scale: jax.Array | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    *,
    interceptions: Interceptions = (),
) -> tuple[tuple[jax.Array, Any], Any]:
    """(loss, gradient of `params`), and the updated statistics, in train mode. Dropout needs its key in `rngs`.

    The gradient is that of the loss times `loss_scale`; it is zero where the tree `moves` says False.
    """

    def predict(params: Any) -> tuple[jax.Array, Any]:
        held = {**variables, "params": params}
        found: tuple[jax.Array, Any] = apply(
            module, held, inputs, interceptions=interceptions, train=True, mutable=["batch_stats"], rngs=rngs
        )
        return found

    def loss(params: Any) -> tuple[jax.Array, Any]:
        moving = jax.tree.map(lambda array, moved: array if moved else lax.stop_gradient(array), params, moves)
        # Residual blocks recompute themselves; a network without them is one block.
        whole = recipe.remat and not isinstance(module, ResNet)
        logits, statistics = (jax.checkpoint(predict) if whole else predict)(moving)
        rows = logits.astype(jax.tree.leaves(params)[0].dtype).reshape(-1, logits.shape[-1])  # every position is a sample of its own
        classes = targets if jnp.issubdtype(targets.dtype, jnp.floating) else targets.reshape(-1)
        value = cross_entropy(rows, classes, recipe.label_smoothing)
        return value if loss_scale is None else value * loss_scale, (value, statistics)

    (_, (value, statistics)), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return (value, gradients), statistics


def accumulate(total: Any, found: Any, share: jax.Array) -> Any:
    """Loss and gradients so far (None: nothing yet) and those of the next micro-batch, by its share of the samples."""
    weighted = jax.tree.map(lambda array: share * array, found)
    return weighted if total is None else jax.tree.map(jnp.add, total, weighted)


def unscale(gradients: Any, loss_scale: jax.Array) -> Any:
    """The gradients of the loss, from those of the loss times its scale."""
    return jax.tree.map(lambda gradient: gradient / loss_scale, gradients)


def advance(
    recipe: Recipe,
    decay_mask: Any,
    state: TrainState,
    gradients: Any,
    statistics: Any,
    scalars: optim.Scalars,
    loss_scale: jax.Array | None = None,
) -> tuple[TrainState, jax.Array]:
    """The state after an update, and whether there was one: of a scaled loss, gradients that are not finite are an overflow.

    `loss_scale` is what the gradients are still multiplied by, if anything.
    """
    if recipe.loss_scaling is None:
        return update(recipe, decay_mask, state, gradients, statistics, scalars), jnp.array(True)
    if loss_scale is not None:
        gradients = unscale(gradients, loss_scale)
    finite = jnp.array([jnp.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients)]).all()
    return lax.cond(finite, lambda: update(recipe, decay_mask, state, gradients, statistics, scalars), lambda: state), finite


def update(recipe: Recipe, decay_mask: Any, state: TrainState, gradients: Any, statistics: Any, scalars: optim.Scalars) -> TrainState:
    """The state after clipping, the optimizer and the EMA behind it; `statistics` are BatchNorm's after the pass."""
    with jax.named_scope(OPTIMIZER):
        clipped = optim.clip(gradients, recipe.clip)
        updates, opt_state = optim.optimizer(recipe, decay_mask, scalars).update(clipped, state.opt_state, state.params)
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


def executed(module: nn.Module, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> nn.Module:
    """The module as the recipe and its execution want it while training; of the same names and variables."""
    changes: dict[str, Any] = {"dtype": jnp.dtype(recipe.mixed_precision)} if recipe.mixed_precision else {}
    if isinstance(module, (ResNet, VisionTransformer)):
        changes |= {"remat": recipe.remat}
    if isinstance(module, ResNet):
        changes |= {"tuned": execution.tuned}
    return module.clone(**changes) if changes else module


def masks(recipe: Recipe, spec: Spec) -> tuple[Any, Any]:
    """Trees of bools over `params`: which of them move, and which of those decay."""
    parameters = spec.parameters()
    moves = {tensor.name: not is_frozen(recipe, tensor.layer) for tensor in parameters}
    decayed = {tensor.name: moves[tensor.name] and decays(recipe, tensor) for tensor in parameters}
    return checkpoint.tree(parameters, moves)["params"], checkpoint.tree(parameters, decayed)["params"]


def by_running_statistics(module: nn.Module, call: Any, x: jax.Array, **_: Any) -> jax.Array:
    """A BatchNorm that is frozen: it normalizes by its running statistics and leaves them alone."""
    return call(x, use_running_average=True)


class Trainer:
    """One recipe on one model; fulfils `core.contract.Trainer`. Dropout is active in `step` alone.

    The weights live in the model, so that `model.predict` sees them move. Their buffers are donated to each update. JAX knows no other
    way to run than compiled, so `execution.compile` changes nothing; `execution.tuned` takes the tuned `layers`, in
    residual networks and while training.
    """

    def __init__(self, model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> None:
        """A trainer at step 0: slots zero, EMA equal to the weights."""
        self.model, self.recipe, self.execution = model, recipe, execution
        self._step_count, self._good_steps = 0, 0
        self._loss_scale = recipe.loss_scaling.initial if recipe.loss_scaling else None
        moves, decayed = masks(recipe, model.spec)
        module = executed(model.module, recipe, execution)
        self._gradients = jax.jit(
            functools.partial(loss_and_gradients, module, recipe, moves), static_argnames="interceptions",
            compiler_options={"xla_gpu_deterministic_ops": True} if execution.deterministic else None,
        )  # fmt: skip
        self._accumulate = jax.jit(accumulate, donate_argnums=0)
        # A lambda, so that `advance` is looked up when it is traced.
        self._advance = jax.jit(lambda state, *given: advance(recipe, decayed, state, *given), donate_argnums=0)
        self._frozen_norms = tuple(
            Interception(layer.name, by_running_statistics)
            for layer in model.spec.layers()
            if layer.op == "batch_norm" and is_frozen(recipe, layer.name)
        )
        self._has_dropout = any(layer.op == "dropout" for layer in model.spec.layers())
        with numerics(model.precision):
            zeros = optim.optimizer(recipe, decayed, optim.scalars(recipe, 0, 0.0))
            self._opt_state = zeros.init(model.variables["params"])
            self._ema = {} if recipe.ema_decay is None else jax.tree.map(jnp.copy, model.variables)

    def gradients(self, inputs: Inputs, targets: np.ndarray) -> Gradients:
        """Loss and gradients in train mode without dropout; nothing is updated."""
        with numerics(self.model.precision):
            (loss, gradients), _ = self._differentiate(inputs, targets)
            return Gradients(float(loss), checkpoint.to_canonical(self.model.spec.parameters(), {"params": gradients}))

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """Clip, then the optimizer (and EMA) alone, given canonical gradients; BatchNorm statistics stay. Frozen parameters take none."""
        parameters = self.model.spec.parameters()
        checkpoint.check(parameters, gradients)
        taken = {
            tensor.name: np.zeros(tensor.shape) if is_frozen(self.recipe, tensor.layer) else gradients[tensor.name] for tensor in parameters
        }
        with numerics(self.model.precision):
            self._move(self._native(parameters, taken)["params"], _statistics(self.model.variables), learning_rate)

    def step(self, inputs: Inputs, targets: np.ndarray, learning_rate: float) -> float:
        """One whole training step; returns the loss before the update."""
        with numerics(self.model.precision):
            key = dropout_key(self.recipe.seed, self._step_count) if self._has_dropout else None
            scale = None if self._loss_scale is None else self.model.put(np.asarray(self._loss_scale))
            (loss, gradients), statistics = self._differentiate(inputs, targets, scale, key)
            self._move(gradients, statistics, learning_rate, scale)
            return float(loss)

    def wait(self) -> None:
        """Until all that the last step computed is there: JAX hands the loss back before the update is done."""
        jax.block_until_ready((self.model.variables, self._opt_state, self._ema))

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
        weights = checkpoint.view(spec.tensors(), self.model.variables)
        return TrainingState(weights, slots, ema, self._step_count, self._loss_scale, self._good_steps)

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
        if recipe.loss_scaling is not None:
            self._loss_scale, self._good_steps = state.loss_scale or recipe.loss_scaling.initial, state.good_steps
        with numerics(model.precision):  # one part after the other, each in place of the old one: a deep model's state is gigabytes
            for slot, arrays in state.slots.items():
                field = {optim.STATE_FIELDS[slot]: self._native(parameters, arrays)["params"]}
                self._opt_state = optax.tree.set(self._opt_state, **field)
            self._ema = {} if recipe.ema_decay is None else self._native(model.spec.tensors(), state.ema)

    def _differentiate(
        self, inputs: Inputs, targets: np.ndarray, loss_scale: jax.Array | None = None, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """((loss, gradients), statistics), averaged over the micro-batches, which BatchNorm sees one after the other."""
        model = self.model
        named = model.check_inputs(inputs)
        count = batches.samples(named)
        wanted = batches.checked_targets(model.spec, targets, count)
        interceptions = (*self._frozen_norms, *model.interceptions)
        variables, total = model.variables, None
        for i, (part, share) in enumerate(formulas.micro_batches(self.recipe, count)):
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, i)}
            batch = model.native_inputs(batches.part(named, part)), self._put_targets(wanted[part])
            found, statistics = self._gradients(variables, *batch, loss_scale, rngs, interceptions=interceptions)
            variables = {**variables, **statistics}
            total = found if total is None and share == 1.0 else self._accumulate(total, found, model.put(np.asarray(share)))
        return total, _statistics(variables)

    def _put_targets(self, targets: np.ndarray) -> jax.Array:
        shares = np.issubdtype(targets.dtype, np.floating)
        return self.model.put(targets) if shares else jax.device_put(targets.astype(np.int32), self.model.jax_device)

    def _move(self, gradients: Any, statistics: Any, learning_rate: float, loss_scale: jax.Array | None = None) -> None:
        """Update, unless the gradients of a scaled loss overflowed; move the loss scale."""
        model, scaling = self.model, self.recipe.loss_scaling
        if not math.isfinite(learning_rate):
            raise UsageError(f"learning_rate={learning_rate!r} must be a finite number")
        values = optim.scalars(self.recipe, self._step_count, learning_rate)
        scalars = {name: model.put(np.asarray(value)) for name, value in values.items()}
        before = TrainState(model.variables["params"], self._opt_state, self._ema)
        state, finite = self._advance(before, gradients, statistics, scalars, loss_scale)
        model.variables = {**statistics, "params": state.params}
        self._opt_state, self._ema = state.opt_state, state.ema
        overflow = scaling is not None and not bool(finite)
        self._step_count += not overflow
        if scaling is not None and self._loss_scale is not None:
            self._loss_scale, self._good_steps = formulas.next_loss_scale(scaling, self._loss_scale, self._good_steps, overflow=overflow)

    def _native(self, tensors: tuple[TensorSpec, ...], arrays: Mapping[str, np.ndarray]) -> Any:
        return checkpoint.to_native(tensors, arrays, self.model.precision, self.model.jax_device)


def _statistics(variables: Any) -> Any:
    """All collections but the parameters."""
    return {collection: tree for collection, tree in variables.items() if collection != "params"}
