"""The two-input model in Flax linen: a text through an LSTM, an image through a convolution, one logit for the pair."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from triptych.core.text_image import TextImageSpec
from triptych.in_jax.layers import UNIFORM_FAN_IN, Concatenate, Conv, Dense, GlobalMaxPool, ReLU, fast_convolution
from triptych.in_jax.lstm import LSTM


class TextImage(nn.Module):
    """The network a `TextImageSpec` describes; `train` changes nothing, as it has neither BatchNorm nor dropout.

    `dtype` is that of products and convolutions, by default the parameters'; the `tuned` convolution trains by `fast_convolution`.
    """

    spec: TextImageSpec
    param_dtype: Any = jnp.float32
    dtype: Any = None
    tuned: bool = False

    @nn.compact
    def __call__(self, text: jax.Array, image: jax.Array, *, train: bool = False) -> jax.Array:
        """(N, length) integer tokens, (N, H, W, in_channels) -> (N, num_classes) logits; of one logit the sigmoid is the loss's."""
        spec, kinds = self.spec, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normal = nn.initializers.normal(1.0)
        x = nn.Embed(spec.vocabulary, spec.width, embedding_init=normal, **kinds, name="embedding")(text)
        read = LSTM(spec.features, **kinds, name="lstm")(x, mask=text != spec.padding_token)
        conv = functools.partial(Conv, use_bias=True, kernel_init=UNIFORM_FAN_IN, **kinds)
        convolution = fast_convolution if self.tuned else None
        x = conv(spec.filters, (spec.kernel,) * 2, padding=0, conv_general_dilated=convolution, name="conv")(image)
        seen = GlobalMaxPool(name="maxpool")(ReLU(name="relu")(x))
        return Dense(spec.num_classes, **kinds, name=spec.head)(Concatenate(name="concat")([read, seen]))
