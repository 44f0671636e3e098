"""Nothing of ours is timed without a proof: the ladder for these weights, then the outputs of every lane while it is timed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import contract, environment, workers
from triptych.core.difference import error_at_scale, magnitude
from triptych.core.errors import TriptychError
from triptych.core.spec import Spec
from triptych.core.tolerance import FREE_RUN_HORIZON, FREE_RUN_RATIO, LOGITS_FLOAT32
from triptych.parity import plan as plans
from triptych.parity.certify import certify
from triptych.parity.observation import write_json

CODE = ("core", "data", "in_pytorch", "in_tensorflow", "in_jax", "parity")
RUNGS = {"inference": (1, 3), "training_step": (1, 3, 4, 5, 6), "training_step_with_data": (1, 2, 3, 4, 5, 6)}
"""What the ladder is climbed for, by the mode that is timed, in float64; in float32, in which it is timed, names and logits."""
FLOAT32_RUNGS = (1, 3)


@dataclass(frozen=True, slots=True)
class Proof:
    """A certificate and the weights it is about: float32, parity weights of seed 0, in a file that every worker reads.

    `exported` is the ONNX model of these weights, or the error that left none; None when no runtime needs it.
    """

    certificate: dict[str, Any]
    weights: Path
    exported: Path | TriptychError | None = None

    @property
    def passed(self) -> bool:
        """Whether our lanes may run."""
        return bool(self.certificate["verdict"] == "pass")

    def summary(self) -> dict[str, Any]:
        """What stands beside every row."""
        kept = ("verdict", "frameworks", "spec_sha256", "weights_sha256", "code_sha256")
        rungs = [
            {key: row[key] for key in ("number", "name", "precision", "worst_error", "tolerance", "passed")}
            for row in self.certificate["rungs"]
        ]
        return {"kind": "parity", **{key: self.certificate[key] for key in kept}, "rungs": rungs}


def prove(spec: Spec, frameworks: Collection[str], modes: Collection[str], work: Path, progress: Callable[[str], None]) -> Proof:
    """The proof of `spec` in these frameworks, from `work` when the same was proven there by the same code and libraries.

    One framework alone is proven against whatever else is installed. UsageError when that is nothing.
    """
    chosen = [name for name in contract.FRAMEWORKS if name in frameworks]
    chosen = chosen if len(chosen) > 1 else workers.available()
    rungs = {"float64": max((RUNGS[mode] for mode in modes), key=len), "float32": FLOAT32_RUNGS}
    what = {
        "spec": plans.spec_sha256(spec), "frameworks": chosen, "rungs": rungs, "code": environment.code_hash(*CODE),
        "versions": environment.versions(), "cpu": environment.cpu()["model"],
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
    directory = work / f"proof-{spec.name}-{digest}"
    done, weights = directory / "certificate.json", directory / "weights.safetensors"
    if not done.exists():
        shutil.rmtree(directory, ignore_errors=True)
        run = directory / "run"
        certificate = certify(spec.name, spec, None, tuple(chosen), ("float64", "float32"), "cpu", run, progress, rungs)
        shutil.move(run / "float32" / "inputs.safetensors", weights)
        shutil.rmtree(run)
        write_json(done, certificate)
    return Proof(json.loads(done.read_text()), weights)


Outputs = list[Any]
"""What a turn that is checked tells: the logits; or the loss, and the loss after the update, of the same batch."""


def errors(outputs: Outputs, reference: Outputs) -> list[float]:
    """How far each is from the reference's, at the scale of the largest: a loss that an update brought near zero keeps the first's."""
    ours, theirs = ([np.atleast_1d(each) for each in given] for given in (outputs, reference))
    scale = max(magnitude(each) for each in (*ours, *theirs))
    return [error_at_scale(a, b, scale) for a, b in zip(ours, theirs, strict=True)]


def tolerances(strayed: list[Outputs], reference: Outputs) -> list[float]:
    """The bound of each output: what float32 logits are allowed, and so the first loss.

    After an update that is less than rounding makes of it: in the backward pass a ReLU whose input is within rounding of zero takes the
    other side. What that makes is measured, as on rung 8: `strayed` are the reference's own outputs when its weights move by one unit in
    the last place, and a lane may differ `FREE_RUN_RATIO` times as far. Beyond `FREE_RUN_HORIZON` that is no evidence, and buys no more.
    """
    rounding = min(FREE_RUN_HORIZON, max((errors(each, reference)[-1] for each in strayed), default=0.0))
    return [LOGITS_FLOAT32, *(max(LOGITS_FLOAT32, FREE_RUN_RATIO * rounding) for _ in reference[1:])]


@dataclass(slots=True)
class Checks:
    """How far one lane's outputs were from the proven ones, on the turns that were looked at, and how far they may be."""

    against: str
    tolerances: list[float]
    errors: list[list[float]] = field(default_factory=list)

    def look(self, outputs: Outputs, reference: Outputs) -> None:
        """Compare one turn's outputs."""
        self.errors.append(errors(outputs, reference))

    @property
    def worst(self) -> list[float]:
        """The largest error of each output."""
        return [max(column) for column in zip(*self.errors, strict=True)]

    @property
    def failure(self) -> str | None:
        """What went wrong; None while all is well."""
        for what, worst, allowed in zip(("outputs are", "loss after the update is"), self.worst, self.tolerances, strict=False):
            if worst > allowed:
                return f"its {what} {worst:.1e} from {self.against}'s, more than {allowed:.1e}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain data; `after_update` where the lane trains."""
        first, *second = [{"worst_error": worst, "tolerance": allowed} for worst, allowed in zip(self.worst, self.tolerances, strict=True)]
        return {"against": self.against, "turns": len(self.errors), **first, **({"after_update": second[0]} if second else {})}
