"""The ladder end to end, through the command line, on small models; and a fault from outside."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize
from triptych.parity import faults
from triptych.parity.inprocess import first_divergence
from triptych.parity.plan import Plan, encoded_images, training_batch
from triptych.parity.planting import plant_all
from triptych.parity.prove import certificate as prove_certificate
from triptych.parity.prove import prove, table

FIELDS = {
    "number", "name", "precision", "worst_error", "tolerance", "tensor", "pair", "passed", "tensors", "pairs", "steps", "image_size",
    "batch_size",
}  # fmt: skip


def triptych(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "triptych.cli", *arguments], capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module")
def certificate() -> dict[str, Any]:
    done = triptych("parity", "mlp", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_small_model_passes_every_rung_in_both_precisions(certificate: dict[str, Any]) -> None:
    assert certificate["verdict"] == "pass"
    assert certificate["first_divergence"] is None
    assert [(row["precision"], row["number"]) for row in certificate["rungs"]] == [
        (p, n) for p in ("float64", "float32") for n in range(1, 9)
    ]


def test_a_certificate_has_the_documented_fields(certificate: dict[str, Any]) -> None:
    assert {"verdict", "model", "spec_sha256", "weights_sha256", "rungs", "first_divergence", "schema"} <= set(certificate)
    assert all(set(row) >= FIELDS and row["pairs"] == 3 for row in certificate["rungs"])
    assert len(certificate["spec_sha256"]) == len(certificate["weights_sha256"]) == 64
    assert {row["steps"] for row in certificate["rungs"] if row["number"] == 7} == {10}


def test_two_frameworks_are_enough_and_one_is_not() -> None:
    done = triptych("parity", "mlp", "--frameworks", "jax,pytorch", "--precision", "float64", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frameworks"] == ["jax", "pytorch"]
    alone = triptych("parity", "mlp", "--frameworks", "jax")
    assert alone.returncode == 2
    assert "two frameworks" in alone.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("resnet5",), "did you mean"),
        (("mlp", "--frameworks", "pytorch,mxnet"), "mxnet"),
        (("mlp", "--fault", "nonesuch"), "nonesuch"),
        (("mlp", "--fault", "batch_norm_epsilon"), "has no"),
        (("mlp", "--fault", "nowhere.py:f"), "nowhere.py"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    done = triptych("parity", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


OUTSIDE = """
import contextlib

@contextlib.contextmanager
def doubled_bias(subject):
    if subject.framework != "jax":
        raise_clean = NotImplemented
        yield raise_clean
        return
    with subject.intercept("fc1", lambda layer, call, x: call(x) * 1.000001):
        yield

def only_tensorflow(subject):
    if subject.framework != "tensorflow":
        return NotImplemented
    subject.weights["fc2.bias"] = subject.weights["fc2.bias"] + 1e-7
