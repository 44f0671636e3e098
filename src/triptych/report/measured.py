"""What was measured of speed, memory and debugging and committed, as plain frozen data (`measurements.py` reads it). Standard library only.

Ratios are of seconds unless they are called a speed; intervals are 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STOCK = "stock"
TUNED = ("tuned", "tuned_compiled")


@dataclass(frozen=True, slots=True)
class Certified:
    """How equal a lane was shown to be: `parity`, `outputs`, or `none` and why. `flop_ratio`: another model's arithmetic over ours."""

    kind: str
    reason: str = ""
    flop_ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """One row of a benchmark. Seconds a batch: `median` is that of turns; `p90`, `p95`, `p99` (None of too few) and `slowest` are of all
    `n` steps. `failure` says why there is nothing, `unavailable` that there is no such lane."""

    framework: str
    model: str
    lane: str
    mode: str
    batch_size: int
    certificate: Certified
    options: dict[str, Any] = field(default_factory=dict)
    median: float | None = None
    interval: tuple[float, ...] | None = None
    n: int = 0
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    slowest: float | None = None
    images_per_second: float | None = None
    build_seconds: float | None = None
    first_call_seconds: float | None = None
    compile_seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_share: float | None = None
    failure: str | None = None
    unavailable: bool = False

    @property
    def contestant(self) -> str:
        """Its name in the pairs of its group, `jax/tuned`."""
        return f"{self.framework}/{self.lane}"

    @property
    def subject(self) -> str:
        """The model with its options."""
        return self.model + "".join(f", {name}={value}" for name, value in self.options.items())


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds of `a` over those of `b` in the same rounds; `winner` is one of the two, or None when the data does not name any."""

    model: str
    mode: str
    batch_size: int
    a: str
    b: str
    ratio: float
    interval: tuple[float, ...]
    winner: str | None = None


@dataclass(frozen=True, slots=True)
class Turns:
    """What a group of rows that took turns can show: the smallest relative difference, and how many of its rounds were noisy."""

    model: str
    mode: str
    batch_size: int
    rounds: int
    noisy_rounds: int
    smallest_difference: float | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """One record of `triptych bench`; `file` is its path below the records, `hardware` what it was measured on, `marked_for` what its
    noisy rounds are marked for (`bench.machine.reasons`)."""

    name: str
    command: str
    file: str
    rows: tuple[Timed, ...]
    pairs: tuple[Pair, ...] = ()
    groups: tuple[Turns, ...] = ()
    import_seconds: dict[str, float] = field(default_factory=dict)
    hardware: str = ""
    compile_cache: str = "cold"
    marked_for: tuple[str, ...] = ()

    def speed(self, ours: Timed, other: str) -> tuple[float, tuple[float, float]] | None:
        """How many times as fast `ours` is as another contestant of its group, and the interval; None unless both took turns."""
        for pair in self.pairs:
            if (pair.model, pair.mode, pair.batch_size) != (ours.model, ours.mode, ours.batch_size):
                continue
            low, high = pair.interval
            if (pair.a, pair.b) == (other, ours.contestant):
                return pair.ratio, (low, high)
            if (pair.a, pair.b) == (ours.contestant, other):
                return 1 / pair.ratio, (1 / high, 1 / low)
        return None

    def winner(self, one: Timed, other: Timed) -> str | None:
        """Which of two contestants of a group takes less time; None when the data does not say."""
        names = {one.contestant, other.contestant}
        group = (one.model, one.mode, one.batch_size)
        found = (pair for pair in self.pairs if {pair.a, pair.b} == names and (pair.model, pair.mode, pair.batch_size) == group)
        return next((pair.winner for pair in found), None)

    def together(self) -> list[list[Timed]]:
        """The rows by group: one model, mode and batch size."""
        groups: dict[tuple[str, str, int], list[Timed]] = {}
        for row in self.rows:
            groups.setdefault((row.subject, row.mode, row.batch_size), []).append(row)
        return list(groups.values())


@dataclass(frozen=True, slots=True)
class Operator:
    """What takes a large share of a profiled step, by the name that the framework's profiler gives it."""

    operation: str
    share: float


@dataclass(frozen=True, slots=True)
class Profiled:
    """One profiled step. `categories`: seconds by kind of work; `unattributed_share`: in no operator; `mixed_share`: in operators fused
    of several kinds; `overhead`: how much longer a traced step takes than an untraced one."""

    framework: str
    model: str
    mode: str
    lane: str
    batch_size: int
    step_seconds: float
    categories: dict[str, float]
    unattributed_share: float
    mixed_share: float
    overhead: float | None = None
    top: tuple[Operator, ...] = ()

    @property
    def told_apart(self) -> float:
        """Share of the step in operators of one known kind."""
        return 1.0 - self.unattributed_share - self.mixed_share


@dataclass(frozen=True, slots=True)
class ShapeError:
    """What the error of one planted wrong shape tells (`benchmarks/shape_bug.py`). `stage`: building or calling; None: no error came."""

    framework: str
    mode: str
    bug: str
    layer: str
    stage: str | None
    exception: str | None = None
    message: str = ""
    names_layer: bool = False
    names_both_sizes: bool = False
    shows_call: bool = False
    model_line: str | None = None
    traceback_lines: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What a batch takes an artefact; `times_the_fastest`: of the fastest one in float32, by pairs of the same round."""

    median_seconds: float
    interval: tuple[float, ...]
    images_per_second: float
    times_the_fastest: float
    times_the_fastest_interval: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """One artefact in its own runtime. `worst_error`: scale-relative, over all images; `serve_images`: what its program of image files was
    shown to give, where it has one; `latency` by batch size, which JSON writes as text."""

    source: str
    format: str
    runtime: str
    model: str
    passed: bool
    worst_error: float | None = None
    bytes: int | None = None
    load_seconds: float | None = None
    failure: str | None = None
    unavailable: str | None = None
    serve_images: dict[str, Any] | None = None
    latency: dict[str, Call] = field(default_factory=dict)

    @property
    def artefact(self) -> str:
        """The name of its directory, `pytorch-onnx`."""
        return f"{self.source}-{self.format}"


@dataclass(frozen=True, slots=True)
class Performance:
    """All of it; a part may be absent. `passes` and `vmaps` are pairs of lanes of the transformer comparison (docs/transformer.md)."""

    suites: tuple[Suite, ...] = ()
    profiles: tuple[Profiled, ...] = ()
    shape_errors: tuple[ShapeError, ...] = ()
    passes: tuple[Pair, ...] = ()
    vmaps: tuple[Pair, ...] = ()
    exports: tuple[Exported, ...] = ()
    bugs: dict[str, str] = field(default_factory=dict)
    hardware: dict[str, str] = field(default_factory=dict)
