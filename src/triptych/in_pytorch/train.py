"""The training step: loss, gradients over micro-batches, clipping, optimizer, moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from triptych.core import batch as batches
from triptych.core import philox
from triptych.core import recipe as formulas
from triptych.core.batch import Inputs
from triptych.core.contract import DEFAULT_EXECUTION, Execution, Gradients, TrainingState
from triptych.core.errors import InputRefused, UsageError
from triptych.core.recipe import LossScaling, Recipe
from triptych.core.trace import OPTIMIZER
from triptych.in_pytorch import optim
from triptych.in_pytorch import weights as canonical
from triptych.in_pytorch.model import DTYPES, Model, full_precision, mode
from triptych.in_pytorch.resnet import BasicBlock, Bottleneck
from triptych.in_pytorch.vit import TransformerBlock

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def create_trainer(model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> Trainer:
    """A trainer at step 0: slots zero, EMA equal to the weights. UsageError for a recipe that cannot be executed."""
    formulas.check(recipe, model.spec)
    if recipe.mixed_precision and model.precision != "float32":
        raise UsageError(
            f"PyTorch's autocast takes float32 to {recipe.mixed_precision} and leaves {model.precision} alone: "
            "give mixed_precision a model in float32"
        )
    return Trainer(model, recipe, execution)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch; smoothing spreads its mass over all classes (numerics 17). (N, K), (N,) classes or (N, K) shares -> ()."""
    return F.cross_entropy(logits, targets, reduction="mean", label_smoothing=label_smoothing)


def unscale(trainer: Trainer) -> None:
    """Divide the gradients in `.grad` by the loss scale, and note whether all of them are finite."""
    trainer.scaler.unscale_(trainer.optimizer)


def update(trainer: Trainer, learning_rate: float) -> None:
    """Move the weights along the gradients in `.grad`, then their average."""
    optim.update(trainer.optimizer, learning_rate)
    if trainer.recipe.ema_decay is not None:
        optim.update_average(trainer.average, trainer.model.native.state_dict(), trainer.recipe.ema_decay)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Only kernels that give the same bits every time; PyTorch raises RuntimeError where it has none."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def loss_scaler(scaling: LossScaling | None, device: str) -> torch.amp.GradScaler:
    """The recipe's dynamic loss scaling; one that does nothing when the recipe has none.

    PyTorch holds the scale in float32: with powers of two it is exact in float64, too. Raises UsageError for what PyTorch cannot do.
    """
    if scaling is None:
        return torch.amp.GradScaler(device, enabled=False)
    if not (0.0 < scaling.initial <= torch.finfo(torch.float32).max and 0.0 < scaling.backoff < 1.0 < scaling.growth):
        raise UsageError(f"{scaling}: initial must be a positive float32, backoff between 0 and 1, growth above 1")
    return torch.amp.GradScaler(
        device, init_scale=scaling.initial, growth_factor=scaling.growth, backoff_factor=scaling.backoff, growth_interval=scaling.interval
    )


@contextlib.contextmanager
def in_place(native: nn.Module) -> Iterator[None]:
    """Passes whose ReLUs overwrite their input, which saves memory and time, unless somebody looks at what the modules return."""
    watched = any(module._forward_hooks or "forward" in vars(module) for module in native.modules())
    before = {} if watched else {module: module.inplace for module in native.modules() if isinstance(module, nn.ReLU)}
    for module in before:
        module.inplace = True
    try:
        yield
    finally:
        for module, flag in before.items():
            module.inplace = flag


@contextlib.contextmanager
def rematerialized(native: nn.Module) -> Iterator[None]:
    """Passes that keep no activations inside a residual block: the backward pass computes them again.

    BatchNorm statistics move the first time only; a model without residual blocks is one block.
    """
    blocks: list[nn.Module] = [module for module in native.modules() if isinstance(module, (BasicBlock, Bottleneck, TransformerBlock))]
    with contextlib.ExitStack() as stack:
        for block in blocks or [native]:
            stack.enter_context(_rematerialized_block(block))
        yield


