"""A training run: plain data in, the same losses in every framework, a checkpoint that any of them loads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import triptych
from triptych.cli import main
from triptych.core import catalog, contract, initialize, recipe
from triptych.core.contract import Execution, Loader
from triptych.core.difference import sketch
from triptych.core.errors import StorageError, UsageError
from triptych.core.preprocess import ColorJitter, RandomErasing, RandomResizedCrop, Transforms
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling, Recipe, Schedule
from triptych.data import Source, open_source
from triptych.training.job import Intervals, Job, Limits, Watch, describe, standard_recipe
from triptych.training.loop import train
from triptych.training.records import Metrics
from triptych.training.worker import in_words, run_worker

FRAMEWORKS = contract.installed()
# label smoothing, warmup, an average and Nesterov: every term of the step counts.
RECIPE = Recipe(SGD(), Schedule(0.1, 2, 3), 48, label_smoothing=0.1, ema_decay=0.9)
JOB = Job("mlp", "digits", RECIPE, steps=3, precision="float64", options={"hidden": (16,)}, keep_sketches=True)


def colored(classes: int, size: int, channels: int, name: str = "folder") -> Source:
    """A set of decoded images, as a folder or an archive gives it."""
    pixels = np.arange(4 * size * size * channels, dtype=np.uint64).reshape(4, size, size, channels).astype(np.uint8)
    return Source(name, "train", tuple(map(str, range(classes))), np.arange(4) % classes, pixels, [str(i) for i in range(4)])


# The job


@pytest.mark.parametrize(
    "job",
    [
        JOB,
        Job("resnet20", "digits", Recipe(AdamW(), Schedule(1e-3, 0, 9, kind="constant"), 8, seed=4), 9, perturbation=2),
        Job(
            "resnet20",
            "digits",
            dataclasses.replace(RECIPE, clip=Clip(norm=1.0), loss_scaling=LossScaling(), frozen=("conv1",)),
            9,
            transforms=Transforms(RandomResizedCrop(), 0, 0.5, ColorJitter(0.1), RandomErasing(), 0.2, 1.0),
            progressive=((0, 16), (4, 32)),
            execution=Execution(tuned=True),
            loader=Loader(2),
            intervals=Intervals(evaluate=3),
            limits=Limits(limit_batches=2),
            watch=Watch(histograms=True, profile_steps=2),
        ),
    ],
)
def test_a_job_survives_json(job: Job, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps(job.to_json()))
    read = describe(tmp_path)
    assert read.to_json() == json.loads(json.dumps(job.to_json()))
    assert (read.recipe, read.sha256()) == (job.recipe, job.sha256())
    assert read.spec(open_source("digits", "train")) == job.spec(open_source("digits", "train"))


def test_the_hash_changes_with_every_field() -> None:
    changes: dict[str, Any] = {
        "model": "resnet20", "data": "elsewhere", "recipe": dataclasses.replace(RECIPE, seed=1), "steps": 4, "precision": "float32",
        "device": "cuda", "options": {}, "perturbation": 0, "keep_sketches": False, "transforms": Transforms(flip=0.5), "uneven": "pad",
        "progressive": ((0, 16),), "start_from": "elsewhere", "new_head": True, "execution": Execution(tuned=True),
        "loader": Loader(workers=1), "intervals": Intervals(evaluate=2), "limits": Limits(max_steps=2), "watch": Watch(images=0),
    }  # fmt: skip
    assert set(changes) == {field.name for field in dataclasses.fields(Job)}
    hashes = {dataclasses.replace(JOB, **{name: value}).sha256() for name, value in changes.items()}
    assert len(hashes | {JOB.sha256()}) == len(changes) + 1


def test_the_digits_fit_the_spec_to_themselves() -> None:
    source = open_source("digits", "train")
    for model in ("mlp", "resnet20"):
        spec = Job(model, "digits", RECIPE, 1).spec(source)
        assert (spec.num_classes, spec.input_shape, spec.preprocessing) == (10, (32, 32, 1), catalog.DIGITS)


def test_options_win_and_the_preprocessing_follows() -> None:
    spec = Job("resnet20", "digits", RECIPE, 1, options={"image_size": 16, "num_classes": 12}).spec(open_source("digits", "train"))
    assert (spec.num_classes, spec.image_size, spec.preprocessing.crop) == (12, 16, 16)
    assert spec.preprocessing.mean == catalog.DIGITS.mean


@pytest.mark.parametrize(
    ("model", "source", "fitted"),
    [
        ("resnet20", colored(7, 24, 3), (7, (24, 24, 3))),
        ("mlp", colored(3, 12, 3), (3, (12, 12, 3))),
        ("resnet20", colored(2, 20, 1), (2, (20, 20, 1))),
    ],
    ids=["classes and size", "channels", "grey"],
)
def test_a_spec_takes_classes_channels_and_size_of_its_data(model: str, source: Source, fitted: tuple[int, tuple[int, ...]]) -> None:
    spec = Job(model, "elsewhere", RECIPE, 1).spec(source)
    assert (spec.num_classes, spec.input_shape) == fitted
    assert (spec.preprocessing.crop, spec.preprocessing.channels) == (spec.image_size, spec.in_channels)


@pytest.mark.parametrize(("epochs", "warmup_epochs", "steps", "warmup"), [(10, 1, 70, 7), (0.5, 1, 4, 3), (0.01, 1, 1, 0), (2, 0, 14, 0)])
def test_the_standard_recipe_counts_whole_batches(epochs: float, warmup_epochs: float, steps: int, warmup: int) -> None:
    made, count = standard_recipe(samples=899, epochs=epochs, batch_size=128, peak=0.2, warmup_epochs=warmup_epochs, label_smoothing=0.1)
    assert (count, made.schedule) == (steps, Schedule(0.2, warmup, steps))
    assert (made.global_batch_size, made.label_smoothing, made.optimizer) == (128, 0.1, SGD(0.9, True, 5e-4))


# The run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Three float64 steps in every installed framework, in this process: directory and result."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: (folder / name, train(JOB, name, folder / name)) for name in FRAMEWORKS}


def test_every_framework_has_the_same_losses(runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    losses = np.array([result["losses"] for _, result in runs.values()])
    assert losses.shape == (len(FRAMEWORKS), 3)
    assert (np.abs(losses - losses[0]) <= 1e-10).all()
    assert (losses[0, 1:] < losses[0, 0]).all()
    assert len({result["correct"] for _, result in runs.values()}) == 1
    assert len({result["data_sha256"] for _, result in runs.values()}) == 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_run_leaves_metrics_result_and_checkpoint(framework: str, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, result = runs[framework]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in metrics] == result["losses"]
    assert [row["learning_rate"] for row in metrics] == [recipe.learning_rate(RECIPE.schedule, step) for step in range(3)]
    stored = json.loads((out / "result.json").read_text())
    assert stored == json.loads(json.dumps(result))
    assert (stored["framework"], stored["train_images"], stored["test_images"]) == (framework, 899, 898)
    assert stored["test_accuracy"] == stored["correct"] / 898
    assert Job.from_json(stored["job"]).sha256() == JOB.sha256()
    assert {path.name for path in out.iterdir()} == {"metrics.jsonl", "result.json", "checkpoint", "sketches.safetensors", "tensorboard"}
    assert stored["images_per_second"] > 0
    assert 0.0 <= stored["data_wait"] < 1.0
    assert stored["peak_memory_bytes"] > 2**20
    assert stored["notes"] == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_its_checkpoint_loads_and_predicts_what_the_run_counted(framework: str, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    out, result = runs[framework]
    model = triptych.create_model("mlp", framework, weights=out / "checkpoint", precision="float64", device="cpu")
    assert (model.spec, list(model.labels or ())) == (JOB.spec(JOB.source("train")), list("0123456789"))
    test = JOB.source("test")
    pixels, labels = test.arrays(1)
    mean, std = (np.float32(values[0]) for values in (model.spec.preprocessing.mean, model.spec.preprocessing.std))
    logits = model.predict(((pixels.astype(np.float32) / np.float32(255) - mean) / std).astype(np.float64))
    assert int((logits.argmax(axis=1) == labels).sum()) == result["correct"]
    start = initialize.initial_weights(model.spec, RECIPE.seed, "float64")
    assert all((value != start[name]).any() for name, value in model.model.weights().items() if name.endswith("weight"))


def test_a_perturbed_run_starts_one_ulp_away(tmp_path: Path, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    """The weights show it after one step; the loss may round to the same number."""
    framework = FRAMEWORKS[0]
    moved = train(dataclasses.replace(JOB, perturbation=0, steps=1), framework, tmp_path / "run")
    assert abs(moved["losses"][0] - runs[framework][1]["losses"][0]) < 1e-13
    after, unmoved = (load_file(out / "sketches.safetensors") for out in (tmp_path / "run", runs[framework][0]))
    differences = {name: np.abs(value - unmoved[name]).max() for name, value in after.items()}
    assert 0.0 < max(differences.values()) < 1e-13


def test_progress_is_reported_step_by_step(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = train(dataclasses.replace(JOB, steps=2), FRAMEWORKS[0], tmp_path / "run", seen.append)
    assert [(told["step"], told["steps"]) for told in seen] == [(1, 2), (2, 2)]
    assert [told["loss"] for told in seen] == result["losses"]
    assert all(told["images_per_second"] > 0 and 0 <= told["data_wait"] < 1 for told in seen)
    assert seen[0]["seconds_left"] > seen[1]["seconds_left"] == 0


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_one_model_serves_all_evaluations(framework: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are those of the step: the last evaluation is that of the trained model, the ones before are others."""
    room, made = contract.load(framework), []
    create = room.create_model
    monkeypatch.setattr(room, "create_model", lambda *args, **kwargs: made.append(create(*args, **kwargs)) or made[-1])
    result = train(dataclasses.replace(JOB, intervals=Intervals(evaluate=1)), framework, tmp_path / "run")
    assert len(made) == 2  # one is trained
    losses = [row["loss"] for row in result["evaluations"]]
    assert losses[-1] == result["test_loss"]
    assert len(set(losses)) == 3


