"""A user's program in Keras: the zoo's network, built again with a layer of the wrong size, and a call.

A Keras layer takes its number of inputs from what it is first called with; one that is built beforehand has its own.
"""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

import triptych
from debugging.bugs import BATCH, MODEL, PIXELS, Bug, channels


def network(bug: Bug) -> keras.Model:
    """The network with the bug in it."""
    model = triptych.create_model(MODEL, framework="tensorflow", device="cpu").native
    if bug.name == "images":
        return model
    shape = (None, bug.wrong) if bug.name == "linear" else (None, None, None, bug.wrong)

    def copied(layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = type(layer).from_config(layer.get_config())
        if layer.name == bug.layer:
            copy.build(shape)
        return copy

    return keras.models.clone_model(model, clone_function=copied)


def call(model: keras.Model, bug: Bug, mode: str) -> None:
    """One forward pass."""
    predict: Callable[..., object] = tf.function(model) if mode == "compiled" else model
    predict(tf.zeros((BATCH, PIXELS, PIXELS, channels(bug))))
