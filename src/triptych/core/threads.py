"""A batch shared out over threads: where a library splits single operations and waits after each, every thread does better on its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from triptych.core.batch import Named, part, samples

Run = Callable[[Named], np.ndarray]


def shared_out(share: Run, alone: Run, threads: int) -> Run:
    """What `alone` computes of a named batch, cut into as many shares as there are `threads`; each thread gives `share` of its own.

    A batch that cannot be cut is left to `alone`, in the caller's thread. The order is kept, and what a share raises is raised.
    """
    pool = ThreadPoolExecutor(threads)

    def run(named: Named) -> np.ndarray:
        shares = np.array_split(np.arange(samples(named)), min(samples(named), threads) or 1)
        if len(shares) == 1:
            return alone(named)
        return np.concatenate(list(pool.map(share, [part(named, slice(each[0], each[-1] + 1)) for each in shares])))

    return run
