"""What `triptych bench` runs: a suite in YAML, read, checked and unfolded into cases. pydantic only parses."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from triptych.bench.tracing import opened
from triptych.core import catalog, contract, workers, yaml_file
from triptych.core.architecture import ImageArchitecture
from triptych.core.contender import LANES, STOCK, WITH_DATA
from triptych.core.errors import InputRefused, UsageError
from triptych.core.spec import Spec
from triptych.export.runtimes import RUNTIMES, missing

Name = Literal["pytorch", "tensorflow", "jax", "onnxruntime", "openvino"]
FOLDER = "suites"
EXPORTER = "pytorch"
"""The framework whose model is exported for the runtimes."""


class Subject(BaseModel):
    """A catalogued model with its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    def spec(self) -> Spec:
        """The spec. UsageError for an unknown name or option, and for dropout, which every framework draws from a stream of its own."""
        spec = catalog.get_spec(self.name, **self.options)
        if getattr(spec, "dropout", 0.0):
            raise UsageError(f"{self.name}: dropout={self.options['dropout']} cannot be timed with its outputs checked; leave it 0")
        return spec


class Suite(BaseModel):
    """Every combination of the lists is a case. `steps` are timed in each turn, each with images of its own, after `warm_up` that are not:
    the first after another process had the machine finds nothing of its own in caches and memory. Outputs are checked in every
    `check_every`-th round; `threads` (None: the cores there are) is the same for everybody; a case gets `limit_seconds` for its first call.

    `compile_cache`: `cold` compiles everything anew; `warm` takes what a process before compiled and left on disk. `data` are the training
    images of `training_step_with_data`: what `triptych.data.open_source` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    models: tuple[Subject, ...] = Field(min_length=1)
    frameworks: tuple[Name, ...] = Field(default=("pytorch", "tensorflow", "jax"), min_length=1)
    lanes: tuple[Literal["default", "tuned", "compiled", "tuned_compiled", "stock"], ...] = Field(default=("default",), min_length=1)
    modes: tuple[Literal["inference", "training_step", "training_step_with_data"], ...] = Field(
        default=("inference", "training_step"), min_length=1
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    rounds: int = Field(default=30, ge=2)
    steps: int = Field(default=1, ge=1)
    warm_up: int = Field(default=1, ge=0)
    check_every: int = Field(default=5, ge=1)
    threads: int | None = Field(default=None, ge=1)
    compile_cache: Literal["cold", "warm"] = "cold"
    data: str = "digits"
    limit_seconds: float = Field(default=600.0, gt=0)
    seed: int = Field(default=0, ge=0)

    @field_validator("models", "frameworks", "lanes", "modes", "batch_sizes")
    @classmethod
    def _once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [value.name if isinstance(value, Subject) else value for value in values]
        if len(set(names)) < len(names):
            raise ValueError("each may stand in the list once")
        return values

    def groups(self) -> list[list[Case]]:
        """The cases that take turns with each other: those of one model, mode and batch size."""
        return [
            [Case(framework, subject.name, dict(subject.options), lane, mode, size) for framework, lane in self._lanes(mode)]
            for subject in self.models
            for mode in self.modes
            for size in self.batch_sizes
        ]

    def _lanes(self, mode: str) -> list[tuple[str, str]]:
        """Our frameworks in every lane they have; JAX has no eager one to compile, and runtimes only infer."""
        pairs = [(framework, lane) for framework in self.frameworks if framework not in RUNTIMES for lane in self.lanes]
        ours: list[tuple[str, str]] = [pair for pair in pairs if pair[0] != "jax" or pair[1] == STOCK or not LANES[pair[1]].compile]
        return ours + [(framework, "default") for framework in self.frameworks if framework in RUNTIMES and mode == "inference"]


@dataclass(frozen=True, slots=True)
class Case:
    """One row: a framework's lane of a model, in one mode and batch size."""

    framework: str
    model: str
    options: dict[str, Any]
    lane: str
    mode: str
    batch_size: int

    @property
    def contestant(self) -> str:
        """Its name within its group, `jax/tuned`."""
        return f"{self.framework}/{self.lane}"

    @property
    def group(self) -> str:
        """`resnet50/inference/8`."""
        return f"{self.model}/{self.mode}/{self.batch_size}"

    @property
    def ours(self) -> bool:
        """Whether it is one of our lanes, which only run with a proof."""
        return self.framework not in RUNTIMES and self.lane != STOCK

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def unavailable(self) -> str | None:
        """Why it cannot run here, as far as that is known without importing anything; None when it may."""
        if self.framework in RUNTIMES:
            return missing(self.framework) or _no_process_of(EXPORTER)
        reason = _no_process_of(self.framework)
        if reason is not None:
            return reason
        if self.lane == STOCK and self.mode == WITH_DATA:
            return "what a user writes without us has an input pipeline of its own"
        spec = catalog.get_spec(self.model, **self.options)
        if self.mode == WITH_DATA and not isinstance(spec, ImageArchitecture):
            return f"input pipelines make images, and {self.model} takes {'; '.join(map(str, spec.inputs()))}"
        if self.ours and LANES[self.lane].tuned and not any(layer.op == "conv" for layer in spec.layers()):
            return f"what is tuned are convolutions, and {self.model} has none"
        return None


def _no_process_of(framework: str) -> str | None:
    """Why no process of the framework can be started, here or at a host; None when one can."""
    return None if framework in workers.available() else contract.missing(framework)


def names() -> list[str]:
    """The shipped suites."""
    return yaml_file.shipped(FOLDER)


def load(name: str, **changes: Any) -> Suite:
    """A shipped suite, or the file at a path; `changes` that are not None replace its values.

    Raises UsageError for an unknown name, model, option, data that do not fit or a wrong change, InputRefused for a file that is no suite.
    """
    data = yaml_file.mapping(yaml_file.read(name, "suite", FOLDER), name, "suite")
    suite = yaml_file.checked(Suite, data, InputRefused, name)
    given = {key: value for key, value in changes.items() if value is not None}
    suite = yaml_file.checked(Suite, {**suite.model_dump(mode="json"), **given}, UsageError, "options") if given else suite
    for subject in suite.models:
        spec = subject.spec()
        if WITH_DATA in suite.modes and isinstance(spec, ImageArchitecture):
            opened(suite.data, spec)
    return suite
