"""`export.json` vouches for the files beside it, and a divergence is found by values alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import storage
from triptych.core.errors import InputRefused
from triptych.export import record
from triptych.export.divergence import first_divergence


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A directory with a model of two files and its record."""
    folder = tmp_path / "tensorflow-saved_model"
    (folder / "saved_model" / "variables").mkdir(parents=True)
    (folder / "saved_model" / "saved_model.pb").write_bytes(b"graph")
    (folder / "saved_model" / "variables" / "data").write_bytes(b"weights")
    (folder / record.NAME).write_bytes(storage.json_bytes({"schema": record.SCHEMA, "passed": True, "files": record.listed(folder)}))
    return folder


def test_what_was_exported_is_read_back(artefact: Path) -> None:
    assert sorted(record.read(artefact)["files"]) == ["saved_model/saved_model.pb", "saved_model/variables/data"]


def test_what_was_altered_added_or_taken_away_is_refused_by_name(artefact: Path) -> None:
    weights = artefact / "saved_model" / "variables" / "data"
    weights.write_bytes(b"Weights")
    with pytest.raises(InputRefused, match="saved_model/variables/data is not what was exported"):
        record.read(artefact)
    weights.unlink()
    with pytest.raises(InputRefused, match="saved_model/variables/data is not what was exported"):
        record.read(artefact)
    weights.write_bytes(b"weights")
    (artefact / "more").write_bytes(b"")
    with pytest.raises(InputRefused, match="more is not what was exported"):
        record.read(artefact)


@pytest.mark.parametrize("content", [b"[]", b"{", json.dumps({"schema": 99}).encode(), json.dumps({"schema": 1, "files": 3}).encode()])
def test_a_damaged_record_is_refused(content: bytes, artefact: Path) -> None:
    (artefact / record.NAME).write_bytes(content)
    with pytest.raises(InputRefused):
        record.read(artefact)


def nodes(*values: np.ndarray) -> Any:
    """A file of nodes with these outputs."""
    return lambda path, images: [(f"node{number}", "Conv", value) for number, value in enumerate(values)]


def test_the_first_divergence_is_named_across_layouts_and_merged_layers() -> None:
    a, b, c = np.random.default_rng(0).standard_normal((3, 1, 4, 4, 8))
    layers = {"conv1": a, "bn1": b, "relu": c, "fc": np.ones((1, 8))}
    first = [value.transpose(0, 3, 1, 2) for value in (a, b, c)]
    whole = nodes(*first, np.ones((1, 8)))
    assert first_divergence(Path(), a, layers, whole) is None
    merged = nodes(*first[1:], np.ones((1, 8)))
    assert first_divergence(Path(), a, layers, merged) is None, "conv1 went into bn1, which is right"
    wrong = first_divergence(Path(), a, layers, nodes(first[0], first[1] * 1.01, first[2] * 1.01, np.full((1, 8), 3.0)))
    assert wrong is not None
    assert (wrong["layer"], wrong["node"], wrong["operator"]) == ("bn1", "node1", "Conv")
    assert wrong["error"] == pytest.approx(0.01, rel=0.02)
