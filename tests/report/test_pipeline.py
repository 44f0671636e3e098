"""The pipeline reuses what still holds, makes anew what does not, and keeps run directories small; no framework runs here."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from triptych import cli
from triptych.cli.train import train_command
from triptych.core import environment
from triptych.core.errors import StorageError, UsageError
from triptych.report import figures, pipeline
from triptych.report.pipeline import FULL, SHORT, Pipeline
from triptych.training.job import Job

FRAMEWORKS = ("pytorch", "jax")


class Maker:
    """Makes a step's result and counts how often."""

    def __init__(self, result: dict[str, Any] | None = None) -> None:
        self.result = {"answer": 42} if result is None else result
        self.directories: list[Path] = []

    def __call__(self, directory: Path) -> dict[str, Any]:
        assert list(directory.iterdir()) == [], "a step starts in an empty directory"
        self.directories.append(directory)
        (directory / "log").write_text("made")
        return self.result


@pytest.fixture
def work(tmp_path) -> Pipeline:
    return Pipeline(tmp_path / "runs")


def losses(framework: str, values: list[float]) -> dict[str, Any]:
    """A training result as the loop writes it."""
    return {
        "framework": framework, "losses": values, "correct": 880, "test_images": 898, "seconds": 1.5, "train_images": 899,
    }  # fmt: skip


# --- Steps -------------------------------------------------------------------------------------------------------------------


def test_a_complete_step_is_reused_and_says_so(work):
    said: list[str] = []
    work.progress = said.append
    make = Maker({"pair": ("a", "b"), "none": None})
    first = work.step("parity", "triptych parity x", ["x"], make)
    second = work.step("parity", "triptych parity x", ["x"], make)
    assert first == second == {"pair": ["a", "b"], "none": None}
    assert len(make.directories) == 1
    assert [(step.name, step.reused, step.command) for step in work.steps] == [
        ("parity", False, "triptych parity x"),
        ("parity", True, "triptych parity x"),
    ]
    assert work.steps[0].seconds >= 0.0
    assert said == ["parity: triptych parity x", "parity: reused"]


def test_fresh_reuses_nothing_and_leaves_nothing_of_before(work):
    make = Maker()
    work.step("parity", "c", ["x"], make)
    work.fresh = True
    work.step("parity", "c", ["x"], make)
    assert make.directories == [make.directories[0]] * 2
    assert [step.reused for step in work.steps] == [False, False]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_step_is_made_anew(work, interruption):
    def interrupted(directory: Path) -> dict[str, Any]:
        (directory / "half").write_text("half")
        raise interruption

    with pytest.raises(interruption):
        work.step("training", "c", ["x"], interrupted)
    assert work.steps == []
    make = Maker()
    assert work.step("training", "c", ["x"], make) == {"answer": 42}
    assert sorted(path.name for path in make.directories[0].iterdir()) == ["log", "step.json"]


def test_a_result_that_is_not_json_is_no_finished_step(work):
    with pytest.raises(ValueError, match="JSON"):
        work.step("training", "c", ["x"], Maker({"loss": float("nan")}))
    assert work.step("training", "c", ["x"], Maker()) == {"answer": 42}
    assert [step.reused for step in work.steps] == [False]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("code_hash", lambda *parts: "other"),
        ("versions", lambda: {"torch": "0.0"}),
        ("cpu", lambda: {"model": "another"}),
        ("variables", lambda: {"XLA_FLAGS": "--xla_cpu_use_onednn=true"}),
    ],
)
def test_what_produced_a_run_decides_whether_it_is_reused(work, monkeypatch, name, changed):
    make = Maker()
    work.step("parity", "c", ["x"], make)
    monkeypatch.setattr(environment, name, changed)
    work.step("parity", "c", ["x"], make)
    monkeypatch.undo()
    work.step("parity", "c", ["x"], make)
    assert [step.reused for step in work.steps] == [False, False, True]
    assert len(set(make.directories)) == 2


def test_what_is_computed_decides_too_and_the_report_itself_does_not(work, monkeypatch):
    make = Maker()
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment, "code_hash", lambda *parts: asked.append(parts) or "same")
    for what in (["x", 1], ["x", 2], ["x", 1]):
        work.step("parity", "c", what, make)
    assert [step.reused for step in work.steps] == [False, False, True]
    assert not {"report", "cli"} & set(asked[0])
    assert {"core", "parity", "training", "in_pytorch", "in_tensorflow", "in_jax"} <= set(asked[0])