"""


def test_a_fault_from_outside_is_caught_where_it_sits(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OUTSIDE)
    done = triptych("parity", "mlp", "--fault", f"{path}:only_tensorflow", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["clean"] == "pass"
    assert [(row["framework"], row["caught"], row["rung"], row["tensor"]) for row in found["faults"]] == [
        ("tensorflow", True, 1, "fc2.bias")
    ]


def test_one_fault_a_rung_is_caught_at_its_rung_and_layer_in_every_framework(tmp_path: Path) -> None:
    spec = catalog.tiny(catalog.get_spec("resnet20"))
    names = (
        "gamma_beta_swapped", "resize_no_antialias", "batch_norm_epsilon", "batch_norm_fast_variance", "loss_float32",
        "momentum_convention",
    )  # fmt: skip
    result = plant_all(spec, names, tuple(contract.FRAMEWORKS), tmp_path / "run", lambda text: None)
    assert result["clean"] == "pass"
    assert {(row["name"], row["framework"]) for row in result["faults"]} == {(name, f) for name in names for f in contract.FRAMEWORKS}
    for row in result["faults"]:
        assert row["caught"], row
        assert row["right_rung"], row
        assert row["right_layer"], row
    missed = {row["name"] for row in result["faults"] if row["missed_by_customary_check"]}
    assert {"batch_norm_fast_variance", "loss_float32", "momentum_convention"} <= missed


def test_faults_of_a_bare_block_are_caught_and_rung_2_is_left_out(tmp_path: Path) -> None:
    spec = catalog.tiny(catalog.get_spec("transformer_block"))
    can, cannot = faults.expressible(spec)
    assert {"layer_norm_epsilon", "gelu_tanh", "attention_unscaled", "attention_heads_first", "layer_norm_fast_variance"} <= set(can)
    assert {fault.name for fault in faults.FAULTS if fault.rung == 2} <= set(cannot)
    names = ("layer_norm_epsilon", "gelu_tanh", "attention_heads_first", "layer_norm_fast_variance", "loss_sum")
    result = plant_all(spec, names, tuple(contract.FRAMEWORKS), tmp_path / "run", lambda text: None)
    assert result["clean"] == "pass"
    assert {(row["name"], row["framework"]) for row in result["faults"]} == {(name, f) for name in names for f in contract.FRAMEWORKS}
    assert all(row["caught"] and row["right_rung"] and row["right_layer"] for row in result["faults"]), result["faults"]


def test_a_rung_that_does_not_apply_is_told_with_its_reason_and_proves_nothing_alone(tmp_path: Path) -> None:
    plan = Plan(catalog.tiny(catalog.get_spec("transformer_block")), ("pytorch", "jax"), "float64", rungs=(1, 2))
    assert list(plan.not_applicable) == [2]
    assert Plan(catalog.get_spec("mlp"), ("pytorch", "jax"), "float64").not_applicable == {}
    proof = prove(plan, None, tmp_path / "run")
    assert proof.passed
    made = prove_certificate("tiny", [proof])
    assert [row["number"] for row in made["rungs"]] == [1]
    (row,) = made["not_applicable"]
    assert (row["number"], row["name"]) == (2, "preprocessing")
    assert "takes features (N, tokens, width)" in row["reason"]
    assert f"2 preprocessing             n/a: {row['reason']}" in table(made)
    proof.plan = dataclasses.replace(plan, rungs=(2,))
    assert not proof.passed, "of a plan with nothing to climb, nothing is proven"


def test_every_fault_names_a_row_of_the_numerics_table_and_a_rung() -> None:
    names = [fault.name for fault in faults.FAULTS]
    assert len(set(names)) == len(names) >= 20
    covered = {fault.numerics for fault in faults.FAULTS} | set(faults.NOT_EXPRESSIBLE)
    assert covered == set(range(1, 39))


@pytest.mark.parametrize("framework", list(contract.FRAMEWORKS))
def test_every_native_fault_is_planted_by_some_room_and_every_planting_has_a_row(framework: str) -> None:
    native = {fault.name for fault in faults.FAULTS if fault.plant is None}
    planted = set(contract.load(framework).PLANTINGS)
    assert planted <= native
    assert native - planted <= {"jpeg_fast_dct"}


def test_models_in_one_process_are_compared_and_left_as_they_were() -> None:
    spec = catalog.tiny(catalog.get_spec("resnet18_cifar"))
    weights = initialize.parity_weights(spec, 1)
    models = [contract.load(name).create_model(spec, weights, precision="float64", device="cpu") for name in ("pytorch", "jax")]
    assert first_divergence(*models) is None
    for model in models:
        held = model.weights()
        assert all(np.array_equal(held[name], value) for name, value in weights.items())
    spoiled = dict(weights)
    spoiled["layer2.0.conv1.weight"] = weights["layer2.0.conv1.weight"] * (1 + 1e-12)
    models[1].load_weights(spoiled)
    found = first_divergence(*models)
    assert found is not None
    assert found.tensor == "layer2.0.conv1.weight"


def test_a_plan_survives_json() -> None:
    plan = Plan(catalog.get_spec("resnet50", num_classes=7), ("pytorch", "jax"), "float32", faults=("relu_missing",))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_inputs_are_the_same_on_every_machine() -> None:
    plan = Plan(catalog.get_spec("resnet20"), ("pytorch", "jax"), "float64")
    images, labels = training_batch(plan, 3)
    again = training_batch(plan, 3)
    assert np.array_equal(images, again[0])
    assert labels.dtype == np.int64
    assert set(encoded_images(plan.spec.preprocessing)) == {"wide.jpg", "tall.jpg", "square.jpg", "small.png"}
