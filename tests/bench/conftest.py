"""Workers that run in the test's own process, and a proof of a tiny model that need not be climbed for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from triptych.bench import record, turns
from triptych.bench.proof import Proof
from triptych.bench.suite import Suite
from triptych.bench.turns import Group, run_group
from triptych.bench.worker import Worker
from triptych.core import catalog, initialize
from triptych.core.conversation import Failed

OPTIONS = {"hidden": [32], "image_size": 8}
CERTIFICATE = {
    "verdict": "pass", "frameworks": ["pytorch", "tensorflow", "jax"], "rungs": [],
    "spec_sha256": "s", "weights_sha256": "w", "code_sha256": "c",
}  # fmt: skip


class Local:
    """A worker without a process, through the same plain data. `spoil` may change a contender when it is built."""

    def __init__(self, framework: str, spoil: Callable[[Any], Any] = lambda contender: contender) -> None:
        self.worker, self.spoil, self.asked = Worker(framework), spoil, []

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """As a process answers."""
        self.asked.append(do)
        try:
            answer = self.worker.ask(do, **json.loads(json.dumps(given)))
        except Exception as error:
            raise Failed(type(error).__name__, str(error)) from error
        if do == "build":
            held = self.worker.held[given["key"]]
            held.contender = self.spoil(held.contender)
        return json.loads(json.dumps(answer))


class Metronome:
    """A calibrator whose kernel always takes as long."""

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """A millisecond."""
        return {"seconds": 1e-3}


class Lab:
    """A tiny model with a certificate that was not climbed for, and who times it."""

    Local, Metronome = Local, Metronome
    certificate, options = CERTIFICATE, OPTIONS

    def __init__(self, weights: Path) -> None:
        self.proof = self.proven(OPTIONS, weights)

    def proven(self, options: dict[str, Any], weights: Path) -> Proof:
        """A certificate for a perceptron with these options."""
        save_file(initialize.parity_weights(catalog.get_spec("mlp", **options), 0, "float32"), weights)
        return Proof(CERTIFICATE, weights)

    def suite(self, **changes: Any) -> Suite:
        """A multilayer perceptron of one hidden layer, in every framework, forward only, unless `changes` say otherwise."""
        given = {"name": "tiny", "models": [{"name": "mlp", "options": OPTIONS}], "modes": ["inference"], "batch_sizes": [4], "rounds": 4}
        return Suite.model_validate({**given, **changes})

    def group(self, suite: Suite, workers: dict[str, Any], proof: Proof | None = None) -> Group:
        """The suite's only group, run."""
        (cases,) = suite.groups()
        return run_group(cases, workers, Metronome(), suite, proof or self.proof)

    def record(self, path: Path, suite: Suite, groups: list[Group]) -> dict[str, Any]:
        """The record of some groups, written."""
        machine = {"peak_flops": 1e11, "threads": 1, "cores": [0], "numerics": {}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(record, "environment", dict)  # it asks git and the driver, which takes longer than all the rest
            made = record.make(suite, "triptych bench tiny", machine, {}, {"mlp": self.proof}, groups)
        record.write(path, made, groups)
        return made


@pytest.fixture(autouse=True)
def _without_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is made of the seconds here."""
    monkeypatch.setattr(turns, "SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The bench of these tests."""
    return Lab(tmp_path_factory.mktemp("proof") / "weights.safetensors")
