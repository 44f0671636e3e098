"""The few Keras layers that the models need and Keras does not have, each registered, serialisable and free-standing.

Keras pads asymmetrically at stride 2, knows no padded max-pool, keeps the biased running variance and flattens in (H, W, C) order
(numerics 1, 2, 6, 11). Use these in your own models as you would their Keras namesakes; images are (N, H, W, C).
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf
from keras import ops

Shape = tuple[int | None, ...]

register = keras.saving.register_keras_serializable(package="triptych")


@register
class PaddedConv2D(keras.layers.Conv2D):
    """`keras.layers.Conv2D` with `padding` an integer: that many zeros on all four sides, at any stride (numerics 1)."""

    def __init__(self, filters: int, kernel_size: int | tuple[int, int], *, padding: int = 0, **kwargs: Any) -> None:
        super().__init__(filters, kernel_size, padding="valid", data_format="channels_last", **kwargs)
        self.zeros = padding
        if self.strides == self.dilation_rate == (1, 1) and self.kernel_size == (2 * padding + 1,) * 2:
            # Here "same" is that many zeros on all four sides, and the convolution needs no padded copy of its input.
            self.padding = "same"

    def call(self, inputs: Any) -> Any:
        """(N, H, W, C) -> (N, H', W', filters)."""
        return super().call(_pad_sides(inputs, self._copied_zeros, 0.0))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The output's shape."""
        return super().compute_output_shape(_padded_shape(input_shape, self._copied_zeros))

    @property
    def _copied_zeros(self) -> int:
        return 0 if self.padding == "same" else self.zeros

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        config = super().get_config()
        del config["data_format"]
        return {**config, "padding": self.zeros}


@register
class PaddedMaxPooling2D(keras.layers.MaxPooling2D):
    """`keras.layers.MaxPooling2D` with `padding` an integer; the padding is minus infinity and never wins (numerics 2)."""

    def __init__(self, pool_size: int | tuple[int, int], *, padding: int = 0, **kwargs: Any) -> None:
        super().__init__(pool_size, padding="valid", data_format="channels_last", **kwargs)
        self.margin, self.fill = padding, float("-inf")

    def call(self, inputs: Any) -> Any:
        """(N, H, W, C) -> (N, H', W', C)."""
        return super().call(_pad_sides(inputs, self.margin, self.fill))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The output's shape."""
        return super().compute_output_shape(_padded_shape(input_shape, self.margin))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        config = super().get_config()
        del config["data_format"]
        return {**config, "padding": self.margin}


@register
class BatchNormalization(keras.layers.Layer):
    """Batch normalization as PyTorch defines it (Ioffe & Szegedy 2015), over all axes but the last.

    `momentum` weighs the *new* batch, the running variance is unbiased, n/(n-1), the batch variance is computed in two passes, and
    the batches are counted (numerics 4-7). A batch must hold more than one value a channel. As in Keras, a layer with
    `trainable = False` normalizes by its running statistics and leaves them alone, and under a mixed-precision policy all is
    computed in the precision of the parameters. `fused` trains by TensorFlow's kernel, where it has one: the same to rounding.
    """

    def __init__(self, *, epsilon: float, momentum: float, fused: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epsilon = epsilon
        self.momentum = momentum
        self.fused = fused

    def build(self, input_shape: Shape) -> None:
        """Create gamma, beta and the running statistics, one value a channel."""
        channels: dict[str, Any] = {"shape": (input_shape[-1],), "autocast": False}
        self.gamma = self.add_weight(name="gamma", initializer="ones", **channels)
        self.beta = self.add_weight(name="beta", initializer="zeros", **channels)
        self.running_mean = self.add_weight(name="running_mean", initializer="zeros", trainable=False, **channels)
        self.running_var = self.add_weight(name="running_var", initializer="ones", trainable=False, **channels)
        self.num_batches_tracked = self.add_weight(
            name="num_batches_tracked", shape=(), initializer="zeros", dtype="int64", trainable=False, autocast=False
        )

    def call(self, inputs: Any, training: bool = False) -> Any:
        """(..., C) -> (..., C); with `training`, by the batch's statistics, which move the running ones."""
        if training and self.trainable and self.fused and len(inputs.shape) == 4 and self.gamma.dtype == "float32":
            return self.normalize_and_track(inputs)
        x = ops.cast(inputs, self.gamma.dtype)
        if training and self.trainable:
            y, mean, variance = normalize_by_batch(x, self.gamma.value, self.beta.value, self.epsilon)
            self.track(mean, unbiased(variance, values_per_channel(x)))
        else:
            y = self.normalize(x, self.running_mean, self.running_var)
        return ops.cast(y, inputs.dtype)

    def normalize_and_track(self, inputs: Any) -> Any:
        """A training pass over (N, H, W, C) by the fused kernel, which gives the unbiased variance.

        Not by `tf.nn.fused_batch_norm`, which raises an epsilon of 1e-5 to 1.001e-5.
        """
        gamma, beta, nothing = tf.convert_to_tensor(self.gamma.value), tf.convert_to_tensor(self.beta.value), tf.zeros([0])
        normalized, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs, scale=gamma, offset=beta, mean=nothing, variance=nothing, epsilon=self.epsilon, is_training=True
        )
        self.track(mean, variance)
        return normalized

    def normalize(self, inputs: Any, mean: Any, variance: Any) -> Any:
        """gamma (x - mean) / sqrt(variance + epsilon) + beta."""
        return (inputs - mean) * (self.gamma * ops.rsqrt(variance + self.epsilon)) + self.beta

    def track(self, mean: Any, variance: Any) -> None:
        """Move the running statistics towards those of a batch and count it."""
        self.running_mean.assign((1.0 - self.momentum) * self.running_mean + self.momentum * mean)
        self.running_var.assign((1.0 - self.momentum) * self.running_var + self.momentum * variance)
        self.num_batches_tracked.assign(self.num_batches_tracked + 1)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "epsilon": self.epsilon, "momentum": self.momentum, "fused": self.fused}


