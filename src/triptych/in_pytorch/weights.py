"""Native tensors <-> canonical numpy arrays, bit for bit.

Module names and layouts are canonical already, so a `state_dict()` needs no renaming and no transposing: what is left is to
copy, and to refuse whatever does not fit. Files that others saved with torch.save (`.pth .pt .th .bin`) are read here too, into
numpy and plain data, never running code they carry.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triptych.core.contract import Converted
from triptych.core.errors import InputRefused
from triptych.core.tensor_file import Widened

Arrays = dict[str, np.ndarray]


def view(tensors: Mapping[str, Tensor]) -> Converted:
    """The tensors, each copied when it is read."""
    return Converted(tensors, to_array)


def to_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """Copies of the tensors as C-contiguous numpy arrays; nothing is shared with the model."""
    return dict(view(tensors))


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


# --- Files of others ----------------------------------------------------------------------------------------------------------

_GLOBAL = re.compile(r"GLOBAL (\S+)")


class _Inert:
    """Stands in for the harmless things that training scripts save beside the weights: it takes any arguments and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


_MULTIARRAY = [f"numpy.{core}.multiarray.{function}" for core in ("core", "_core") for function in ("scalar", "_reconstruct")]
_HARMLESS = ("argparse.Namespace", "pathlib.PosixPath", "pathlib.WindowsPath", "numpy.dtype", "numpy.ndarray", *_MULTIARRAY)
# The real classes are never touched: torch.load builds the stand-in wherever a file names one of these.
_STAND_INS: list[Any] = [(_Inert, name) for name in _HARMLESS]


def read_file(path: str | os.PathLike[str]) -> Any:
    """The content of a torch.save file: tensors as numpy arrays (`Widened` for bfloat16 and float8), containers and plain values.

    Loaded with `weights_only=True`: a file that needs code to be read is refused, not run. Anything that is neither a dense
    tensor, a container nor a plain value becomes its description. Raises InputRefused naming the file.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A hostile or damaged pickle can fail in any way at all; whatever it is, the file is refused.
        raise InputRefused(f"{path}: {_reason(str(error))}") from error
    return _Unwrapper(path.stat().st_size).plain(content)


def _reason(message: str) -> str:
    needed = _GLOBAL.search(message)
    if needed:
        return (
            f"contains code; refused, and none of it was run (reading it would call {needed[1]}). "
            "Only plain tensors are taken: ask its author for `torch.save(model.state_dict(), ...)` or safetensors"
        )
    if "TorchScript" in message:
        return "is a TorchScript archive, a program and not a checkpoint; refused. Save `model.state_dict()` instead"
    if "weights_only" in message.lower() or "Weights only load failed" in message:
        return "is not a checkpoint of plain tensors, so it was refused, and nothing in it was run"
    first = message.strip().splitlines()[0] if message.strip() else "it ends too early"
    return f"not readable as a PyTorch checkpoint, it is truncated or damaged ({first})"


@dataclass(slots=True)
class _Unwrapper:
    """Turns what torch.load gave into numpy and plain data, in memory bounded by the file's size.

    Every stored element takes a byte or more, so more elements than bytes means views that unfold (stride 0) or repeat.
    """

    elements_left: int
    seen: dict[int, Any] = field(default_factory=dict)

    def plain(self, value: Any) -> Any:
        if id(value) in self.seen:  # shared or cyclic containers are converted once
            return self.seen[id(value)]
        if isinstance(value, torch.Tensor):
            self.seen[id(value)] = result = self._tensor(value)
            return result
        if isinstance(value, dict):
            self.seen[id(value)] = mapping = {}
            mapping.update({key: self.plain(item) for key, item in value.items()})
            return mapping
        if isinstance(value, (list, tuple)):
            sequence: list[Any] = []
            self.seen[id(value)] = sequence
            sequence.extend(self.plain(item) for item in value)
            return sequence
        return value if value is None or isinstance(value, (str, int, float, bool)) else f"<{type(value).__name__}>"

    def _tensor(self, tensor: torch.Tensor) -> Any:
        dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not dense or tensor.numel() > self.elements_left:
            return f"<{tensor.layout} {tensor.dtype} tensor on {tensor.device}, shape {tuple(tensor.shape)}>"
        self.elements_left -= tensor.numel()
        tensor = tensor.detach().resolve_conj().resolve_neg()
        name = str(tensor.dtype).removeprefix("torch.")
        if name.startswith(("bfloat", "float8", "float4")):
            return Widened(tensor.float().numpy(), name)
        return tensor.numpy()
