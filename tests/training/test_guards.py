"""What stops a run or is said about it: a loss that is no number, memory that grows or ends, an emulated precision."""

from __future__ import annotations

import dataclasses
import json
import mmap
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from triptych.core import contract, environment
from triptych.core.errors import TriptychError, UsageError
from triptych.core.preprocess import Transforms
from triptych.core.recipe import SGD, Recipe, Schedule
from triptych.training import guards
from triptych.training.guards import MemoryGuard, half_precision, is_out_of_memory, memory_advice, own_memory, peak_memory
from triptych.training.job import Intervals, Job, describe
from triptych.training.loop import train
from triptych.training.records import read_metrics

FRAMEWORKS = contract.installed()
# From step 4 on the rate is absurd: the weights are lost in that step, the loss of the next one is no number.
RECIPE = Recipe(SGD(), Schedule(0.05, 2, 8, kind="step", milestones=(4,), gamma=1e300), 48)
JOB = Job(
    "mlp", "digits", RECIPE, 8, "float64", "cpu", {"hidden": (16,)}, Transforms(pad_crop=4, flip=0.5), intervals=Intervals(checkpoint=3)
)
MIB = 2**20


# A loss that is no number


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_loss_that_is_no_number_stops_the_run_and_can_be_had_again(framework: str, tmp_path: Path) -> None:
    with pytest.raises(TriptychError, match=r"the loss of step 5 is (nan|inf); training cannot go on") as stopped:
        train(JOB, framework, tmp_path)
    saved = tmp_path / "nonfinite-000005"
    report = json.loads((saved / "report.json").read_text())
    assert str(report["samples"]) in str(stopped.value)
    assert report["command"] in str(stopped.value)
    assert (report["step"], report["replays_from_step"], report["framework"]) == (5, 3, framework)
    assert report["learning_rate"] == 0.05 * 1e300
    assert describe(saved).sha256() == JOB.sha256()
    assert_batch_of_the_pipeline(framework, saved)


def assert_batch_of_the_pipeline(framework: str, saved: Path) -> None:
    """The saved batch is the one that the pipeline makes of the plan."""
    from triptych.core.sampling import SamplingPlan

    source = JOB.source("train")
    spec = JOB.spec(source)
    plan = SamplingPlan(source.labels, 10, 48, 0, JOB.transforms, spec.image_size)
    batch = load_file(saved / "batch.safetensors")
    ((images, targets),) = contract.load(framework).batches(source, plan.batches(5, 6), spec.preprocessing, JOB.transforms)
    np.testing.assert_array_equal(batch["images"], images)
    np.testing.assert_array_equal(batch["targets"], targets)
    np.testing.assert_array_equal(batch["indices"], plan.batch(5).indices)


@pytest.mark.parametrize("checkpoints", [3, None], ids=["from a checkpoint", "from the start"])
def test_the_saved_command_replays_into_the_same_step(checkpoints: int | None, tmp_path: Path) -> None:
    with pytest.raises(TriptychError, match="training cannot go on"):
        train(dataclasses.replace(JOB, intervals=Intervals(checkpoint=checkpoints)), FRAMEWORKS[0], tmp_path / "run")
    saved = tmp_path / "run" / "nonfinite-000005"
    command = json.loads((saved / "report.json").read_text())["command"]
    _, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    again = saved / FRAMEWORKS[0] / "nonfinite-000005"
    assert str(again) in done.stderr
    assert (again / "batch.safetensors").read_bytes() == (saved / "batch.safetensors").read_bytes()
    first, second = (read_metrics(place / "metrics.jsonl") for place in (tmp_path / "run", saved / FRAMEWORKS[0]))
    assert [row["loss"] for row in second] == [row["loss"] for row in first][3 if checkpoints else 0 :]


def test_a_reproducer_that_cannot_be_saved_does_not_hide_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(guards, "write_whole", full)
    with pytest.raises(TriptychError, match=r"the loss of step 5 .* could not be saved: .*No space left"):
        train(JOB, FRAMEWORKS[0], tmp_path)


# Memory that grows


def told(readings: list[float]) -> list[tuple[int, str]]:
    """(step, what is said) for readings in MiB, one a step, after settling."""
    values = iter(readings)
    guard = MemoryGuard(0, lambda: int(next(values) * MIB))
    return [(step, text) for step in range(len(readings)) if (text := guard.after_step()) is not None]


def test_steady_growth_is_said_once() -> None:
    ((step, text),) = told([500 + 1.0 * step for step in range(1000)])
    assert step == 6 * 20 - 1
    assert "100 MiB in the last 100 steps, 1.00 MiB a step. A retained graph?" in text


def test_slow_growth_is_said_later() -> None:
    ((step, _),) = told([500 + 0.05 * step for step in range(4000)])
    assert 1000 < step < 3000


