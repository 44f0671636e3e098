"""The example of CONTRIBUTING.md is planted as it is printed there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize
from triptych.parity import faults
from triptych.parity.plan import Plan, forward_inputs
from triptych.parity.subject import Subject

PLAN = Plan(catalog.get_spec("mlp", hidden=(5, 4)), ("pytorch", "jax"), "float64")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first Python example of CONTRIBUTING.md, as a file."""
    found = re.search(r"```python\n(.*?)```", (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(), re.S)
    assert found is not None
    path = tmp_path_factory.mktemp("outside") / "mine.py"
    path.write_text(found[1])
    return path


def subject(framework: str) -> Subject:
    """One framework's side, with biases that are not zero."""
    return Subject(framework, PLAN, initialize.parity_weights(PLAN.spec, 0))


@pytest.mark.parametrize("framework", list(contract.FRAMEWORKS))
def test_the_layer_fault_changes_its_layer_and_nothing_before_and_is_gone_afterwards(example: Path, framework: str) -> None:
    side, images = subject(framework), forward_inputs(PLAN)
    fault = faults.find(f"{example}:bias_forgotten", PLAN.spec)
    clean = side.model.forward(images).intermediates
    with fault.plant(side):
        faulty = side.model.forward(images).intermediates
    assert np.array_equal(faulty["relu1"], clean["relu1"])
    assert faulty["fc2"] == pytest.approx(clean["fc2"] - side.weights["fc2.bias"], abs=1e-12)
    assert np.array_equal(side.model.forward(images).intermediates["fc"], clean["fc"])


def test_the_data_fault_leaves_other_frameworks_clean(example: Path) -> None:
    fault = faults.find(f"{example}:warmup_forgotten", PLAN.spec)
    with pytest.raises(faults.LeftClean):
        fault.plant(subject("pytorch"))
    side, schedule = subject("jax"), PLAN.sgd.schedule
    with fault.plant(side):
        assert side.learning_rate(schedule, 0) == schedule.peak
