"""What a Keras user would write for the two-input model computes the same, the LSTM's biases added up."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers

from triptych.core import catalog, initialize

SPEC = catalog.tiny(catalog.get_spec("text_image"))
WEIGHTS = initialize.parity_weights(SPEC, 3)
TEXTS = np.array([[3, 7, 2, 5, 0, 0, 0], [0, 0, 9, 4, 1, 10, 6], [8, 0, 3, 0, 0, 3, 1], [0] * 7])
BATCH = {"text": TEXTS, "image": np.random.default_rng(0).normal(size=(len(TEXTS), 12, 12, 3))}


def plain() -> keras.Model:
    """The chapter's example, in float64, with a mask and our weights."""
    text, image = keras.Input((None,), dtype="int32", name="text"), keras.Input((12, 12, 3), dtype="float64", name="image")
    x = layers.Embedding(SPEC.vocabulary, SPEC.width, mask_zero=True, dtype="float64", name="embedding")(text)
    read = layers.LSTM(SPEC.features, dtype="float64", name="lstm")(x)
    seen = layers.GlobalMaxPooling2D(dtype="float64")(layers.Conv2D(8, 3, activation="relu", dtype="float64", name="conv")(image))
    both = layers.Concatenate(dtype="float64")([read, seen])
    model = keras.Model({"text": text, "image": image}, layers.Dense(1, activation="sigmoid", dtype="float64", name="fc")(both))
    bias = WEIGHTS["lstm.bias_ih_l0"] + WEIGHTS["lstm.bias_hh_l0"]
    model.get_layer("embedding").set_weights([WEIGHTS["embedding.weight"]])
    model.get_layer("lstm").set_weights(
        [WEIGHTS["lstm.weight_ih_l0"].T, WEIGHTS["lstm.weight_hh_l0"].T, bias]
    )  # i, f, c, o: the same order
    model.get_layer("conv").set_weights([WEIGHTS["conv.weight"].transpose(2, 3, 1, 0), WEIGHTS["conv.bias"]])
    model.get_layer("fc").set_weights([WEIGHTS["fc.weight"].T, WEIGHTS["fc.bias"]])
    return model


def test_its_probabilities_are_the_sigmoid_of_our_logits(room: Any) -> None:
    logits = room.create_model(SPEC, WEIGHTS, precision="float64", device="cpu").predict(BATCH)
    np.testing.assert_allclose(plain()(BATCH).numpy(), 1.0 / (1.0 + np.exp(-logits)), rtol=0, atol=1e-14)
