"""Reading a pickle of plain containers and numpy arrays without running any code it names.

CIFAR-10's official Python archive holds pickles, and a pickle is a program. Here the few names such files use stand for inert
records of ours; any other name is refused before it is even looked up. numpy itself is never called by the pickle.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import numpy as np

from triptych.core.errors import InputRefused


class _DType:
    """Stands in for numpy.dtype: remembers its code (`u1`) and byte order."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def integer(self) -> np.dtype[Any]:
        """The integer type it describes; ValueError for any other, so that neither objects nor records are ever made."""
        match = re.fullmatch(r"[<>|=]?([iu][1248])", self.code)
        if match is None:
            raise ValueError(f"an array of type {self.code!r}")
        return np.dtype((">" if self.order == ">" else "<") + match[1])


class _Array:
    """Stands in for numpy.ndarray: keeps the recorded shape, type and bytes, and checks them when asked for the array."""

    def __init__(self) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """The integer array. ValueError when bytes and shape disagree or the type is another."""
        _, shape, dtype, fortran_order, content = self.state
        return np.frombuffer(content, dtype.integer()).reshape(shape, order="F" if fortran_order else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.state = (1, shape, dtype, order == "F", content)
    return array


def _scalar(dtype: _DType, content: bytes) -> int:
    return int(np.frombuffer(content, dtype.integer())[0])


def _encode(text: str, encoding: str | bytes) -> bytes:
    """Protocol 2 writes bytes as latin-1 text; no other codec is honoured."""
    return text.encode("latin-1") if _text(encoding) in ("latin1", "latin-1") else b""


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


_ALLOWED = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    **{f"numpy.{core}.multiarray._reconstruct": _reconstruct for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _from_buffer for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Our record for a name of the table; UnpicklingError for every other name."""
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to run {module}.{name}")
        return _ALLOWED[f"{module}.{name}"]


def load(data: bytes, name: str) -> dict[str, Any]:
    """The dictionary that a pickle holds, keys as text, arrays as numpy integer arrays. Raises InputRefused, naming the file."""
    try:
        value = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__} where a dict is expected")
        return {_text(key): item.array() if isinstance(item, _Array) else item for key, item in value.items()}
    except Exception as error:  # a hostile or damaged pickle raises whatever it likes
        raise InputRefused(f"{name}: refused as a pickle of plain arrays ({type(error).__name__}: {error})") from None
