"""A run that is stopped, killed or moved to another framework goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from triptych.core import checkpoint, contract
from triptych.core.contract import TrainingState
from triptych.core.errors import InputRefused, Interrupted, StorageError
from triptych.core.preprocess import Transforms
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling, Recipe, Schedule
from triptych.training import checkpoints, loop
from triptych.training.checkpoints import Checkpoints, newest, written
from triptych.training.job import Intervals, Job, Limits
from triptych.training.loop import train
from triptych.training.records import read_metrics

FRAMEWORKS = contract.installed()
# Everything that has a state of its own: momentum, average, loss scale, micro-batches, mixed images, a moving rate.
RECIPE = Recipe(
    SGD(), Schedule(0.05, 2, 8), 48, label_smoothing=0.1, ema_decay=0.9, micro_batch_size=20, clip=Clip(norm=1.0),
    loss_scaling=LossScaling(initial=64.0, interval=3),
)  # fmt: skip
TRANSFORMS = Transforms(pad_crop=4, flip=0.5, mixup=0.2)
JOB = Job(
    "mlp", "digits", RECIPE, 8, "float64", options={"hidden": (16,)}, transforms=TRANSFORMS, intervals=Intervals(checkpoint=2, keep_last=9)
)


def stopped_after(job: Job, steps: int) -> Job:
    """The same run, cut short."""
    return dataclasses.replace(job, limits=Limits(max_steps=steps))


def weights(out: Path) -> dict[str, np.ndarray]:
    """The trained model of a run."""
    return load_file(out / "checkpoint" / "model.safetensors")


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Equal in every bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.tobytes() == other[name].tobytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The uninterrupted run in every framework."""
    folder = tmp_path_factory.mktemp("whole")
    for name in FRAMEWORKS:
        train(JOB, name, folder / name)
    return {name: folder / name for name in FRAMEWORKS}


def test_a_resumed_run_counts_the_time_of_the_steps_it_did_not_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(stopped_after(JOB, 4), FRAMEWORKS[0], tmp_path)
    saved = newest(tmp_path)
    assert saved is not None
    assert saved.notes["seconds"] > 0
    assert saved.notes["cpu_seconds"] > 0
    long_ago = dataclasses.replace(saved, notes={**saved.notes, "seconds": 5000.0, "cpu_seconds": 9000.0})
    monkeypatch.setattr(loop, "newest", lambda out: long_ago)
    result = train(JOB, FRAMEWORKS[0], tmp_path, resume="auto")
    assert 5000 < result["seconds"] < 6000
    assert 9000 < result["cpu_seconds"] < 10000


@pytest.mark.parametrize("optimizer", [SGD(), AdamW()], ids=["sgd", "adamw"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_resumed_run_ends_in_the_same_bits(framework: str, optimizer: Any, tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, recipe=dataclasses.replace(RECIPE, optimizer=optimizer))
    uninterrupted = train(job, framework, tmp_path / "whole")
    train(stopped_after(job, 5), framework, tmp_path / "run")
    again = train(job, framework, tmp_path / "run", resume="auto")
    assert again["losses"] == uninterrupted["losses"]
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    rows = [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rows == list(range(8))


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FRAMEWORKS, 2)))
def test_another_framework_goes_on_from_the_very_state(first: str, second: str, tmp_path: Path, whole: dict[str, Path]) -> None:
    job = dataclasses.replace(JOB, recipe=dataclasses.replace(RECIPE, ema_decay=None))
    train(stopped_after(job, 4), first, tmp_path)
    found = newest(tmp_path)
    assert found is not None
    assert (found.next_step, found.state.step, found.state.loss_scale, found.state.good_steps) == (4, 4, 128.0, 1)
    room = contract.load(second)
    spec = job.spec(job.source("train"))
    trainer = room.create_trainer(room.create_model(spec, dict(found.state.weights), precision="float64", device="cpu"), job.recipe)
    trainer.load_state(found.state)
    assert_state(trainer.state(), found.state)
    alone = train(job, first, tmp_path / "alone")
    with pytest.warns(UserWarning, match=f"the run was in {first}, it goes on in {second}"):
        moved = train(job, second, tmp_path, resume="auto")
    assert moved["losses"][:4] == alone["losses"][:4]
    assert abs(moved["losses"][4] - alone["losses"][4]) <= 1e-10
    np.testing.assert_allclose(moved["losses"], alone["losses"], rtol=1e-6)


def assert_state(one: TrainingState, other: TrainingState) -> None:
    """Two training states are equal in every bit."""
    assert (one.step, one.loss_scale, one.good_steps) == (other.step, other.loss_scale, other.good_steps)
    assert_same(dict(one.weights), dict(other.weights))
    assert_same(dict(one.ema), dict(other.ema))
    for slot in other.slots:
        assert_same(dict(one.slots[slot]), dict(other.slots[slot]))


def start(run: Path, framework: str, job: Job, resume: str, **environment: str) -> subprocess.Popen[bytes]:
    """A worker process."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "job.json").write_text(json.dumps(job.to_json()))
    command = [sys.executable, "-m", "triptych.training.worker", str(run), framework, resume]
    with (run / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "KERAS_BACKEND": "tensorflow", **environment})


def wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    """Until `condition()` or the end of the process."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_killed_at_any_moment_it_ends_in_the_same_bits(framework: str, tmp_path: Path, whole: dict[str, Path]) -> None:
    """SIGKILL twice: after a checkpoint, and while one is being written."""
    run, out = tmp_path / "run", tmp_path / "run" / framework
    process = start(run, framework, JOB, "auto")
    wait_for(lambda: len(written(out)) >= 1, process)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    process = start(run, framework, JOB, "auto")
    wait_for(lambda: any((out / "steps").glob(".*.partial")), process)
    process.kill()
    assert process.wait() in (-signal.SIGKILL, 0)
    assert start(run, framework, JOB, "auto").wait() == 0, (run / "log").read_text()
    assert_same(weights(out), weights(whole[framework]))


