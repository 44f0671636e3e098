"""Realistic porting mistakes, planted in this room's native code and taken out again on exit.

A planting is called with a subject (`parity.subject.Subject`) and the canonical name of a layer, and returns a context manager.
The models know nothing of it: a planting intercepts a module, or replaces a function of `optim`, `train` or `data`, all of
which are looked up at every call.

Left out: `jpeg_fast_dct`, because torchvision offers no choice of DCT.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torchvision.transforms.v2 import functional as transforms

from triptych.core.recipe import Clip
from triptych.in_pytorch import data, optim, text_image_faults, train

Planting = Callable[[Any, str], AbstractContextManager[Any]]
Call = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, float], Tensor]


def _intercepted(wrapper: Callable[[Any, Call, Tensor], Tensor]) -> Planting:
    return lambda subject, layer: subject.intercept(layer, wrapper)


def _replaced(module: Any, function: str, wrong: Callable[..., Any]) -> Planting:
    return lambda subject, layer: patch.object(module, function, wrong)


def _wrong_update(kind: type[Optimizer], wrong: Callable[[Optimizer, float], None]) -> Planting:
    """Optimizers of this kind step wrongly, all others as they should."""
    right = optim.update

    def update(optimizer: Optimizer, learning_rate: float) -> None:
        (wrong if isinstance(optimizer, kind) else right)(optimizer, learning_rate)

    return _replaced(optim, "update", update)


# --- BatchNorm ---------------------------------------------------------------------------------------------------------------


def _epsilon(norm: nn.BatchNorm2d | nn.LayerNorm, call: Call, x: Tensor) -> Tensor:
    """Keras' default, for BatchNorm and LayerNorm alike (numerics 4, 8)."""
    with patch.object(norm, "eps", 1e-3):
        return call(x)


def _momentum(norm: Any, call: Call, x: Tensor) -> Tensor:
    """Keras' and Flax's convention: momentum weighs the old."""
    with patch.object(norm, "momentum", 1.0 - norm.momentum):
        return call(x)


def _biased_variance(norm: Any, call: Call, x: Tensor) -> Tensor:
    if not norm.training:
        return call(x)
    before = norm.running_var.clone()
    y = call(x)
    with torch.no_grad():
        norm.running_var.copy_(before.lerp(x.var((0, 2, 3), correction=0), norm.momentum))
    return y


def _fast_variance(norm: nn.BatchNorm2d, call: Call, x: Tensor) -> Tensor:
    """Flax's `use_fast_variance`: E[x²] - E[x]², which cancels."""
    if not norm.training:
        return call(x)
    mean, count = x.mean((0, 2, 3)), x.numel() // x.shape[1]
    variance = (x.square().mean((0, 2, 3)) - mean.square()).clamp(min=0.0)
    _track(norm, mean, variance * (count / (count - 1)))
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (x - _per_channel(mean)) * _per_channel(scale) + _per_channel(norm.bias)


