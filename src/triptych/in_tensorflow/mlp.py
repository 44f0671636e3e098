"""A multilayer perceptron as a functional Keras model (Goodfellow et al. 2016, ch. 6)."""

from __future__ import annotations

import keras
from keras import layers

from triptych.core.spec import MLPSpec
from triptych.in_tensorflow.layers import ChannelsFirstFlatten


def mlp(spec: MLPSpec, dtype: str = "float32") -> keras.Model:
    """The network of `spec`: images (N, H, W, C) -> logits (N, classes). Weights are zeros until some are loaded."""
    images = keras.Input(spec.input_shape, dtype=dtype, name="images")
    x = ChannelsFirstFlatten(dtype=dtype, name="flatten")(images)
    for i, width in enumerate(spec.hidden, start=1):
        x = layers.Dense(width, kernel_initializer="zeros", dtype=dtype, name=f"fc{i}")(x)
        x = layers.ReLU(dtype=dtype, name=f"relu{i}")(x)
        if spec.dropout:
            # An explicit seed: without one Keras draws it from Python's global generator, which is the caller's.
            x = layers.Dropout(spec.dropout, seed=i, dtype=dtype, name=f"dropout{i}")(x)
    logits = layers.Dense(spec.num_classes, kernel_initializer="zeros", dtype=dtype, name=spec.head)(x)
    return keras.Model(images, logits, name=spec.name)
