"""What a report is made of, as plain frozen data: `triptych report` fills it, the renderers read nothing else.

Every part may be absent; `Evidence.missing` then says why, and the report prints that reason where the part would stand.
Numbers that do not exist are None, never NaN. Standard library only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from triptych.core.errors import InputRefused
from triptych.report.measured import Performance
from triptych.report.revive import build

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of a certificate. For rung 8 `worst_error` is a ratio to the one-ulp self-divergence; None means no evidence."""

    number: int
    name: str
    precision: str
    passed: bool
    worst_error: float | None = None
    tolerance: float | None = None
    tensor: str | None = None
    pair: str | None = None
    tensors: int | None = None
    pairs: int | None = None
    steps: int | None = None
    image_size: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Curves:
    """Rung 8, step by step: how far frameworks drift apart, and how far one drifts from itself after one unit in the last place.

    `self_divergence` is the median of `self_runs`, one a perturbation; only the steps in `counted` are held to the bound.
    """

    self_divergence: tuple[float, ...]
    pairs: dict[str, tuple[float, ...]]
    self_runs: tuple[tuple[float, ...], ...] = ()
    counted: tuple[int, ...] = ()
    precision: str = "float64"


@dataclass(frozen=True, slots=True)
class Context:
    """AlgoPerf's setting (random initialization, float32, eval mode): absolute figures and the yardsticks beside them.

    `layout_noise`: a framework's own NCHW against NHWC difference, for those that have both; `published` is AlgoPerf's figure.
    """

    max_abs_logit_difference: float
    logit_scale: float
    layout_noise: dict[str, float] = field(default_factory=dict)
    published: float | None = None
    image_size: int | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What `triptych parity MODEL --json` prints, with the curves of rung 8 and the context; `not_applicable` are rungs with reasons."""

    verdict: str
    model: str
    spec_sha256: str
    weights_sha256: str
    rungs: tuple[Rung, ...]
    first_divergence: dict[str, Any] | str | None = None
    context: Context | None = None
    curves: tuple[Curves, ...] = ()
    not_applicable: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One framework's training: the loss of every step and the time of its first seed, and the test images that each seed got right."""

    framework: str
    losses: tuple[float, ...]
    correct: tuple[int, ...]
    test_images: int
    seconds: float | None = None
    train_images: int | None = None

    def __post_init__(self) -> None:
        if not (self.correct and all(0 <= correct <= self.test_images for correct in self.correct) and self.test_images > 0):
            raise InputRefused(
                f"Run.correct is {list(self.correct)} of {self.test_images} test images; it must hold one number a seed, none above that"
            )

    @property
    def accuracy(self) -> float:
        """Share of test images classified right, the mean over the seeds."""
        return sum(self.correct) / len(self.correct) / self.test_images


