"""The canonical checkpoint: bit-exact, atomic, verified, and loaded unchanged by torchvision and timm."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, checkpoint, contract, initialize, storage
from triptych.core.contract import TrainingState
from triptych.core.errors import InputRefused, StorageError, UsageError
from triptych.core.spec import MLPSpec, Preprocessing, Spec

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint_v1"
TINY = catalog.tiny(catalog.get_spec("resnet20"))


@functools.cache
def _weights(spec: Spec, precision: str) -> checkpoint.Weights:
    """Quick random weights; Philox would take seconds for a ResNet-18."""
    rng = np.random.default_rng(7)
    return {tensor.name: rng.standard_normal(tensor.shape).astype(initialize.dtype_of(tensor, precision)) for tensor in spec.tensors()}


def weights_of(spec: Spec, precision: str = "float32") -> checkpoint.Weights:
    """Weights in which every tensor differs and the counters count."""
    return {name: np.array(3, np.int64) if array.dtype.kind == "i" else array.copy() for name, array in _weights(spec, precision).items()}


def bits(array: np.ndarray) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """All that makes an array what it is."""
    return array.dtype, array.shape, array.tobytes()


def check_equal(left: checkpoint.Weights, right: checkpoint.Weights) -> None:
    """Same names in the same order, same dtypes, shapes and bits."""
    assert list(left) == list(right)
    assert [name for name in left if bits(left[name]) != bits(right[name])] == []


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved tiny ResNet."""
    return checkpoint.save(tmp_path / "saved", TINY, weights_of(TINY))


# What comes back


@pytest.mark.parametrize("precision", contract.PRECISIONS)
def test_round_trip_is_bit_exact_and_writable(tmp_path: Path, precision: str) -> None:
    weights = weights_of(TINY, precision)
    loaded = checkpoint.load(checkpoint.save(tmp_path / "c", TINY, weights, provenance={"why": "test"}))
    check_equal(loaded.weights, weights)
    assert (loaded.spec, loaded.precision, loaded.labels) == (TINY, precision, None)
    assert loaded.provenance["why"] == "test"
    assert all(array.flags.writeable for array in loaded.weights.values())


def test_bits_of_special_values_survive(tmp_path: Path) -> None:
    weights = weights_of(TINY)
    weights["bn1.bias"].view(np.uint32)[:4] = (0x80000000, 0x7FC00001, 0xFF800000, 0x00000001)  # -0, a NaN payload, -inf, a denormal
    check_equal(checkpoint.load(checkpoint.save(tmp_path / "c", TINY, weights)).weights, weights)


def test_transposed_views_are_stored_in_their_logical_order(tmp_path: Path) -> None:
    weights = weights_of(TINY)
    hwio = np.ascontiguousarray(weights["conv1.weight"].transpose(2, 3, 1, 0))
    viewed = {**weights, "conv1.weight": hwio.transpose(3, 2, 0, 1)}
    check_equal(checkpoint.load(checkpoint.save(tmp_path / "c", TINY, viewed)).weights, weights)


def test_same_content_gives_the_same_bytes(tmp_path: Path, saved: Path) -> None:
    again = checkpoint.save(tmp_path / "again", TINY, dict(reversed(weights_of(TINY).items())))
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {file.name: file.read_bytes() for file in saved.iterdir()}


def test_precision_is_converted_only_on_request(saved: Path) -> None:
    loaded = checkpoint.load(saved, precision="float64")
    assert loaded.precision == "float64"
    assert {array.dtype.name for array in loaded.weights.values()} == {"float64", "int64"}
    assert np.array_equal(loaded.weights["fc.bias"], weights_of(TINY)["fc.bias"].astype(np.float64))
    with pytest.raises(UsageError, match="float16"):
        checkpoint.load(saved, precision="float16")


def test_the_committed_fixture_of_schema_1_still_loads() -> None:
    spec = MLPSpec("mlp", (4,), 0.0, 10, 1, 4, Preprocessing(None, 4, (0.3053,), (0.3762,)))
    loaded = checkpoint.load(FIXTURE)
    assert loaded.spec == spec
    check_equal(loaded.weights, initialize.initial_weights(spec, 1))
    assert loaded.labels == tuple("0123456789")


