"""How records are written."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def measuring() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measuring", BENCHMARKS / "measuring.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_record_is_replaced_whole_and_never_holds_nan(measuring, tmp_path):
    path = tmp_path / "speed" / "step.json"
    measuring.write_json(path, {"ratio": None})
    with pytest.raises(ValueError, match="JSON"):
        measuring.write_json(path, {"ratio": float("nan")})
    assert json.loads(path.read_text()) == {"ratio": None}
    assert [file.name for file in path.parent.iterdir()] == ["step.json"]


def test_the_head_names_the_command_and_the_environment(measuring):
    head = measuring.head("benchmarks/step_speed.py")
    assert head["command"] == "benchmarks/step_speed.py"
    assert len(head["environment"]["triptych"]["code_sha256"]) == 64
