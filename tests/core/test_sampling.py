"""The sampling plan: every sample once an epoch, any step directly, the same numbers however a run is split."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import philox, sampling
from triptych.core.errors import UsageError
from triptych.core.preprocess import WORDS, ColorJitter, RandomErasing, RandomResizedCrop, Transforms, draw
from triptych.core.sampling import SamplingPlan, epoch_order, in_order, sample_words

EVERYTHING = Transforms(RandomResizedCrop(), 0, 0.5, ColorJitter(0.4, 0.3, 0.2, 0.1), RandomErasing(), 0.2, 1.0)


def plan(size: int, batch_size: int, seed: int = 0, **changes: object) -> SamplingPlan:
    """A plan over `size` samples of three classes."""
    return SamplingPlan(np.arange(size) % 3, 3, batch_size, seed, **changes)  # type: ignore[arg-type]


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_sample_comes_at_most_once_an_epoch(size: int, batch_size: int, seed: int) -> None:
    made = plan(size, min(batch_size, size), seed)
    per_epoch = made.steps_per_epoch
    for epoch in range(3):
        seen = [int(i) for batch in made.batches(epoch * per_epoch, (epoch + 1) * per_epoch) for i in batch.indices]
        assert len(seen) == len(set(seen)) == per_epoch * made.global_batch_size
        assert set(seen) <= set(range(size))


@given(st.integers(1, 40), st.integers(1, 12))
def test_a_padded_epoch_has_every_sample(size: int, batch_size: int) -> None:
    made = plan(size, batch_size, uneven="pad")
    seen = np.concatenate([batch.indices for batch in made.batches(0, made.steps_per_epoch)])
    assert set(seen.tolist()) == set(range(size))
    assert len(seen) == batch_size * -(-size // batch_size)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 40))
def test_any_step_can_be_reached_directly(size: int, batch_size: int, step: int) -> None:
    transforms = Transforms(flip=0.5, mixup=0.4)
    made, again = (plan(size, min(batch_size, size), 1, transforms=transforms, crop=8) for _ in range(2))
    *_, last = made.batches(0, step + 1)
    direct = again.batch(step)
    for one, other in ((last.indices, direct.indices), (last.words, direct.words), (last.targets, direct.targets)):
        np.testing.assert_array_equal(one, other)
    assert last.mix is not None
    assert direct.mix is not None
    assert last.mix.share == direct.mix.share


def test_epochs_and_seeds_have_their_own_order() -> None:
    orders = [epoch_order(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    # Golden: a run of today must be resumed by tomorrow's version.
    assert epoch_order(0, 0, 8).tolist() == [1, 0, 5, 3, 6, 2, 4, 7]


def test_the_numbers_of_a_run_are_golden() -> None:
    made = plan(11, 4, 5, transforms=EVERYTHING, crop=8)
    digest = hashlib.sha256()
    for batch in made.batches(0, 6):
        assert batch.words is not None
        assert batch.mix is not None
        found = draw(EVERYTHING, batch.words, 8, 9, 8)
        for part in (batch.indices, batch.words, batch.targets, batch.mix.partner, found.window, found.flip, found.order, found.erase):
            digest.update(np.ascontiguousarray(part).tobytes())
    assert digest.hexdigest() == "4ea830d43e24e9a0b11799762f7c72bf0ef99e0c81fe8728e9c4fa71d0d21190"


def test_words_are_the_same_drawn_at_once_or_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = sample_words(3, 1, [4, 0, 6], 7)
    monkeypatch.setattr(sampling, "TABLE_WORDS", 0)
    np.testing.assert_array_equal(at_once, sample_words(3, 1, [4, 0, 6], 7))
    assert at_once.shape == (3, WORDS)
    np.testing.assert_array_equal(at_once[1], philox.bits("transforms/3/1", WORDS))


@pytest.mark.parametrize("transforms", [Transforms(flip=0.5), Transforms(mixup=0.3), Transforms(cutmix=1.0)])
def test_ranks_share_the_global_batch(transforms: Transforms) -> None:
    whole = plan(24, 8, transforms=transforms, crop=16)
    for step in (0, 2, 4):
        expected = whole.batch(step)
        parts = [dataclasses.replace(whole, rank=rank, world=4).batch(step) for rank in range(4)]
        np.testing.assert_array_equal(np.concatenate([part.indices[:2] for part in parts]), expected.indices)
        np.testing.assert_array_equal(np.concatenate([part.targets for part in parts]), expected.targets)
        if expected.mix is not None:
            partners = [part.indices[part.mix.partner] for part in parts if part.mix is not None]
            np.testing.assert_array_equal(np.concatenate(partners), expected.indices[expected.mix.partner])


@pytest.mark.parametrize("transforms", [Transforms(mixup=0.3), Transforms(cutmix=1.0), EVERYTHING])
def test_mixed_targets_are_shares_of_both_labels(transforms: Transforms) -> None:
    made = plan(30, 10, transforms=transforms, crop=16)
    kinds = set()
    for batch in made.batches(0, 12):
        assert batch.mix is not None
        kinds.add(batch.mix.box is None)
        assert sorted(batch.mix.partner.tolist()) == list(range(10))
        assert 0.0 <= batch.mix.share <= 1.0
        np.testing.assert_allclose(batch.targets.sum(axis=1), 1.0, rtol=1e-15)
        own, other = batch.indices % 3, (batch.indices % 3)[batch.mix.partner]
        expected = batch.mix.share * np.eye(3)[own] + (1.0 - batch.mix.share) * np.eye(3)[other]
        np.testing.assert_array_equal(batch.targets, expected)
        if batch.mix.box is not None:
            top, left, height, width = batch.mix.box
            assert batch.mix.share == 1.0 - height * width / 256
            assert 0 <= top <= 16 - height
            assert 0 <= left <= 16 - width
    assert kinds == {True, False} if transforms is EVERYTHING else len(kinds) == 1


def test_without_random_transforms_nothing_is_drawn() -> None:
    batch = plan(8, 4).batch(0)
    assert (batch.words, batch.mix) == (None, None)
    assert batch.indices.dtype == np.int64
    np.testing.assert_array_equal(batch.targets, batch.indices % 3)


def test_evaluation_sees_every_sample_in_order() -> None:
    batches = list(in_order(np.arange(10) % 3, 4))
    assert [len(batch.targets) for batch in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([batch.indices for batch in batches]), np.arange(10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": 8, "batch_size": 9}, "a global batch of 9 needs at least as many samples; there are 8"),
     ({"size": 8, "batch_size": 4, "rank": 1, "world": 3}, "must divide evenly"),
     ({"size": 8, "batch_size": 4, "rank": 2, "world": 2}, "rank 2 of 2")],
)  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(**changes)  # type: ignore[arg-type]


def test_beta_is_symmetric_and_as_wide_as_alpha_says() -> None:
    for alpha in (0.2, 1.0, 2.0):
        values = np.array([sampling.beta(f"beta/{alpha}/{i}", alpha) for i in range(600)])
        assert abs(values.mean() - 0.5) < 4 * np.sqrt(1 / (4 * (2 * alpha + 1)) / 600)
        assert values.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)
