"""Recipe files: what is shipped, what a file may say, what is refused and how, and the steps that come of it."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import main
from triptych.core import contract
from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import ColorJitter, RandomErasing, RandomResizedCrop, Transforms
from triptych.core.recipe import AdamW, Clip, LossScaling
from triptych.training import recipe_file
from triptych.training.job import Intervals, Job, Limits, Watch

SMALLEST = "model: mlp\nglobal_batch_size: 32\nepochs: 2\noptimizer: {learning_rate: 0.1}\n"


@pytest.mark.parametrize("name", recipe_file.names())
def test_what_is_shipped_resolves_and_reads_back(name: str) -> None:
    read = recipe_file.load(name)
    assert recipe_file.loads(read.resolved()) == read
    start = "fine_tune.start_from=somewhere"
    job = (recipe_file.load(name, [start]) if read.fine_tune.new_head else read).job(50_000)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert job.steps > 0
    text = (Path(recipe_file.__file__).parents[1] / "recipes" / f"{name}.yaml").read_text()
    assert all(f"# {word}" in text for word in ("Paper:", "Command:", "Accuracy, time:"))
    assert f"triptych train {name} " in text


def test_every_part_of_a_recipe_arrives() -> None:
    text = (
        SMALLEST.replace("{learning_rate: 0.1}", "{name: adamw, learning_rate: 0.1, beta2: 0.99, decay_norm_and_bias: true}")
        + """
micro_batch_size: 8
transforms:
  random_resized_crop: {scale: [0.5, 1.0]}
  flip: 0.25
  jitter: {hue: 0.1}
  erasing: {probability: 0.3}
  cutmix: 1.0
