"""The sampling plan: which samples a step sees, and every random number that their transforms need.

All of it is counter-based (`core/philox.py`): the order is a pure function of (seed, epoch), a sample's numbers of (seed, epoch, sample),
MixUp's and CutMix's of (seed, global step, position in the batch). So nothing depends on workers, processes, micro-batches or
frameworks, and any step can be reached directly: a run resumes in the middle of an epoch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from triptych.core import philox
from triptych.core.errors import UsageError
from triptych.core.preprocess import NO_TRANSFORMS, WORDS, Transforms

# Up to this many words (64 MB) the numbers of an epoch are drawn at once, which is faster than sample by sample; they are the same.
TABLE_WORDS = 2**23


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """How each image of a batch is mixed with another one of it: `share` of its own pixels or area, the rest of `partner`'s.

    `partner` is (N,) positions in the batch's `indices`; `box` (top, left, height, width) is what CutMix takes from the partner.
    """

    share: float
    partner: np.ndarray
    box: tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One batch of a plan. The pipeline loads and transforms every sample of `indices`, then mixes and yields the first `len(targets)`.

    `targets` is (N,) int64 classes, or (N, classes) float64 shares where images are mixed; `words` is (samples, WORDS) uint64, the
    random numbers of the transforms (None: no transform is random).
    """

    step: int
    epoch: int
    indices: np.ndarray
    targets: np.ndarray
    words: np.ndarray | None = None
    mix: Mix | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SamplingPlan:
    """The batches of a run over `labels` (samples,), at `crop` pixels.

    The uneven last batch of an epoch is dropped, or with `uneven="pad"` filled up from the beginning of the epoch's order. Rank
    `rank` of `world` processes gets its contiguous part of every global batch. Raises UsageError when the numbers do not fit.
    """

    labels: np.ndarray
    num_classes: int
    global_batch_size: int
    seed: int = 0
    transforms: Transforms = NO_TRANSFORMS
    crop: int = 0
    uneven: Literal["drop", "pad"] = "drop"
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        size, batch = len(self.labels), self.global_batch_size
        if batch < 1 or size < 1 or (self.uneven == "drop" and batch > size):
            raise UsageError(f"a global batch of {batch} needs at least as many samples; there are {size}")
        if batch % self.world or not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world}: a global batch of {batch} must divide evenly among the processes")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one epoch."""
        whole, rest = divmod(len(self.labels), self.global_batch_size)
        return whole + bool(rest and self.uneven == "pad")

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start ... stop - 1."""
        return (self.batch(step) for step in range(start, stop))

    def batch(self, step: int) -> Batch:
        """The batch of one step, whatever came before."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = epoch_order(self.seed, epoch, len(self.labels))
        size = self.global_batch_size
        chosen = np.take(order, np.arange(position * size, (position + 1) * size), mode="wrap")
        mix = self._mix(step, size)
        part = size // self.world
        mine = slice(self.rank * part, (self.rank + 1) * part)
        targets = self._targets(chosen, mix)[mine]
        if mix is not None and self.world > 1:
            chosen, mix = np.concatenate([chosen[mine], chosen[mix.partner[mine]]]), replace(mix, partner=np.arange(part, 2 * part))
        else:
            chosen = chosen[mine]
        words = sample_words(self.seed, epoch, chosen, len(self.labels)) if self.transforms.random else None
        return Batch(step, epoch, chosen, targets, words, mix)

    def _targets(self, chosen: np.ndarray, mix: Mix | None) -> np.ndarray:
        labels: np.ndarray = self.labels[chosen]
        if mix is None:
            return labels
        shares = np.zeros((len(labels), self.num_classes))
        rows = np.arange(len(labels))
        shares[rows, labels] += mix.share
        shares[rows, labels[mix.partner]] += 1.0 - mix.share
        return shares

    def _mix(self, step: int, size: int) -> Mix | None:
        mixup, cutmix = self.transforms.mixup, self.transforms.cutmix
        if not (mixup or cutmix):
            return None
        stream = f"mix/{self.seed}/{step}"
        coin, top, left = philox.uniform(stream, (3,))
        partner = philox.permutation(f"{stream}/partner", size)
        if mixup and (not cutmix or coin < 0.5):
            return Mix(beta(f"{stream}/share", mixup), partner, None)
        share = beta(f"{stream}/share", cutmix)
        side = int(self.crop * math.sqrt(1.0 - share))
        box = (int(top * (self.crop - side + 1)), int(left * (self.crop - side + 1)), side, side)
        return Mix(1.0 - side * side / self.crop**2, partner, box)


def in_order(labels: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Every sample once, in order, without random transforms: for evaluation. The last batch may be smaller."""
    for step, start in enumerate(range(0, len(labels), batch_size)):
        indices = np.arange(start, min(start + batch_size, len(labels)))
        yield Batch(step, 0, indices, labels[indices])


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` samples in an epoch: a pure function of (seed, epoch, size), for every framework alike. Read-only."""
    order = philox.permutation(f"order/{seed}/{epoch}", size)
    order.flags.writeable = False
    return order


def sample_words(seed: int, epoch: int, samples: Sequence[int] | np.ndarray, size: int) -> np.ndarray:
    """(N, WORDS) uint64, the random words of these samples in this epoch: words WORDS i ... WORDS (i + 1) - 1 of the epoch's stream."""
    if size * WORDS <= TABLE_WORDS:
        return np.take(_epoch_words(seed, epoch, size), samples, axis=0)
    stream = f"transforms/{seed}/{epoch}"
    return np.stack([philox.bits(stream, WORDS, start=int(sample) * WORDS) for sample in samples])


@functools.lru_cache(maxsize=1)
def _epoch_words(seed: int, epoch: int, size: int) -> np.ndarray:
    return philox.bits(f"transforms/{seed}/{epoch}", size * WORDS).reshape(size, WORDS)


def beta(stream: str, alpha: float) -> float:
    """A Beta(alpha, alpha) number by Jöhnk's rejection (1964), from a stream of its own."""
    for start in range(0, 4096, 2):
        u, v = (((int(word) >> 12) + 0.5) * 2.0**-52 for word in philox.bits(stream, 2, start=start))
        x, y = u ** (1.0 / alpha), v ** (1.0 / alpha)
        if 0.0 < x + y <= 1.0:
            return float(x / (x + y))
    return 0.5  # never seen: one pair in two or three is accepted for alpha up to 1, fewer for large ones, which peak at one half