def test_asked_to_stop_it_finishes_the_step_and_saves(tmp_path: Path) -> None:
    seen: list[int] = []
    job = dataclasses.replace(JOB, intervals=Intervals())
    with pytest.raises(Interrupted, match="stopped after step 3 of 8; the state is saved") as stopped:
        train(job, FRAMEWORKS[0], tmp_path, lambda told: seen.append(told["step"]), stopping=lambda: len(seen) == 3)
    assert stopped.value.exit_code == 9
    found = newest(tmp_path)
    assert found is not None
    assert found.next_step == 3


def test_a_worker_that_is_terminated_exits_with_nine(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, steps=100_000)
    process = start(tmp_path, FRAMEWORKS[0], job, "never")
    wait_for(lambda: len(written(tmp_path / FRAMEWORKS[0])) >= 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 9
    told = json.loads((tmp_path / FRAMEWORKS[0] / "error.json").read_text())
    assert told["kind"] == "Interrupted"


def test_the_command_exits_with_nine_and_goes_on(tmp_path: Path) -> None:
    """SIGTERM to `triptych train`, which hands it on to its worker."""
    command = [sys.executable, "-m", "triptych.cli", "train", "mlp", "--framework", FRAMEWORKS[0], "--out", str(tmp_path / "run")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--epochs", "5000", "--checkpoint-every", "5"], stdout=log, stderr=log)
    wait_for(lambda: len(written(tmp_path / "run" / FRAMEWORKS[0])) >= 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 9
    assert b"the state is saved. Go on with --resume auto" in (tmp_path / "log").read_bytes()
    found = newest(tmp_path / "run" / FRAMEWORKS[0])
    assert found is not None


def test_an_older_checkpoint_named_by_its_path_abandons_the_later_ones(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, intervals=Intervals(checkpoint=2, keep_last=2))
    train(job, FRAMEWORKS[0], tmp_path)
    assert written(tmp_path) == ["000006", "000008"]
    train(stopped_after(job, 7), FRAMEWORKS[0], tmp_path, resume=str(tmp_path / "steps" / "000006"))
    assert written(tmp_path) == ["000006"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(7))


def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path: Path, whole: dict[str, Path]) -> None:
    framework = FRAMEWORKS[0]
    shutil.copytree(whole[framework], tmp_path / "run")
    steps = tmp_path / "run" / "steps"
    assert written(tmp_path / "run") == ["000002", "000004", "000006", "000008"]
    for name, file in (("000008", "optimizer.safetensors"), ("000006", "manifest.json")):
        data = bytearray((steps / name / file).read_bytes())
        data[len(data) // 2] ^= 1
        (steps / name / file).write_bytes(data)
    with pytest.warns(UserWarning, match="passed over") as warned:
        found = newest(tmp_path / "run")
    assert found is not None
    assert found.next_step == 4
    assert "optimizer.safetensors" in str(warned[0].message)
    with pytest.warns(UserWarning, match="passed over"):
        train(JOB, framework, tmp_path / "run", resume="auto")
    assert_same(weights(tmp_path / "run"), weights(whole[framework]))


def test_only_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, intervals=Intervals(checkpoint=1, evaluate=1, keep_last=2, keep_best=1))
    result = train(job, FRAMEWORKS[0], tmp_path)
    accuracies = [row["accuracy"] for row in result["evaluations"]]
    assert len(accuracies) == 8
    kept = written(tmp_path)
    assert kept[-2:] == ["000007", "000008"]
    best = int(kept[0]) if len(kept) == 3 else max(int(name) for name in kept)
    assert accuracies[best - 1] == max(accuracies)
    assert (tmp_path / "latest").read_text() == "steps/000008\n"


def test_a_writer_that_fails_is_heard_and_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = stopped_after(JOB, 4)
    saved = checkpoint.save

    def full(directory: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(directory).name == "000004":
            raise StorageError("cannot write: no space is left on the device")
        return saved(directory, *args, **kwargs)

    monkeypatch.setattr(checkpoints.checkpoint, "save", full)
    with pytest.raises(StorageError, match="no space is left"):
        train(job, FRAMEWORKS[0], tmp_path)
    found = newest(tmp_path)
    assert found is not None
    assert found.next_step == 2


def test_a_vanished_directory_is_said(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(stopped_after(JOB, 2), FRAMEWORKS[0], out)
    found = newest(out)
    assert found is not None
    keeper = Checkpoints(out, list("0123456789"))
    shutil.rmtree(out)
    keeper.save(JOB.spec(JOB.source("train")), found.state, 4, {})
    with pytest.raises(StorageError, match="the run directory has vanished"):
        keeper.close()
    assert not out.exists()


def test_a_checkpoint_of_weights_alone_is_no_place_to_go_on_from(tmp_path: Path, whole: dict[str, Path]) -> None:
    path = whole[FRAMEWORKS[0]] / "checkpoint"
    with pytest.raises(InputRefused, match="holds weights only"):
        train(JOB, FRAMEWORKS[0], tmp_path, resume=str(path))
