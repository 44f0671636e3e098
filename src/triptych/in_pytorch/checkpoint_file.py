"""Reading foreign PyTorch files (`.pth .pt .th .bin`) into numpy and plain data, never running code they carry."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from triptych.core.errors import InputRefused
from triptych.core.tensor_file import Widened

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


def read(path: str | os.PathLike[str]) -> Any:
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
