"""`triptych doctor`: a bug report's environment, and the pip line of what is missing."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner

from triptych.cli.doctor import doctor_command


def run(*arguments: str) -> str:
    result = CliRunner().invoke(doctor_command, list(arguments))
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def without_jax(monkeypatch):
    """jax, as if it were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jax" else real(name, *rest))


def test_json_holds_environment_frameworks_disk_and_memory():
    data = json.loads(run("--json"))
    assert set(data["frameworks"]) == {"pytorch", "tensorflow", "jax"}
    assert data["disk_bytes"]["total"] >= data["disk_bytes"]["free"] > 0
    assert {"avx2", "avx512", "bf16"} <= set(data["cpu"]["simd"]) or data["cpu"]["simd"] == {}
    assert {"cpu", "memory_bytes", "versions", "variables", "triptych"} <= set(data)


def test_a_missing_framework_comes_with_its_pip_line(without_jax):
    data = json.loads(run("--json"))["frameworks"]["jax"]
    assert data == {"installed": False, "missing": ["jax"], "install": "pip install 'triptych[jax]'"}
    assert "not installed (jax not found): pip install 'triptych[jax]'" in run()


def test_text_names_the_essentials():
    text = run()
    for word in ("triptych", "python", "cpu", "cores", "simd", "memory", "disk here", "frameworks", "versions"):
        assert f"\n{word}" in "\n" + text