@pytest.mark.parametrize(
    "readings",
    [
        [500.0] * 2000,
        [500 + 400 * (1 - np.exp(-step / 60)) for step in range(2000)],
        [500 + 200 * (step > 300) + 300 * (step > 700) for step in range(2000)],
        [500 + 300 * (step % 50) / 50 for step in range(2000)],
        [500 + np.random.default_rng(0).normal(0, 100, 2000)[step] for step in range(2000)],
        [500 + 0.002 * step for step in range(20_000)],
    ],
    ids=["flat", "levels off", "jumps", "sawtooth", "noise", "fragmentation"],
)
def test_other_memory_is_not_growth(readings: list[float]) -> None:
    assert told(readings) == []


def test_nothing_is_said_while_it_settles() -> None:
    values = iter(range(0, 10**12, 10 * MIB))
    guard = MemoryGuard(1000, lambda: next(values))
    assert [guard.after_step() for _ in range(1000)] == [None] * 1000


def test_memory_is_read() -> None:
    before = own_memory()
    held = np.ones(64 * MIB // 8)
    assert own_memory() - before > 60 * MIB
    assert peak_memory() > held.nbytes


class Leaking:
    """A trainer that keeps a MiB of every step: pages of its own, as in a long process new arrays take what others gave back."""

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._kept = trainer, list[mmap.mmap]()

    def step(self, *args: Any) -> Any:
        """A step, and what stays of it."""
        self._kept.append(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._kept[-1].write(b"1" * MIB)
        return self._trainer.step(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


@pytest.mark.parametrize("leaks", [False, True], ids=["clean", "leaking"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_planted_leak_is_named_and_a_run_without_is_not(
    framework: str, leaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = contract.load(framework)
    create = room.create_trainer
    if leaks:
        monkeypatch.setattr(room, "create_trainer", lambda *args: Leaking(create(*args)))
    seen: list[dict[str, Any]] = []
    recipe = dataclasses.replace(RECIPE, schedule=Schedule(0.05, 0, 200))
    job = dataclasses.replace(JOB, recipe=recipe, steps=200, intervals=Intervals(evaluate=50, checkpoint=50))
    result = train(job, framework, tmp_path, seen.append)
    assert len(result["losses"]) == 200
    assert len(result["notes"]) == leaks
    assert all("A retained graph?" in note for note in result["notes"])
    assert [row["note"] for row in read_metrics(tmp_path / "metrics.jsonl") if "note" in row] == result["notes"]
    assert [each["note"] for each in seen if "note" in each] == result["notes"]


# Memory that ends


class ResourceExhaustedError(Exception):
    """As TensorFlow calls it."""


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls it."""


ENDS = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("float64")),
    ResourceExhaustedError("OOM when allocating tensor"),
    OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."),
]


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_the_end_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("memory layout"))


@pytest.mark.parametrize(
    ("batch", "micro", "advice"),
    [(128, None, "micro_batch_size=64 (now 128); the global batch stays 128"), (96, 32, "=16 (now 32)"), (45, None, "=15 (now 45)"),
     (128, 1, "recompute activations, --set remat=true")],
)  # fmt: skip
def test_smaller_parts_of_the_same_global_batch_are_suggested(batch: int, micro: int | None, advice: str) -> None:
    recipe = dataclasses.replace(RECIPE, global_batch_size=batch, micro_batch_size=micro)
    with pytest.raises(UsageError) as refused, memory_advice(recipe):
        raise MemoryError
    assert advice in str(refused.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="of the model"), memory_advice(RECIPE):
        raise ValueError("of the model")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_out_of_memory_gets_the_advice(framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = contract.load(framework)
    create = room.create_trainer

    def full(*args: Any) -> Any:
        trainer = create(*args)
        monkeypatch.setattr(trainer, "step", lambda *_: np.ones(2**55))
        return trainer

    monkeypatch.setattr(room, "create_trainer", full)
    with pytest.raises(UsageError, match=r"out of memory in a training step: .*--set micro_batch_size=24 \(now 48\)"):
        train(JOB, framework, tmp_path)


# Precision


def processor(monkeypatch: pytest.MonkeyPatch, **simd: bool) -> None:
    """A machine with these extensions."""
    monkeypatch.setattr(environment, "cpu", lambda: {"model": "An old processor", "affinity": 2, "simd": simd})


@pytest.mark.parametrize(("half", "name"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_an_emulated_precision_is_said(half: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(RECIPE, mixed_precision=half)
    processor(monkeypatch, **{name: False})
    assert f"An old processor has no native {half}" in str(half_precision(recipe, "cpu"))
    assert half_precision(recipe, "cuda") is None
    assert half_precision(RECIPE, "cpu") is None
    processor(monkeypatch, **{name: True})
    assert half_precision(recipe, "cpu") is None
    processor(monkeypatch)  # a system that does not tell
    assert half_precision(recipe, "cpu") is None


def test_it_is_said_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, bf16=False)
    seen: list[dict[str, Any]] = []
    recipe = dataclasses.replace(RECIPE, mixed_precision="bfloat16", schedule=Schedule(0.05, 0, 2))
    result = train(dataclasses.replace(JOB, precision="float32", recipe=recipe, steps=2), FRAMEWORKS[0], tmp_path, seen.append)
    assert ["note" in each for each in seen] == [True, False, False]
    assert result["notes"] == [seen[0]["note"]]
