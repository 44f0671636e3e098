"""A batch shared out over threads: where a library splits single operations and waits after each, every thread does better on its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


def shared_out(share: Run, alone: Run, threads: int) -> Run:
    """What `alone` computes of (N, ...), cut into as many shares as there are `threads`; each thread gives `share` of its own.

    A batch that cannot be cut is left to `alone`, in the caller's thread. The order is kept, and what a share raises is raised.
    """
    pool = ThreadPoolExecutor(threads)

    def run(inputs: np.ndarray) -> np.ndarray:
        shares = min(len(inputs), threads)
        return np.concatenate(list(pool.map(share, np.array_split(inputs, shares)))) if shares > 1 else alone(inputs)

    return run
