"""Tensors to safetensors bytes and back, without any framework. The file format carries no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from triptych.core.errors import InputRefused

DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Widened:
    """A tensor whose own dtype numpy lacks (bfloat16, float8), widened exactly to float32."""

    array: np.ndarray
    dtype: str


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Safetensors bytes, bit-exact; the metadata `format: pt` is what timm and transformers look for."""
    # `order="C"` because safetensors copies the raw buffer; np.ascontiguousarray would turn a scalar counter into shape (1,).
    contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    return safetensors.numpy.save(contiguous, metadata={"format": "pt"})


def decode(data: bytes, source: object) -> dict[str, np.ndarray | Widened]:
    """The tensors of safetensors bytes, writable. InputRefused naming `source` for a damaged header or an unknown dtype."""
    deserialize: Any = safetensors.deserialize  # an untyped extension function
    try:
        entries = deserialize(data)
    except safetensors.SafetensorError as error:
        raise InputRefused(f"{source}: not a valid safetensors file ({error})") from None
    return {name: _tensor(name, entry["dtype"], entry["data"], entry["shape"], source) for name, entry in entries}


def _tensor(name: str, dtype: str, data: bytearray, shape: list[int], source: object) -> np.ndarray | Widened:
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << 16
        return Widened(bits.view(np.float32).reshape(shape), "bfloat16")
    if dtype not in DTYPES:
        raise InputRefused(f"{source}: tensor {name!r} has dtype {dtype}, which is not supported; known: {', '.join(DTYPES)}, BF16")
    return np.frombuffer(data, np.dtype(DTYPES[dtype]).newbyteorder("<")).reshape(shape)
