"""The bars that speed was held to, ResNet-50 in float32, as claims: each with its interval and the share of the matmul peak beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from triptych.export.runtimes import RUNTIMES
from triptych.report.asked import STEP_LOWER_END, steps
from triptych.report.asked import TUNED as STEP_RATIO
from triptych.report.evidence import Evidence
from triptych.report.measured import STOCK, TUNED, Suite, Timed
from triptych.report.verdict import Claim
from triptych.report.wording import bounds, contestant, listing, mode_title, times

MODEL = "resnet50"
SERVED = "bench_inference"
TRAINED = 32
"""Images of the smallest batch that a ResNet-50 is trained on; what a step of fewer takes stands in the tables of its suite."""


@dataclass(frozen=True, slots=True)
class Bar:
    """The fastest of `lanes` must be `least` times as fast as the fastest of `against`: the ratio, or the lower end of its interval."""

    framework: str
    mode: str
    lanes: tuple[str, ...]
    against: tuple[str, ...]
    least: float
    words: str
    lower_end: bool = False
    from_batch: int = 1
    """The smallest batch at which it is asked."""

    @property
    def asked(self) -> str:
        """The bound in words."""
        return f"lower end ≥ {self.least}×" if self.lower_end else f"≥ {self.least}×"

    def text(self, size: int | None = None, ours: Timed | None = None, other: Timed | None = None) -> str:
        """What is compared; in a record at which batch size, which lane of ours, with which rival, and whether that is another model."""
        batch = "" if size is None else f", batch {size}"
        words = f"{contestant(other.framework, other.lane)}, {self.words}" if other and len(self.against) > 1 else self.words
        flops = other.certificate.flop_ratio if other else None
        model = f" (another model, {times(flops)} the FLOPs)" if flops else ""
        lane = contestant(self.framework, ours.lane if ours else self.lanes[0])
        return f"{mode_title(self.mode).capitalize()} of {MODEL}{batch}: {lane}, over {words}{model}"


RIVALS = tuple(f"{name}/default" for name in RUNTIMES)
INFERENCE = (
    Bar("pytorch", "inference", TUNED, (f"pytorch/{STOCK}",), 1.5, "torchvision, eager"),
    Bar("pytorch", "inference", TUNED, RIVALS, 0.95, f"the better of {listing([row.title for row in RUNTIMES.values()])}", lower_end=True),
    Bar("tensorflow", "inference", TUNED, (f"tensorflow/{STOCK}",), 1.1, "keras.applications' predict"),
    Bar("jax", "inference", TUNED, (f"jax/{STOCK}",), 1.4, "a plain jit of plain Flax"),
)
TRAINING = tuple(
    Bar(name, "training_step", lanes, (f"{name}/{STOCK}",), least, "the stock one", lanes == ("default",), TRAINED)
    for name, ratio in STEP_RATIO.items()
    for lanes, least in ((("default",), STEP_LOWER_END), (TUNED, ratio))
)


def bars(evidence: Evidence) -> Iterator[Claim]:
    """A claim for each bar in each record and batch size; of a bar that no record shows, one that does not hold and does not fail."""
    for bar in INFERENCE:
        found = [claim for suite in evidence.performance.suites for claim in _claims(bar, suite)]
        yield from found or [_unshown(bar, evidence)]
    yield from steps(evidence, {MODEL})
    yield from (claim for bar in TRAINING for suite in evidence.performance.suites for claim in _claims(bar, suite))


def _unshown(bar: Bar, evidence: Evidence) -> Claim:
    return Claim(bar.text(), "not recorded here", bar.asked, None, evidence.commands.get(SERVED))


def _claims(bar: Bar, suite: Suite) -> Iterator[Claim]:
    for group in suite.together():
        claim = _claim(bar, suite, group) if asked(bar, group[0]) else None
        if claim is not None:
            yield claim


def asked(bar: Bar, row: Timed) -> bool:
    """Whether the bar is asked of a group with this row."""
    return (row.model, row.mode) == (MODEL, bar.mode) and row.batch_size >= bar.from_batch


def _claim(bar: Bar, suite: Suite, group: list[Timed]) -> Claim | None:
    """The bar in one group; None where the group has neither of the two sides."""
    mine = [row for row in group if row.framework == bar.framework and row.lane in bar.lanes]
    rivals = [row for row in group if row.contestant in bar.against]
    if not mine or not rivals:
        return None
    ours, other = fastest(mine), fastest(rivals)
    found = suite.speed(ours, other.contestant) if ours and other else None
    text = bar.text(group[0].batch_size, ours, other)
    if ours is None or found is None:
        why = [row.failure for row in (*mine, *rivals) if row.failure]
        return Claim(text, "; ".join(dict.fromkeys(why)) or "not timed", bar.asked, None, suite.command)
    ratio, interval = found
    good = (interval[0] if bar.lower_end else ratio) >= bar.least
    complete = {row.contestant for row in rivals if row.median} >= set(bar.against)
    share = f"; {ours.peak_share:.0%} of peak" if ours.peak_share is not None else ""
    measured = f"{times(ratio)} ({bounds(interval)}){share}"
    return Claim(text, measured, bar.asked, None if good and not complete else good, suite.command)


def fastest(rows: list[Timed]) -> Timed | None:
    """The row with the least seconds; None when nothing of them was timed."""
    timed = [(row.median, row) for row in rows if row.median]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None
