"""The arithmetic behind every figure of a benchmark: pure functions of raw samples.

Intervals are 95 % percentile bootstraps (Efron & Tibshirani 1993, chapter 13) with a fixed seed: the same samples give the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
PERCENTILES = {"p90": (0.90, 64), "p95": (0.95, 130), "p99": (0.99, 662)}
"""Quantile, and the samples without which it is not told."""

Interval = tuple[float, float]


def median_interval(samples: Sequence[float]) -> tuple[float, Interval]:
    """The median and its interval. ValueError without samples."""
    values = _finite(samples)
    return float(np.median(values)), _interval(_resampled_medians(values, seed=0))


def paired_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, Interval]:
    """The median of a[i] / b[i], and its interval by the bootstrap over pairs.

    What slows down one turn slows down its pair too: their ratio is what is sampled. ValueError unless there are as many of both.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"pairs are needed: {len(a)} and {len(b)} samples were given")
    return median_interval(_finite(a) / _finite(b))


def unpaired_interval(
    new: Sequence[float], old: Sequence[float], new_kernel: Sequence[float] = (1.0,), old_kernel: Sequence[float] = (1.0,)
) -> tuple[float, Interval]:
    """median(new) / median(old) and its interval, each side resampled on its own: for runs that were not interleaved.

    The seconds of one fixed kernel beside each run take out how much faster or slower the machine was meanwhile.
    """
    sides = [_finite(each) for each in (new, old_kernel, old, new_kernel)]
    a, b, c, d = (np.append(_resampled_medians(side, seed), np.median(side)) for seed, side in enumerate(sides))
    ratios = a * b / (c * d)
    return float(ratios[-1]), _interval(ratios[:-1])


def percentiles(samples: Sequence[float]) -> dict[str, float | None]:
    """p90, p95 and p99; None where the samples are too few to tell."""
    values = _finite(samples)
    return {name: float(np.quantile(values, q)) if len(values) >= needed else None for name, (q, needed) in PERCENTILES.items()}


def outliers(samples: Sequence[float]) -> int:
    """How many samples lie more than three interquartile ranges beyond the quartiles (Tukey 1977, "far out"); none of them is dropped."""
    values = _finite(samples)
    low, high = np.quantile(values, [0.25, 0.75])
    fence = 3.0 * (high - low)
    return int(((values < low - fence) | (values > high + fence)).sum())


def smallest_difference(interval: Interval) -> float:
    """The relative difference below which a ratio says nothing, from the interval of the ratio of a thing to itself (A/A)."""
    return max(abs(math.log(bound)) for bound in interval)


def winner(interval: Interval, floor: float = 0.0) -> str | None:
    """`a` or `b`, whichever took less time, from the interval of a / b; None when it crosses 1 or is no more than `floor` away from it."""
    low, high = interval
    if low > 1.0 and math.log((low * high) ** 0.5) > floor:
        return "b"
    if high < 1.0 and -math.log((low * high) ** 0.5) > floor:
        return "a"
    return None


def break_even_steps(compile_seconds: float, seconds: float, other_compile_seconds: float, other_seconds: float) -> int | None:
    """Steps after which a lane has made up for its compilation against another; 0 when it has none to make up for; None for never."""
    extra, saved = compile_seconds - other_compile_seconds, other_seconds - seconds
    if extra <= 0.0:
        return 0 if saved >= 0.0 else None
    return math.ceil(extra / saved) if saved > 0.0 else None


def _finite(samples: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(samples, np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values <= 0.0).any():
        raise ValueError(f"samples must be one or more positive finite numbers; given {samples!r}")
    return values


def _resampled_medians(values: np.ndarray, seed: int) -> np.ndarray:
    """Medians of `RESAMPLES` draws with replacement, some at a time: memory stays bounded."""
    numbers, medians = np.random.default_rng(seed), np.empty(RESAMPLES)
    at_once = max(1, 2**20 // len(values))
    for start in range(0, RESAMPLES, at_once):
        part = medians[start : start + at_once]
        part[:] = np.median(values[numbers.integers(len(values), size=(len(part), len(values)))], axis=1)
    return medians


def _interval(estimates: np.ndarray) -> Interval:
    low, high = np.quantile(estimates, [0.025, 0.975])
    return float(low), float(high)
