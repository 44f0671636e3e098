"""Hold the frameworks' observations against each other, tensor by tensor, and write the certificate. Numpy only."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from triptych.core import recipe, tolerance
from triptych.core.difference import NOTHING_IN_COMMON, error_at_scale, magnitude, scaled_error
from triptych.core.recipe import AdamW
from triptych.parity.observation import Observation
from triptych.parity.plan import Plan
from triptych.parity.rungs import RUNGS

Values = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor across all frameworks: its worst pair, against its tolerance."""

    rung: int
    step: int
    group: str
    tensor: str
    error: float
    tolerance: float
    pair: tuple[str, str]
    scale: float
    checksums: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether the worst pair is within the tolerance."""
        return self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """Error in units of the tolerance; a broken exact comparison counts more than any other."""
        if self.tolerance == 0.0:
            return 0.0 if self.error == 0.0 else 1e300
        return self.error / self.tolerance


@dataclass(slots=True)
class Comparer:
    """Consumes aligned observations; remembers every comparison and the tensors of the first divergence.

    With `keep` it remembers every tensor as well: for small specs, whose clean values planted faults are held against.
    """

    plan: Plan
    comparisons: list[Comparison] = field(default_factory=list)
    first: Comparison | None = None
    first_tensors: Values = field(default_factory=dict)
    free: dict[str, dict[tuple[str, str], list[float]]] = field(default_factory=dict)
    context: dict[str, Values] = field(default_factory=dict)
    keep: bool = False
    kept: dict[tuple[str, int, int, str, str], Values] = field(default_factory=dict)
    _recent: dict[str, Values] = field(default_factory=dict)

    def consume(self, streams: Mapping[str, Iterable[Observation]]) -> Iterator[Comparison]:
        """Compare the streams in step; yields each comparison as it is made."""
        names = list(streams)
        for row in itertools.zip_longest(*streams.values()):
            present = [o for o in row if o is not None]
            if len(present) < len(row) or len({o.key for o in present}) > 1:
                yield self._remember(self._misaligned(names, row), {})
                return
            values = dict(zip(names, (o.value for o in present), strict=True))
            if self.keep:
                self.kept[row[0].key] = values
            if row[0].group == "free":
                self._free_run(row[0], values)
            elif row[0].group == "context":
                self.context[row[0].name] = values
            else:
                yield self.compare(row[0], values)

    def compare(self, head: Observation, values: Values) -> Comparison:
        """Compare one tensor across frameworks and remember the result."""
        bound = tolerance.tolerance(self.plan.precision, self.plan.spec.name, head.rung, head.group)
        error, pair = worst_pair(self._compared(head, values))
        scale = max(magnitude(value) for value in values.values())
        # A checksum tells later runs apart; at the size of a training state a cryptographic hash would cost more than the proof.
        checksums = {name: f"{zlib.crc32(value.tobytes()):08x}" for name, value in values.items()}
        finite = scale if np.isfinite(scale) else 0.0
        comparison = Comparison(head.rung, head.step, head.group, head.name, error, bound, pair, finite, checksums)
        return self._remember(comparison, values)

    def _compared(self, head: Observation, values: Values) -> Values:
        """What of a tensor is compared: itself, or in rung 7, where moments decide, what its moments do not already explain."""
        if head.rung != 7 or not head.name.startswith("adamw "):
            return values
        self._recent[head.group] = values
        if head.name == "adamw updates":
            self._recent["updates"] = values
        if head.group == "adamw_weight" and "exp_avg" in self._recent:
            return {name: value - self._implied(name, head.step, value) for name, value in values.items()}
        if head.group == "adamw_ema" and "adamw_weight" in self._recent and "exp_avg" in self._recent:
            share = 1.0 - float(self.plan.adamw.ema_decay or 0.0)
            return {name: value - share * np.asarray(self._recent["adamw_weight"][name], np.float64) for name, value in values.items()}
        if head.group == "statistics":
            self._recent.pop("exp_avg", None)
        return values

    def _implied(self, name: str, step: int, like: np.ndarray) -> np.ndarray:
        first, second = self._recent["exp_avg"][name], self._recent["exp_avg_sq"][name]
        if first.shape != like.shape or second.shape != like.shape:
            return np.zeros(like.shape)
        updates = int(self._recent["updates"][name]) if "updates" in self._recent else step + 1
        return implied_update(self.plan, first, second, step, updates)

    def _misaligned(self, names: list[str], row: tuple[Observation | None, ...]) -> Comparison:
        """A framework reports another tensor, or none, where the others report one."""
        keys = ["nothing" if o is None else o.name for o in row]
        head = next(o for o in row if o is not None)
        odd = next(i for i in range(1, len(keys)) if keys[i] != keys[0]) if len(set(keys)) > 1 else 1
        tensor = head.name if "exception" not in {o.group for o in row if o} else next(o.name for o in row if o and o.group == "exception")
        return Comparison(head.rung, head.step, head.group, tensor, NOTHING_IN_COMMON, 0.0, (names[0], names[odd]), 0.0, {})

    def _remember(self, comparison: Comparison, values: Values) -> Comparison:
        self.comparisons.append(comparison)
        if not comparison.passed and self.first is None:
            self.first, self.first_tensors = comparison, {name: np.array(value) for name, value in values.items()}
        return comparison

    def _free_run(self, head: Observation, values: Values) -> None:
        curves = self.free.setdefault(head.name.partition(" ")[0], {})
        for pair in itertools.combinations(values, 2):
            curve = curves.setdefault(pair, [])
            curve.extend([0.0] * (head.step + 1 - len(curve)))
            curve[head.step] = max(curve[head.step], scaled_error(values[pair[0]], values[pair[1]]))


def worst_pair(values: Values) -> tuple[float, tuple[str, str]]:
    """The largest scale-relative error of any two frameworks, and which two."""
    pairs = list(itertools.combinations(values, 2))
    size = {name: magnitude(value) for name, value in values.items()}
    errors = [error_at_scale(values[a], values[b], max(size[a], size[b])) for a, b in pairs]
    worst = int(np.argmax(errors))
    return errors[worst], pairs[worst]


def implied_update(plan: Plan, exp_avg: np.ndarray, exp_avg_sq: np.ndarray, step: int, updates: int) -> np.ndarray:
    """The AdamW update -lr m̂ / (sqrt(v̂) + epsilon), float64, that a framework's own recorded moments imply (its bound).

    The rate is that of the step; bias corrections count the `updates`, which leave skipped steps out.
    """
    adamw = plan.adamw.optimizer
    assert isinstance(adamw, AdamW)
    rate, t = recipe.learning_rate(plan.adamw.schedule, step), max(1, updates)
    first = np.asarray(exp_avg, np.float64) / (1.0 - adamw.beta1**t)
    second = np.sqrt(np.asarray(exp_avg_sq, np.float64)) / np.sqrt(1.0 - adamw.beta2**t)
    return np.asarray(-rate * first / (second + adamw.epsilon))


def rung_rows(plan: Plan, comparisons: list[Comparison], pairs: int) -> list[dict[str, Any]]:
    """The certificate's rows of rungs 1 to 7: for each rung the tensor that is worst in units of its tolerance.

    `pairs` is how many pairs of frameworks were compared, `pair` the worst of them.
    """
    rows = []
    for rung in RUNGS[:7]:
        mine = [c for c in comparisons if c.rung == rung.number]
        if not mine:
            continue
        worst = max(mine, key=lambda c: (c.severity, c.error))
        spec = plan.spec if rung.number <= 3 else plan.training_spec
        batch = {2: 1, 3: plan.forward_batch}.get(rung.number, plan.training_batch)
        rows.append({
            "number": rung.number, "name": rung.name, "precision": plan.precision, "worst_error": worst.error,
            "tolerance": worst.tolerance, "tensor": worst.tensor, "group": worst.group, "pair": list(worst.pair),
            "passed": all(c.passed for c in mine), "tensors": len({c.tensor for c in mine}), "pairs": pairs,
            "steps": plan.steps if rung.number == 7 else 1, "image_size": spec.image_size, "batch_size": batch,
            "groups": _groups(mine),
        })  # fmt: skip
    return rows


def _groups(comparisons: list[Comparison]) -> dict[str, dict[str, Any]]:
    """The worst tensor of each group of a rung, for whoever wants more than the rung's worst."""
    worst: dict[str, Comparison] = {}
    for comparison in comparisons:
        if comparison.group not in worst or comparison.error > worst[comparison.group].error:
            worst[comparison.group] = comparison
    return {name: {"worst_error": c.error, "tolerance": c.tolerance, "tensor": c.tensor, "step": c.step} for name, c in worst.items()}


