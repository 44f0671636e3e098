"""The two-input model as a functional Keras model: a text through an LSTM, an image through a convolution, one logit for the pair."""

from __future__ import annotations

import keras
from keras import layers

from triptych.core.text_image import TextImageSpec
from triptych.in_tensorflow.layers import PaddedConv2D, TokenLookup
from triptych.in_tensorflow.lstm import LSTM


def text_image(spec: TextImageSpec, dtype: str = "float32") -> keras.Model:
    """The network of `spec`: {"text": (N, length) tokens, "image": (N, H, W, C)} -> logits (N, num_classes).

    The mask of padding travels from the lookup to the LSTM as Keras' own. Weights are zeros until some are loaded.
    """
    text = keras.Input((spec.length,), dtype="int32", name="text")
    image = keras.Input(spec.input_shape, dtype=dtype, name="image")
    x = TokenLookup(spec.vocabulary, spec.width, padding_token=spec.padding_token, dtype=dtype, name="embedding")(text)
    read = LSTM(spec.features, dtype=dtype, name="lstm")(x)
    x = PaddedConv2D(spec.filters, spec.kernel, kernel_initializer="zeros", dtype=dtype, name="conv")(image)
    seen = layers.GlobalMaxPooling2D(dtype=dtype, name="maxpool")(layers.ReLU(dtype=dtype, name="relu")(x))
    x = layers.Concatenate(dtype=dtype, name="concat")([read, seen])
    logits = layers.Dense(spec.num_classes, kernel_initializer="zeros", dtype=dtype, name=spec.head)(x)
    return keras.Model({"text": text, "image": image}, logits, name=spec.name)
