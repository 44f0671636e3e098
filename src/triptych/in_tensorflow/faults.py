"""Realistic porting mistakes, planted from outside in a model, a trainer or the input pipeline, and taken back on exit.

Each planting is called as `planting(subject, layer)`, where `subject` has `model` (and `trainer`, `recipe`, `spec`) and `layer` is the
canonical name of a layer of the fitting kind (ignored where the mistake is nobody's in particular). No model code knows of any of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import keras
import tensorflow as tf

from triptych.core.recipe import SGD, AdamW, Clip
from triptych.in_tensorflow import data, layers, optim, text_image_faults, train
from triptych.in_tensorflow.model import traced_anew
from triptych.in_tensorflow.optim import Slots

Planting = Callable[[Any, str], contextlib.AbstractContextManager[None]]
Call = Callable[[Any], Any]

PLANTINGS: dict[str, Planting] = {}


def planting(make: Callable[[Any, str], Iterator[None]]) -> Planting:
    """Enter a generator function into `PLANTINGS` under its name."""
    PLANTINGS[make.__name__] = contextlib.contextmanager(make)
    return PLANTINGS[make.__name__]


def in_layer(wrapper: Callable[[Any, Call, Any], Any]) -> Planting:
    """Enter a `wrapper(native_layer, call, x)`: the layer computes it in place of its own call."""

    @contextlib.contextmanager
    def plant(subject: Any, layer: str) -> Iterator[None]:
        with subject.model.intercept(layer, wrapper):
            yield

    PLANTINGS[wrapper.__name__] = plant
    return plant


def in_training(module: Any, name: str) -> Callable[[Callable[..., Any]], Planting]:
    """Enter a replacement of the function `module.name`, which every trainer traced meanwhile will use."""

    def enter(replacement: Callable[..., Any]) -> Planting:
        @contextlib.contextmanager
        def plant(subject: Any, layer: str) -> Iterator[None]:
            with traced_anew(train.Trainer), patch.object(module, name, replacement):
                yield

        PLANTINGS[replacement.__name__] = plant
        return plant

    return enter


def in_pipeline(name: str) -> Callable[[Callable[..., Any]], Planting]:
    """Enter a replacement of the function `data.name`."""

    def enter(replacement: Callable[..., Any]) -> Planting:
        @contextlib.contextmanager
        def plant(subject: Any, layer: str) -> Iterator[None]:
            with patch.object(data, name, replacement):
                yield

        PLANTINGS[replacement.__name__] = plant
        return plant

    return enter


# --- Layers -----------------------------------------------------------------------------------------------------------------------


@in_layer
def batch_norm_epsilon(native: Any, call: Call, x: Any) -> Any:
    """Keras' default epsilon (numerics 4)."""
    with patch.object(native, "epsilon", 1e-3):
        return call(x)


@in_layer
def batch_norm_momentum(native: Any, call: Call, x: Any) -> Any:
    """Momentum read as the weight of the old statistics, as Keras and Flax do (numerics 5)."""
    with patch.object(native, "momentum", 1.0 - native.momentum):
        return call(x)


@in_layer
def batch_norm_biased_variance(native: Any, call: Call, x: Any) -> Any:
    """The biased variance goes into the running one, as in Keras and Flax (numerics 6)."""
    with patch.object(layers, "unbiased", lambda variance, count: variance):
        return call(x)


@in_layer
def batch_norm_fast_variance(native: Any, call: Call, x: Any) -> Any:
    """E[x²] - E[x]², Flax's default (numerics 7)."""

    def fast_moments(inputs: Any) -> tuple[Any, Any]:
        axes = list(range(inputs.shape.rank - 1))
        mean = tf.reduce_mean(inputs, axes)
        return mean, tf.reduce_mean(inputs * inputs, axes) - mean * mean

    with patch.object(layers, "moments", fast_moments):
        return call(x)


@in_layer
def batch_norm_frozen_in_training(native: Any, call: Call, x: Any) -> Any:
    """Running statistics used while training: `training=True` was forgotten."""
    return type(native).call(native, x, training=False)


@in_layer
def batch_norm_batch_statistics_in_eval(native: Any, call: Call, x: Any) -> Any:
    """The batch's own statistics at inference: the model was left in train mode."""

    def normalize_by_batch(inputs: Any, mean: Any, variance: Any) -> Any:
        return type(native).normalize(native, inputs, *layers.moments(inputs))

    with patch.object(native, "normalize", normalize_by_batch):
        return call(x)


