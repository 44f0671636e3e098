"""A Flax model behind the numpy boundary."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from triptych.core import batch as batches
from triptych.core import contract
from triptych.core.batch import Inputs, Named
from triptych.core.contract import Forward
from triptych.core.errors import UsageError
from triptych.core.spec import ResNetSpec, Spec
from triptych.in_jax import weights as checkpoint
from triptych.in_jax.mlp import MLP
from triptych.in_jax.resnet import ResNet
from triptych.in_jax.text_image import TextImage
from triptych.in_jax.vit import BareTransformerBlock, VisionTransformer

Arrays = dict[str, np.ndarray]

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "resnet": ResNet, "mlp": MLP, "vit": VisionTransformer, "transformer_block": BareTransformerBlock, "text_image": TextImage,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Interception:
    """`layer` computes `wrapper(module, call, x)`. Hashed by identity, so that a jitted pass is traced anew for each one."""

    layer: str
    wrapper: Callable[..., Any]


Interceptions = tuple[Interception, ...]


@contextlib.contextmanager
def numerics(precision: str) -> Iterator[None]:
    """The numerics of a run, for this block only: x64 for float64, full products. Encloses array creation, tracing and calls."""
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        yield


def build(spec: Spec, precision: str = "float32") -> nn.Module:
    """The Flax module of a spec; it holds no arrays."""
    return FAMILIES[spec.family](spec, param_dtype=np.dtype(precision))


def apply(
    module: nn.Module,
    variables: Any,
    inputs: Sequence[jax.Array],
    *,
    interceptions: Interceptions = (),
    layer_inputs: Mapping[str, jax.Array] | None = None,
    **options: Any,
) -> Any:
    """`module.apply` with the named layers intercepted and their inputs replaced (outside of the interception)."""
    shown = layer_inputs or {}

    def interceptor(next_fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
        name = ".".join(context.module.path)
        wrappers = [item.wrapper for item in interceptions if item.layer == name]
        if context.method_name != "__call__" or not (wrappers or name in shown):
            return next_fun(*args, **kwargs)
        x, *others = args
        call: Callable[..., Any] = functools.partial(_called, next_fun, others, **kwargs)
        for wrapper in wrappers:
            call = functools.partial(wrapper, context.module, call)
        return call(_replaced(name, x, shown))

    with nn.intercept_methods(interceptor):
        return module.apply(variables, *inputs, **options)


def _called(next_fun: Callable[..., Any], others: Sequence[Any], x: jax.Array, **options: Any) -> Any:
    return next_fun(x, *others, **options)


def _replaced(name: str, x: jax.Array, inputs: Mapping[str, jax.Array]) -> jax.Array:
    if name not in inputs:
        return x
    given = inputs[name]
    if given.shape != x.shape:
        raise UsageError(f"layer_inputs[{name!r}] has shape {given.shape}; the layer takes {x.shape}")
    return given


def _predict(module: nn.Module, variables: Any, inputs: Sequence[jax.Array], *, interceptions: Interceptions) -> jax.Array:
    found: jax.Array = apply(module, variables, inputs, interceptions=interceptions)
    return found


def _forward(
    module: nn.Module,
    names: frozenset[str],
    variables: Any,
    inputs: Sequence[jax.Array],
    layer_inputs: Mapping[str, jax.Array],
    *,
    training: bool,
    interceptions: Interceptions,
) -> tuple[dict[str, jax.Array], Any]:
    """Intermediates by name, and the updated variables."""
    _, updates = apply(
        module,
        variables,
        inputs,
        interceptions=interceptions,
        layer_inputs=layer_inputs,
        train=training,
        mutable=["intermediates", "batch_stats"] if training else ["intermediates"],
        capture_intermediates=lambda layer, method: method == "__call__" and ".".join(layer.path) in names,
    )
    captured = {".".join(path[:-1]): outputs[0] for path, outputs in flatten_dict(updates.pop("intermediates")).items()}
    return captured, {**variables, **updates}


class Model:
    """A Flax module and its variables; fulfils `core.contract.Model`.

    The passes are jitted once a model and shape. In float64, arrays of `native` need `jax.enable_x64(True)` around their use.
    """

    framework = "jax"

    def __init__(self, spec: Spec, weights: Mapping[str, np.ndarray], precision: str = "float32", device: str = "auto") -> None:
        """Take canonical weights; UsageError for an unknown precision or absent device, InputRefused for weights that do not fit."""
        contract.check_precision(precision)
        self.spec, self.precision = spec, precision
        self.device, self.jax_device = _device(device)
        self.interceptions: Interceptions = ()
        self._use(build(spec, precision))
        self.load_weights(weights)

    def _use(self, module: nn.Module) -> None:
        self.module, names = module, frozenset(self.spec.intermediates())
        self._predict = jax.jit(functools.partial(_predict, module), static_argnames="interceptions")
        self._forward = jax.jit(functools.partial(_forward, module, names), static_argnames=("training", "interceptions"))

    @property
    def native(self) -> tuple[nn.Module, Any]:
        """(flax module, variables). A `Trainer` donates the variables to each step: take them again after it."""
        return self.module, self.variables

    @native.setter
    def native(self, native: tuple[nn.Module, Any]) -> None:
        """Another module or other variables of the same names, from now on; a trainer keeps the module it was created with."""
        module, self.variables = native
        self._use(module)

    def predict(self, inputs: Inputs, batch_size: int | None = None) -> np.ndarray:
        """A batch, images preprocessed -> logits (N, *spec.output_shape), in eval mode, `batch_size` at a time."""
        named = self.check_inputs(inputs)
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size={batch_size} must be a positive integer")
        count = batches.samples(named)
        size = min(batch_size or count, count) or 1
        with numerics(self.precision):
            logits = [self._logits(batches.part(named, slice(start, start + size)), size) for start in range(0, count, size)]
        return np.concatenate([np.empty((0, *self.spec.output_shape), self.precision), *logits])

    def _logits(self, named: Named, size: int) -> np.ndarray:
        """Logits of at most `size` samples; a smaller last batch is filled up, which is cheaper than compiling for it."""
        filled = {name: np.resize(array, (size, *array.shape[1:])) if len(array) < size else array for name, array in named.items()}
        logits = self._predict(self.variables, self.native_inputs(filled), interceptions=self.interceptions)
        return np.array(logits[: batches.samples(named)])

    def forward(self, inputs: Inputs, *, training: bool = False, layer_inputs: Mapping[str, np.ndarray] | None = None) -> Forward:
        """One pass with every intermediate of `spec.intermediates()` (NHWC). Dropout is off in both modes.

        `training=True` uses batch statistics and returns the running state it leads to; the model stays as it was.
        `layer_inputs` replaces the input of the named layers; the shapes must be those the layers would get.
        """
        named = self.check_inputs(inputs)
        for name in layer_inputs or {}:
            self.check_layer(name)
        with numerics(self.precision):
            shown = {name: self.put(array) for name, array in (layer_inputs or {}).items()}
            captured, variables = self._forward(
                self.variables, self.native_inputs(named), shown, training=training, interceptions=self.interceptions
            )
            state = [tensor for tensor in self.spec.tensors() if training and not tensor.trainable]
            intermediates = {name: np.array(captured[name]) for name in self.spec.intermediates()}
            return Forward(intermediates, checkpoint.to_canonical(state, variables))

    def weights(self) -> Arrays:
        """The canonical state, bit for bit."""
        with numerics(self.precision):
            return checkpoint.to_canonical(self.spec.tensors(), self.variables)

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take a canonical state, bit for bit. Raises InputRefused, listing every name that does not fit."""
        with numerics(self.precision):
            self.variables = checkpoint.to_native(self.spec.tensors(), weights, self.precision, self.jax_device)

    @contextlib.contextmanager
    def intercept(self, layer: str, wrapper: Callable[..., Any]) -> Iterator[None]:
        """While open, `layer` (or a whole block, `layer1.0`) computes `wrapper(module, call, x)` in place of `call(x)`.

        `module` is the bound Flax module. Wrappers run while a pass is traced; later ones enclose earlier ones.
        """
        self.check_layer(layer)
        outer = self.interceptions
        self.interceptions = (*outer, Interception(layer, wrapper))
        try:
            yield
        finally:
            self.interceptions = outer

    def put(self, array: np.ndarray) -> jax.Array:
        """An array on the model's device, in its precision; called inside `numerics`."""
        return jax.device_put(np.asarray(array, self.precision), self.jax_device)

    def check_inputs(self, inputs: Inputs) -> Named:
        """The batch by name; UsageError unless these are inputs of the spec's kinds and shapes."""
        return batches.checked(self.spec, inputs)

    def native_inputs(self, named: Named) -> tuple[jax.Array, ...]:
        """What the module is called with: floats in its precision, ids as int32; called inside `numerics`."""
        return tuple(
            jax.device_put(named[each.name].astype(np.int32), self.jax_device) if each.kind == "tokens" else self.put(named[each.name])
            for each in self.spec.inputs()
        )

    def check_layer(self, name: str) -> None:
        """UsageError unless `name` is a layer or a residual block of the spec."""
        blocks = [block.name for block in self.spec.blocks()] if isinstance(self.spec, ResNetSpec) else []
        known = [layer.name for layer in self.spec.layers()] + blocks
        if name not in known:
            raise UsageError(f"{self.spec.name} has no layer {name!r}; it has {', '.join(known)}")


def _device(name: str) -> tuple[str, jax.Device]:
    """The device called `name` and its JAX device; `auto` is JAX's own choice, an accelerator if there is one."""
    contract.check_device(name)
    found = {known: devices[0] for known in contract.DEVICES if known != "auto" and (devices := _devices(known))}
    if name == "auto":
        name = next((known for known, device in found.items() if device == jax.local_devices()[0]), "cpu")
    if name not in found:
        raise UsageError(f"device {name!r} is not available to JAX here; choose from auto, {', '.join(found)}")
    return name, found[name]


def _devices(platform: str) -> list[jax.Device]:
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # JAX's way to say that there is none
        return []
