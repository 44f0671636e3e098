"""What the measuring scripts of this folder share: a paired interval, the head of a record, and a file that is written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core.environment import environment

RESULTS = Path(__file__).parent / "results"
RESAMPLES = 10_000


def paired_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The median of a[i] / b[i], and its 95 % interval by the percentile bootstrap over pairs (Efron & Tibshirani 1993, chapter 13).

    What slows down one turn slows down its pair too: their ratio is what is sampled. Raises ValueError unless there are as many of both.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"pairs are needed: {len(a)} and {len(b)} samples were given")
    ratios = np.asarray(a, np.float64) / np.asarray(b, np.float64)
    chosen = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), (float(low), float(high))


def head(command: str) -> dict[str, Any]:
    """What every record begins with: its schema, the command that makes it, and the environment it was made in."""
    return {"schema": 1, "command": command, "environment": environment()}


def write_json(path: Path, data: Any) -> None:
    """Replace `path` by the JSON of `data`, whole or not at all; a number that does not exist is null, and NaN a ValueError."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
