"""The stream between workers and comparer: in order, bounded, complete or an error."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from triptych.core import catalog, contract, initialize
from triptych.core.contract import Converted, TrainingState
from triptych.core.errors import TriptychError
from triptych.core.recipe import AdamW, Recipe, Schedule
from triptych.parity import observation
from triptych.parity.certify import training_images
from triptych.parity.observation import Observation, ShardReader, ShardWriter, write_tensors
from triptych.parity.plan import Plan
from triptych.parity.subject import Kept
from triptych.parity.trajectory import FileTrajectory, StoredTensors, counts, flatten, unflatten


def many(count: int) -> list[Observation]:
    return [Observation(3, "activation", f"layer{i}", np.full((64, 64), float(i)), step=i) for i in range(count)]


def test_what_is_written_is_read_in_order_and_deleted(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    scalar = Observation(4, "counter", "num_batches_tracked", np.asarray(7, np.int64), fault="f")
    for each in [*many(5), scalar]:
        writer.write(each)
    writer.close({"device": "cpu"})
    reader = ShardReader(tmp_path)
    read = list(reader)
    assert [o.key for o in read] == [o.key for o in [*many(5), scalar]]
    assert read[-1].value.shape == ()
    assert read[-1].value.dtype == np.int64
    assert reader.summary["device"] == "cpu"
    assert not list(tmp_path.glob("[0-9]*"))


def test_a_writer_waits_for_its_reader_so_that_the_disk_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "SHARD_BYTES", 32 * 1024)
    monkeypatch.setattr(observation, "PENDING_BYTES", 128 * 1024)
    writer, peak, read = ShardWriter(tmp_path), 0, 0

    def write() -> None:
        for each in many(40):
            writer.write(each)
        writer.close({})

    thread = threading.Thread(target=write)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive(), "the writer did not wait although nobody read"
    for _ in ShardReader(tmp_path):
        read += 1
        peak = max(peak, sum(path.stat().st_size for path in tmp_path.glob("[0-9]*.safetensors") if path.exists()))
    thread.join()
    assert read == 40
    assert peak <= (128 + 2 * 40) * 1024


def test_a_worker_that_dies_is_an_error_not_an_endless_wait(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.write(many(1)[0])
    writer.flush()
    reader = iter(ShardReader(tmp_path, alive=lambda: False))
    assert next(reader).name == "layer0"
    with pytest.raises(TriptychError, match="without finishing"):
        next(reader)


def state(step: int) -> TrainingState:
    slots = {"momentum": {"fc.weight": np.ones(3)}}
    return TrainingState({"fc.weight": np.full(3, step + 0.5)}, slots, {"fc.weight": np.zeros(3)}, step, 2.0**step, step % 3)


def test_a_training_state_survives_its_file_even_when_that_is_deleted(tmp_path: Path) -> None:
    observation.write_tensors(tmp_path / "state.safetensors", flatten(state(4)), counts(state(4)))
    again = unflatten(StoredTensors(tmp_path / "state.safetensors"))
    (tmp_path / "state.safetensors").unlink()
    assert (again.weights["fc.weight"] == 4.5).all()
    assert (again.ema["fc.weight"] == 0.0).all()
    assert {slot: list(values) for slot, values in again.slots.items()} == {"momentum": ["fc.weight"]}
    assert (len(again.weights), "fc.bias" in again.weights) == (1, False)
    assert (again.step, again.loss_scale, again.good_steps) == (4, 16.0, 1)


def test_a_state_without_loss_scaling_has_none_after_its_file_either(tmp_path: Path) -> None:
    plain = dataclasses.replace(state(4), loss_scale=None)
    observation.write_tensors(tmp_path / "state.safetensors", flatten(plain), counts(plain))
    assert unflatten(StoredTensors(tmp_path / "state.safetensors")).loss_scale is None


def test_a_trajectory_holds_one_state_at_a_time_and_waits_for_every_reader(tmp_path: Path) -> None:
    writer = FileTrajectory(tmp_path, "pytorch", ("jax", "tensorflow"), replays=False, keep=False)
    readers = [FileTrajectory(tmp_path, name, (), replays=True, keep=False) for name in writer.readers]
    writer.write("sgd", 0, state(0))
    thread = threading.Thread(target=lambda: (writer.write("sgd", 1, state(1)), writer.close()))
    thread.start()
    assert readers[0].read("sgd", 0).weights["fc.weight"][0] == 0.5
    time.sleep(0.1)
    assert not (tmp_path / "sgd-001.safetensors").exists(), "written before every reader had the one before"
    readers[1].read("sgd", 0)
    for reader in readers:
        assert reader.read("sgd", 1).weights["fc.weight"][0] == 1.5
    thread.join(timeout=5)
    assert not list(tmp_path.iterdir())


def test_tensors_of_every_shape_are_mapped(tmp_path: Path) -> None:
    given = {
        "scalar": np.float64(3.5), "empty": np.empty((0, 4), np.float32), "counter": np.arange(6).reshape(2, 3),
        "turned": np.arange(6.0).reshape(2, 3).T, "flags": np.array([True]),
    }  # fmt: skip
    observation.write_tensors(tmp_path / "some.safetensors", given, {"made": "here"})
    stored = StoredTensors(tmp_path / "some.safetensors")
    assert stored.metadata == {"made": "here"}
    for name, value in given.items():
        assert (stored[name].shape, stored[name].dtype) == (np.shape(value), np.asarray(value).dtype)
        assert np.array_equal(stored[name], value)
    with pytest.raises(KeyError):
        stored["missing"]


def in_memory_of_files() -> int:
    """Bytes of mapped files that this process has in memory."""
    found = re.search(r"^RssFile:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    return 1024 * int(found[1]) if found else pytest.skip("this system does not tell")


def test_tensors_that_are_held_take_one_file_descriptor_and_those_that_are_not_no_memory(tmp_path: Path) -> None:
    """A descriptor each broke the table of faults, which keeps what a proof saw, wherever a process may have 1,024."""
    size = 2**20
    write_tensors(tmp_path / "many.safetensors", {f"layer{i}": np.full(size, float(i)) for i in range(12)})
    before, resident = len(os.listdir("/proc/self/fd")), in_memory_of_files()
    stored = StoredTensors(tmp_path / "many.safetensors")
    for i in range(12):
        assert stored[f"layer{i}"].sum() == i * size
    assert in_memory_of_files() - resident < 3 * size * 8, "a tensor stays in memory when nobody holds it"
    held = {name: value[1:] for name, value in stored.items()}
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    (tmp_path / "many.safetensors").unlink()
    del stored
    assert all((held[f"layer{i}"] == i).all() for i in range(12)), "what is held outlives the file and its reader"
    held.clear()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_state_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """All of it at once is four times a model's size, beside the state itself: that alone put a ViT-B's worker over 6 GiB."""
    names, read = [f"layer{i}" for i in range(16)], []

    def produce(name: str) -> np.ndarray:
        read.append(name)
        return np.full((128, 128), float(name.removeprefix("layer")))

    weights = Converted({name: name for name in names}, produce)
    lazy = TrainingState(weights, {"exp_avg": weights}, weights, step=1)
    tracemalloc.start()
    try:
        observation.write_tensors(tmp_path / "state.safetensors", flatten(lazy), counts(lazy))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read.count("layer3") >= 3
    assert peak < 4 * 128 * 128 * 8 < 3 * len(names) * 128 * 128 * 8
    stored = load_file(tmp_path / "state.safetensors")
    assert len(stored) == 3 * len(names)
    assert all((value == float(name.rpartition("layer")[2])).all() for name, value in stored.items())


@pytest.mark.parametrize("framework", contract.installed())
def test_a_view_of_a_training_state_takes_no_memory_until_it_is_read(framework: str) -> None:
    """A copy beside the native state would put a deep model's worker over its bound of memory."""
    spec = catalog.get_spec("mlp", hidden=(64,))
    weights = initialize.initial_weights(spec, 0, "float64")
    recipe = Recipe(AdamW(), Schedule(1e-3, 0, 3), 2, ema_decay=0.9)
    room = contract.load(framework)
    trainer = room.create_trainer(room.create_model(spec, weights, precision="float64", device="cpu"), recipe)
    trainer.state()  # what the first reading imports or compiles is not its copy
    tracemalloc.start()
    try:
        view = trainer.view()
        kept = {name: len(values) for name, values in {"weights": view.weights, **view.slots, "ema": view.ema}.items()}
        held = tracemalloc.get_traced_memory()[0]
        state = view.copy()
        copied = tracemalloc.get_traced_memory()[0] - held
    finally:
        tracemalloc.stop()
    size = sum(value.nbytes for value in weights.values())
    assert kept == {"weights": 4, "exp_avg": 4, "exp_avg_sq": 4, "ema": 4}
    assert held < 0.05 * size < 3.9 * size < copied
    assert all(np.array_equal(state.weights[name], value) and np.array_equal(state.ema[name], value) for name, value in weights.items())


