"""The two-input model in every room, held to formulas in numpy: lookup, LSTM, padding, pooling and the loss of one logit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize
from triptych.core.errors import UsageError
from triptych.core.recipe import SGD, Clip, Recipe, Schedule

SPEC = catalog.tiny(catalog.get_spec("text_image"))
WEIGHTS = initialize.parity_weights(SPEC, 0)
RECIPE = Recipe(SGD(momentum=0.0, nesterov=False, weight_decay=0.0), Schedule(0.1, 0, 10), 4, label_smoothing=0.1)
# Padding behind the text, before it, within it; a text of one token, of none, and a full one.
TEXTS = np.array(
    [[3, 7, 2, 5, 0, 0, 0], [0, 0, 9, 4, 1, 10, 6], [8, 0, 3, 0, 0, 3, 1], [0, 0, 0, 5, 0, 0, 0], [0] * 7, [1, 2, 3, 4, 5, 6, 7]]
)
IMAGES = np.random.default_rng(0).normal(size=(len(TEXTS), 12, 12, 3))
BATCH = {"text": TEXTS, "image": IMAGES}
LABELS = np.array([1, 0, 0, 1, 1, 0])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def read(tokens: list[int]) -> np.ndarray:
    """The LSTM's state after these tokens, by the formula: i, f, g, o; zeros at first."""
    weights, state, cell = (WEIGHTS[f"lstm.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih")), np.zeros(5), np.zeros(5)
    inputs, recurrent, bias = weights
    for token in tokens:
        gates = inputs @ WEIGHTS["embedding.weight"][token] + bias + recurrent @ state + WEIGHTS["lstm.bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        state = sigmoid(o) * np.tanh(cell)
    return state


@pytest.fixture(scope="module", params=contract.installed())
def room(request: pytest.FixtureRequest) -> Any:
    return contract.load(request.param)


@pytest.fixture(scope="module")
def model(room: Any) -> Any:
    return room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu")


def test_the_lstm_reads_the_tokens_and_leaves_padding_out(model: Any) -> None:
    expected = np.stack([read([token for token in text if token != SPEC.padding_token]) for text in TEXTS.tolist()])
    for training in (False, True):
        np.testing.assert_allclose(model.forward(BATCH, training=training).intermediates["lstm"], expected, rtol=0, atol=1e-14)
    assert not expected[4].any()  # nothing but padding: the state at the start


def test_every_other_intermediate_by_hand(model: Any) -> None:
    found = model.forward(BATCH).intermediates
    assert list(found) == ["embedding", "lstm", "conv", "relu", "maxpool", "concat", "fc"]
    np.testing.assert_array_equal(found["embedding"], WEIGHTS["embedding.weight"][TEXTS])
    windows = np.lib.stride_tricks.sliding_window_view(IMAGES, (3, 3), axis=(1, 2))  # (N, 10, 10, C, 3, 3)
    seen = np.maximum(np.einsum("nhwcij,ocij->nhwo", windows, WEIGHTS["conv.weight"]) + WEIGHTS["conv.bias"], 0.0)
    np.testing.assert_allclose(found["relu"], seen, rtol=0, atol=1e-13)
    np.testing.assert_allclose(found["concat"], np.hstack([found["lstm"], seen.max((1, 2))]), rtol=0, atol=1e-13)
    logits = found["concat"] @ WEIGHTS["fc.weight"].T + WEIGHTS["fc.bias"]
    np.testing.assert_allclose(model.predict(BATCH), logits, rtol=0, atol=1e-13)
    assert logits.shape == (len(TEXTS), 1)


def test_predictions_come_batch_by_batch(model: Any) -> None:
    np.testing.assert_allclose(model.predict(BATCH, batch_size=4), model.predict(BATCH), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("text", "message"),
    [(TEXTS + 5, "ids from 5 to 15"), (TEXTS - 1, "ids from -1 to 9"), (TEXTS.astype(float), "look the ids up"), (TEXTS[:, :3], "length")],
)
def test_other_texts_are_refused_before_anything_is_looked_up(model: Any, text: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.predict({"text": text, "image": IMAGES})


def test_the_loss_is_the_binary_cross_entropy_of_the_sigmoid(room: Any, model: Any) -> None:
    trainer = room.create_trainer(model, RECIPE)
    logits = model.predict(BATCH)[:, 0]
    smoothed = 0.9 * LABELS + 0.05
    expected = -np.mean(smoothed * np.log(sigmoid(logits)) + (1.0 - smoothed) * np.log(1.0 - sigmoid(logits)))
    assert trainer.gradients(BATCH, LABELS).loss == pytest.approx(expected, rel=1e-13)
    shares = np.eye(2)[LABELS]
    assert trainer.gradients(BATCH, shares).loss == pytest.approx(expected, rel=1e-13)
    found = trainer.gradients(BATCH, LABELS).gradients
    np.testing.assert_allclose(found["fc.bias"], [np.mean(sigmoid(logits) - smoothed)], rtol=1e-13)
    with pytest.raises(UsageError, match=r"integers in \[0, 2\)"):
        trainer.gradients(BATCH, LABELS + 1)


def test_gradients_add_up_over_repeated_tokens_and_none_reaches_padding(room: Any, model: Any) -> None:
    trainer, step = room.create_trainer(model, RECIPE), 1e-6
    found = trainer.gradients(BATCH, LABELS).gradients["embedding.weight"]
    assert not found[SPEC.padding_token].any()
    token, losses = 3, []  # twice in one text, once in two others
    for moved in (step, -step):
        table = WEIGHTS["embedding.weight"].copy()
        table[token, 0] += moved
        model.load_weights({**WEIGHTS, "embedding.weight": table})
        losses.append(trainer.gradients(BATCH, LABELS).loss)
    model.load_weights(WEIGHTS)
    assert found[token, 0] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-6)


def test_clipping_by_norm_counts_the_row_of_a_repeated_token_once(room: Any) -> None:
    limit = 1e-3
    model = room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu")
    trainer = room.create_trainer(model, Recipe(RECIPE.optimizer, RECIPE.schedule, 4, clip=Clip(norm=limit)))
    gradients = trainer.gradients(BATCH, LABELS).gradients
    norm = np.sqrt(sum(np.square(gradient).sum() for gradient in gradients.values()))
    trainer.step(BATCH, LABELS, 1.0)
    after = trainer.state().weights
    for name, gradient in gradients.items():
        np.testing.assert_allclose(WEIGHTS[name] - after[name], gradient * limit / (norm + 1e-6), rtol=0, atol=1e-15)


def test_both_biases_have_the_gradient_of_their_sum(room: Any, model: Any) -> None:
    found = room.create_trainer(model, RECIPE).gradients(BATCH, LABELS).gradients
    np.testing.assert_allclose(found["lstm.bias_ih_l0"], found["lstm.bias_hh_l0"], rtol=1e-13)
    assert found["lstm.bias_ih_l0"].any()


def test_equal_pixels_share_the_gradient_of_their_maximum(room: Any) -> None:
    """Of a flat image every pixel is the largest: each place of the kernel gets the same gradient, that of the pixel's value."""
    weights = {**WEIGHTS, "conv.bias": np.abs(WEIGHTS["conv.bias"]) + 9.0}  # in front of the ReLU all is positive
    model = room.create_model(SPEC, weights, precision="float64", device="cpu")
    ramp = np.zeros_like(IMAGES)
    ramp[:, 2:8, :8] = 1.0
    flat_kernel = {**weights, "conv.weight": np.zeros_like(weights["conv.weight"])}
    model.load_weights(flat_kernel)
    found = room.create_trainer(model, RECIPE).gradients({"text": TEXTS, "image": ramp}, LABELS).gradients
    windows = np.lib.stride_tricks.sliding_window_view(ramp, (3, 3), axis=(1, 2)).mean((1, 2))  # over all pixels alike: (N, C, 3, 3)
    errors = sigmoid(model.predict({"text": TEXTS, "image": ramp})[:, 0]) - (0.9 * LABELS + 0.05)
    expected = np.einsum("n,o,ncij->ocij", errors / len(TEXTS), weights["fc.weight"][0, SPEC.features :], windows)
    np.testing.assert_allclose(found["conv.weight"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("micro", [4, 3])
def test_micro_batches_of_pairs_are_one_batch(room: Any, micro: int) -> None:
    whole, parts = (
        room.create_trainer(room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu"), Recipe(
            RECIPE.optimizer, RECIPE.schedule, len(TEXTS), micro_batch_size=size,
        )) for size in (None, micro)
    )  # fmt: skip
    assert whole.step(BATCH, LABELS, 0.1) == pytest.approx(parts.step(BATCH, LABELS, 0.1), rel=1e-13)
    a, b = whole.state().weights, parts.state().weights
    assert all(np.abs(a[name] - b[name]).max() < 1e-14 for name in a)


@pytest.mark.parametrize("changes", [{"remat": True}, {"mixed_precision": "bfloat16"}, {"frozen": ("embedding", "lstm")}], ids=str)
def test_recipes_execute_and_learn(room: Any, changes: dict[str, Any]) -> None:
    weights = {name: value.astype(np.float32) for name, value in WEIGHTS.items()}
    model = room.create_model(SPEC, weights, precision="float32", device="cpu")
    trainer = room.create_trainer(model, Recipe(RECIPE.optimizer, RECIPE.schedule, len(TEXTS), **changes))
    batch = {"text": TEXTS, "image": IMAGES.astype(np.float32)}
    losses = [trainer.step(batch, LABELS, 0.3) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    moved = {name for name, value in trainer.state().weights.items() if not np.array_equal(value, weights[name])}
    left = {name for name in WEIGHTS if name.startswith(changes.get("frozen", ()))}
    assert moved == set(WEIGHTS) - left


def test_several_classes_have_a_logit_each(room: Any) -> None:
    spec = catalog.with_options(SPEC, num_classes=3)
    model = room.create_model(spec, initialize.parity_weights(spec, 0), precision="float64", device="cpu")
    logits, labels = model.predict(BATCH), np.array([0, 1, 2, 2, 1, 0])
    assert logits.shape == (len(TEXTS), 3)
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    expected = -np.log(shifted / shifted.sum(1, keepdims=True))[np.arange(len(labels)), labels].mean()
    plain = Recipe(RECIPE.optimizer, RECIPE.schedule, len(TEXTS))
    assert room.create_trainer(model, plain).gradients(BATCH, labels).loss == pytest.approx(expected, rel=1e-13)
