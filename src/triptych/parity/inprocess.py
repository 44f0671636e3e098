"""The ladder within one process: for `triptych.assert_equal`, and for measuring noise."""

from __future__ import annotations

from triptych.core.contract import Model
from triptych.core.errors import UsageError
from triptych.parity.compare import Comparer, Comparison
from triptych.parity.plan import Plan
from triptych.parity.rungs import climb
from triptych.parity.subject import Subject
from triptych.parity.trajectory import MemoryTrajectory

RUNGS = (1, 3, 4, 5)
"""What two living models can be asked without changing them: their own weights, both forward modes, gradients."""


def first_divergence(a: Model, b: Model) -> Comparison | None:
    """The first tensor, in execution order, in which two models of one spec and precision differ; None when there is none."""
    if a.spec != b.spec or a.precision != b.precision:
        raise UsageError(f"only models of one spec and precision can be equal: {a.spec.name} {a.precision}, {b.spec.name} {b.precision}")
    plan = Plan(a.spec, ("a", "b"), a.precision, rungs=RUNGS, device="auto")
    comparer = Comparer(plan)
    streams = {side: climb(_subject(plan, model), MemoryTrajectory(), RUNGS) for side, model in (("a", a), ("b", b))}
    return next((comparison for comparison in comparer.consume(streams) if not comparison.passed), None)


def _subject(plan: Plan, model: Model) -> Subject:
    """A subject around a living model. Training rungs run on a copy at their image size, so that the model stays as it is."""
    return Subject(model.framework, plan, model.weights(), model=model)