def test_the_fixture_is_what_this_version_writes(tmp_path: Path) -> None:
    loaded = checkpoint.load(FIXTURE)
    again = checkpoint.save(tmp_path / "c", loaded.spec, loaded.weights, labels=loaded.labels, provenance=loaded.provenance)
    assert (again / "config.json").read_text() == (FIXTURE / "config.json").read_text()
    assert (again / "model.safetensors").read_bytes() == (FIXTURE / "model.safetensors").read_bytes()


def test_labels_travel_and_must_fit(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(TINY.num_classes)]
    assert checkpoint.load(checkpoint.save(tmp_path / "c", TINY, weights_of(TINY), labels=names)).labels == tuple(names)
    with pytest.raises(InputRefused, match="3 labels for 10 classes"):
        checkpoint.save(tmp_path / "d", TINY, weights_of(TINY), labels=names[:3])


# Training state


def training_state() -> TrainingState:
    """A state in which weights, slot, EMA and step are all different."""
    weights = weights_of(TINY)
    slots = {"momentum": {tensor.name: weights[tensor.name] * np.float32(0.25) for tensor in TINY.parameters()}}
    ema = {name: array + array.dtype.type(1) for name, array in weights.items()}
    return TrainingState(weights, slots, ema, 41)


def test_training_state_round_trip(tmp_path: Path) -> None:
    state = training_state()
    directory = checkpoint.save_training_state(tmp_path / "c", TINY, state, trainer={"epoch": 2, "versions": {"numpy": "x"}})
    loaded, trainer = checkpoint.load_training_state(directory)
    check_equal(loaded.weights, state.weights)
    check_equal(loaded.slots["momentum"], state.slots["momentum"])
    check_equal(loaded.ema, state.ema)
    assert (loaded.step, trainer["epoch"], trainer["versions"]) == (41, 2, {"numpy": "x"})


def test_training_state_without_ema_or_slots(tmp_path: Path) -> None:
    state = dataclasses.replace(training_state(), ema={}, slots={})
    loaded, _ = checkpoint.load_training_state(checkpoint.save_training_state(tmp_path / "c", TINY, state))
    assert (loaded.ema, loaded.slots, loaded.step) == ({}, {}, 41)
    assert not (tmp_path / "c" / "ema.safetensors").exists()


def test_weights_alone_are_no_training_state(saved: Path) -> None:
    assert checkpoint.load(saved).training is None
    with pytest.raises(InputRefused, match="weights only"):
        checkpoint.load_training_state(saved)


def test_incomplete_optimizer_state_is_refused_by_key(tmp_path: Path) -> None:
    state = training_state()
    del state.slots["momentum"]["fc.bias"]
    with pytest.raises(InputRefused, match=r"missing: momentum\.fc\.bias"):
        checkpoint.save_training_state(tmp_path / "c", TINY, state)
    assert not (tmp_path / "c").exists()


# What the tensors must be


def test_validate_lists_every_problem_at_once() -> None:
    weights = weights_of(TINY)
    del weights["layer2.1.bn2.running_var"]
    weights["layer9.weight"] = np.zeros(3, np.float32)
    weights["fc.weight"] = np.zeros((3, 32), np.float32)
    weights["fc.bias"] = weights["fc.bias"].astype(np.float64)
    weights["bn1.num_batches_tracked"] = np.array(1.0, np.float32)
    with pytest.raises(InputRefused) as caught:
        checkpoint.validate(TINY, weights, "some/file", origin={"fc.weight": "module.linear.weight"})
    message = str(caught.value)
    for part in (
        "some/file", "5 problem(s)", "missing: layer2.1.bn2.running_var (16,)", "unexpected: layer9.weight (3,)",
        "wrong shape: module.linear.weight (as fc.weight) is (3, 32), expected (10, 32)",
        "wrong dtype: fc.bias is float64, expected float32",
        "wrong dtype: bn1.num_batches_tracked is float32, expected int64",
    ):  # fmt: skip
        assert part in message
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("dtype", [np.float16, ">f4", np.int32])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    weights = {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in weights_of(TINY).items()}
    with pytest.raises(InputRefused, match="expected float32 or float64"):
        checkpoint.validate(TINY, weights, "x")


# load_weights


