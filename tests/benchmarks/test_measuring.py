"""The arithmetic that recorded speeds rest on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
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


def test_a_slowdown_that_hits_both_of_a_pair_changes_nothing(measuring):
    weather = np.exp(np.random.default_rng(1).normal(size=40))
    ratio, (low, high) = measuring.paired_interval(1.25 * weather, weather)
    assert ratio == pytest.approx(1.25)
    assert (low, high) == pytest.approx((1.25, 1.25))


def test_the_interval_covers_the_true_ratio_as_often_as_it_says(measuring):
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(100):
        noise = np.exp(0.05 * random.normal(size=30))
        _, (low, high) = measuring.paired_interval(1.1 * noise, np.ones(30))
        covered += low <= 1.1 <= high
    assert 88 <= covered <= 100


def test_noise_widens_the_interval_and_the_same_samples_give_the_same_one(measuring):
    random = np.random.default_rng(3)
    quiet, loud = (np.exp(scale * random.normal(size=20)) for scale in (0.01, 0.2))
    width = [interval[1] - interval[0] for _, interval in (measuring.paired_interval(x, np.ones(20)) for x in (quiet, loud))]
    assert 0 < width[0] < width[1] / 4
    assert measuring.paired_interval(loud, np.ones(20)) == measuring.paired_interval(loud, np.ones(20))


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_that_are_no_pairs_are_refused(measuring, a, b):
    with pytest.raises(ValueError, match="pairs"):
        measuring.paired_interval(a, b)


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
