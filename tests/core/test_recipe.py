"""The reference formulas: schedule, weight-decay groups, averages; and a recipe read back as it was written."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import catalog, recipe
from triptych.core.recipe import SGD, AdamW, Recipe, Schedule

COSINE = Schedule(peak=0.4, warmup_steps=4, total_steps=12, final=0.1)


def test_warmup_then_cosine_by_hand() -> None:
    rates = [recipe.learning_rate(COSINE, step) for step in range(13)]
    # Linear to the peak: step 0 is peak / warmup_steps, and the last warmup step is the peak itself.
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-15)
    # Cosine from the peak (step 4) over its mean (step 8) to `final` at `total_steps`.
    assert [rates[4], rates[8], rates[12]] == pytest.approx([0.4, 0.25, 0.1], rel=1e-15)
    assert rates[6] == pytest.approx(0.1 + 0.15 * (1 + math.sqrt(0.5)), rel=1e-15)


def test_after_the_end_the_rate_stays_at_final() -> None:
    assert [recipe.learning_rate(COSINE, step) for step in (12, 13, 1000)] == pytest.approx([0.1] * 3, rel=1e-15)


def test_constant_and_no_warmup() -> None:
    constant = Schedule(peak=0.5, warmup_steps=2, total_steps=10, kind="constant")
    assert [recipe.learning_rate(constant, step) for step in (0, 1, 2, 9, 99)] == [0.25, 0.5, 0.5, 0.5, 0.5]
    assert recipe.learning_rate(Schedule(peak=0.5, warmup_steps=0, total_steps=10), 0) == 0.5
    assert recipe.learning_rate(Schedule(peak=0.5, warmup_steps=3, total_steps=3), 3) == 0.5


@given(st.floats(1e-6, 10.0), st.integers(0, 20), st.integers(1, 50), st.floats(0.0, 1.0))
def test_a_schedule_rises_to_its_peak_and_falls_to_its_end(peak: float, warmup: int, decay: int, share: float) -> None:
    schedule = Schedule(peak, warmup, warmup + decay, final=share * peak)
    rates = [recipe.learning_rate(schedule, step) for step in range(warmup + decay + 1)]
    assert all(np.diff(rates[: warmup + 1]) >= -1e-15 * peak)
    assert all(np.diff(rates[warmup:]) <= 1e-15 * peak)
    assert max(rates) == pytest.approx(peak, rel=1e-14)
    assert rates[-1] == pytest.approx(share * peak, rel=1e-14, abs=1e-16 * peak)


def test_only_weights_of_convolutions_and_linear_layers_decay() -> None:
    selective, all_in = (Recipe(SGD(), COSINE, 4, decay_norm_and_bias=flag) for flag in (False, True))
    parameters = catalog.get_spec("resnet18").parameters()
    decayed = {tensor.name for tensor in parameters if recipe.decays(selective, tensor)}
    assert {"conv1.weight", "layer2.0.downsample.0.weight", "fc.weight"} < decayed
    assert not {"bn1.weight", "bn1.bias", "layer2.0.downsample.1.weight", "fc.bias"} & decayed
    assert len(decayed) == 21  # 20 convolutions (three of them shortcuts) and the classifier
    assert all(recipe.decays(all_in, tensor) for tensor in parameters)


@pytest.mark.parametrize(
    "made",
    [
        Recipe(SGD(), COSINE, 128),
        Recipe(SGD(0.5, False, 0.0), COSINE, 8, label_smoothing=0.1, ema_decay=0.999, decay_norm_and_bias=True, seed=7),
        Recipe(AdamW(0.8, 0.99, 1e-6, 0.1), Schedule(1e-3, 0, 5, kind="constant"), 16),
    ],
    ids=["sgd", "everything", "adamw"],
)
def test_a_recipe_survives_json(made: Recipe) -> None:
    read = recipe.from_dict(json.loads(json.dumps(recipe.to_dict(made))))
    assert read == made
    assert type(read.optimizer) is type(made.optimizer)


def test_an_unknown_optimizer_or_field_is_refused() -> None:
    data = recipe.to_dict(Recipe(SGD(), COSINE, 8))
    with pytest.raises(KeyError, match="lion"):
        recipe.from_dict({**data, "optimizer": {"name": "lion"}})
    with pytest.raises(TypeError, match="warmup_epochs"):
        recipe.from_dict({**data, "schedule": {**data["schedule"], "warmup_epochs": 1}})


def test_optimizers_name_their_slots() -> None:
    assert (SGD().name, SGD().slots) == ("sgd", ("momentum",))
    assert (AdamW().name, AdamW().slots) == ("adamw", ("exp_avg", "exp_avg_sq"))


def test_an_average_follows_the_weights() -> None:
    weights = np.array([1.0, -2.0])
    average = np.zeros(2)
    for _ in range(3):
        average = recipe.ema(average, weights, 0.9)
    assert average == pytest.approx((1 - 0.9**3) * weights, rel=1e-14)
    assert (recipe.ema(weights, weights * 5, 1.0) == weights).all()
    assert (recipe.ema(weights, weights * 5, 0.0) == weights * 5).all()
