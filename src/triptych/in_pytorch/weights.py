"""Native tensors <-> canonical numpy arrays, bit for bit.

Module names and layouts are canonical already, so a `state_dict()` needs no renaming and no transposing: what is left is to
copy, and to refuse whatever does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from triptych.core.errors import InputRefused

Arrays = dict[str, np.ndarray]


def to_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Copies of the tensors as C-contiguous numpy arrays; nothing is shared with the model."""
    return {name: to_array(tensor) for name, tensor in tensors.items()}


def to_array(tensor: Tensor) -> np.ndarray:
    """A copy of one tensor as a C-contiguous numpy array."""
    return tensor.detach().cpu().numpy().copy(order="C")


def to_tensor(array: np.ndarray, like: Tensor) -> Tensor:
    """A copy of the array with the dtype and device of `like`; bit for bit when it has that dtype already."""
    dtype = str(like.dtype).removeprefix("torch.")
    return torch.from_numpy(np.array(array, dtype=dtype, order="C")).to(like.device)


def copy_into(tensors: Mapping[str, Tensor], arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Overwrite the tensors in place. Raises InputRefused, before anything is written, when a name or shape does not fit."""
    check(arrays, tensors, what)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(to_tensor(arrays[name], tensor))


def load(native: nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Give the module a canonical state. Raises InputRefused listing every missing, unknown and mis-shaped tensor."""
    copy_into(native.state_dict(), weights, "weights")


def check(arrays: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor], what: str) -> None:
    """InputRefused unless names and shapes of the two agree; the message lists all that do not."""
    problems = [f"missing: {name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if name not in arrays]
    problems += [f"unknown: {name} {np.shape(array)}" for name, array in arrays.items() if name not in tensors]
    problems += [
        f"shape: {name} is {np.shape(arrays[name])}, must be {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in arrays and np.shape(arrays[name]) != tuple(tensor.shape)
    ]
    if problems:
        listed = "\n  ".join(problems)
        raise InputRefused(f"{what} do not fit this model ({len(problems)} problems); `triptych info` lists its tensors:\n  {listed}")
