"""Random numbers that nothing may change: bits against the published algorithm, values against the standard library."""

from __future__ import annotations

import hashlib
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import philox

GOLDEN = (0xCBCBAF5542B9EF3F, 0x38A74519F6C28ED2, 0x63B2645403627E9F, 0x4989050F99621BF6, 0x6B07B323FACBAFEC, 0x9131B69BC83445CA)


def philox4x64(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10 as Salmon et al. 2011, section 3.3, define it, in Python's integers."""
    word = 2**64 - 1
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B97F4A7C15) & word, (key[1] + i * 0xBB67AE8584CAA73B) & word
        left, right = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (right >> 64) ^ b ^ k0, right & word, (left >> 64) ^ d ^ k1, left & word
    return a, b, c, d


def test_the_reference_gives_the_authors_known_answer() -> None:
    """The first vector of `kat_vectors` in the authors' Random123 library: counter and key zero."""
    assert philox4x64((0, 0, 0, 0), (0, 0)) == (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B)


@pytest.mark.parametrize("stream", ["golden", "initialize/0/conv1.weight", ""])
def test_bits_are_philox4x64_keyed_by_the_stream(stream: str) -> None:
    digest = hashlib.sha256(stream.encode()).digest()
    key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
    expected = [word for block in (1, 2, 3) for word in philox4x64((block, 0, 0, 0), key)]
    assert philox.bits(stream, 12).tolist() == expected


def test_golden_values() -> None:
    assert tuple(philox.bits("golden", 6).tolist()) == GOLDEN
    assert philox.uniform("golden", (3,)).tolist() == [0.796076734843815, 0.2213023365391199, 0.3894407944784549]
    assert philox.normal("golden", (3,)).tolist() == [0.8276892118448397, -0.7678022575966376, -0.28077681312079084]
    assert philox.permutation("golden", 10).tolist() == [1, 3, 2, 4, 5, 9, 0, 7, 6, 8]


@given(st.integers(0, 40), st.integers(0, 20))
def test_a_stream_can_be_entered_anywhere(start: int, count: int) -> None:
    assert philox.bits("stream", count, start=start).tolist() == philox.bits("stream", start + count)[start:].tolist()


def test_streams_differ() -> None:
    assert not np.intersect1d(philox.bits("a", 1000), philox.bits("b", 1000)).size


def test_uniforms_are_the_centres_of_cells_and_never_0_or_1() -> None:
    values = philox.uniform("uniform", (100_000,))
    cells = values * 2.0**52 - 0.5
    assert (cells == np.floor(cells)).all()
    assert 0.0 < values.min() < values.max() < 1.0
    # Mean and variance of a uniform within five standard errors.
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * 100_000)
    assert abs(values.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / 100_000)


def test_the_extreme_words_stay_inside_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(philox, "bits", lambda stream, count: np.array([0, 2**64 - 1], np.uint64))
    low, high = philox.uniform("any", (2,)).tolist()
    assert 0.0 < low < high < 1.0
    assert np.isfinite(philox.normal("any", (2,))).all()


def test_shapes() -> None:
    assert philox.uniform("shape", (2, 3)).shape == (2, 3)
    assert philox.normal("shape", ()).shape == ()
    assert philox.uniform("shape", (0, 4)).shape == (0, 4)
    assert philox.uniform("shape", (2, 3)).ravel().tolist() == philox.uniform("shape", (6,)).tolist()


def test_the_quantile_is_that_of_the_standard_library() -> None:
    """Python's `NormalDist.inv_cdf` is AS 241 too, with the platform's logarithm; far tails and both sides of every seam included."""
    seams = np.nextafter([0.075, 0.075, 0.925, 0.925, math.exp(-25)], [0.0, 1.0, 0.0, 1.0, 1.0])
    powers = 2.0 ** -np.arange(1, 53)
    p = np.concatenate([philox.uniform("p", (20_000,)), powers, 1.0 - powers[1:], seams, philox.uniform("tail", (1000,)) * 1e-12])
    exact = np.array([statistics.NormalDist().inv_cdf(value) for value in p])
    # AS 241 claims 1e-16; its nine operations and the logarithm round a few times on either side.
    assert (np.abs(philox.normal_quantile(p) - exact) <= 2e-15 * np.abs(exact)).all()


def test_the_quantile_is_odd_and_rises() -> None:
    p = np.sort(philox.uniform("odd", (5000,)))
    z = philox.normal_quantile(p)
    assert (np.diff(z) > 0.0).all()
    assert philox.normal_quantile(np.array([0.5])).tolist() == [0.0]
    dyadic = np.arange(1, 512) / 1024.0  # 1 - p is exact
    assert (philox.normal_quantile(dyadic) == -philox.normal_quantile(1.0 - dyadic)).all()


def test_normals_have_the_moments_of_a_normal() -> None:
    z = philox.normal("moments", (200_000,))
    moments = ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96))  # power, its mean, its variance
    errors = [abs((z**power).mean() - mean) / math.sqrt(variance / z.size) for power, mean, variance in moments]
    assert max(errors) < 5.0


@given(st.floats(min_value=5e-324, max_value=1.7e308, allow_nan=False))
def test_log_is_within_four_units_in_the_last_place(x: float) -> None:
    exact = math.log(x)
    assert abs(float(philox.log(np.array([x]))[0]) - exact) <= 4 * math.ulp(exact)


def test_log_near_one() -> None:
    x = 1.0 + 1e-3 * (philox.uniform("near one", (20_000,)) - 0.5)
    exact = np.array([math.log(value) for value in x])
    assert (np.abs(philox.log(x) - exact) <= 4 * np.spacing(np.abs(exact))).all()
    assert philox.log(np.array([1.0])).tolist() == [0.0]


@given(st.integers(0, 200), st.text(max_size=5))
def test_a_permutation_holds_everything_once(size: int, stream: str) -> None:
    order = philox.permutation(stream, size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


def test_permutations_of_different_streams_differ() -> None:
    assert philox.permutation("order/0/0", 100).tolist() != philox.permutation("order/0/1", 100).tolist()