def _frozen_in_training(norm: nn.BatchNorm2d, call: Call, x: Tensor) -> Tensor:
    """The mode flag that never reached the layer."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)


def _batch_statistics_in_eval(norm: nn.BatchNorm2d, call: Call, x: Tensor) -> Tensor:
    """A forgotten `model.eval()`."""
    return call(x) if norm.training else _normalized_by_batch(norm, x)


def _normalized_by_batch(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)


def _per_channel(c: Tensor) -> Tensor:
    return c[:, None, None]


def _track(norm: Any, mean: Tensor, variance: Tensor) -> None:
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance, norm.momentum)
        norm.num_batches_tracked.add_(1)


# --- Transformers ------------------------------------------------------------------------------------------------------------


def _fast_layer_norm(norm: nn.LayerNorm, call: Call, x: Tensor) -> Tensor:
    """Flax's `use_fast_variance`: E[x²] - E[x]², which cancels (numerics 7)."""
    mean = x.mean(-1, keepdim=True)
    variance = (x.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0.0)
    return (x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


def _gelu_tanh(gelu: nn.GELU, call: Call, x: Tensor) -> Tensor:
    """Flax's default (numerics 9)."""
    return F.gelu(x, approximate="tanh")


def _attention_unscaled(attention: Any, call: Call, x: Tensor) -> Tensor:
    """No division by sqrt(width / heads)."""
    query, key, value = x.chunk(3, dim=2)
    return call(torch.cat([query * (query.shape[2] / attention.heads) ** 0.5, key, value], dim=2))


def _attention_float32(attention: Any, call: Call, x: Tensor) -> Tensor:
    """Products and softmax in float32 whatever the run's precision."""
    return call(x.float()).to(x.dtype)


def _attention_heads_first(attention: Any, call: Call, x: Tensor) -> Tensor:
    """The projection read as (heads, 3, ...), as some networks store it, in place of (3, heads, ...)."""
    return call(x.unflatten(2, (attention.heads, 3, -1)).transpose(2, 3).flatten(2))


# --- Geometry and layout -----------------------------------------------------------------------------------------------------


def _conv_same_padding(conv: nn.Conv2d, call: Call, x: Tensor) -> Tensor:
    """TensorFlow's SAME: at stride 2 the odd pixel of padding goes behind."""
    return F.conv2d(_same_pad(x, conv.kernel_size[0], conv.stride[0], 0.0), conv.weight, conv.bias, conv.stride)


def _max_pool_same_padding(pool: Any, call: Call, x: Tensor) -> Tensor:
    return F.max_pool2d(_same_pad(x, pool.kernel_size, pool.stride, float("-inf")), pool.kernel_size, pool.stride)


def _same_pad(x: Tensor, kernel: int, stride: int, value: float) -> Tensor:
    """(N, C, S, S) padded so that the output has ceil(S / stride) pixels, the smaller half of the padding first."""
    size = x.shape[-1]
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after), value=value)


def _stride_on_first_convolution(block: Any, call: Call, x: Tensor) -> Tensor:
    """ResNet v1 in place of v1.5: strides of a bottleneck's 1x1 and 3x3 swapped."""
    first, second = block.conv1.stride, block.conv2.stride
    with patch.object(block.conv1, "stride", second), patch.object(block.conv2, "stride", first):
        return call(x)


def _flatten_native_order(flatten: nn.Flatten, call: Call, x: Tensor) -> Tensor:
    """(H, W, C) order, as an NHWC framework flattens."""
    return call(x.permute(0, 2, 3, 1))


def _pad_one_side(shortcut: Any, call: Call, x: Tensor) -> Tensor:
    x = x[:, :, :: shortcut.stride, :: shortcut.stride]
    return F.pad(x, (0, 0, 0, 0, 0, shortcut.out_channels - shortcut.in_channels))


def _pad_average_pool(shortcut: Any, call: Call, x: Tensor) -> Tensor:
    missing = shortcut.out_channels - shortcut.in_channels
    return F.pad(F.avg_pool2d(x, shortcut.stride), (0, 0, 0, 0, missing // 2, missing - missing // 2))


# --- Arithmetic, dropout, gradient flow --------------------------------------------------------------------------------------


def _low_precision(layer: Any, call: Call, x: Tensor) -> Tensor:
    """Operands rounded to bfloat16, sums kept: what a device's fast default does."""
    x, weight = (operand.bfloat16().to(operand.dtype) for operand in (x, layer.weight))
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, layer.bias)
    return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def _dropout_always(layer: nn.Module, call: Call, x: Tensor) -> Tensor:
    """Inverted dropout of rate 0.1 whatever the mode, always the same units."""
    generator = torch.Generator(x.device).manual_seed(0)
    kept = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) >= 0.1
    return call(x * kept / 0.9)


def _stopped_gradient(layer: nn.Module, call: Call, x: Tensor) -> Tensor:
    return call(x.detach())


# --- Optimizers: in place of `optim.update` ----------------------------------------------------------------------------------


