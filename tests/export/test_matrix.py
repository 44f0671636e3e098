"""The table of formats: whole, with a reason for what is impossible, and what the rooms, the adapters and the document say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from triptych.core import contract
from triptych.core.errors import UsageError
from triptych.core.tolerance import EXPORTED
from triptych.export import matrix, runtimes

PACKAGE = Path(matrix.__file__).parent


def test_every_source_has_one_cell_a_format_and_each_says_how_or_why_not() -> None:
    cells = [(cell.source, cell.format) for cell in matrix.CELLS]
    assert sorted(cells) == sorted((source, name) for source in matrix.SOURCES for name in matrix.FORMATS)
    assert all(cell.how for cell in matrix.CELLS)
    assert {row.bound for row in matrix.FORMATS.values()} == set(EXPORTED)


def test_every_runtime_has_an_adapter_and_verifies_a_cell() -> None:
    assert {cell.runtime for cell in matrix.CELLS if cell.possible} == set(runtimes.ADAPTERS)
    files = {file.stem.removeprefix("with_") for file in (PACKAGE / "runtimes").glob("with_*.py")}
    assert files == set(runtimes.ADAPTERS)


@pytest.mark.parametrize("framework", matrix.SOURCES)
def test_a_room_writes_what_the_table_says(framework: str) -> None:
    if framework not in contract.installed():
        pytest.skip(f"{framework} is not installed")
    contract.load(framework)
    writers = importlib.import_module(f"{contract.FRAMEWORKS[framework].package}.export").WRITERS
    asked = {cell.via or cell.format for cell in matrix.CELLS if cell.source == framework and cell.possible}
    assert set(writers) == asked


def test_what_is_impossible_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match=r"tensorflow does not export to torchscript: TorchScript and torch.export are programs of torch"):
        matrix.chosen(["tensorflow"], ["torchscript"])
    with pytest.raises(UsageError, match="unknown format 'tflight'; choose from all, torchscript"):
        matrix.chosen(["tensorflow"], ["tflight"])
    with pytest.raises(UsageError, match="unknown framework 'caffe'"):
        matrix.chosen(["caffe"], ["all"])


def test_all_is_every_possible_cell_and_one_format_those_that_have_it() -> None:
    every = matrix.chosen(list(matrix.SOURCES), ["all"])
    assert every == [cell for cell in matrix.CELLS if cell.possible]
    assert [cell.layout for cell in matrix.chosen(list(matrix.SOURCES), ["onnx"])] == ["NCHW", "NHWC", "NHWC"]
    assert [cell.layout for cell in matrix.chosen(list(matrix.SOURCES), ["saved_model"])] == ["NHWC"] * 3
    assert [cell.source for cell in matrix.chosen(list(matrix.SOURCES), ["keras"])] == ["tensorflow"]


def test_a_missing_library_is_told_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = matrix.chosen(["jax"], ["onnx"])
    found = contract.importlib.util.find_spec
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda name: None if name == "jax2onnx" else found(name))
    line = "ONNX, opset 18 from jax is not installed (jax2onnx not found). Install it with: pip install 'triptych[export]'"
    assert cell.missing() in (line, runtimes.missing("onnxruntime") or line)
