"""What was asked of the training system, held against its records: each bound with the words it came in."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from triptych.core.contract import FRAMEWORKS
from triptych.core.tolerance import FREE_RUN_RATIO, STEP
from triptych.report.evidence import Evidence, RecordedRun, Speed
from triptych.report.verdict import Claim
from triptych.report.wording import bounds, framework_title, listing, number, points, short, times

# On CIFAR-10: who must be trained in what, what each run must exceed, and how near the frameworks must be to each other.
TRAINED = {"resnet20": tuple(FRAMEWORKS), "resnet18_cifar": ("pytorch",)}
LEAST_ACCURACY = 0.85
ACCURACY_SPREAD = 0.01
# All ordered pairs of three frameworks; kills that a run must survive, in each; what saving in the background may cost.
PAIRS = 6
KILLS = 20
OVERHEAD = 1.035
# Speed over stock: the lower end of the interval of the default lane, the ratio of the best lever, and of the input pipeline.
STEP_LOWER_END = 0.97
TUNED = {"pytorch": 1.1, "tensorflow": 1.1, "jax": 2.0}
PIPELINE = 5.0
OUTSIDE = 0.03


def asked(evidence: Evidence) -> Iterator[Claim]:
    """A claim for each thing asked; one whose part is not recorded does not hold and does not fail."""
    yield from _accuracy(evidence)
    yield _agreement(evidence)
    yield _resumed(evidence)
    yield _kills(evidence)
    yield _overhead(evidence)
    yield from steps(evidence)
    yield _outside(evidence)
    yield _pipelines(evidence)


def _accuracy(evidence: Evidence) -> Iterator[Claim]:
    runs, command = evidence.records.runs, evidence.commands.get("cifar10")
    bound = f"> {LEAST_ACCURACY:.0%}"
    for model in dict.fromkeys([*TRAINED, *(run.model for run in runs)]):
        mine = [run for run in runs if run.model == model]
        absent = [framework_title(name) for name in TRAINED.get(model, ()) if name not in {run.framework for run in mine}]
        if not mine:
            yield _unshown(evidence, "cifar10", f"{model} on CIFAR-10: lowest test accuracy", bound)
            continue
        lowest = min(run.test_accuracy for run in mine)
        good = lowest > LEAST_ACCURACY
        measured = f"{lowest:.2%}" + (f"; not recorded in {listing(absent)}" if absent else "")
        text = f"{model} on {mine[0].data}: lowest test accuracy"
        yield Claim(text, measured, bound, None if good and absent else good, command)
        means = _means(mine)
        if len(means) > 1:
            apart = max(means) - min(means)
            text, holds = f"{model} on {mine[0].data}: {len(means)} frameworks apart", apart <= ACCURACY_SPREAD + 1e-12
            yield Claim(text, points(apart), f"≤ {points(ACCURACY_SPREAD)}", holds, command)


def _means(runs: list[RecordedRun]) -> list[float]:
    """The mean accuracy of each framework."""
    groups = [[run.test_accuracy for run in runs if run.framework == name] for name in dict.fromkeys(run.framework for run in runs)]
    return [sum(group) / len(group) for group in groups]


def _agreement(evidence: Evidence) -> Claim:
    text, bound = "One checkpoint in several frameworks: the same answer", "on every image"
    rows = evidence.records.evaluated
    if not rows:
        return _unshown(evidence, "evaluated", text, bound)
    same, images = sum(row.agree for row in rows), sum(row.images for row in rows)
    # Where they differ, it is not shown here whether the two classes tie to rounding: the images are listed.
    return Claim(text, f"{same:,} of {images:,}", bound, True if same == images else None, evidence.commands.get("evaluated"))


def _resumed(evidence: Evidence) -> Claim:
    text = "A run resumed in another framework: state bit for bit, first step, drift"
    bound = f"{PAIRS} pairs; ≤ {short(STEP)}; ≤ {FREE_RUN_RATIO:g}×"
    rows = evidence.records.resumed
    if not rows:
        return _unshown(evidence, "resumed", text, bound)
    good = sum(
        row.passed and row.state_bit_equal and row.first_step_error is not None and row.first_step_error <= STEP
        and row.ratio is not None and row.ratio <= FREE_RUN_RATIO
        for row in rows
    )  # fmt: skip
    errors, ratios = [row.first_step_error for row in rows if row.first_step_error is not None], [row.ratio for row in rows if row.ratio]
    worst = f"{number(max(errors, default=None))}; {times(max(ratios, default=None))}"
    holds = None if good == len(rows) < PAIRS else good == len(rows)
    return Claim(text, f"{good} of {len(rows)}; {worst}", bound, holds, evidence.commands.get("resumed"))


def _kills(evidence: Evidence) -> Claim:
    text, bound = "Killed and resumed: final weights bitwise the same", f"≥ {KILLS} kills in each framework"
    rows = evidence.records.kills
    if not rows:
        return _unshown(evidence, "kills", text, bound)
    good = all(row.bitwise_equal and row.kills >= KILLS for row in rows)
    holds = None if good and {row.framework for row in rows} != set(FRAMEWORKS) else good
    equal = sum(row.bitwise_equal for row in rows)
    measured = f"{equal} of {len(rows)} frameworks, {' + '.join(str(row.kills) for row in rows)} kills"
    return Claim(text, measured, bound, holds, evidence.commands.get("kills"))


def _overhead(evidence: Evidence) -> Claim:
    text, bound = "Time with checkpoints over time without, the largest", f"≤ {OVERHEAD}×"
    ratios = [row.ratio for row in evidence.records.overhead if row.ratio is not None]
    if not ratios:
        return _unshown(evidence, "overhead", text, bound)
    return Claim(text, times(max(ratios), 3), bound, max(ratios) <= OVERHEAD, evidence.commands.get("overhead"))


def steps(evidence: Evidence, models: AbstractSet[str] | None = None) -> Iterator[Claim]:
    """The speed of a training step over the stock one, of these models or of all that are recorded."""
    command, rows = evidence.commands.get("steps"), [row for row in evidence.records.steps if row.ratio is not None]
    rows = [row for row in rows if models is None or row.model in models]
    if not rows:
        yield _unshown(evidence, "steps", "A training step over the stock one", f"lower end ≥ {STEP_LOWER_END}")
    for framework, model in dict.fromkeys((row.framework, row.model) for row in rows):
        mine = [row for row in rows if (row.framework, row.model) == (framework, model)]
        name = f"A training step of {model} in {framework_title(framework)} over the stock one"
        yield from (_default_lane(name, row, command) for row in mine if row.lane == "default")
        best = max((row for row in mine if row.lane != "default"), key=lambda row: row.ratio or 0.0, default=None)
        if best is not None and best.ratio is not None:
            bound = TUNED.get(framework, 1.0)
            measured = f"{times(best.ratio)} ({bounds(best.interval)})"
            yield Claim(f"{name}, {best.lane.replace('_', ' and ')}", measured, f"≥ {bound}×", best.ratio >= bound, command)


def _default_lane(name: str, row: Speed, command: str | None) -> Claim:
    low = row.interval[0] if row.interval else 0.0
    measured = f"{times(row.ratio)} ({bounds(row.interval)})"
    return Claim(name, measured, f"lower end ≥ {STEP_LOWER_END}", low >= STEP_LOWER_END, command)


def _outside(evidence: Evidence) -> Claim:
    text, bound = "Share of a step outside the framework's own kernels, the largest", f"≤ {OUTSIDE:.0%}"
    shares = [row.share for row in evidence.records.outside]
    if not shares:
        return _unshown(evidence, "steps", text, bound)
    return Claim(text, f"{max(shares):.1%}", bound, max(shares) <= OUTSIDE, evidence.commands.get("steps"))


def _pipelines(evidence: Evidence) -> Claim:
    text, bound = "An input pipeline over a stock DataLoader, the slowest", f"≥ {PIPELINE:g}×"
    ratios = [row.ratio for row in evidence.records.pipelines if row.ratio is not None]
    if not ratios:
        return _unshown(evidence, "pipelines", text, bound)
    return Claim(text, times(min(ratios)), bound, min(ratios) >= PIPELINE, evidence.commands.get("pipelines"))


def _unshown(evidence: Evidence, part: str, text: str, bound: str) -> Claim:
    return Claim(text, evidence.missing.get(part, "not recorded here"), bound, None, evidence.commands.get(part))
