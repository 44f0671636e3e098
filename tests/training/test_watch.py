"""What a run writes to be looked at, read back with TensorBoard's own reader."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core import contract
from triptych.core.errors import InputRefused, StorageError
from triptych.core.preprocess import Transforms
from triptych.core.recipe import SGD, LossScaling, Recipe, Schedule
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import open_source
from triptych.training.job import Intervals, Job, Limits, Watch
from triptych.training.loop import train
from triptych.training.records import read_metrics
from triptych.training.watch import EventFile, export_csv, pixels, scalars

FRAMEWORKS = contract.installed()
RECIPE = Recipe(SGD(), Schedule(0.05, 2, 8), 48, loss_scaling=LossScaling(initial=64.0, interval=3))
JOB = Job("mlp", "digits", RECIPE, 8, options={"hidden": (16,)}, intervals=Intervals(evaluate=3, checkpoint=2), watch=Watch(images=3))
# In a process of its own, in which there is no TensorFlow for the reader to load.
READER = """
import json, sys
sys.modules["tensorflow"] = None
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
events = EventAccumulator(sys.argv[1], size_guidance={"tensors": 0})
events.Reload()
read = lambda event: tensor_util.make_ndarray(event.tensor_proto).tolist()
plain = lambda value: [each.hex() if isinstance(each, bytes) else each for each in value] if isinstance(value, list) else value
print(json.dumps({tag: [[event.step, plain(read(event))] for event in events.Tensors(tag)] for tag in events.Tags()["tensors"]}))
"""


def shown(out: Path) -> dict[str, list[list[Any]]]:
    """What TensorBoard reads of a run: [step, value] for each tag."""
    done = subprocess.run([sys.executable, "-c", READER, str(out / "tensorboard")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read: dict[str, list[list[Any]]] = json.loads(done.stdout.splitlines()[-1])
    return read


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, list[list[Any]]]]:
    """A run, its result, and what TensorBoard reads of it."""
    out = tmp_path_factory.mktemp("watched") / "run"
    result = train(dataclasses.replace(JOB, watch=Watch(images=3, histograms=True)), FRAMEWORKS[0], out)
    return out, result, shown(out)


def test_scalars_are_those_of_the_metrics(watched: tuple[Path, dict[str, Any], dict[str, list[list[Any]]]]) -> None:
    out, result, read = watched
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 8
    for name in ("loss", "learning_rate", "images_per_second", "data_wait", "loss_scale"):
        assert read[f"train/{name}"] == [[row["step"], float(np.float32(row[name]))] for row in rows]
    assert [row["loss_scale"] for row in rows] == [64.0, 64.0, 128.0, 128.0, 128.0, 256.0, 256.0, 256.0]
    judged = [*result["evaluations"], {"step": 7, "loss": result["test_loss"], "accuracy": result["test_accuracy"]}]
    assert [row["step"] for row in judged] == [2, 5, 7]
    for name in ("loss", "accuracy"):
        assert read[f"test/{name}"] == [[row["step"], float(np.float32(row[name]))] for row in judged]


def test_input_images_are_what_the_model_was_given(watched: tuple[Path, dict[str, Any], dict[str, list[list[Any]]]]) -> None:
    read = watched[2]
    source = open_source("digits", "train")
    images, labels = source.arrays(1)
    first = SamplingPlan(labels, 10, 48, RECIPE.seed).batch(0)
    assert sorted(tag for tag in read if tag.startswith("inputs")) == ["inputs/0", "inputs/1", "inputs/2"]
    for i in range(3):
        ((step, (width, height, encoded)),) = read[f"inputs/{i}"]
        given = np.asarray(Image.open(io.BytesIO(bytes.fromhex(encoded))))
        assert (step, int(bytes.fromhex(width)), int(bytes.fromhex(height))) == (0, 32, 32)
        np.testing.assert_array_equal(given, images[first.indices[i], :, :, 0])


def test_images_are_shown_as_after_augmentation(tmp_path: Path) -> None:
    whole = shown_pixels(dataclasses.replace(JOB, transforms=Transforms(pad_crop=4)), tmp_path / "moved")
    assert not np.array_equal(whole, shown_pixels(JOB, tmp_path / "plain"))


def shown_pixels(job: Job, out: Path) -> np.ndarray:
    """The first input image of a run of one step."""
    train(dataclasses.replace(job, limits=Limits(max_steps=1)), FRAMEWORKS[0], out)
    return np.asarray(Image.open(io.BytesIO(bytes.fromhex(shown(out)["inputs/0"][0][1][2]))))


def test_normalization_is_undone() -> None:
    levels = np.arange(2 * 3 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 3) * 4
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = ((levels / 255.0 - means) / deviations).astype(np.float32)
    np.testing.assert_array_equal(pixels(normalized, Preprocessing(None, 3, means, deviations)), levels)


def test_histograms_hold_every_weight(watched: tuple[Path, dict[str, Any], dict[str, list[list[Any]]]]) -> None:
    out, _, read = watched
    (name,) = [tag for tag in read if tag == "weights/fc.weight"]
    assert [step for step, _ in read[name]] == [2, 5]
    for _, buckets in read[name]:
        assert sum(count for _, _, count in buckets) == 160
    assert not [tag for tag in read if tag.startswith("weights") and "counter" in tag]
    assert out.is_dir()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_resumed_run_shows_each_step_once(framework: str, tmp_path: Path) -> None:
    """It is stopped after step 5 and goes on from the checkpoint before it: step 4 is written twice."""
    train(dataclasses.replace(JOB, limits=Limits(max_steps=5)), framework, tmp_path)
    again = train(JOB, framework, tmp_path, resume="auto")
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    read = shown(tmp_path)
    assert read["train/loss"] == [[step, float(np.float32(loss))] for step, loss in enumerate(again["losses"])]
    export_csv(tmp_path, tmp_path / "scalars.csv")
    head, *rows = csv.reader((tmp_path / "scalars.csv").read_text().splitlines())
    assert head == ["step", "tag", "value"]
    exported = [(int(step), np.float32(value)) for step, tag, value in rows if tag == "train/loss"]
    assert exported == [(step, np.float32(loss)) for step, loss in enumerate(again["losses"])]
    assert {tag for _, tag, _ in rows} == {tag for tag in read if not tag.startswith("inputs")}


def test_a_record_that_a_crash_cut_off_ends_its_file(tmp_path: Path) -> None:
    written = EventFile(tmp_path, 0)
    for step in range(3):
        written.scalars(step, {"train/loss": step / 2})
    written.close()
    for cut in (1, 5, 20):
        data = written.path.read_bytes()
        written.path.write_bytes(data[:-cut])
        assert list(scalars(tmp_path)) == [(0, "train/loss", 0.0), (1, "train/loss", 0.5)]
        written.path.write_bytes(data)


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="holds no TensorBoard event files"):
        export_csv(tmp_path, tmp_path / "scalars.csv")


def test_events_that_cannot_be_written_are_a_storage_error(tmp_path: Path) -> None:
    written = EventFile(tmp_path, 0)
    written.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*events\.out\.tfevents"):
        EventFile(tmp_path / "file" / "tensorboard", 0)


def test_it_is_switched_off(tmp_path: Path) -> None:
    train(dataclasses.replace(JOB, watch=Watch(tensorboard=False)), FRAMEWORKS[0], tmp_path)
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 10


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_frameworks_own_profiler_leaves_a_trace(framework: str, tmp_path: Path) -> None:
    train(dataclasses.replace(JOB, watch=Watch(profile_steps=2)), framework, tmp_path)
    patterns = {"pytorch": "*.pt.trace.json", "tensorflow": "plugins/profile/*/*.xplane.pb", "jax": "plugins/profile/*/*.xplane.pb"}
    (trace,) = (tmp_path / "tensorboard").glob(patterns[framework])
    assert trace.stat().st_size > 1000


def test_no_framework_is_loaded_to_write_or_read(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    program = """
import sys
from pathlib import Path
from triptych.training.watch import EventFile, scalars
written = EventFile(Path("events"), 0)
written.scalars(0, {"train/loss": 1.0})
written.close()
print(list(scalars(Path("events"))), sorted(set(sys.modules) & {"tensorflow", "torch", "jax", "keras"}))
"""
    done = python("-W", "error", "-c", program)
    assert done.stdout.strip() == "[(0, 'train/loss', 1.0)] []", done.stderr