def free_run_row(plan: Plan, kind: str, free: dict[tuple[str, str], list[float]], self_curves: list[list[float]]) -> dict[str, Any]:
    """The certificate's row of rung 8 for a recipe: the largest ratio of a pair's divergence to the median self-divergence."""
    typical = np.median(np.asarray(self_curves), axis=0)
    counted = [step for step in range(len(typical)) if 0.0 < typical[step] < tolerance.FREE_RUN_HORIZON]
    ratios = [(curve[step] / typical[step], pair, step) for pair, curve in free.items() for step in counted]
    worst, pair, step = max(ratios, default=(NOTHING_IN_COMMON * tolerance.FREE_RUN_RATIO, ("", ""), 0))
    enough = len(counted) >= tolerance.FREE_RUN_MINIMUM_STEPS
    said = f"all weights after step {step}" if enough else "no evidence: fewer than 3 steps count"
    return {
        "number": 8, "name": RUNGS[7].name if kind == "sgd" else f"{RUNGS[7].name}, {kind}", "optimizer": kind,
        "precision": plan.precision, "worst_error": float(worst),
        "tolerance": tolerance.FREE_RUN_RATIO, "tensor": said,
        "group": "ratio", "pair": list(pair), "passed": bool(enough and worst <= tolerance.FREE_RUN_RATIO),
        "tensors": sum(tensor.kind != "batch_counter" for tensor in plan.spec.tensors()),
        "pairs": len(free), "steps": len(counted), "image_size": plan.training_spec.image_size, "batch_size": plan.training_batch,
        "curves": {
            "self_divergence": self_curves, "median_self_divergence": [float(v) for v in typical],
            "pairs": {" / ".join(names): curve for names, curve in free.items()}, "counted_steps": counted,
        },
    }  # fmt: skip


def divergence(plan: Plan, comparison: Comparison | None) -> dict[str, Any] | None:
    """The certificate's `first_divergence`: the first tensor in execution order outside its tolerance."""
    if comparison is None:
        return None
    row = asdict(comparison)
    row.pop("checksums")
    return {**row, "precision": plan.precision, "pair": list(comparison.pair), "layer": layer_of(plan, comparison.tensor)}


def layer_of(plan: Plan, tensor: str) -> str | None:
    """The layer a compared tensor belongs to: the longest layer name that one of its words starts with."""
    names = [layer.name for layer in plan.spec.layers()]
    words = tensor.split()
    fitting = [name for name in names if any(word == name or word.startswith(f"{name}.") for word in words)]
    return max(fitting, key=len, default=None)