@register
class PadShortcut(keras.layers.Layer):
    """Option A of He et al. 2015, §3.3: subsample, then zero channels on both sides; no parameters."""

    def __init__(self, filters: int, *, strides: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides

    def call(self, inputs: Any) -> Any:
        """(N, H, W, C) -> (N, ceil(H / strides), ceil(W / strides), filters)."""
        missing = self.filters - inputs.shape[-1]
        subsampled = inputs[:, :: self.strides, :: self.strides, :]
        return ops.pad(subsampled, [[0, 0], [0, 0], [0, 0], [missing // 2, missing - missing // 2]])

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The output's shape."""
        batch, height, width, _ = input_shape
        return (batch, _subsampled(height, self.strides), _subsampled(width, self.strides), self.filters)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}


@register
class ChannelsFirstFlatten(keras.layers.Layer):
    """Flattens (N, H, W, C) images in PyTorch's (C, H, W) order, so that dense layers behind share weights with it (numerics 11)."""

    def call(self, inputs: Any) -> Any:
        """(N, H, W, C) -> (N, C H W)."""
        return ops.reshape(ops.transpose(inputs, (0, 3, 1, 2)), (-1, math.prod(inputs.shape[1:])))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The output's shape."""
        batch, *image = input_shape
        known = [size for size in image if size is not None]
        return (batch, math.prod(known) if len(known) == len(image) else None)


@register
class TokenEmbedding(keras.layers.Layer):
    """A class token in front of the patches, and a learned position added to every token."""

    def build(self, input_shape: Shape) -> None:
        """Create the token and the positions."""
        _, patches, width = input_shape
        assert patches is not None, "a learned position a token needs a sequence of known length"
        self.cls_token = self.add_weight(name="cls_token", shape=(1, 1, width), initializer="zeros")
        self.pos_embed = self.add_weight(name="pos_embed", shape=(1, patches + 1, width), initializer="zeros")

    def call(self, inputs: Any) -> Any:
        """(N, patches, width) -> (N, patches + 1, width)."""
        token = ops.broadcast_to(self.cls_token, (ops.shape(inputs)[0], 1, inputs.shape[2]))
        return ops.concatenate([token, inputs], axis=1) + self.pos_embed

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The output's shape."""
        batch, patches, width = input_shape
        return (batch, None if patches is None else patches + 1, width)


@register
class TokenLookup(keras.layers.Embedding):
    """`keras.layers.Embedding` whose mask leaves out one token of your choice, where Keras knows only 0 (numerics 39)."""

    def __init__(self, input_dim: int, output_dim: int, *, padding_token: int, **kwargs: Any) -> None:
        super().__init__(input_dim, output_dim, **{"embeddings_initializer": "zeros", **kwargs})
        self.padding_token = padding_token
        self.supports_masking = True

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """(N, tokens) -> (N, tokens) bool, true where a token counts."""
        return ops.not_equal(inputs, self.padding_token)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "padding_token": self.padding_token}


@register
class ScaledDotProductAttention(keras.layers.Layer):
    """softmax(q kᵀ / sqrt(width / heads)) v for each head, without a mask, of queries, keys and values side by side (numerics 26).

    As in Keras, the softmax of an input in half precision is computed in float32.
    """

    def __init__(self, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads

    def call(self, inputs: Any) -> Any:
        """(N, tokens, 3 * width) -> (N, tokens, width)."""
        _, tokens, width = inputs.shape
        size = width // (3 * self.heads)
        query, key, value = ops.unstack(ops.reshape(inputs, (-1, tokens, 3, self.heads, size)), axis=2)
        # A scale of the input's type: Keras computes its own in float32 (numerics 31).
        scale = ops.convert_to_tensor(1.0 / math.sqrt(size), dtype=inputs.dtype)
        return ops.reshape(ops.dot_product_attention(query, key, value, scale=scale), (-1, tokens, width // 3))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The output's shape."""
        batch, tokens, width = input_shape
        return (batch, tokens, None if width is None else width // 3)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "heads": self.heads}


@register
class ExactGELU(keras.layers.Layer):
    """x Φ(x) (numerics 9). `keras.activations.gelu` holds sqrt(2) in float32 whatever it is given (numerics 31)."""

    def call(self, inputs: Any) -> Any:
        """Any shape -> the same shape."""
        return 0.5 * inputs * (1.0 + ops.erf(inputs * math.sqrt(0.5)))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        """The input's shape."""
        return input_shape


def moments(inputs: Any) -> tuple[Any, Any]:
    """Mean and biased variance of each channel in two passes: E[x²] - E[x]² in one would cancel (numerics 7)."""
    count = values_per_channel(inputs)
    mean = channel_sums(inputs) / count
    return mean, channel_sums(ops.square(inputs - mean)) / count


def channel_sums(inputs: Any) -> Any:
    """(N, H, W, C) or (N, C) -> (C,): the sums over rows, then columns, then images.

    Over all of them at once TensorFlow adds one value after the other, and its rounding grows with their number (numerics 38).
    """
    for _ in range(len(inputs.shape) - 1):
        inputs = ops.sum(inputs, axis=-2)
    return inputs


def values_per_channel(inputs: Any) -> Any:
    """How many values of each channel there are, in the precision of the values."""
    return ops.cast(ops.size(inputs) // inputs.shape[-1], inputs.dtype)


def normalize_by_batch(inputs: Any, gamma: Any, beta: Any, epsilon: float) -> tuple[Any, Any, Any]:
    """gamma (x - mean) / sqrt(variance + epsilon) + beta by the batch's own statistics, and these; only the first has a gradient.

    The gradient is Ioffe & Szegedy's formula, which passes over the batch about half as often as what automatic differentiation
    makes of the forward pass. It is itself written in terms of x, so that it can be differentiated again.
    """
    scope = tf.get_current_name_scope()

    @tf.custom_gradient
    def normalize(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> Any:
        mean, variance = moments(x)
        y = (x - mean) * (gamma * tf.math.rsqrt(variance + epsilon)) + beta

        def backward(dy: tf.Tensor, *_: tf.Tensor) -> tuple[tf.Tensor, ...]:
            with tf.name_scope(f"gradient_tape/{scope}/"):  # TensorFlow scopes only the gradients of its own operators
                return gradient(dy)

        def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, ...]:
            mean, variance = moments(x)  # seen here by the tape; computed once all the same
            inverse, centred = tf.math.rsqrt(variance + epsilon), x - mean
            count = values_per_channel(x)
            dbeta, projected = channel_sums(dy), channel_sums(dy * centred)
            dx = (dy - centred * (inverse * inverse * projected / count) - dbeta / count) * (gamma * inverse)
            return dx, inverse * projected, dbeta

        return (y, mean, variance), backward

    return normalize(*(tf.convert_to_tensor(each) for each in (inputs, gamma, beta)))


def unbiased(variance: Any, count: Any) -> Any:
    """The unbiased variance of `count` values, n/(n-1) of the biased one (numerics 6)."""
    return variance * (count / (count - 1.0))


def _pad_sides(inputs: Any, padding: int, value: float) -> Any:
    if not padding:
        return inputs
    return ops.pad(inputs, [[0, 0], [padding, padding], [padding, padding], [0, 0]], constant_values=value)


def _padded_shape(shape: Shape, padding: int) -> Shape:
    batch, height, width, channels = shape
    return (batch, None if height is None else height + 2 * padding, None if width is None else width + 2 * padding, channels)


def _subsampled(size: int | None, strides: int) -> int | None:
    return None if size is None else -(-size // strides)
