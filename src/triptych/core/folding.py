"""BatchNorm folded into the convolutions before it: in inference the same function, with fewer passes over memory.

With s = γ / sqrt(variance + ε), per output channel:  W' = s W,  b' = β - s mean (Jacob et al. 2018, arXiv:1712.05877, §3.2). Computed in
float64 and rounded once. The result is a model like any other, of a spec without BatchNorm; what it has lost is how to train.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np

from triptych.core.spec import ResNetSpec, Spec


def fold(spec: Spec, weights: Mapping[str, np.ndarray]) -> tuple[Spec, dict[str, np.ndarray]]:
    """The spec and canonical weights of the same function without BatchNorm; a model that has none, and its weights, as they are."""
    if not isinstance(spec, ResNetSpec) or spec.batch_norm is None:
        return spec, dict(weights)
    folded = {tensor.name: weights[tensor.name] for layer in spec.layers() if layer.op == "linear" for tensor in layer.tensors()}
    for conv, norm in itertools.pairwise(spec.layers()):
        if norm.op == "batch_norm":
            kernel, dtype = weights[f"{conv.name}.weight"], weights[f"{conv.name}.weight"].dtype
            gamma, beta, mean, variance = (
                np.asarray(weights[f"{norm.name}.{name}"], np.float64) for name in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / np.sqrt(variance + spec.batch_norm.epsilon)
            folded[f"{conv.name}.weight"] = (kernel * scale[:, None, None, None]).astype(dtype)
            folded[f"{conv.name}.bias"] = (beta - mean * scale).astype(dtype)
    without = dataclasses.replace(spec, batch_norm=None)
    return without, {tensor.name: folded[tensor.name] for tensor in without.tensors()}
