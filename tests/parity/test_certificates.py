"""The committed evidence: every catalogued model has a certificate of today's spec, and every planted fault was caught."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from triptych.core import catalog
from triptych.parity import faults
from triptych.parity.certify import LARGE
from triptych.parity.plan import Plan, spec_sha256

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GIB = 2**30


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def certificate_of(model: str) -> dict[str, Any]:
    return read(RESULTS / "certificates" / f"{model}.json")


def test_there_is_a_certificate_for_each_catalogued_model() -> None:
    assert {path.stem for path in (RESULTS / "certificates").glob("*.json")} == set(catalog.CATALOG)


@pytest.mark.parametrize("model", list(catalog.CATALOG))
def test_every_catalogued_model_is_certified_as_it_stands(model: str) -> None:
    certificate = certificate_of(model)
    assert certificate["verdict"] == "pass"
    assert certificate["first_divergence"] is None
    assert certificate["spec_sha256"] == spec_sha256(catalog.get_spec(model))
    climbed = [(row["precision"], row["number"]) for row in certificate["rungs"]]
    idle = {row["number"]: row["reason"] for row in certificate.get("not_applicable", [])}
    assert idle == Plan(catalog.get_spec(model), ("pytorch", "jax"), "float64").not_applicable
    assert climbed == [(precision, number) for precision in ("float64", "float32") for number in range(1, 9) if number not in idle]
    assert all(row["pairs"] == 3 and row["passed"] for row in certificate["rungs"])


@pytest.mark.parametrize("model", list(catalog.CATALOG))
def test_a_climb_stays_within_memory_and_disk(model: str) -> None:
    large = sum(math.prod(tensor.shape) for tensor in catalog.get_spec(model).parameters()) > LARGE
    for precision, used in certificate_of(model)["resources"].items():
        assert used["peak_disk_bytes"] <= 4 * GIB, precision
        assert max(used["peak_memory_bytes"].values()) <= (7 if large else 6) * GIB, precision


@pytest.mark.parametrize("model", ["resnet20", "resnet50", "vit_tiny_patch16_224", "transformer_block", "text_image"])
def test_every_planted_fault_was_caught_at_its_rung_and_layer(model: str) -> None:
    table = read(RESULTS / "faults" / f"{model}.json")
    assert table["clean"] == "pass"
    planted = {row["name"] for row in table["faults"]}
    assert planted == set(faults.expressible(catalog.tiny(catalog.get_spec(model)))[0])
    assert len(planted) >= 20
    assert all(row["caught"] and row["right_rung"] and row["right_layer"] for row in table["faults"])