def test_sketches_are_not_half_kept(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, intervals=Intervals(checkpoint=1))
    train(dataclasses.replace(job, limits=Limits(max_steps=2)), FRAMEWORKS[0], tmp_path / "run")
    with pytest.raises(UsageError, match="a resumed run would lack its first steps; train anew"):
        train(job, FRAMEWORKS[0], tmp_path / "run", resume="auto")


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "tensorboard", "sketches.safetensors"])
def test_what_cannot_be_written_is_a_storage_error(name: str, tmp_path: Path) -> None:
    """A folder stands where the file should go, or a file where the folder should."""
    if name == "tensorboard":
        (tmp_path / name).write_text("")
    else:
        (tmp_path / name / "something").mkdir(parents=True)
    with pytest.raises(
        StorageError, match=f"cannot write .*{name}.*: (is a directory|file exists|not a directory).*--resume auto"
    ) as refused:
        train(JOB, FRAMEWORKS[0], tmp_path)
    assert refused.value.exit_code == 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_a_full_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Metrics(tmp_path / "metrics.jsonl", []) as metrics:
        pass
    full = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    monkeypatch.setattr(metrics, "_file", full)
    with pytest.raises(StorageError, match="no space left on device; make room"):
        metrics.write({"step": 0})
    with contextlib.suppress(OSError):
        full.close()