def test_variables_that_change_results_are_seen(monkeypatch):
    before = pipeline._digest(["x"])
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    assert pipeline._digest(["x"]) != before
    monkeypatch.undo()
    monkeypatch.setenv("TRIPTYCH_UNRELATED", "1")
    assert pipeline._digest(["x"]) == before


def test_a_finished_step_keeps_results_and_drops_the_bulk(work):
    kept = (
        "certificate.json", "float64/comparison.json", "float64/jax.log", "float64/first_divergence.safetensors",
        "jax/checkpoint/model.safetensors",
    )  # fmt: skip
    dropped = (
        "float64/inputs.safetensors", "float64/weights.safetensors", "float64/jax_cache/a/b",
        "float64/trajectory/sgd-000.safetensors", "one-ulp/jax/sketches.safetensors",
    )  # fmt: skip

    def make(directory: Path) -> dict[str, Any]:
        for name in kept + dropped:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(b"x")
        return {}

    work.step("parity", "c", ["x"], make)
    (directory,) = work.runs.iterdir()
    left = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    assert left == {*kept, "step.json"}
    assert not (directory / "float64/jax_cache").exists()


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="--runs"):
        Pipeline(tmp_path / "file").step("parity", "c", ["x"], Maker())


# --- Trainings ---------------------------------------------------------------------------------------------------------------


def test_differences_are_absolute_step_by_step_and_of_runs_of_one_length():
    assert pipeline._difference([1.0, 2.0, 0.5], [1.5, 2.0, 0.25]) == (0.5, 0.0, 0.25)
    with pytest.raises(ValueError, match="shorter"):
        pipeline._difference([1.0, 2.0], [1.0])


def test_weights_apart_are_the_worst_tensor_of_each_step_for_each_pair(tmp_path):
    ones = np.ones(4)
    sketches = {
        "a": {"0/w": ones, "0/b": ones, "1/w": ones, "10/w": ones},
        "b": {"0/w": ones, "0/b": 0.5 * ones, "1/w": 0.75 * ones, "10/w": ones},
        "a-one-ulp": {"0/w": ones, "0/b": ones, "1/w": np.full(4, np.nan), "10/w": 0.9 * ones},
    }
    runs = {name: tmp_path / name for name in sketches}
    for name, tensors in sketches.items():
        runs[name].mkdir()
        save_file(tensors, runs[name] / "sketches.safetensors")
    apart = pipeline._apart(runs)
    assert list(apart) == ["a / b", "a / a-one-ulp", "b / a-one-ulp"]
    assert apart["a / b"] == [0.5, 0.25, 0.0]
    assert apart["a / a-one-ulp"] == pytest.approx([0.0, 2.0, 0.1])


def test_evidence_of_a_training_holds_differences_and_yardstick():
    made = {
        "runs": {
            "pytorch": losses("pytorch", [2.0, 1.0]),
            "jax": losses("jax", [2.0, 1.5]),
            "pytorch-one-ulp": losses("pytorch", [2.0, 1.25]),
        },
        "apart": {"pytorch / jax": [0.0, 1e-3], "pytorch / pytorch-one-ulp": [1e-16, 1e-4], "jax / pytorch-one-ulp": [1.0, 1.0]},
    }
    training = pipeline._as_evidence(pipeline._job(SHORT), made, FRAMEWORKS, 1)
    assert [run.framework for run in training.runs] == list(FRAMEWORKS)
    assert training.runs[1].accuracy == 880 / 898
    assert training.loss_difference == {"pytorch / jax": (0.0, 0.5)}
    assert training.loss_self == (0.0, 0.25)
    assert training.weight_difference == {"pytorch / jax": (0.0, 1e-3)}
    assert training.weight_self == (1e-16, 1e-4)
    assert (training.precision, training.recipe["global_batch_size"]) == ("float64", 64)


def test_evidence_of_a_training_without_yardstick():
    made = {"runs": {"pytorch": losses("pytorch", [2.0]), "jax": losses("jax", [1.5])}, "apart": {}}
    training = pipeline._as_evidence(pipeline._job(FULL), made, FRAMEWORKS, 1)
    assert training.loss_difference == {"pytorch / jax": (0.5,)}
    assert (training.loss_self, training.weight_difference, training.weight_self) == ((), {}, ())


