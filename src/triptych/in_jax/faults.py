"""Realistic porting mistakes, as a JAX programmer would make them: each is planted for the length of a `with` block.

A planting takes (subject, layer). Faults of a layer intercept it, on every model of the subject; faults of the optimizer, the
loss or the input pipeline replace a function of this package, and reach a trainer that has not run yet. Left out:
`jpeg_fast_dct` (Pillow offers no choice of DCT).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from triptych.core.recipe import SGD, Clip
from triptych.in_jax import data, layers, optim, text_image_faults, train

Planting = Callable[[Any, str], AbstractContextManager[Any]]
Call = Callable[..., jax.Array]


@contextlib.contextmanager
def attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Attributes of a bound Flax module replaced for a while; Flax freezes modules, hence `object.__setattr__`."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def _intercepting(wrapper: Callable[..., Any]) -> Planting:
    return lambda subject, layer: subject.intercept(layer, wrapper)


def _with_attributes(**values: Any) -> Planting:
    """The layer, configured otherwise."""

    def wrapper(module: nn.Module, call: Call, x: jax.Array) -> jax.Array:
        with attributes(module, **values):
            return call(x)

    return _intercepting(wrapper)


def _with_function(name: str, wrong: Callable[..., Any]) -> Planting:
    """The layer, with a function of `layers` replaced while it is traced."""

    def wrapper(module: nn.Module, call: Call, x: jax.Array) -> jax.Array:
        with patch.object(layers, name, wrong):
            return call(x)

    return _intercepting(wrapper)


def _replacing(target: Any, name: str, wrong: Callable[..., Any]) -> Planting:
    """A function of this package, replaced by `wrong(right, ...)`."""

    def planting(subject: Any, layer: str) -> AbstractContextManager[Any]:
        right = getattr(target, name)
        return patch.object(target, name, lambda *args, **kwargs: wrong(right, *args, **kwargs))

    return planting


# --- layers -----------------------------------------------------------------------------------------------------------


def _momentum_of_the_old(module: Any, call: Call, x: jax.Array) -> jax.Array:
    with attributes(module, momentum=1.0 - module.momentum):
        return call(x)


def _fast_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.square(x).mean(axes) - jnp.square(mean)


def _frozen_in_training(module: Any, call: Call, x: jax.Array) -> jax.Array:
    return call(x, use_running_average=True)


def _batch_statistics_in_eval(module: Any, call: Call, x: jax.Array) -> jax.Array:
    if module.is_mutable_collection("batch_stats"):
        return call(x)
    params = module.variables["params"]
    return layers.normalize(x, *layers.batch_statistics(x), params["scale"], params["bias"], module.epsilon)


def _gelu_tanh(module: Any, call: Call, x: jax.Array) -> jax.Array:
    return nn.gelu(x, approximate=True)


def _attention_unscaled(module: Any, call: Call, x: jax.Array) -> jax.Array:
    query, key, value = jnp.split(x, 3, axis=2)
    return call(jnp.concatenate([query * (query.shape[2] / module.heads) ** 0.5, key, value], axis=2))


def _attention_float32(module: Any, call: Call, x: jax.Array) -> jax.Array:
    return call(x.astype(jnp.float32)).astype(x.dtype)


def _attention_heads_first(module: Any, call: Call, x: jax.Array) -> jax.Array:
    """The projection read as (heads, 3, ...), as some networks store it, in place of (3, heads, ...)."""
    split = x.reshape(*x.shape[:2], module.heads, 3, -1)
    return call(jnp.swapaxes(split, 2, 3).reshape(x.shape))


def _max_pool_same(module: Any, call: Call, x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (module.kernel, module.kernel), (module.stride, module.stride), "SAME")


@contextlib.contextmanager
def _stride_on_first_convolution(subject: Any, layer: str) -> Iterator[None]:
    """A bottleneck as of ResNet v1, and of keras.applications: the stride on the first 1x1, none on the 3x3."""
    stride = subject.spec.layer(f"{layer}.conv2").stride
    with (
        _with_attributes(strides=stride)(subject, f"{layer}.conv1"),
        _with_attributes(strides=1)(subject, f"{layer}.conv2"),
    ):
        yield


def _flatten_native_order(module: Any, call: Call, x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _low_precision(module: Any, call: Call, x: jax.Array) -> jax.Array:
    """What a default of bfloat16 products does; `reduce_precision`, because XLA may drop a cast there and back."""

    def rounded(x: jax.Array) -> jax.Array:
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def promote(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, **_: Any) -> Any:
        return rounded(inputs), rounded(kernel), bias

    with attributes(module, promote_dtype=promote):
        return call(x)


def _pad_one_side(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, before + after)))


def _pad_average_pool(module: Any, call: Call, x: jax.Array) -> jax.Array:
    window = (module.stride, module.stride)
    missing = module.features - x.shape[-1]
    return layers.zero_channels(nn.avg_pool(x, window, window), missing // 2, missing - missing // 2)


def _dropout(module: Any, call: Call, x: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(jax.random.key(0, impl="threefry2x32"), 0.9, x.shape)
    return call(jnp.where(keep, x / 0.9, 0.0))


def _gradient_stopped(module: Any, call: Call, x: jax.Array) -> jax.Array:
    return call(lax.stop_gradient(x))


# --- optimizer --------------------------------------------------------------------------------------------------------


def _keras_momentum(right: Any, hyper: SGD, decay_mask: Any, values: optim.Scalars) -> optax.GradientTransformation:
    """v = m v - lr g; w += v: the learning rate scales what enters the trace, not what leaves it."""
    return optax.chain(
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.scale_by_learning_rate(values["learning_rate"]),
        optax.trace(hyper.momentum, hyper.nesterov),
    )


def _other_nesterov(right: Any, hyper: SGD, decay_mask: Any, values: optim.Scalars) -> optax.GradientTransformation:
    """v + m v in place of g + m v (a plain SGD is given this Nesterov, too)."""
    return optax.chain(
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.trace(hyper.momentum, nesterov=False),
        optax.scale(1.0 + hyper.momentum),
        optax.scale_by_learning_rate(values["learning_rate"]),
    )


def _decoupled_decay(right: Any, hyper: SGD, decay_mask: Any, values: optim.Scalars) -> optax.GradientTransformation:
    """Weight decay chained after the momentum instead of before it: SGDW."""
    return optax.chain(
        optax.trace(hyper.momentum, hyper.nesterov),
        optax.add_decayed_weights(hyper.weight_decay, decay_mask),
        optax.scale_by_learning_rate(values["learning_rate"]),
    )


def _epsilon_hat(right: Any, exp_avg: jax.Array, exp_avg_sq: jax.Array, epsilon: float, values: optim.Scalars) -> jax.Array:
    rate = jnp.sqrt(values["bias_correction2"]) / values["bias_correction1"]
    return rate * exp_avg / (jnp.sqrt(exp_avg_sq) + epsilon)


def _ema_before_step(
    right: Any, recipe: Any, decay_mask: Any, state: train.TrainState, gradients: Any, statistics: Any, values: optim.Scalars
) -> train.TrainState:
    after = right(recipe, decay_mask, state, gradients, statistics, values)
    return after.replace(ema=train.averaged(recipe.ema_decay, state.ema, {**statistics, "params": state.params}))


def _clip_before_unscale(right: Any, recipe: Any, decay_mask: Any, state: Any, gradients: Any, *rest: Any) -> Any:
    """Clipped while still multiplied by the loss scale, whose size the limit does not know (numerics 18)."""
    scaled = len(rest) == 3 and rest[-1] is not None
    return right(recipe, decay_mask, state, optim.clip(gradients, recipe.clip) if scaled else gradients, *rest)


def _clip_no_epsilon(right: Any, gradients: Any, limits: Clip | None) -> Any:
    """`optax.clip_by_global_norm`: nothing is added to the norm (numerics 18)."""
    if limits is None or limits.norm is None:
        return right(gradients, limits)
    return optax.clip_by_global_norm(limits.norm).update(gradients, optax.EmptyState())[0]


def _clip_per_tensor(right: Any, gradients: Any, limits: Clip | None) -> Any:
    """Each tensor by its own norm (numerics 18)."""
    return jax.tree.map(lambda gradient: right(gradient, limits), gradients)


# --- loss and images --------------------------------------------------------------------------------------------------


def _other_classes(right: Any, logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    shares = train.as_shares(targets, logits)
    others = label_smoothing / (logits.shape[-1] - 1)
    return optax.softmax_cross_entropy(logits, (1.0 - label_smoothing) * shares + others * (1.0 - shares)).mean()


def _loss_float32(right: Any, logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    targets = targets.astype(jnp.float32) if targets.ndim == 2 else targets
    return right(logits.astype(jnp.float32), targets, label_smoothing).astype(logits.dtype)


def _loss_sum(right: Any, logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    return right(logits, targets, label_smoothing) * logits.shape[0]


def _sigmoid_twice(right: Any, logits: jax.Array, targets: jax.Array, label_smoothing: float) -> jax.Array:
    """A model with a sigmoid at its end, and a loss of logits (numerics 41)."""
    return right(nn.sigmoid(logits), targets, label_smoothing)


def _brightness_added(right: Any, image: jax.Array, factor: jax.Array) -> jax.Array:
    """`tf.image.adjust_brightness` adds to the pixels, by a share of the full scale (numerics 32)."""
    return image + (factor - 1.0) * 255.0


def _contrast_by_channel(right: Any, image: jax.Array, factor: jax.Array) -> jax.Array:
    """`tf.image.adjust_contrast` blends each channel with its own mean (numerics 32)."""
    return factor * image + (1.0 - factor) * image.mean(axis=(-3, -2), keepdims=True)


def _no_antialias(right: Any, *given: Any, crop: int) -> jax.Array:
    return right(*given, crop=crop, antialias=False)


def _rounded(right: Any, *given: Any, crop: int) -> jax.Array:
    return jnp.round(right(*given, crop=crop))


PLANTINGS: dict[str, Planting] = {
    "batch_norm_epsilon": _with_attributes(epsilon=1e-3),
    "batch_norm_momentum": _intercepting(_momentum_of_the_old),
    "batch_norm_biased_variance": _with_function("unbiased", lambda var, n: var),
    "batch_norm_fast_variance": _with_function("batch_statistics", _fast_statistics),
    "batch_norm_frozen_in_training": _intercepting(_frozen_in_training),
    "batch_norm_batch_statistics_in_eval": _intercepting(_batch_statistics_in_eval),
    "layer_norm_epsilon": _with_attributes(epsilon=1e-3),
    "layer_norm_fast_variance": _with_attributes(use_fast_variance=True),
    "gelu_tanh": _intercepting(_gelu_tanh),
    "attention_unscaled": _intercepting(_attention_unscaled),
    "attention_float32": _intercepting(_attention_float32),
    "attention_heads_first": _intercepting(_attention_heads_first),
    "conv_same_padding": _with_attributes(padding="SAME"),
    "max_pool_same_padding": _intercepting(_max_pool_same),
    "stride_on_first_convolution": _stride_on_first_convolution,
    "flatten_native_order": _intercepting(_flatten_native_order),
    "low_precision_layer": _intercepting(_low_precision),
    "pad_shortcut_one_side": _with_function("zero_channels", _pad_one_side),
    "pad_shortcut_average_pool": _intercepting(_pad_average_pool),
    "dropout_in_eval": _intercepting(_dropout),
    "gradient_stopped_shortcut": _intercepting(_gradient_stopped),
    **{name: _intercepting(wrapper) for name, wrapper in text_image_faults.WRAPPERS.items()},
    "momentum_convention": _replacing(optim, "sgd", _keras_momentum),
    "nesterov_formula": _replacing(optim, "sgd", _other_nesterov),
    "weight_decay_decoupled": _replacing(optim, "sgd", _decoupled_decay),
    "adam_epsilon_hat": _replacing(optim, "adam_direction", _epsilon_hat),
    "ema_before_step": _replacing(train, "update", _ema_before_step),
    "label_smoothing_other_classes": _replacing(train, "cross_entropy", _other_classes),
    "loss_float32": _replacing(train, "cross_entropy", _loss_float32),
    "loss_sum": _replacing(train, "cross_entropy", _loss_sum),
    "sigmoid_twice": _replacing(train, "cross_entropy", _sigmoid_twice),
    "clip_before_unscale": _replacing(train, "advance", _clip_before_unscale),
    "clip_no_epsilon": _replacing(optim, "clip", _clip_no_epsilon),
    "clip_per_tensor": _replacing(optim, "clip", _clip_per_tensor),
    "jitter_brightness_adds": _replacing(data, "brightness", _brightness_added),
    "jitter_native_contrast": _replacing(data, "contrast", _contrast_by_channel),
    "resize_no_antialias": _replacing(data, "resample", _no_antialias),
    "resize_uint8": _replacing(data, "resample", _rounded),
}