def _sgd_operands(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
    """(group, parameter, its gradient with coupled weight decay, its momentum buffer), all to be changed in place."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield group, p, p.grad + group["weight_decay"] * p, optimizer.state[p]["momentum_buffer"]


@torch.no_grad()
def _keras_momentum(optimizer: Optimizer, learning_rate: float) -> None:
    """v = m v - lr g; w += v: equal to torch's only while the learning rate is constant (numerics 12)."""
    for group, p, g, v in _sgd_operands(optimizer):
        v.mul_(group["momentum"]).sub_(learning_rate * g)
        p.add_(group["momentum"] * v - learning_rate * g if group["nesterov"] else v)


@torch.no_grad()
def _stale_nesterov(optimizer: Optimizer, learning_rate: float) -> None:
    """Looks ahead along the velocity from before its update."""
    for group, p, g, v in _sgd_operands(optimizer):
        p.sub_(learning_rate * (g + group["momentum"] * v))
        v.mul_(group["momentum"]).add_(g)


@torch.no_grad()
def _decoupled_weight_decay(optimizer: Optimizer, learning_rate: float) -> None:
    """Keras' decay in SGD: w -= lr wd w beside the step, out of the momentum's sight (numerics 14)."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            v = optimizer.state[p]["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
            p.mul_(1.0 - learning_rate * group["weight_decay"])
            p.sub_(learning_rate * (p.grad + group["momentum"] * v if group["nesterov"] else v))


@torch.no_grad()
def _epsilon_hat(optimizer: Optimizer, learning_rate: float) -> None:
    """Keras' AdamW: epsilon is added to the root before its bias correction (numerics 15)."""
    for group in optimizer.param_groups:
        (beta1, beta2), epsilon = group["betas"], group["eps"]
        for p in group["params"]:
            state = optimizer.state[p]
            steps = state["step"].add_(1).item()
            m, v = state["exp_avg"].lerp_(p.grad, 1.0 - beta1), state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
            p.mul_(1.0 - learning_rate * group["weight_decay"])
            p.sub_(learning_rate * (1.0 - beta2**steps) ** 0.5 / (1.0 - beta1**steps) * m / (v.sqrt() + epsilon))


def _average_before_step(trainer: Any, learning_rate: float) -> None:
    """In place of `train.update`: the moving average takes the weights that the step is about to replace."""
    if trainer.recipe.ema_decay is not None:
        optim.update_average(trainer.average, trainer.model.native.state_dict(), trainer.recipe.ema_decay)
    optim.update(trainer.optimizer, learning_rate)


# --- Clipping: in place of `optim.clip` and `train.unscale` --------------------------------------------------------------------


def _clip_before_unscale(trainer: Any, *, unscale: Callable[[Any], None] = train.unscale) -> None:
    """Clipped while still multiplied by the loss scale, whose size the limit does not know (numerics 18)."""
    optim.clip(trainer.trained.values(), trainer.recipe.clip)
    unscale(trainer)


def _clip_no_epsilon(parameters: Iterable[nn.Parameter], limits: Clip | None) -> None:
    """Keras' and optax's: nothing is added to the norm (numerics 18)."""
    if limits is not None and limits.norm is not None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        for gradient in gradients:
            gradient.mul_((limits.norm / norm).clamp(max=1.0))


def _clip_per_tensor(parameters: Iterable[nn.Parameter], limits: Clip | None, *, clip: Callable[..., None] = optim.clip) -> None:
    """Keras' `clipnorm`: each tensor by its own norm (numerics 18)."""
    for parameter in parameters:
        clip([parameter], limits)


# --- Loss: in place of `train.cross_entropy` ---------------------------------------------------------------------------------


def _smoothing_over_others(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Mass on the K - 1 wrong classes only (numerics 17)."""
    shares = F.one_hot(targets, logits.shape[1]).to(logits.dtype) if targets.ndim == 1 else targets
    others = label_smoothing / (logits.shape[1] - 1)
    return F.cross_entropy(logits, (1.0 - label_smoothing) * shares + others * (1.0 - shares))


def _float32_loss(logits: Tensor, targets: Tensor, label_smoothing: float, *, cross_entropy: Loss = train.cross_entropy) -> Tensor:
    """`keras.losses` return float32 whatever they are given (numerics 31)."""
    return cross_entropy(logits.float(), targets.float() if targets.is_floating_point() else targets, label_smoothing)


def _summed_loss(logits: Tensor, targets: Tensor, label_smoothing: float, *, cross_entropy: Loss = train.cross_entropy) -> Tensor:
    return cross_entropy(logits, targets, label_smoothing) * len(logits)


def _sigmoid_twice(logits: Tensor, targets: Tensor, label_smoothing: float, *, cross_entropy: Loss = train.cross_entropy) -> Tensor:
    """A model with a sigmoid at its end, and a loss `from_logits` (numerics 41)."""
    return cross_entropy(logits.sigmoid(), targets, label_smoothing)


# --- Colour jitter: in place of `data.brightness` and `data.contrast` ----------------------------------------------------------


def _brightness_added(pixels: Tensor, factor: Tensor) -> Tensor:
    """`tf.image.adjust_brightness` adds to the pixels, by a share of the full scale (numerics 32)."""
    return pixels + (factor - 1.0) * 255.0


def _contrast_by_channel(pixels: Tensor, factor: Tensor) -> Tensor:
    """`tf.image.adjust_contrast` blends each channel with its own mean (numerics 32)."""
    return factor * pixels + (1.0 - factor) * pixels.mean(dim=(2, 3), keepdim=True)


# --- Images: in place of `data.interpolate` ----------------------------------------------------------------------------------


def _aliased(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=False)


def _rounded(x: Tensor, height: int, width: int) -> Tensor:
    """Resized as uint8, as Pillow and the usual torchvision pipeline do (numerics 21)."""
    return transforms.resize_image(x.to(torch.uint8), [height, width], antialias=True).to(x.dtype)


PLANTINGS: dict[str, Planting] = {
    "batch_norm_epsilon": _intercepted(_epsilon),
    "batch_norm_momentum": _intercepted(_momentum),
    "batch_norm_biased_variance": _intercepted(_biased_variance),
    "batch_norm_fast_variance": _intercepted(_fast_variance),
    "batch_norm_frozen_in_training": _intercepted(_frozen_in_training),
    "batch_norm_batch_statistics_in_eval": _intercepted(_batch_statistics_in_eval),
    "layer_norm_epsilon": _intercepted(_epsilon),
    "layer_norm_fast_variance": _intercepted(_fast_layer_norm),
    "gelu_tanh": _intercepted(_gelu_tanh),
    "attention_unscaled": _intercepted(_attention_unscaled),
    "attention_float32": _intercepted(_attention_float32),
    "attention_heads_first": _intercepted(_attention_heads_first),
    "conv_same_padding": _intercepted(_conv_same_padding),
    "max_pool_same_padding": _intercepted(_max_pool_same_padding),
    "stride_on_first_convolution": _intercepted(_stride_on_first_convolution),
    "flatten_native_order": _intercepted(_flatten_native_order),
    "low_precision_layer": _intercepted(_low_precision),
    "pad_shortcut_one_side": _intercepted(_pad_one_side),
    "pad_shortcut_average_pool": _intercepted(_pad_average_pool),
    "dropout_in_eval": _intercepted(_dropout_always),
    "gradient_stopped_shortcut": _intercepted(_stopped_gradient),
    **{name: _intercepted(wrapper) for name, wrapper in text_image_faults.WRAPPERS.items()},
    "momentum_convention": _wrong_update(torch.optim.SGD, _keras_momentum),
    "nesterov_formula": _wrong_update(torch.optim.SGD, _stale_nesterov),
    "weight_decay_decoupled": _wrong_update(torch.optim.SGD, _decoupled_weight_decay),
    "adam_epsilon_hat": _wrong_update(torch.optim.AdamW, _epsilon_hat),
    "ema_before_step": _replaced(train, "update", _average_before_step),
    "label_smoothing_other_classes": _replaced(train, "cross_entropy", _smoothing_over_others),
    "loss_float32": _replaced(train, "cross_entropy", _float32_loss),
    "loss_sum": _replaced(train, "cross_entropy", _summed_loss),
    "sigmoid_twice": _replaced(train, "cross_entropy", _sigmoid_twice),
    "clip_before_unscale": _replaced(train, "unscale", _clip_before_unscale),
    "clip_no_epsilon": _replaced(optim, "clip", _clip_no_epsilon),
    "clip_per_tensor": _replaced(optim, "clip", _clip_per_tensor),
    "jitter_brightness_adds": _replaced(data, "brightness", _brightness_added),
    "jitter_native_contrast": _replaced(data, "contrast", _contrast_by_channel),
    "resize_no_antialias": _replaced(data, "interpolate", _aliased),
    "resize_uint8": _replaced(data, "interpolate", _rounded),
}
