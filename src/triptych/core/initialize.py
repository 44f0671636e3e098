"""Canonical initial weights from a seed: no framework is the master.

Two recipes: `initial_weights` for training (He et al. 2015 as torchvision does it: normal, fan-out), `parity_weights` for
proofs. Random initialization hides faults (gamma 1, beta 0, statistics 0 and 1 make whole formulas invisible) and is
degenerate in eval mode, so a proof uses weights in which every term of every formula counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from triptych.core import philox
from triptych.core.spec import Spec, TensorSpec

Weights = dict[str, np.ndarray]

BRANCH = 0.3


def initial_weights(spec: Spec, seed: int, precision: str = "float32") -> Weights:
    """Weights to train from: convolutions N(0, 2 / fan_out); linear layers uniform ±1/sqrt(fan_in); gamma 1, beta 0.

    A convolution with a bias, which no BatchNorm follows, is initialized as a linear layer (a ViT's patches are one); class token and
    positions are N(0, 0.02), as in timm; a lookup's rows are N(0, 1) and all of an LSTM is uniform ±1/sqrt(features), as in PyTorch.

    Computed in float64 and rounded once to `precision`, tensor by tensor from its own stream, so that adding a tensor
    changes no other.
    """
    return {tensor.name: _initial(tensor, spec, seed).astype(dtype_of(tensor, precision)) for tensor in spec.tensors()}


def _initial(tensor: TensorSpec, spec: Spec, seed: int) -> np.ndarray:
    stream, shape = f"initialize/{seed}/{tensor.name}", tensor.shape
    if tensor.kind in ("class_token", "positions"):
        return philox.normal(stream, shape) * 0.02
    if tensor.kind == "lookup_weight":
        return philox.normal(stream, shape)
    layer = spec.layer(tensor.layer)
    if layer.op == "lstm":
        return (philox.uniform(stream, shape) * 2.0 - 1.0) / math.sqrt(layer.out_channels)
    if tensor.kind == "conv_weight" and not layer.bias:
        fan_out = shape[0] * shape[2] * shape[3]
        return philox.normal(stream, shape) * math.sqrt(2.0 / fan_out)
    if tensor.kind in ("conv_weight", "linear_weight", "bias"):
        fan_in = layer.in_channels * layer.kernel**2
        return (philox.uniform(stream, shape) * 2.0 - 1.0) / math.sqrt(fan_in)
    return np.full(shape, 1.0 if tensor.kind in ("norm_weight", "running_var") else 0.0)


def parity_weights(spec: Spec, seed: int, precision: str = "float64") -> Weights:
    """Weights for proofs: gamma in [0.5, 1.5], beta, class token and positions ~ N(0, 0.2), non-zero biases; convolutions and linear
    layers as above.

    The last gamma of a residual branch is `BRANCH` of that, as in trained networks (Goyal et al. 2017 start it at 0): with full
    branches fifty layers amplify rounding so much that float32 has no digits left in which a fault could show.
    The running statistics are placeholders (0 and 1) until one train-mode pass has calibrated them (`calibrated`).
    """
    weights, ends = initial_weights(spec, seed, precision), spec.branch_ends
    for tensor in spec.tensors():
        stream, dtype = f"parity/{seed}/{tensor.name}", dtype_of(tensor, precision)
        if tensor.kind == "norm_weight":
            scale = BRANCH if tensor.layer in ends else 1.0
            weights[tensor.name] = (scale * (0.5 + philox.uniform(stream, tensor.shape))).astype(dtype)
        elif tensor.kind in ("norm_bias", "bias", "class_token", "positions", "lstm_input_bias", "lstm_state_bias"):
            weights[tensor.name] = (0.2 * philox.normal(stream, tensor.shape)).astype(dtype)
    return weights


def calibrated(spec: Spec, weights: Mapping[str, np.ndarray], after: Weights, momentum: float) -> Weights:
    """`weights` with the running statistics that one train-mode pass (`after`, from `weights`) implies for its batch.

    r_after = (1 - m) r + m s is solved for s and rounded to 8 bits of mantissa, so that the numbers, and with them the hash of
    the weights, do not depend on the last bits of the framework that ran the pass.
    """
    out = dict(weights)
    for tensor in spec.tensors():
        if tensor.kind in ("running_mean", "running_var"):
            old, new = weights[tensor.name].astype(np.float64), after[tensor.name].astype(np.float64)
            out[tensor.name] = _coarse((new - (1.0 - momentum) * old) / momentum).astype(weights[tensor.name].dtype)
    return out


def one_ulp_away(spec: Spec, weights: Mapping[str, np.ndarray], number: int) -> Weights:
    """`weights` with every parameter moved by one unit in the last place, up or down by the stream `ulp/number`."""
    moved = dict(weights)
    for tensor in spec.parameters():
        value = weights[tensor.name]
        up = philox.uniform(f"ulp/{number}/{tensor.name}", value.shape) < 0.5
        moved[tensor.name] = np.nextafter(value, np.where(up, np.inf, -np.inf).astype(value.dtype))
    return moved


def _coarse(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    coarse: np.ndarray = np.ldexp(np.round(mantissa * 256.0) / 256.0, exponent)
    return coarse


def dtype_of(tensor: TensorSpec, precision: str) -> np.dtype:
    """Counters are int64 in every precision; everything else has the precision of the run."""
    return np.dtype(np.int64 if tensor.kind == "batch_counter" else precision)