@in_layer
def layer_norm_epsilon(native: Any, call: Call, x: Any) -> Any:
    """Keras' default epsilon (numerics 8)."""
    with patch.object(native, "epsilon", 1e-3):
        return call(x)


@in_layer
def layer_norm_fast_variance(native: Any, call: Call, x: Any) -> Any:
    """E[x²] - E[x]², Flax's default (numerics 7)."""
    mean = tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.maximum(tf.reduce_mean(x * x, -1, keepdims=True) - mean * mean, 0.0)
    return (x - mean) * tf.math.rsqrt(variance + native.epsilon) * native.gamma + native.beta


@in_layer
def gelu_tanh(native: Any, call: Call, x: Any) -> Any:
    """The approximation by tanh, Flax's default (numerics 9)."""
    return tf.nn.gelu(x, approximate=True)


@in_layer
def attention_unscaled(native: Any, call: Call, x: Any) -> Any:
    """No division by sqrt(width / heads) (numerics 26)."""
    query, key, value = tf.split(x, 3, axis=2)
    return call(tf.concat([query * (query.shape[2] / native.heads) ** 0.5, key, value], axis=2))


@in_layer
def attention_float32(native: Any, call: Call, x: Any) -> Any:
    """Products and softmax in float32 whatever the run's precision (numerics 26)."""
    return tf.cast(call(tf.cast(x, tf.float32)), x.dtype)


