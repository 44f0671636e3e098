"""The training step: loss, gradients, optimizer, moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from triptych.core import philox
from triptych.core.contract import Gradients, TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import Recipe
from triptych.in_pytorch import optim
from triptych.in_pytorch import weights as canonical
from triptych.in_pytorch.model import Model, full_precision, mode


def create_trainer(model: Model, recipe: Recipe) -> Trainer:
    """A trainer at step 0: slots zero, EMA equal to the weights."""
    return Trainer(model, recipe)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch; smoothing spreads its mass over all classes (numerics 17). (N, K), (N,) -> ()."""
    return F.cross_entropy(logits, labels, reduction="mean", label_smoothing=label_smoothing)


def update(trainer: Trainer, learning_rate: float) -> None:
    """Move the weights along the gradients in `.grad`, then their average."""
    optim.update(trainer.optimizer, learning_rate)
    if trainer.recipe.ema_decay is not None:
        optim.update_average(trainer.average, trainer.model.native.state_dict(), trainer.recipe.ema_decay)


class Trainer:
    """Fulfils `core.contract.Trainer`: one recipe executed natively on one model, which it trains in place."""

    def __init__(self, model: Model, recipe: Recipe) -> None:
        self.model, self.recipe, self.steps = model, recipe, 0
        self.optimizer = optim.create_optimizer(model.native, model.spec, recipe)
        averaged = recipe.ema_decay is not None
        self.average = {name: tensor.clone() for name, tensor in model.native.state_dict().items()} if averaged else {}

    def gradients(self, images: np.ndarray, labels: np.ndarray) -> Gradients:
        """Loss and gradients in train mode, with dropout off; nothing is updated, BatchNorm statistics included."""
        native = self.model.native
        inputs, targets = self._batch(images, labels)
        buffers = {name: buffer.clone() for name, buffer in native.named_buffers()}
        parameters = dict(native.named_parameters())
        with full_precision(), mode(native, training=True), torch.enable_grad():
            loss = cross_entropy(functional_call(native, buffers, (inputs,)), targets, self.recipe.label_smoothing)
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return Gradients(loss.item(), canonical.to_arrays(dict(zip(parameters, gradients, strict=True))))

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """The optimizer (and EMA) alone, given gradients; counts as a step, BatchNorm statistics stay.

        Raises InputRefused unless there is one gradient of the right shape for every parameter.
        """
        parameters = dict(self.model.native.named_parameters())
        canonical.check(gradients, parameters, "gradients")
        for name, parameter in parameters.items():
            parameter.grad = canonical.to_tensor(gradients[name], parameter)
        self._update(learning_rate)

    def step(self, images: np.ndarray, labels: np.ndarray, learning_rate: float) -> float:
        """One whole training step; returns the loss before the update.

        Dropout, if the spec has any, is a pure function of the recipe's seed and the step.
        """
        native = self.model.native
        inputs, targets = self._batch(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        with full_precision(), mode(native, training=True, dropout=True), self._dropout_seed(), torch.enable_grad():
            loss = cross_entropy(native(inputs), targets, self.recipe.label_smoothing)
            loss.backward()
        self._update(learning_rate)
        return loss.item()

    def state(self) -> TrainingState:
        """The canonical training state, bit for bit; a copy."""
        return self.view().copy()

    def view(self) -> TrainingState:
        """`state()` with each tensor converted when it is read, which must be before the trainer moves on."""
        slots = {slot: canonical.view(tensors) for slot, tensors in self._slots().items()}
        return TrainingState(canonical.view(self.model.native.state_dict()), slots, canonical.view(self.average), self.steps)

    def load_state(self, state: TrainingState) -> None:
        """Take a canonical training state, bit for bit. Raises InputRefused, with nothing changed, when a part does not fit."""
        slots = self._slots()
        if set(state.slots) != set(slots):
            raise InputRefused(
                f"{self.recipe.optimizer.name} has slots {sorted(slots)}; given {sorted(state.slots)}: was another optimizer saved?"
            )
        parts = [(self.model.native.state_dict(), state.weights, "weights"), (self.average, state.ema, "EMA weights")]
        parts += [(tensors, state.slots[slot], f"slots {slot}") for slot, tensors in slots.items()]
        for tensors, arrays, what in parts:
            canonical.check(arrays, tensors, what)
        for tensors, arrays, what in parts:
            canonical.copy_into(tensors, arrays, what)
        optim.set_steps(self.optimizer, state.step)
        self.steps = state.step

    def _update(self, learning_rate: float) -> None:
        update(self, learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        return optim.slots(self.optimizer, self.model.native, self.recipe.optimizer.slots)

    def _batch(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Checked native inputs. A label out of range would be an error on a CPU, a crash on a GPU and NaN elsewhere."""
        self.model.check_images(images)
        classes = self.model.spec.num_classes
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(f"labels must be integers of shape ({len(images)},), one an image; given {labels.dtype} {labels.shape}")
        if labels.size and not 0 <= labels.min() <= labels.max() < classes:
            raise UsageError(f"labels must be in [0, {classes}); given {labels.min()} to {labels.max()}")
        inputs = self.model.to_native(images)
        return inputs, torch.from_numpy(labels.astype(np.int64)).to(inputs.device)

    @contextlib.contextmanager
    def _dropout_seed(self) -> Iterator[None]:
        """Random numbers of this step's own, if it needs any; the caller's generators (CPU and CUDA) are put back."""
        if not getattr(self.model.spec, "dropout", 0.0):
            yield
            return
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            torch.manual_seed(int(philox.bits(f"dropout/{self.recipe.seed}/{self.steps}", 1)[0]))
            yield
