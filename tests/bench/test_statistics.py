"""The arithmetic that every figure of a benchmark rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.bench import statistics

SECONDS = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30)


def test_a_slowdown_that_hits_both_of_a_pair_changes_nothing() -> None:
    weather = np.exp(np.random.default_rng(1).normal(size=40))
    ratio, (low, high) = statistics.paired_interval(1.25 * weather, weather)
    assert ratio == pytest.approx(1.25)
    assert (low, high) == pytest.approx((1.25, 1.25))


@pytest.mark.parametrize("kind", ["paired", "unpaired", "median"])
def test_an_interval_covers_the_truth_as_often_as_it_says(kind: str) -> None:
    random, covered, truth = np.random.default_rng(2), 0, 1.1
    for _ in range(100):
        a, b = truth * np.exp(0.05 * random.normal(size=30)), np.exp(0.05 * random.normal(size=30))
        whole = {
            "paired": lambda a=a, b=b: statistics.paired_interval(a, b),
            "unpaired": lambda a=a, b=b: statistics.unpaired_interval(a, b),
            "median": lambda a=a: statistics.median_interval(a),
        }
        _, (low, high) = whole[kind]()
        covered += low <= truth <= high
    assert 88 <= covered <= 100


@given(SECONDS)
def test_an_interval_holds_its_median_and_lies_within_the_samples(samples: list[float]) -> None:
    median, (low, high) = statistics.median_interval(samples)
    assert min(samples) <= low <= median <= high <= max(samples)


@given(SECONDS)
def test_the_same_samples_give_the_same_figures(samples: list[float]) -> None:
    assert statistics.median_interval(samples) == statistics.median_interval(samples)
    ratio, (low, high) = statistics.unpaired_interval(samples, samples)
    assert ratio == pytest.approx(1.0)
    assert low <= 1.0 + 1e-9
    assert high >= 1.0 - 1e-9


def test_noise_widens_the_interval() -> None:
    random = np.random.default_rng(3)
    quiet, loud = (np.exp(scale * random.normal(size=20)) for scale in (0.01, 0.2))
    width = [high - low for _, (low, high) in map(statistics.median_interval, (quiet, loud))]
    assert 0 < width[0] < width[1] / 4


def test_one_outlier_moves_no_median_much() -> None:
    samples = [1.0 + 0.001 * i for i in range(21)]
    median, _ = statistics.median_interval([*samples, 100.0])
    assert median == pytest.approx(statistics.median_interval(samples)[0], rel=1e-3)


def test_a_machine_that_is_slower_as_a_whole_is_taken_out() -> None:
    random = np.random.default_rng(4)
    old, new = (np.exp(0.02 * random.normal(size=60)) for _ in range(2))
    kernel = np.exp(0.02 * random.normal(size=60))
    ratio, (low, high) = statistics.unpaired_interval(1.3 * new, old, 1.3 * kernel, kernel)
    assert low < 1.0 < high
    assert ratio == pytest.approx(1.0, abs=0.02)
    assert statistics.unpaired_interval(1.3 * new, old)[1][0] > 1.2


@pytest.mark.parametrize(("extra", "far"), [([], 0), ([1.06], 0), ([1.2], 1), ([0.5, 100.0], 2)])
def test_samples_far_out_are_counted(extra: list[float], far: int) -> None:
    assert statistics.outliers([1.0 + 0.001 * i for i in range(41)] + extra) == far


@pytest.mark.parametrize(
    ("count", "told"),
    [(63, set()), (64, {"p90"}), (129, {"p90"}), (130, {"p90", "p95"}), (661, {"p90", "p95"}), (662, {"p90", "p95", "p99"})],
)
def test_percentiles_are_told_with_enough_samples_only(count: int, told: set[str]) -> None:
    found = statistics.percentiles(np.arange(1, count + 1) / count)
    assert {name for name, value in found.items() if value is not None} == told
    for name in told:
        assert found[name] == pytest.approx(float(name[1:]) / 100, abs=0.02)


@pytest.mark.parametrize(
    ("interval", "floor", "expected"),
    [
        ((0.9, 1.1), 0.0, None),
        ((1.0, 1.1), 0.0, None),  # an interval that touches 1 does not exclude it
        ((1.01, 1.05), 0.0, "b"),
        ((0.90, 0.95), 0.0, "a"),
        ((1.01, 1.05), 0.05, None),  # no more than what the machine makes of nothing
        ((1.06, 1.12), 0.05, "b"),
        ((0.97, 0.99), 0.05, None),
    ],
)  # fmt: skip
def test_there_is_a_winner_only_when_the_data_has_one(interval: tuple[float, float], floor: float, expected: str | None) -> None:
    assert statistics.winner(interval, floor) == expected


def test_the_smallest_difference_is_the_farther_bound_either_way() -> None:
    assert statistics.smallest_difference((0.98, 1.01)) == pytest.approx(-math.log(0.98))
    assert statistics.smallest_difference((0.99, 1.04)) == pytest.approx(math.log(1.04))
    assert statistics.smallest_difference((1.0, 1.0)) == 0.0


@pytest.mark.parametrize(
    ("lane", "other", "steps"),
    [
        ((10.0, 0.5), (0.0, 1.0), 20),
        ((10.0, 0.7), (1.0, 1.0), 30),
        ((10.0, 1.0), (0.0, 1.0), None),  # nothing is saved
        ((10.0, 2.0), (0.0, 1.0), None),
        ((1.0, 0.5), (2.0, 1.0), 0),  # cheaper from the start
        ((1.0, 2.0), (2.0, 1.0), None),
    ],
)
def test_break_even(lane: tuple[float, float], other: tuple[float, float], steps: int | None) -> None:
    found = statistics.break_even_steps(*lane, *other)
    assert found == steps or (steps == 30 and found in (30, 31))


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_samples_that_are_no_pairs_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="pairs"):
        statistics.paired_interval(a, b)


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [float("inf")], [0.0], [-1.0, 1.0]])
def test_what_is_no_time_is_refused(samples: list[float]) -> None:
    for figure in (statistics.median_interval, statistics.percentiles, lambda x: statistics.unpaired_interval([1.0], x)):
        with pytest.raises(ValueError, match="samples"):
            figure(samples)