@in_layer
def attention_heads_first(native: Any, call: Call, x: Any) -> Any:
    """The projection read as (heads, 3, ...), as some networks store it, in place of (3, heads, ...) (numerics 26)."""
    _, tokens, width = x.shape
    split = tf.reshape(x, (-1, tokens, native.heads, 3, width // (3 * native.heads)))
    return call(tf.reshape(tf.transpose(split, (0, 1, 3, 2, 4)), (-1, tokens, width)))


@in_layer
def conv_same_padding(native: Any, call: Call, x: Any) -> Any:
    """`padding="same"`, which at stride 2 pads more at the end than at the start (numerics 1)."""
    return tf.nn.conv2d(x, native.kernel, native.strides, "SAME")


@in_layer
def max_pool_same_padding(native: Any, call: Call, x: Any) -> Any:
    """`padding="same"` in the stem's max-pool: the same shape, other windows (numerics 3)."""
    return tf.nn.max_pool2d(x, native.pool_size, native.strides, "SAME")


@planting
def stride_on_first_convolution(subject: Any, layer: str) -> Iterator[None]:
    """ResNet v1, as `keras.applications` has it: the stride of the bottleneck `layer` sits on its first 1x1 (numerics 10)."""
    block = next(block for block in subject.spec.blocks() if block.name == layer)

    def strided(native: Any, call: Call, x: Any) -> Any:
        return tf.nn.conv2d(x, native.kernel, block.stride, "VALID")

    def unstrided(native: Any, call: Call, x: Any) -> Any:
        return tf.nn.conv2d(x, native.kernel, 1, "SAME")

    with subject.model.intercept(f"{layer}.conv1", strided), subject.model.intercept(f"{layer}.conv2", unstrided):
        yield


@in_layer
def flatten_native_order(native: Any, call: Call, x: Any) -> Any:
    """Flattened in TensorFlow's own (H, W, C) order (numerics 11)."""
    return tf.reshape(x, (-1, x.shape[1] * x.shape[2] * x.shape[3]))


@in_layer
def low_precision_layer(native: Any, call: Call, x: Any) -> Any:
    """Operands rounded to bfloat16, as TF32-like defaults do (numerics 28)."""
    with keras.StatelessScope([(native.kernel, rounded_to_bfloat16(native.kernel))]):
        return call(rounded_to_bfloat16(x))


def rounded_to_bfloat16(x: Any) -> tf.Tensor:
    """x with the 8 bits of mantissa of a bfloat16, in x's own type."""
    x = tf.convert_to_tensor(x)
    return tf.cast(tf.cast(x, tf.bfloat16), x.dtype)


@in_layer
def pad_shortcut_one_side(native: Any, call: Call, x: Any) -> Any:
    """All zero channels behind the others."""
    subsampled = x[:, :: native.strides, :: native.strides, :]
    return tf.pad(subsampled, [[0, 0], [0, 0], [0, 0], [0, native.filters - x.shape[-1]]])


@in_layer
def pad_shortcut_average_pool(native: Any, call: Call, x: Any) -> Any:
    """Average-pools where option A subsamples. The pooled image is blown up again so that the layer's own subsampling picks the means."""
    pooled = tf.nn.avg_pool2d(x, native.strides, native.strides, "SAME")
    blown_up = tf.repeat(tf.repeat(pooled, native.strides, axis=1), native.strides, axis=2)
    return call(blown_up[:, : x.shape[1], : x.shape[2], :])


@in_layer
def dropout_in_eval(native: Any, call: Call, x: Any) -> Any:
    """Dropout left on at inference."""
    return call(tf.nn.experimental.stateless_dropout(x, rate=0.1, seed=(0, 1)))


@in_layer
def gradient_stopped_shortcut(native: Any, call: Call, x: Any) -> Any:
    """`tf.stop_gradient` on the shortcut: the forward pass is right, the gradient is not."""
    return call(tf.stop_gradient(x))


for _wrapper in text_image_faults.WRAPPERS:
    in_layer(_wrapper)


# --- Optimizer --------------------------------------------------------------------------------------------------------------------


@in_training(optim, "sgd")
def momentum_convention(
    rule: SGD, decay: float, weight: tf.Variable, gradient: tf.Tensor, slots: Slots, learning_rate: tf.Tensor, step: tf.Tensor
) -> list[Any]:
    """`keras.optimizers.SGD`: v = m v - lr g; w += v. It agrees only while the learning rate is constant (numerics 12)."""
    (velocity,) = slots
    gradient = gradient + decay * weight
    after = rule.momentum * velocity - learning_rate * gradient
    move = rule.momentum * after - learning_rate * gradient if rule.nesterov else after
    return optim.assign(weight, weight + move, slots, [after])


@in_training(optim, "sgd")
def nesterov_formula(
    rule: SGD, decay: float, weight: tf.Variable, gradient: tf.Tensor, slots: Slots, learning_rate: tf.Tensor, step: tf.Tensor
) -> list[Any]:
    """The look-ahead uses the buffer from before this step, g + m v_old, which is plain momentum (numerics 13)."""
    (momentum,) = slots
    direction = gradient + decay * weight + rule.momentum * momentum
    return optim.assign(weight, weight - learning_rate * direction, slots, [direction])


@in_training(optim, "sgd")
def weight_decay_decoupled(
    rule: SGD, decay: float, weight: tf.Variable, gradient: tf.Tensor, slots: Slots, learning_rate: tf.Tensor, step: tf.Tensor,
    *, coupled: Callable[..., list[Any]] = optim.sgd,
) -> list[Any]:  # fmt: skip
    """Decoupled decay in SGD, as every Keras optimizer has it (numerics 14)."""
    weight.assign(weight * (1.0 - learning_rate * decay))
    return coupled(rule, 0.0, weight, gradient, slots, learning_rate, step)


@in_training(optim, "adamw")
def adam_epsilon_hat(
    rule: AdamW, decay: float, weight: tf.Variable, gradient: tf.Tensor, slots: Slots, learning_rate: tf.Tensor, step: tf.Tensor
) -> list[Any]:
    """`keras.optimizers.AdamW`: epsilon inside the bias correction, the "epsilon hat" of Kingma & Ba 2015 (numerics 15)."""
    mean, square = slots
    mean = rule.beta1 * mean + (1.0 - rule.beta1) * gradient
    square = rule.beta2 * square + (1.0 - rule.beta2) * gradient * gradient
    correction1, correction2 = optim.bias_corrections(rule, step, weight.dtype)
    rate = learning_rate * tf.sqrt(correction2) / correction1
    moved = weight * (1.0 - learning_rate * decay) - rate * mean / (tf.sqrt(square) + rule.epsilon)
    return optim.assign(weight, moved, slots, [mean, square])


@in_training(train, "update")
def ema_before_step(trainer: Any, gradients: Any, learning_rate: tf.Tensor, step: tf.Tensor) -> None:
    """The moving average takes the weights from before the update."""
    trainer.average()
    trainer.optimizer.apply(gradients, learning_rate, step)


@in_training(train, "unscale")
def clip_before_unscale(trainer: Any, gradients: Any, *, unscale: Callable[..., list[tf.Tensor]] = train.unscale) -> list[tf.Tensor]:
    """Clipped while still multiplied by the loss scale, whose size the limit does not know (numerics 18)."""
    return unscale(trainer, optim.clip(gradients, trainer.recipe.clip))


@in_training(optim, "clip")
def clip_no_epsilon(gradients: Any, limits: Clip | None, *, clip: Callable[..., list[tf.Tensor]] = optim.clip) -> list[tf.Tensor]:
    """Keras' `global_clipnorm`, `tf.clip_by_global_norm`: nothing is added to the norm (numerics 18)."""
    if limits is None or limits.norm is None:
        return clip(gradients, limits)
    return tf.clip_by_global_norm(gradients, limits.norm)[0]


@in_training(optim, "clip")
def clip_per_tensor(gradients: Any, limits: Clip | None, *, clip: Callable[..., list[tf.Tensor]] = optim.clip) -> list[tf.Tensor]:
    """Keras' `clipnorm`: each tensor by its own norm (numerics 18)."""
    return [clip([gradient], limits)[0] for gradient in gradients]


# --- Loss -------------------------------------------------------------------------------------------------------------------------


@in_training(train, "cross_entropy")
def label_smoothing_other_classes(logits: tf.Tensor, targets: tf.Tensor, label_smoothing: float) -> tf.Tensor:
    """The mass is spread over the K - 1 wrong classes only (numerics 17)."""
    classes = logits.shape[-1]
    shares = train.as_shares(targets, classes, logits.dtype)
    smoothed = (1.0 - label_smoothing) * shares + label_smoothing / (classes - 1) * (1.0 - shares)
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(smoothed, logits))


@in_training(train, "cross_entropy")
def loss_float32(
    logits: tf.Tensor, targets: tf.Tensor, label_smoothing: float, *, cross_entropy: Callable[..., tf.Tensor] = train.cross_entropy
) -> tf.Tensor:
    """The loss in float32 whatever the run's precision, as `keras.losses` return it (numerics 31)."""
    return tf.cast(cross_entropy(tf.cast(logits, tf.float32), targets, label_smoothing), logits.dtype)


@in_training(train, "cross_entropy")
def loss_sum(
    logits: tf.Tensor, targets: tf.Tensor, label_smoothing: float, *, cross_entropy: Callable[..., tf.Tensor] = train.cross_entropy
) -> tf.Tensor:
    """The sum over the batch instead of the mean (numerics 29)."""
    return cross_entropy(logits, targets, label_smoothing) * tf.cast(tf.shape(logits)[0], logits.dtype)


@in_training(train, "cross_entropy")
def sigmoid_twice(
    logits: tf.Tensor, targets: tf.Tensor, label_smoothing: float, *, cross_entropy: Callable[..., tf.Tensor] = train.cross_entropy
) -> tf.Tensor:
    """A model with a sigmoid at its end, and a loss with `from_logits=True` (numerics 41)."""
    return cross_entropy(tf.sigmoid(logits), targets, label_smoothing)


# --- Input pipeline ---------------------------------------------------------------------------------------------------------------


@in_pipeline("decode_jpeg")
def jpeg_fast_dct(encoded: tf.Tensor) -> tf.Tensor:
    """TensorFlow's default, the fast inverse DCT (numerics 19)."""
    return tf.io.decode_jpeg(encoded, channels=3)


@in_pipeline("resize_bilinear")
def resize_no_antialias(pixels: tf.Tensor, height: Any, width: Any) -> tf.Tensor:
    """`tf.image.resize` by default: no antialiasing (numerics 20)."""
    return tf.image.resize(pixels, (height, width))


@in_pipeline("resize_bilinear")
def resize_uint8(
    pixels: tf.Tensor, height: Any, width: Any, *, resize_bilinear: Callable[..., tf.Tensor] = data.resize_bilinear
) -> tf.Tensor:
    """The resized image is stored as bytes (numerics 21)."""
    return tf.cast(tf.cast(tf.clip_by_value(tf.round(resize_bilinear(pixels, height, width)), 0.0, 255.0), tf.uint8), tf.float32)


@in_pipeline("brightness")
def jitter_brightness_adds(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`tf.image.adjust_brightness` adds to the pixels, by a share of the full scale (numerics 32)."""
    return pixels + (factor - 1.0) * 255.0


@in_pipeline("contrast")
def jitter_native_contrast(pixels: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """`tf.image.adjust_contrast` blends each channel with its own mean (numerics 32)."""
    return factor * pixels + (1.0 - factor) * tf.reduce_mean(pixels, axis=[1, 2], keepdims=True)