def test_a_worker_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="cannot write"):
        run_worker(JOB, FRAMEWORKS[0], tmp_path / "run")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_deterministic_kernels_compute_the_same(framework: str, tmp_path: Path, runs: dict[str, tuple[Path, dict[str, Any]]]) -> None:
    job = dataclasses.replace(JOB, execution=Execution(deterministic=True))
    result = run_worker(job, framework, tmp_path / "run")  # a process of its own: TensorFlow's switch stays on
    np.testing.assert_allclose(result["losses"], runs[framework][1]["losses"], rtol=1e-12)


def test_a_run_that_cannot_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Grey images would be broadcast to three channels by two of the frameworks, and a label out of range be NaN in another."""
    for options, message in (({"in_channels": 3}, "images of 1 channels, mlp is to take 3"), ({"num_classes": 9}, "labels 0 to 9")):
        with pytest.raises(UsageError, match=message):
            train(dataclasses.replace(JOB, options=options), FRAMEWORKS[0], tmp_path / "run")
    with pytest.raises(UsageError, match="transformer_block cannot be fed with images alone: it takes features"):
        train(dataclasses.replace(JOB, model="transformer_block", options={}), FRAMEWORKS[0], tmp_path / "run")
    unlabeled = dataclasses.replace(colored(4, 8, 3), labels=np.array([0, -1, 2, 3]))
    with pytest.raises(UsageError, match=r"labels -1 to 3 \(-1: unknown\)"):
        Job("mlp", "elsewhere", RECIPE, 1).spec(unlabeled)


def test_a_worker_is_a_process_of_its_own(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    job = dataclasses.replace(JOB, steps=1, precision="float32")
    result = run_worker(job, FRAMEWORKS[0], tmp_path / "run", told.append)
    assert len(result["losses"]) == 1
    assert [(each["step"], each["steps"], each["loss"]) for each in told] == [(1, 1, result["losses"][0])]
    assert in_words(told[0]) == f"step 1 of 1, loss {result['losses'][0]:.4f}"
    with pytest.raises(StorageError, match=f"training in {FRAMEWORKS[0]}: cannot write .*exists already"):
        run_worker(job, FRAMEWORKS[0], tmp_path / "run")


# The command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "{existing}"), 10, "exists already; name a new directory"),
        (("--batch-size", "2000"), 2, "--batch-size 2000 is more than the 899 training images of digits"),
        (("--framework", "mxnet"), 2, "unknown framework 'mxnet'; choose from pytorch, tensorflow, jax"),
        (("--epochs", "0"), 2, "--epochs 0.0 and --learning-rate 0.1 must be positive"),
        (("--precision", "float16"), 2, "'float16' is not one of"),
        (("--data", "{existing}/nowhere"), 2, "no data at"),
    ],
)
def test_a_mistake_has_its_exit_code(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [part.replace("{existing}", str(tmp_path)) for part in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["train", "mlp", "--out", str(tmp_path / "run"), *given])
    assert ended.value.code == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_unknown_model_is_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "resnet5", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "did you mean 'resnet50'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_trained_model_is_the_moving_average_when_there_is_one(decay: float | None, tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, recipe=dataclasses.replace(RECIPE, ema_decay=decay))
    train(job, FRAMEWORKS[0], tmp_path)
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    last = load_file(tmp_path / "sketches.safetensors")[f"{job.steps - 1}/fc.bias"]
    assert np.array_equal(sketch(saved["fc.bias"]), last) == (decay is None)
