"""Native variables <-> canonical checkpoint, bit for bit.

The canonical form has torchvision's names and PyTorch's layouts; the native one is Flax's: collections `params` and
`batch_stats`, HWIO and (in, out) kernels. A layer's canonical name, split at its dots, is its path in the module tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from triptych.core.contract import Converted
from triptych.core.errors import InputRefused
from triptych.core.spec import Kind, TensorSpec

Arrays = dict[str, np.ndarray]
Tree = dict[str, Any]

# kind -> (collection, leaf, axes of the native array in terms of the canonical one)
NATIVE: dict[Kind, tuple[str, str, tuple[int, ...]]] = {
    "conv_weight": ("params", "kernel", (2, 3, 1, 0)),  # OIHW -> HWIO
    "linear_weight": ("params", "kernel", (1, 0)),  # (out, in) -> (in, out)
    "bias": ("params", "bias", (0,)),
    "norm_weight": ("params", "scale", (0,)),
    "norm_bias": ("params", "bias", (0,)),
    "running_mean": ("batch_stats", "mean", (0,)),
    "running_var": ("batch_stats", "var", (0,)),
    "class_token": ("params", "cls_token", (0, 1, 2)),
    "positions": ("params", "pos_embed", (0, 1, 2)),
    "lookup_weight": ("params", "embedding", (0, 1)),
    "lstm_input_weight": ("params", "kernel", (1, 0)),  # (4 features, width) -> (width, 4 features)
    "lstm_state_weight": ("params", "recurrent_kernel", (1, 0)),
    "lstm_input_bias": ("params", "bias", (0,)),
    "lstm_state_bias": ("params", "recurrent_bias", (0,)),
    "batch_counter": ("batch_stats", "num_batches_tracked", ()),
}


def path(tensor: TensorSpec) -> tuple[str, ...]:
    """`layer1.0.conv1.weight` -> `("params", "layer1", "0", "conv1", "kernel")`."""
    collection, leaf, _ = NATIVE[tensor.kind]
    return (collection, *tensor.layer.split("."), leaf)


def tree(tensors: Iterable[TensorSpec], values: Mapping[str, Any]) -> Tree:
    """Any values by canonical name, arranged as the native tree."""
    return unflatten_dict({path(tensor): values[tensor.name] for tensor in tensors})


def to_native(tensors: tuple[TensorSpec, ...], arrays: Mapping[str, np.ndarray], precision: str, device: jax.Device) -> Tree:
    """Canonical arrays -> native variables on `device`, in `precision` (same precision: bit for bit).

    Raises InputRefused, listing every missing, unknown and mis-shaped name.
    """
    check(tensors, arrays)
    native = {tensor.name: _native(tensor, arrays[tensor.name], precision) for tensor in tensors}
    return jax.device_put(tree(tensors, native), device)


def _native(tensor: TensorSpec, array: np.ndarray, precision: str) -> jax.Array:
    """A copy in native layout; int32 counters, because int64 exists in JAX only under x64."""
    dtype = np.int32 if tensor.kind == "batch_counter" else np.dtype(precision)
    return jnp.array(np.asarray(array).transpose(NATIVE[tensor.kind][2]).astype(dtype))


def view(tensors: Iterable[TensorSpec], variables: Mapping[str, Any]) -> Converted:
    """`to_canonical` with each array converted when it is asked for."""
    leaves = flatten_dict(variables)
    return Converted({tensor.name: (tensor, leaves[path(tensor)]) for tensor in tensors}, lambda held: _canonical(*held))


def to_canonical(tensors: Iterable[TensorSpec], variables: Mapping[str, Any]) -> Arrays:
    """Native variables -> canonical arrays of the caller's own; counters int64."""
    return dict(view(tensors, variables))


def _canonical(tensor: TensorSpec, leaf: jax.Array) -> np.ndarray:
    array = np.asarray(leaf).transpose(np.argsort(NATIVE[tensor.kind][2]))
    return np.array(array, np.int64 if tensor.kind == "batch_counter" else array.dtype, order="C")


def check(tensors: tuple[TensorSpec, ...], arrays: Mapping[str, np.ndarray]) -> None:
    """InputRefused, listing all of them, if a name is missing, unknown or mis-shaped, or a counter too large for int32."""
    expected = {tensor.name: tensor.shape for tensor in tensors}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in arrays]
    problems += [f"unknown {name} {np.shape(arrays[name])}" for name in arrays if name not in expected]
    problems += [
        f"mis-shaped {name}: given {np.shape(arrays[name])}, expected {shape}"
        for name, shape in expected.items()
        if name in arrays and np.shape(arrays[name]) != shape
    ]
    problems += [
        f"{tensor.name} = {arrays[tensor.name]} does not fit int32"
        for tensor in tensors
        if tensor.kind == "batch_counter" and tensor.name in arrays and np.max(arrays[tensor.name]) > np.iinfo(np.int32).max
    ]
    if problems:
        raise InputRefused(f"these weights do not fit the model ({len(problems)} problems): " + "; ".join(problems))