@contextlib.contextmanager
def _rematerialized_block(block: nn.Module) -> Iterator[None]:
    attributes, call = vars(block), block.forward
    before = attributes.get("forward")

    def contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        return contextlib.nullcontext(), statistics_stay(block)

    def forward(*inputs: Tensor) -> Tensor:
        # The compiler makes updates of statistics outputs of its graph, which it does not compute twice.
        if torch.compiler.is_compiling():
            return checkpoint(call, *inputs, use_reentrant=False)
        return checkpoint(call, *inputs, use_reentrant=False, context_fn=contexts)

    attributes["forward"] = forward
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before


@contextlib.contextmanager
def statistics_stay(block: nn.Module) -> Iterator[None]:
    """BatchNorms normalize as they do, but what they write is a copy of their running statistics."""
    kept = {module: dict(module.named_buffers(recurse=False)) for module in block.modules()}
    for module, buffers in kept.items():
        for name, buffer in buffers.items():
            setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, buffers in kept.items():
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


class Trainer:
    """Fulfils `core.contract.Trainer`: one recipe executed natively on one model, which it trains in place."""

    def __init__(self, model: Model, recipe: Recipe, execution: Execution = DEFAULT_EXECUTION) -> None:
        self.model, self.recipe, self.execution, self.steps = model, recipe, execution, 0
        native = model.native
        if execution.tuned:
            native.to(memory_format=torch.channels_last)
        self.optimizer = optim.create_optimizer(native, model.spec, recipe)
        self.scaler = loss_scaler(recipe.loss_scaling, model.device)
        self.average = {name: tensor.clone() for name, tensor in native.state_dict().items()} if recipe.ema_decay is not None else {}
        self.frozen = frozenset(name for name, _ in native.named_modules() if name and formulas.is_frozen(recipe, name))
        trained = {tensor.name for tensor in formulas.trainable(recipe, model.spec)}
        self.trained = {name: parameter for name, parameter in native.named_parameters() if name in trained}
        self._forward: Callable[..., Tensor] = torch.compile(native) if execution.compile else native

    def gradients(self, inputs: Inputs, targets: np.ndarray) -> Gradients:
        """Loss and gradients in train mode, with dropout off; nothing is updated, BatchNorm statistics included."""
        native = self.model.native
        given, wanted = self._batch(inputs, targets)
        self.optimizer.zero_grad(set_to_none=True)
        buffers = {name: buffer.clone() for name, buffer in native.named_buffers()}
        total = {name: torch.zeros_like(parameter) for name, parameter in native.named_parameters()}
        mean = 0.0
        with self._executing(dropout=False):
            for part, share in formulas.micro_batches(self.recipe, len(wanted)):
                loss = self._loss(lambda *x: functional_call(native, buffers, x), [x[part] for x in given], wanted[part])
                found = torch.autograd.grad(loss, list(self.trained.values()), materialize_grads=True)
                for name, gradient in zip(self.trained, found, strict=True):
                    total[name].add_(gradient, alpha=share)
                mean += share * loss.item()
        return Gradients(mean, canonical.to_arrays(total))

    def apply(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> None:
        """Clip, then the optimizer (and EMA) alone, given gradients; counts as a step, BatchNorm statistics stay.

        With loss scaling, gradients that are not finite are an overflow. Raises InputRefused unless there is one gradient of the right
        shape for every parameter; those of frozen ones are ignored.
        """
        canonical.check(gradients, dict(self.model.native.named_parameters()), "gradients")
        for name, parameter in self.trained.items():
            parameter.grad = self.scaler.scale(canonical.to_tensor(gradients[name], parameter))
        self._advance(learning_rate)
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, inputs: Inputs, targets: np.ndarray, learning_rate: float) -> float:
        """One whole training step; returns the loss before the update.

        Dropout, if the spec has any, is a pure function of the recipe's seed and the number of updates.
        """
        given, wanted = self._batch(inputs, targets)
        # Only now: a heap that shrinks after every step has to grow again in the next, which on a CPU takes a tenth of its time.
        self.optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        with self._executing(dropout=True), self._dropout_seed():
            for part, share in formulas.micro_batches(self.recipe, len(wanted)):
                loss = self._loss(self._forward, [x[part] for x in given], wanted[part]) * share
                self.scaler.scale(loss).backward()
                losses.append(loss.detach())
        self._advance(learning_rate)
        return torch.stack(losses).sum().item()

    def state(self) -> TrainingState:
        """The canonical training state, bit for bit; a copy."""
        return self.view().copy()

    def view(self) -> TrainingState:
        """`state()` with each tensor converted when it is read, which must be before the trainer moves on."""
        slots = {slot: canonical.view(tensors) for slot, tensors in self._slots().items()}
        weights, ema = canonical.view(self.model.native.state_dict()), canonical.view(self.average)
        scale, good_steps = self._loss_scale()
        return TrainingState(weights, slots, ema, self.steps, scale, good_steps)

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
        scaling = self.recipe.loss_scaling
        if scaling is not None:
            scale = scaling.initial if state.loss_scale is None else state.loss_scale
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": state.good_steps})

    def _loss(self, forward: Callable[..., Tensor], inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """The loss in the model's precision, of logits that half precision may have computed. Every position is a sample of its own.

        Between products autocast hands half precision on: BatchNorm reads and writes it, and computes and keeps statistics in float32.
        """
        half = self.recipe.mixed_precision
        with torch.autocast(self.model.device, HALF[half]) if half else contextlib.nullcontext():
            logits = forward(*inputs)
        rows = logits.to(DTYPES[self.model.precision]).flatten(0, -2)
        return cross_entropy(rows, targets if targets.is_floating_point() else targets.flatten(), self.recipe.label_smoothing)

    def _advance(self, learning_rate: float) -> None:
        """Unscale, clip and update, unless a scaled gradient overflowed."""
        with torch.profiler.record_function(OPTIMIZER):
            if not self._overflowed():
                optim.clip(self.trained.values(), self.recipe.clip)
                update(self, learning_rate)
                self.steps += 1

    def _overflowed(self) -> bool:
        """Unscale, move the loss scale, and tell whether it was backed off."""
        if self.recipe.loss_scaling is None:
            return False
        before = self.scaler.get_scale()
        unscale(self)
        self.scaler.update()
        # As PyTorch's documentation tells a skipped step; and after hundreds of them the scale has no finite inverse to unscale by.
        return self.scaler.get_scale() < before or before < torch.finfo(torch.float32).tiny

    def _loss_scale(self) -> tuple[float | None, int]:
        if self.recipe.loss_scaling is None:
            return None, 0
        held = self.scaler.state_dict()
        return float(held["scale"]), int(held["_growth_tracker"])

    def _slots(self) -> dict[str, dict[str, Tensor]]:
        return optim.slots(self.optimizer, self.model.native, self.recipe.optimizer.slots)

    def _batch(self, inputs: Inputs, targets: np.ndarray) -> tuple[tuple[Tensor, ...], Tensor]:
        """Checked native inputs and targets: int64 classes, or shares in the model's precision."""
        named = self.model.check_inputs(inputs)
        wanted = batches.checked_targets(self.model.spec, targets, batches.samples(named))
        dtype = DTYPES[self.model.precision] if np.issubdtype(wanted.dtype, np.floating) else torch.int64
        layout = torch.channels_last if self.execution.tuned else torch.contiguous_format
        return self.model.native_inputs(named, layout), torch.from_numpy(wanted).to(self.model.device, dtype)

    @contextlib.contextmanager
    def _executing(self, *, dropout: bool) -> Iterator[None]:
        """The model as the recipe wants it for a pass: train mode except for frozen layers, which want no gradients either."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(full_precision())
            stack.enter_context(mode(self.model.native, training=True, dropout=dropout, frozen=self.frozen))
            stack.enter_context(_gradients_for(self.trained.values(), self.model.native))
            stack.enter_context(in_place(self.model.native))
            stack.enter_context(torch.enable_grad())
            if self.execution.deterministic:
                stack.enter_context(deterministic())
            if self.recipe.remat:
                stack.enter_context(rematerialized(self.model.native))
            yield

    @contextlib.contextmanager
    def _dropout_seed(self) -> Iterator[None]:
        """Random numbers of this step's own, if it needs any; the caller's generators (CPU and CUDA) are put back."""
        if not getattr(self.model.spec, "dropout", 0.0):
            yield
            return
        with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
            torch.manual_seed(int(philox.bits(f"dropout/{self.recipe.seed}/{self.steps}", 1)[0]))
            yield


@contextlib.contextmanager
def _gradients_for(trained: Collection[nn.Parameter], native: nn.Module) -> Iterator[None]:
    """Of the module's parameters these alone want gradients, for a while."""
    before = [(parameter, parameter.requires_grad) for parameter in native.parameters()]
    wanted = {id(parameter) for parameter in trained}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
