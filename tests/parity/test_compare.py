"""The comparer: every way in which two tensors can differ is seen, and none is averaged away (numerics 30)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from triptych.core import catalog, philox, tolerance
from triptych.core.difference import NOTHING_IN_COMMON, scaled_error
from triptych.parity.compare import Comparer, free_run_row, implied_update, layer_of, rung_rows, worst_pair
from triptych.parity.observation import Observation
from triptych.parity.plan import Plan

SPEC = catalog.tiny(catalog.get_spec("resnet20"))
PLAN = Plan(SPEC, ("pytorch", "jax"), "float64")
FLOATS = arrays(np.float64, (4, 3), elements=st.floats(-1e6, 1e6))


def see(name: str, value: np.ndarray, *, rung: int = 3, group: str = "activation", step: int = 0) -> Observation:
    return Observation(rung, group, name, value, step)


@given(FLOATS, FLOATS)
def test_scaled_error_is_symmetric_bounded_and_zero_only_for_equals(a: np.ndarray, b: np.ndarray) -> None:
    assert scaled_error(a, b) == scaled_error(b, a)
    assert 0.0 <= scaled_error(a, b) <= NOTHING_IN_COMMON
    assert (scaled_error(a, b) == 0.0) == bool((a == b).all())


def test_differences_that_cancel_in_the_mean_are_seen() -> None:
    a = np.ones((2, 8))
    b = a + np.tile([0.5, -0.5], 8).reshape(2, 8)
    assert float((a - b).mean()) == 0.0
    assert scaled_error(a, b) == pytest.approx(1 / 3)


def test_a_permutation_is_a_difference() -> None:
    a = np.arange(6.0)
    assert scaled_error(a, a[::-1]) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_never_pass_not_even_against_themselves(bad: float) -> None:
    a = np.array([1.0, bad])
    assert scaled_error(a, np.array([1.0, 2.0])) == NOTHING_IN_COMMON
    comparison = Comparer(PLAN).compare(see("conv1", a), {"pytorch": a, "jax": a.copy()})
    assert not comparison.passed


def test_shapes_that_would_broadcast_have_nothing_in_common() -> None:
    assert scaled_error(np.zeros((2, 1)), np.zeros((2, 3))) == NOTHING_IN_COMMON
    assert scaled_error(np.empty((0, 0)), np.empty(0)) == NOTHING_IN_COMMON


def test_two_missing_tensors_do_not_count_as_equal() -> None:
    missing = np.empty((0, 0))
    assert not Comparer(PLAN).compare(see("conv1", missing), {"pytorch": missing, "jax": missing.copy()}).passed


def test_the_worst_of_three_pairs_is_named() -> None:
    values = {"pytorch": np.ones(2), "tensorflow": np.ones(2) * 1.1, "jax": np.ones(2) * 0.9}
    error, pair = worst_pair(values)
    assert pair == ("tensorflow", "jax")
    assert error == pytest.approx(0.2 / 1.1)


def test_the_first_divergence_is_the_first_in_execution_order_not_the_largest() -> None:
    comparer = Comparer(PLAN)
    good, small, large = np.ones(3), np.ones(3) * (1 + 1e-9), np.ones(3) * 2
    streams = {
        "pytorch": [see("conv1", good), see("bn1", good), see("relu", good)],
        "jax": [see("conv1", good), see("bn1", small), see("relu", large)],
    }
    found = list(comparer.consume(streams))
    assert [c.passed for c in found] == [True, False, False]
    assert comparer.first is not None
    assert comparer.first.tensor == "bn1"
    assert set(comparer.first_tensors) == {"pytorch", "jax"}
    row = rung_rows(PLAN, comparer.comparisons, 1)[0]
    assert (row["passed"], row["tensor"], row["tensors"]) == (False, "relu", 3)


@pytest.mark.parametrize("other", [[], [("bn1", 1.0)]])
def test_a_framework_that_reports_less_or_something_else_fails(other: list[tuple[str, float]]) -> None:
    comparer = Comparer(PLAN)
    streams = {"pytorch": [see("conv1", np.ones(1))], "jax": [see(name, np.full(1, value)) for name, value in other]}
    found = list(comparer.consume(streams))
    assert [c.error for c in found] == [NOTHING_IN_COMMON]
    assert comparer.first is not None


def test_exact_groups_tolerate_nothing() -> None:
    a = np.array([1.0, 2.0])
    comparison = Comparer(PLAN).compare(see("fc.weight", a, rung=1, group="weights"), {"pytorch": a, "jax": np.nextafter(a, 3.0)})
    assert (comparison.tolerance, comparison.passed) == (0.0, False)


def test_adamw_weights_are_held_to_the_update_their_own_moments_imply() -> None:
    """Moments that differ within their tolerance explain a larger difference of weights; an unexplained one is caught."""
    shape, w = (64,), philox.normal("w", (64,))
    first, second = philox.normal("m", shape) * 1e-9, philox.normal("v", shape) ** 2 * 1e-20
    moved = first * (1.0 + 1e-6)
    for spoiled, passed in ((0.0, True), (1e-9, False)):
        comparer = Comparer(PLAN)
        sides = {
            "pytorch": (first, second, w + implied_update(PLAN, first, second, 0, 1)),
            "jax": (moved, second, w + implied_update(PLAN, moved, second, 0, 1) + spoiled),
        }
        for index, group in enumerate(("exp_avg", "exp_avg_sq", "adamw_weight")):
            values = {name: side[index] for name, side in sides.items()}
            last = comparer.compare(see("adamw fc.weight", values["pytorch"], rung=7, group=group), values)
        assert scaled_error(sides["pytorch"][2], sides["jax"][2]) > tolerance.UPDATE
        assert last.passed is passed


def test_a_free_run_without_enough_comparable_steps_is_no_evidence() -> None:
    free = {("pytorch", "jax"): [1e-13, 1e-2, 1.0]}
    row = free_run_row(PLAN, "sgd", free, [[1e-13, 1e-2, 1.0]] * 5)
    assert (row["passed"], row["steps"]) == (False, 1)
    assert "no evidence" in row["tensor"]


@pytest.mark.parametrize(("factor", "passed"), [(2.0, True), (6.0, False)])
def test_the_free_run_is_held_against_the_self_divergence(factor: float, passed: bool) -> None:
    itself = [1e-13, 1e-11, 1e-9, 1e-7, 0.5]
    row = free_run_row(PLAN, "sgd", {("pytorch", "jax"): [factor * v for v in itself[:-1]] + [1.9]}, [itself] * 5)
    assert row["passed"] is passed
    assert row["worst_error"] == pytest.approx(factor)
    assert row["steps"] == 4


def test_the_layer_of_a_tensor_is_found_in_every_spelling() -> None:
    spelled = ["layer2.0.bn1", "layer2.0.bn1 (probe)", "layer2.0.bn1.running_var", "sgd momentum layer2.0.bn1.weight"]
    assert {layer_of(PLAN, text) for text in spelled} == {"layer2.0.bn1"}
    assert layer_of(PLAN, "loss") is None