def test_weights_load_from_a_directory_a_file_and_a_bare_file(saved: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    shutil.copy(saved / "model.safetensors", bare)
    for path in (saved, saved / "model.safetensors", bare):
        check_equal(checkpoint.load_weights(path, TINY), weights_of(TINY))
    assert checkpoint.load_weights(bare, TINY, precision="float64")["fc.bias"].dtype == np.float64


def test_a_model_file_beside_its_manifest_is_verified(saved: Path) -> None:
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (saved / "model.safetensors").write_bytes(data)
    with pytest.raises(InputRefused, match="was altered"):
        checkpoint.load_weights(saved / "model.safetensors", TINY)


def test_weights_of_another_model_are_refused(saved: Path) -> None:
    with pytest.raises(InputRefused, match=r"tiny_resnet20.*does not hold the weights of mlp"):
        checkpoint.load_weights(saved, catalog.get_spec("mlp"))


def test_a_different_constant_is_refused_a_different_size_is_not(saved: Path) -> None:
    other = dataclasses.replace(TINY, batch_norm=dataclasses.replace(TINY.batch_norm, epsilon=1e-3))
    with pytest.raises(InputRefused, match=r"batch_norm.*epsilon=1e-05.*epsilon=0\.001"):
        checkpoint.load_weights(saved, other)
    check_equal(checkpoint.load_weights(saved, catalog.with_options(TINY, image_size=24)), weights_of(TINY))


# Writing


def siblings(directory: Path) -> list[str]:
    """What lies beside the checkpoint: leftovers would."""
    return sorted(entry.name for entry in directory.parent.iterdir() if entry != directory)


def test_an_existing_directory_needs_overwrite(saved: Path) -> None:
    with pytest.raises(StorageError, match=r"exists already.*overwrite=True") as caught:
        checkpoint.save(saved, TINY, weights_of(TINY))
    assert caught.value.exit_code == 10
    wide = weights_of(TINY, "float64")
    check_equal(checkpoint.load(checkpoint.save(saved, TINY, wide, overwrite=True)).weights, wide)
    assert siblings(saved) == []


def test_overwriting_without_an_atomic_exchange(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    wide = weights_of(TINY, "float64")
    check_equal(checkpoint.load(checkpoint.save(saved, TINY, wide, overwrite=True)).weights, wide)
    assert siblings(saved) == []


def test_overwriting_removes_files_of_the_old_run_but_never_foreign_ones(tmp_path: Path) -> None:
    directory = checkpoint.save_training_state(tmp_path / "c", TINY, training_state())
    checkpoint.save(directory, TINY, weights_of(TINY), overwrite=True)
    assert sorted(file.name for file in directory.iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    (directory / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match=r"thesis\.txt"):
        checkpoint.save(directory, TINY, weights_of(TINY), overwrite=True)
    assert (directory / "thesis.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("mine")
    with pytest.raises(StorageError, match="it is a file"):
        checkpoint.save(tmp_path / "c", TINY, weights_of(TINY), overwrite=True)
    assert (tmp_path / "c").read_text() == "mine"


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "no space"), (errno.EACCES, "permission denied"), (errno.EROFS, "read-only"), (errno.EIO, "error")]
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str, existing: bool
) -> None:
    target = tmp_path / "c"
    if existing:
        checkpoint.save(target, TINY, weights_of(TINY))
    original = storage.write_file

    def failing(path: Path, data: bytes) -> None:
        original(path, data[: len(data) // 2])
        if path.name == "manifest.json":
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_file", failing)
        with pytest.raises(StorageError, match=f"(?i){reason}"):
            checkpoint.save(target, TINY, weights_of(TINY, "float64"), overwrite=True)
    assert siblings(target) == []
    assert target.exists() == existing
    if existing:
        check_equal(checkpoint.load(target).weights, weights_of(TINY))


def test_interrupted_before_the_swap_the_old_one_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_put_in_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(saved, TINY, weights_of(TINY, "float64"), overwrite=True)
    assert checkpoint.load(saved).precision == "float32"
    assert siblings(saved) == []


def test_every_file_and_both_directories_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def recording(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    checkpoint.save(tmp_path / "c", TINY, weights_of(TINY))
    assert synced[:3] == ["model.safetensors", "config.json", "manifest.json"]
    assert synced[3].endswith(".partial")
    assert synced[4] == tmp_path.name


def test_a_path_through_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not a directory"):
        checkpoint.save(tmp_path / "file" / "c", TINY, weights_of(TINY))