@dataclass(frozen=True, slots=True)
class Training:
    """One model trained in several frameworks, with each seed from one initialization on identical batches; one precision.

    All differences are of the first seed, a number a step. `loss_difference`, `weight_difference`: per pair of frameworks; `loss_self`,
    `weight_self`: one framework against itself with its initial weights moved by one unit in the last place.
    """

    model: str
    dataset: str
    precision: str
    runs: tuple[Run, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    loss_difference: dict[str, tuple[float, ...]] = field(default_factory=dict)
    loss_self: tuple[float, ...] = ()
    weight_difference: dict[str, tuple[float, ...]] = field(default_factory=dict)
    weight_self: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        seeds = [len(run.correct) for run in self.runs]
        if len(set(seeds)) > 1:
            raise InputRefused(f"the runs have {', '.join(map(str, seeds))} seeds; every framework must be trained with the same ones")


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted fault in one framework. `error` is what the rung measured; None when it was not caught or has no number.

    `right_rung`, `right_layer`: whether the ladder pointed at the rung and the layer where the fault was planted.
    """

    name: str
    framework: str
    caught: bool
    rung: int | None = None
    tensor: str | None = None
    error: float | None = None
    float32_forward_error: float | None = None
    cause: str = ""
    numerics: int | None = None
    expected_rung: int | None = None
    planted_layer: str | None = None
    right_rung: bool = True
    right_layer: bool = True


@dataclass(frozen=True, slots=True)
class NotExpressible:
    """A cause in `docs/numerics.md` that no catalogued model can show, and why."""

    name: str
    reason: str
    numerics: int | None = None


@dataclass(frozen=True, slots=True)
class FaultTable:
    """What `triptych parity MODEL --fault all --json` prints."""

    model: str
    clean: str
    faults: tuple[Fault, ...]
    not_expressible: tuple[NotExpressible, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Parameters and arithmetic of one model at its default options (`core/cost.py`). `image_size` is None without images."""

    model: str
    image_size: int | None
    parameters: int
    macs: int
    flops: int


@dataclass(frozen=True, slots=True)
class CodeCount:
    """Size of one file of model code (`report/lines.py`)."""

    framework: str
    file: str
    statements: int
    lines: int


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One committed training run. `evaluations` are (step, epoch, accuracy, loss); accuracies are fractions, `train_loss` is by epoch.

    `cpu_minutes` is the time that all cores together spent on it.
    """

    model: str
    framework: str
    test_accuracy: float
    seconds: float
    epochs: float
    seed: int
    test_correct: int | None = None
    test_images: int | None = None
    parameters: int | None = None
    train_loss: tuple[float, ...] = ()
    evaluations: tuple[tuple[float | None, ...], ...] = ()
    cpu_minutes: float | None = None
    data: str = "CIFAR-10"
    data_note: str = ""
    hardware: str = ""
    code_sha256: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One committed checkpoint evaluated in several frameworks: images right in each, and on how many all say the same.

    `ties` are images on which they differ; `logit_difference` is the largest between two frameworks, `logit_scale` the largest logit.
    """

    weights: str
    correct: dict[str, int]
    images: int
    agree: int
    ties: tuple[str, ...] = ()
    logit_difference: float | None = None
    logit_scale: float | None = None


@dataclass(frozen=True, slots=True)
class ResumedPair:
    """A run begun in `source` and resumed in `target`. `ratio` is its drift over the one-ulp self-divergence of an uninterrupted run."""

    source: str
    target: str
    state_bit_equal: bool
    first_step_error: float | None
    ratio: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Kills:
    """How often a run was killed (`during_save`: while it saved), and whether its final weights are those of the uninterrupted one."""

    framework: str
    kills: int
    during_save: int | None
    bitwise_equal: bool


@dataclass(frozen=True, slots=True)
class Overhead:
    """Time of a run that saves checkpoints over that of one that does not, with its paired 95 % interval."""

    framework: str
    ratio: float | None
    interval: tuple[float, ...] | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of ours over the stock one, with its paired 95 % interval: a lane of the training step, or (`lane` empty) an input pipeline.

    `macs`, `stock_macs`: multiply-adds of a forward pass, where the stock model is not quite the same. `reason`: why there is no ratio.
    """

    framework: str
    ratio: float | None
    interval: tuple[float, ...] | None
    n: int
    against: str
    images_per_second: float | None = None
    model: str = ""
    lane: str = ""
    levers: tuple[str, ...] = ()
    batch_size: int | None = None
    image_size: int | None = None
    macs: int | None = None
    stock_macs: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outside:
    """Share of a training step that is spent outside the framework's own kernels."""

    framework: str
    model: str
    share: float
    interval: tuple[float, ...]
    n: int


@dataclass(frozen=True, slots=True)
class Records:
    """What was measured once and committed (`report/record.py` reads it). `hardware` is by part: what each was measured on."""

    runs: tuple[RecordedRun, ...] = ()
    evaluated: tuple[Evaluated, ...] = ()
    resumed: tuple[ResumedPair, ...] = ()
    kills: tuple[Kills, ...] = ()
    overhead: tuple[Overhead, ...] = ()
    steps: tuple[Speed, ...] = ()
    outside: tuple[Outside, ...] = ()
    pipelines: tuple[Speed, ...] = ()
    hardware: dict[str, str] = field(default_factory=dict)

    def part(self, name: str) -> tuple[Any, ...]:
        """The rows of a part by the name of its command; `cifar10` are the runs."""
        rows: tuple[Any, ...] = self.runs if name == "cifar10" else getattr(self, name)
        return rows


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the pipeline that made the evidence: computed now, or reused because the same hashes were found."""

    name: str
    reused: bool
    seconds: float | None = None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it. `commands` names what makes each part: report, parity, training, short_training, faults, costs, lines, environment;
    of `records`: cifar10, evaluated, resumed, kills, overhead, steps, pipelines; and of `performance` (`measurements.COMMANDS`)."""

    certificates: tuple[Certificate, ...] = ()
    training: Training | None = None
    short_training: Training | None = None
    faults: tuple[FaultTable, ...] = ()
    records: Records = field(default_factory=Records)
    performance: Performance = field(default_factory=Performance)
    costs: tuple[ModelCost, ...] = ()
    code: tuple[CodeCount, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    created: str | None = None
    schema: int = SCHEMA

    def why_missing(self, part: str) -> str:
        """The recorded reason why `part` is not there."""
        return self.missing.get(part, "this run did not produce it")


def to_dict(evidence: Evidence) -> dict[str, Any]:
    """Plain data for JSON; `from_dict` is its inverse."""
    return dataclasses.asdict(evidence)


def from_dict(data: dict[str, Any]) -> Evidence:
    """The evidence that `to_dict` described. InputRefused for a missing field or another schema."""
    if data.get("schema", SCHEMA) != SCHEMA:
        raise InputRefused(f"evidence of schema {data['schema']!r}; this version reads schema {SCHEMA}: run `triptych report` again")
    return build(Evidence, data)