def test_a_subject_s_weights_stay_in_their_file_and_a_fault_may_replace_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / "w.safetensors", {"fc.weight": np.full(3, 1.5), "fc.bias": np.zeros(2), "bn.num_batches_tracked": np.array(7)})
    held = Kept(StoredTensors(tmp_path / "w.safetensors"), "float32")
    assert held["fc.weight"] is not held["fc.weight"], "read anew each time"
    assert {name: held[name].dtype.name for name in held} == {
        "fc.weight": "float32",
        "fc.bias": "float32",
        "bn.num_batches_tracked": "int64",
    }
    held["fc.bias"] = np.ones(2)
    assert dict(held)["fc.bias"].tolist() == [1.0, 1.0]
    assert len(held) == 3
    with pytest.raises(TypeError, match="without one of its weights"):
        del held["fc.bias"]


@pytest.mark.parametrize(("model", "images"), [("resnet152", 4), ("vit_small_patch16_224", 4), ("vit_base_patch16_224", 1)])
def test_a_large_model_is_trained_with_fewer_images(model: str, images: int) -> None:
    assert training_images(catalog.get_spec(model)) == images


def test_only_running_statistics_are_calibrated() -> None:
    assert Plan(catalog.get_spec("resnet20"), ("pytorch", "jax"), "float64").calibrates
    assert not Plan(catalog.get_spec("resnet20"), ("pytorch", "jax"), "float64", calibrate=False).calibrates
    assert not Plan(catalog.get_spec("vit_tiny_patch16_224"), ("pytorch", "jax"), "float64").calibrates