schedule: {kind: step, warmup_epochs: 0.5, milestones: [1, 1.5], gamma: 0.2}
label_smoothing: 0.1
clip: {value: 0.5}
ema: 0.9
fine_tune: {start_from: here, new_head: true, frozen: [fc1]}
remat: true
precision: float16
seed: 3
uneven: pad
loader: {workers: 2, cache: memory}
execution: {compile: true}
intervals: {evaluate: 5}
limits: {max_time: 60}
watch: {images: 2, histograms: true, profile_steps: 3}
"""
    )
    job = recipe_file.loads(text).job(100)
    recipe, schedule = job.recipe, job.recipe.schedule
    assert (job.steps, schedule.warmup_steps, schedule.milestones, schedule.gamma, schedule.peak) == (8, 2, (4, 6), 0.2, 0.1)
    assert recipe.optimizer == AdamW(0.9, 0.99, 1e-8, 1e-2)
    assert recipe.decay_norm_and_bias
    assert (recipe.micro_batch_size, recipe.clip, recipe.ema_decay, recipe.label_smoothing) == (8, Clip(value=0.5), 0.9, 0.1)
    assert (recipe.frozen, recipe.remat, recipe.mixed_precision, recipe.loss_scaling) == (("fc1",), True, "float16", LossScaling())
    expected = Transforms(RandomResizedCrop((0.5, 1.0)), 0, 0.25, ColorJitter(hue=0.1), RandomErasing(0.3), cutmix=1.0)
    assert (job.transforms, job.start_from, job.new_head, job.precision) == (expected, "here", True, "float32")
    assert (job.loader.workers, job.loader.cache, job.execution.compile) == (2, "memory", True)
    assert (job.intervals.evaluate, job.limits, job.uneven) == (5, Limits(max_time=60), "pad")
    assert recipe.seed == 3
    assert job.watch == Watch(True, 2, True, 3)


def test_a_job_of_an_earlier_version_is_read() -> None:
    job = recipe_file.loads(SMALLEST).job(100)
    earlier = {key: value for key, value in job.to_json().items() if key != "watch"}
    assert Job.from_json(earlier) == job


def test_a_job_refuses_a_number_out_of_its_range() -> None:
    """Also without a recipe file."""
    job = recipe_file.loads(SMALLEST).job(100)
    with pytest.raises(UsageError, match=r"intervals\.keep_last=0 is out of range; it must be 1 or more"):
        dataclasses.replace(job, intervals=Intervals(keep_last=0))


@pytest.mark.parametrize(
    ("change", "steps"),
    [("epochs=3", 9), ("limits.limit_batches=2", 4), ("limits.overfit_batches=1", 2), ("uneven=pad", 8), ("global_batch_size=100", 2)],
)
def test_steps_follow_the_sampling_plan(change: str, steps: int, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALLEST)
    assert recipe_file.load(str(path), [change]).job(100).steps == steps


def test_image_sizes_become_first_steps() -> None:
    job = recipe_file.loads(SMALLEST.replace("epochs: 2", "progressive: [[16, 1.5], [32, 0.5]]").replace("mlp", "resnet20")).job(320)
    assert (job.steps, job.progressive) == (20, ((0, 16), (15, 32)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learnig_rate=1", r"unknown key 'optimizer.learnig_rate'; did you mean 'optimizer.learning_rate'\? allowed: "),
        ("epoch=1", r"unknown key 'epoch'; did you mean 'epochs'\?"),
        ("transforms.jitter.huge=1", r"unknown key 'transforms.jitter.huge'; did you mean 'transforms.jitter.hue'\?"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate: .*given 'fast'"),
        ("optimizer.name=adam", "optimizer.name: .*'sgd' or 'adamw'; given 'adam'"),
        ("global_batch_size=0", "global_batch_size: .*greater than or equal to 1; given 0"),
        ("transforms.flip=2", "flip=2.0 must be a probability"),
        ("seed", "give KEY=VALUE"),
        ("seed=[", "is not a YAML value"),
        ("model=resnet5", "unknown model 'resnet5'"),
        ("fine_tune.new_head=true", "keeps the rest of a checkpoint: name it"),
        ("steps=4", "told by one of epochs, steps and progressive; given: epochs, steps"),
        *(
            (f"{name}={value}", f"{name}={value} is out of range; it must be ")
            for name, values in (
                ("intervals.evaluate", (0, -1)),
                ("intervals.checkpoint", (0,)),
                ("intervals.keep_last", (0,)),
                ("intervals.keep_best", (-1,)),
                ("limits.max_steps", (0,)),
                ("limits.max_time", (0.0, -1.0)),
                ("limits.limit_batches", (0,)),
                ("limits.overfit_batches", (-2,)),
                ("loader.workers", (-1,)),
                ("loader.prefetch", (0,)),
                ("watch.images", (-1,)),
                ("watch.profile_steps", (0,)),
                ("loss_scaling.interval", (0,)),
                ("loss_scaling.initial", (0.0,)),
                ("loss_scaling.growth", (1.0,)),
                ("loss_scaling.backoff", (1.0, 0.0)),
            )
            for value in values
        ),
        ("limits.max_time=.nan", "limits.max_time=nan is out of range; it must be above 0"),
        ("loader.cache=''", "loader.cache='' is neither 'memory' nor the path of a file"),
        ("watch.image=3", "unknown key 'watch.image'; did you mean 'watch.images'"),
        ("global_batch_size=101", "global_batch_size=101 is more than the 100 training images"),
    ],
)
def test_a_wrong_override_is_refused_with_the_remedy(override: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SMALLEST)
    with pytest.raises(UsageError, match=message):
        recipe_file.load(str(path), [override]).job(100)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "a recipe is a mapping of names to values; found list"),
        ("a: [1\n", "not valid YAML"),
        ("model: &a mlp\ndata: *a\n", "anchors and aliases"),
        (SMALLEST + "modle: 1\n", "unknown key 'modle'; did you mean 'model'"),
        ("!!python/object/apply:os.system [exit]\n", "not valid YAML"),
        ("model: mlp\n", "2 wrong value|global_batch_size: Field required"),
        ("x" * (2**20 + 2), "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InputRefused, match=message):
        recipe_file.load(str(path))


def test_an_unknown_name_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'cifar10_resnet20'"):
        recipe_file.load("cifar10_resnet2")
    with pytest.raises(InputRefused, match="no such file"):
        recipe_file.load(str(tmp_path / "absent.yaml"))


def test_devices_are_those_of_the_contract() -> None:
    assert typing.get_args(recipe_file.RecipeFile.model_fields["device"].annotation) == contract.DEVICES


# The command


def run(*arguments: Any) -> int:
    """The exit code of `triptych train`."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_a_recipe_is_trained_and_kept_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    framework = contract.installed()[0]
    few = ("--set", "epochs=0.2", "--set", "options.hidden=[16]", "--seed", 3, "--device", "cpu")
    assert run("digits_mlp", "--framework", framework, "--out", tmp_path / "run", *few, "--json") == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert (result["seed"], len(result["losses"])) == (3, 3)
    kept = recipe_file.loads((tmp_path / "run" / "recipe.yaml").read_text())
    assert (kept.seed, kept.epochs, kept.options) == (3, 0.2, {"hidden": [16]})
    assert Job.from_json(result["job"]) == kept.job(899)


@pytest.mark.parametrize("asked", [("--dry-run",), ("--set", "limits.dry_run=true")], ids=str)
def test_a_dry_run_prints_the_recipe_and_writes_nothing(asked: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("digits_mlp", "--out", tmp_path / "run", *asked, "--set", "seed=5") == 0
    text = capsys.readouterr().out
    assert recipe_file.loads(text).seed == 5
    assert "70 steps in pytorch; nothing was trained" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("digits_mlp", "--epochs", "3"), 2, "--epochs is of the standard recipe; change digits_mlp with --set"),
        (("mlp", "--set", "seed=1"), 2, "--set changes a recipe, and 'mlp' is none"),
        (("digits_mlp", "--set", "sead=1"), 2, "did you mean 'seed'"),
        (("absent.yaml",), 8, "absent.yaml: no such file"),
    ],
)
def test_mistakes_have_their_exit_code(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", tmp_path / "run") == code
    assert message in capsys.readouterr().err
