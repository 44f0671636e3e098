"""Native variables <-> the canonical state: torchvision names, PyTorch layouts (numerics 11), bit for bit in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from triptych.core.contract import Converted
from triptych.core.errors import InputRefused
from triptych.core.spec import Kind, Spec, TensorSpec

Arrays = dict[str, np.ndarray]

# The attribute of the Keras layer that holds each kind of tensor.
ATTRIBUTES: dict[Kind, str] = {
    "conv_weight": "kernel",
    "linear_weight": "kernel",
    "bias": "bias",
    "norm_weight": "gamma",
    "norm_bias": "beta",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "class_token": "cls_token",
    "positions": "pos_embed",
    "lookup_weight": "embeddings",
    "lstm_input_weight": "kernel",
    "lstm_state_weight": "recurrent_kernel",
    "lstm_input_bias": "bias",
    "lstm_state_bias": "recurrent_bias",
    "batch_counter": "num_batches_tracked",
}
# OIHW -> HWIO and (out, in) -> (in, out); everything else has one layout.
_PRODUCTS: dict[Kind, tuple[int, ...]] = dict.fromkeys(("linear_weight", "lstm_input_weight", "lstm_state_weight"), (1, 0))
TO_NATIVE: dict[Kind, tuple[int, ...]] = {"conv_weight": (2, 3, 1, 0), **_PRODUCTS}
TO_CANONICAL: dict[Kind, tuple[int, ...]] = {"conv_weight": (3, 2, 0, 1), **_PRODUCTS}


@dataclass(frozen=True, slots=True)
class Binding:
    """One canonical tensor and the Keras variable that holds it."""

    tensor: TensorSpec
    variable: keras.Variable

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.tensor.name

    def to_native(self, canonical: np.ndarray) -> np.ndarray:
        """PyTorch layout -> the variable's layout and dtype."""
        axes = TO_NATIVE.get(self.tensor.kind)
        array = canonical if axes is None else np.transpose(canonical, axes)
        return np.asarray(array, dtype=self.variable.dtype, order="C")

    def to_canonical(self, native: Any) -> np.ndarray:
        """A tensor in the variable's layout -> a numpy array of our own in PyTorch layout."""
        axes = TO_CANONICAL.get(self.tensor.kind)
        array = np.asarray(native)
        return np.array(array if axes is None else np.transpose(array, axes), order="C")


Bindings = tuple[Binding, ...]


def bind(model: keras.Model, spec: Spec) -> Bindings:
    """The bindings of a model built from `spec`, in state-dict order."""
    return tuple(Binding(tensor, getattr(model.get_layer(tensor.layer), ATTRIBUTES[tensor.kind])) for tensor in spec.tensors())


def view(bindings: Iterable[Binding], values: Iterable[Any] | None = None) -> Converted:
    """`read` with each array converted when it is asked for."""
    bindings = tuple(bindings)
    values = [b.variable.value for b in bindings] if values is None else values
    return Converted({b.name: (b, value) for b, value in zip(bindings, values, strict=True)}, lambda held: held[0].to_canonical(held[1]))


def read(bindings: Iterable[Binding], values: Iterable[Any] | None = None) -> Arrays:
    """The canonical arrays of the bound variables, or of `values` that have their layouts (gradients, slots, averages)."""
    return dict(view(bindings, values))


def load(bindings: Iterable[Binding], arrays: Mapping[str, np.ndarray]) -> None:
    """Assign a canonical state; nothing is assigned unless all of it fits."""
    bindings = tuple(bindings)
    check(bindings, arrays, "weights")
    assign(bindings, [b.variable for b in bindings], arrays)


def assign(bindings: Iterable[Binding], variables: Iterable[Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Checked canonical arrays into variables of the bindings' layouts, one after the other: a deep model's state is gigabytes."""
    for binding, variable in zip(bindings, variables, strict=True):
        variable.assign(binding.to_native(np.asarray(arrays[binding.name])))


def check(bindings: Iterable[Binding], arrays: Mapping[str, np.ndarray], what: str) -> None:
    """InputRefused, listing all of them, if a key is missing, unknown, mis-shaped or of the wrong kind of number."""
    expected = {b.name: b.tensor for b in bindings}
    problems = [f"missing {name}" for name in expected if name not in arrays]
    problems += [f"unknown {name}" for name in arrays if name not in expected]
    problems += [problem for name, tensor in expected.items() if name in arrays for problem in _misfits(tensor, np.asarray(arrays[name]))]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise InputRefused(f"{what} do not fit the model ({len(problems)} problems; `triptych convert` imports foreign files):{listed}")


def _misfits(tensor: TensorSpec, array: np.ndarray) -> list[str]:
    problems = []
    if array.shape != tensor.shape:
        problems.append(f"mis-shaped {tensor.name}: {array.shape} given, {tensor.shape} expected")
    numbers = np.integer if tensor.kind == "batch_counter" else np.floating
    if not np.issubdtype(array.dtype, numbers):
        problems.append(f"mistyped {tensor.name}: {array.dtype} given, {numbers.__name__} expected")
    return problems
