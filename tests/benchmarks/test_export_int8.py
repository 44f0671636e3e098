"""The record of int8: what the bars ask, row by row, and the document that shows it."""

from __future__ import annotations

import json

import export_int8
import export_matrix
import pytest
from measuring import RESULTS

from triptych.core.tolerance import EXPORTED

RECORDED = json.loads((RESULTS / "export" / "int8.json").read_text())
RUNTIMES = ["onnxruntime", "openvino", "litert"]


def test_the_document_has_the_tables_of_the_record() -> None:
    content = export_int8.table(RECORDED)
    assert f"<!-- begin int8 -->\n{content}\n<!-- end int8 -->" in export_matrix.DOCUMENT.read_text(), (
        "benchmarks/export_int8.py --write-doc"
    )


def test_every_runtime_keeps_its_accuracy_on_all_test_images() -> None:
    rows = RECORDED["accuracy"]["rows"]
    assert [row["runtime"] for row in rows] == RUNTIMES
    for row in rows:
        assert row["images"] == row["of_images"] == 10_000
        assert row["lost_points"] == pytest.approx(100 * (row["accuracy_float32"] - row["accuracy_int8"]))
        assert row["holds"]
        assert row["lost_points"] <= export_int8.LOST_POINTS
        assert row["same_class"] > 9_800
        assert row["worst_error"] <= EXPORTED["int8"]
        assert row["calibration"]["split"] == "train"


def test_every_runtime_is_timed_at_both_batch_sizes() -> None:
    rows = RECORDED["speed"]["rows"]
    assert [(row["runtime"], row["batch_size"]) for row in rows] == [(name, size) for name in RUNTIMES for size in export_int8.BATCHES]
    for row in rows:
        low, high = row["times_as_fast_interval"]
        assert low <= row["times_as_fast"] <= high
        assert row["holds"] == (low >= export_int8.FASTER)
