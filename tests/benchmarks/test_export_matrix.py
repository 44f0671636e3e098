"""The recorded matrix of formats, and the document that shows it."""

from __future__ import annotations

import json

import export_matrix
from measuring import RESULTS, marked

from triptych.core.tolerance import EXPORTED
from triptych.export import matrix

RECORDED = json.loads((RESULTS / "export" / "matrix.json").read_text())


def test_the_document_has_the_tables_of_the_record_and_of_the_code() -> None:
    text = export_matrix.DOCUMENT.read_text()
    for name, content in export_matrix.blocks(RECORDED).items():
        assert marked(name, content) in text, "benchmarks/export_matrix.py --write-doc"


def test_every_possible_cell_is_on_record_and_kept_its_bound() -> None:
    rows = {export_matrix.name_of(row): row for row in RECORDED["rows"]}
    assert rows.keys() == {cell.name for cell in matrix.CELLS if cell.possible}
    for row in rows.values():
        assert row["passed"], row["failure"]
        assert row["worst_error"] <= row["tolerance"] == EXPORTED[matrix.FORMATS[row["format"]].bound]
        low, high = row["latency"]["1"]["interval"]
        assert 0 < low <= row["latency"]["1"]["median_seconds"] <= high
