"""How far two tensors are apart: max-abs and scale-relative, never a mean that could cancel (numerics 30)."""

from __future__ import annotations

import numpy as np

NOTHING_IN_COMMON = 2.0
"""The largest scale-relative error there is: shapes differ, a tensor is missing, or a value is not finite."""

SKETCH = 4096


def scaled_error(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| over the larger of max |a| and max |b|, in float64; `NOTHING_IN_COMMON` for anything incomparable."""
    return error_at_scale(a, b, max(magnitude(a), magnitude(b)))


def error_at_scale(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    """`scaled_error` with the larger of the two magnitudes already known."""
    if a.shape != b.shape or not np.isfinite(scale):
        return NOTHING_IN_COMMON
    difference = magnitude(np.subtract(a, b, dtype=np.float64))
    return min(NOTHING_IN_COMMON, difference / scale) if difference else 0.0


def magnitude(value: np.ndarray) -> float:
    """The largest absolute value; not a number when one element is not, or when there is none: nothing equals nothing."""
    return max(float(value.max()), -float(value.min())) if value.size else float("nan")


def sketch(value: np.ndarray, size: int = SKETCH) -> np.ndarray:
    """Some `size` elements of a large tensor at an even stride: enough to measure how far two runs are apart."""
    flat = value.reshape(-1)
    return flat[:: max(1, flat.size // size)].copy()