def test_every_framework_is_trained_with_every_seed_and_judged_by_the_mean():
    wanted = pipeline._wanted(pipeline._job(FULL), 2, FRAMEWORKS)
    assert {name: (job.recipe.seed, job.perturbation, framework) for name, (job, framework) in wanted.items()} == {
        "pytorch": (0, None, "pytorch"), "jax": (0, None, "jax"), "pytorch-seed-1": (1, None, "pytorch"),
        "jax-seed-1": (1, None, "jax"), "pytorch-one-ulp": (0, 0, "pytorch"),
    }  # fmt: skip
    results = {name: {**losses(framework, [2.0, job.recipe.seed]), "correct": 880 + n}
               for n, (name, (job, framework)) in enumerate(wanted.items())}  # fmt: skip
    training = pipeline._as_evidence(pipeline._job(FULL), {"runs": results, "apart": {}}, FRAMEWORKS, 2)
    assert [(run.framework, run.correct, run.losses) for run in training.runs] == [
        ("pytorch", (880, 882), (2.0, 0.0)), ("jax", (881, 883), (2.0, 0.0)),
    ]  # fmt: skip
    assert training.runs[1].accuracy == pytest.approx(882 / 898)


@pytest.mark.parametrize("settings", [FULL, SHORT])
def test_a_job_is_the_standard_recipe_on_the_digits(settings):
    job = pipeline._job(settings)
    assert (job.model, job.data, job.device, job.perturbation) == ("resnet20", "digits", "cpu", None)
    assert job.steps == settings.epochs * (len(job.source("train")) // settings.batch_size)
    assert job.keep_sketches is settings.compare_weights


@pytest.mark.parametrize("settings", [FULL, SHORT])
def test_the_command_beside_a_training_trains_the_same(settings):
    once = settings.command
    if settings.seeds > 1:
        loop, once = once.removesuffix("; done").split("; do ")
        assert loop == "for seed in " + " ".join(map(str, range(settings.seeds)))
        assert "--seed $seed " in once
    program, command, *arguments = shlex.split(once.replace("$seed", "0"))
    assert (program, command) == ("triptych", "train")
    given = train_command.make_context("train", arguments).params
    job = pipeline._job(settings)
    assert (given["recipe"], given["data"], given["framework"]) == (job.model, job.data, "all")
    assert (given["epochs"], given["batch_size"]) == (settings.epochs, job.recipe.global_batch_size)
    assert (given["learning_rate"], given["precision"]) == (job.recipe.schedule.peak, job.precision)
    assert (given["label_smoothing"], given["ema"]) == (job.recipe.label_smoothing, job.recipe.ema_decay)
    assert given["pad_crop"] == job.transforms.pad_crop
    assert (given["weight_decay"], given["seed"] or 0) == (job.recipe.optimizer.weight_decay, job.recipe.seed)


# --- All of it ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch) -> list[tuple[str, int | None, Path]]:
    """Proofs, plantings and trainings without a framework; yields (framework, perturbation, run directory) of each training."""
    seen: list[tuple[str, int | None, Path]] = []

    def run_worker(job: Job, framework: str, run: Path, progress: Any) -> dict[str, Any]:
        seen.append((framework, job.perturbation, run))
        directory = run / framework
        directory.mkdir(parents=True)
        off = 0.0 if job.perturbation is None else 1e-9
        result = losses(framework, [2.0, 1.0 + off])
        (directory / "result.json").write_text(json.dumps(result))
        if job.keep_sketches:
            save_file({"0/w": np.ones(2), "1/w": np.array([1.0, 1.0 - off])}, directory / "sketches.safetensors")
        return result

    proof = {"verdict": "pass", "model": "resnet50", "spec_sha256": "a", "weights_sha256": "b", "rungs": []}
    monkeypatch.setattr(pipeline.workers, "available", lambda: list(FRAMEWORKS))
    monkeypatch.setattr(pipeline.certify, "certify", lambda *given: proof)
    monkeypatch.setattr(pipeline.planting, "plant_all", lambda spec, *given: {"model": spec.name, "clean": "pass", "faults": []})
    monkeypatch.setattr(pipeline, "run_worker", run_worker)
    return seen


def test_evidence_is_gathered_once_and_then_reused(work, trained):
    first = pipeline.evidence(work)
    plain = FULL.seeds + SHORT.seeds
    assert Counter((name, moved) for name, moved, _ in trained) == {("pytorch", None): plain, ("jax", None): plain, ("pytorch", 0): 2}
    assert len({run / name for name, _, run in trained}) == len(trained)
    assert first.certificates[0].model == "resnet50"
    assert [table.clean for table in first.faults] == ["pass"]
    assert first.short_training.loss_self == pytest.approx((0.0, 1e-9))
    assert first.short_training.weight_self == pytest.approx((0.0, 1e-9))
    assert first.short_training.weight_difference == {"pytorch / jax": (0.0, 0.0)}
    assert first.training.loss_self == pytest.approx((0.0, 1e-9))
    assert first.training.weight_difference == {}
    assert {"report", "parity", "faults", "training", "short_training"} <= set(first.commands)
    again = Pipeline(work.runs)
    second = pipeline.evidence(again)
    assert len(trained) == 2 * plain + 2
    assert [step.reused for step in work.steps] == [False] * 4
    assert [step.reused for step in again.steps] == [True] * 4
    assert dataclasses.replace(second, steps=first.steps, created=first.created, environment=first.environment) == first


def test_one_framework_has_nothing_to_be_compared_with(work, monkeypatch):
    monkeypatch.setattr(pipeline.workers, "available", lambda: ["jax"])
    with pytest.raises(UsageError, match="installed: jax"):
        pipeline.evidence(work)


def report(monkeypatch, found, tmp_path: Path, *arguments: str) -> int:
    """`triptych report` on evidence that is already there; its exit code."""

    def evidence(work: Pipeline) -> Any:
        work.steps += found.steps
        return found

    monkeypatch.setattr(pipeline, "evidence", evidence)
    monkeypatch.setattr(figures, "png", lambda draw: b"")
    monkeypatch.setattr(figures, "svg", lambda draw, canvas, prefix: "<svg></svg>")
    with pytest.raises(SystemExit) as caught:
        cli.main(["report", "--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), *arguments])
    return int(caught.value.code or 0)


def test_the_command_prints_verdict_claims_and_steps_as_json(evidence, monkeypatch, tmp_path, capsys):
    assert report(monkeypatch, evidence, tmp_path, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["verdict"] == "PASS"
    assert all(claim["holds"] is True and claim["measured"] and claim["asked"] for claim in printed["claims"])
    assert printed["steps"] == [
        {"name": "parity of resnet50", "reused": False, "seconds": 402.5},
        {"name": "training of resnet20", "reused": True, "seconds": None},
    ]
    assert Path(printed["out"], "report.html").is_file()


def test_the_command_says_what_was_reused_and_where_the_report_is(evidence, monkeypatch, tmp_path, capsys):
    assert report(monkeypatch, evidence, tmp_path) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "parity of resnet50: 402 s" in said.out
    assert "training of resnet20: reused" in said.out
    assert str(tmp_path / "out" / "report.md") in said.out


def test_a_claim_that_does_not_hold_is_exit_code_4_and_the_report_is_written(evidence, monkeypatch, tmp_path, capsys):
    wrong = dataclasses.replace(evidence, faults=(dataclasses.replace(evidence.faults[0], clean="fail"),))
    assert report(monkeypatch, wrong, tmp_path, "--json") == 4
    said = capsys.readouterr()
    printed = json.loads(said.out)
    assert printed["verdict"] == "FAIL"
    assert False in [claim["holds"] for claim in printed["claims"]]
    assert "does not hold" in said.err
    assert "Traceback" not in said.err
    assert "FAIL" in (tmp_path / "out" / "report.md").read_text()


def test_tasks_side_by_side_have_cores_of_their_own_and_all_are_done():
    seen: list[tuple[int, frozenset[int]]] = []
    before = os.sched_getaffinity(0)

    def task(number: int) -> None:
        time.sleep(0.05)
        seen.append((number, frozenset(os.sched_getaffinity(0))))

    pipeline._side_by_side([partial(task, number) for number in range(5)])
    assert sorted(number for number, _ in seen) == list(range(5))
    lanes = {cores for _, cores in seen}
    assert sum(map(len, lanes)) == len(frozenset.union(*lanes)) <= len(before)
    assert os.sched_getaffinity(0) == before
    with pytest.raises(ZeroDivisionError):
        pipeline._side_by_side([lambda: None, lambda: 1 // 0])


def test_after_a_failure_the_step_beside_it_ends_and_the_rest_is_dropped():
    begun, failed = [], threading.Event()

    def slow() -> None:
        begun.append("slow")
        failed.wait(10)
        time.sleep(0.2)
        begun.append("slow ended")

    def fails() -> None:
        failed.set()
        raise StorageError("disk full")

    with pytest.raises(StorageError, match="disk full"):
        pipeline._two_at_a_time(slow, fails, *[lambda: time.sleep(0.5)] * 3, lambda: begun.append("last"))
    assert begun == ["slow", "slow ended"]


def test_steps_give_their_results_in_order():
    assert pipeline._two_at_a_time(lambda: time.sleep(0.1), lambda: 1, lambda: 2) == [None, 1, 2]
