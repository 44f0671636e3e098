"""Initial weights: golden hashes that no platform or numpy release may move, and the distributions they claim."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import pytest

from triptych.core import catalog, initialize
from triptych.core.initialize import BRANCH, Weights, calibrated, initial_weights, one_ulp_away, parity_weights
from triptych.core.spec import Spec

GOLDEN = {
    ("initial_weights", "mlp", "float32"): "49e9eefd7ac6c72909e5cff677d95f1507288ce0ac05658d569533f3940b2066",
    ("initial_weights", "mlp", "float64"): "ef7f205c0ff6bb25bbbf7bcad4b17854916493172b2896e46e0b3cb0b311f709",
    ("parity_weights", "mlp", "float32"): "195d646e3c4a1413c16ae3011df6499fe423f8191340252059ae94f6f93f475d",
    ("parity_weights", "mlp", "float64"): "4fef2588cfce62bdef2f9c32cbd8435c3124de397257a6bb317b9a64a1fe515f",
    ("initial_weights", "resnet20", "float32"): "1c93dfc7161c7970553dc12a66bd0c0fa27009fad839d0138493ef35984a24a9",
    ("initial_weights", "resnet20", "float64"): "54253200c14e2258c6334adcf88a1c27302df539536a4b68201e3493d9d13d32",
    ("parity_weights", "resnet20", "float32"): "7002f775d3d62b1a34f82ee6776a7b08f43213aae805d180c50621f92ebb16fe",
    ("parity_weights", "resnet20", "float64"): "a60b59cb8511a57a4416d5053fc0bbf51a7499319372705aabbd22fe60c1ea05",
}


def digest(weights: Weights) -> str:
    """SHA-256 of names, dtypes, shapes and little-endian bytes, in state-dict order."""
    content = hashlib.sha256()
    for name, value in weights.items():
        content.update(f"{name} {value.dtype.newbyteorder('<').str} {value.shape}\n".encode())
        content.update(np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes())
    return content.hexdigest()


@pytest.fixture
def spec() -> Spec:
    """A tiny ResNet with every kind of tensor."""
    return catalog.tiny(catalog.get_spec("resnet18"))


@pytest.mark.parametrize(("draw", "model", "precision"), GOLDEN, ids=" ".join)
def test_golden_hashes(draw: str, model: str, precision: str) -> None:
    assert digest(getattr(initialize, draw)(catalog.get_spec(model), 0, precision)) == GOLDEN[draw, model, precision]


@pytest.mark.parametrize("draw", [initial_weights, parity_weights])
@pytest.mark.parametrize("model", ["mlp", "resnet20"])
def test_names_shapes_and_dtypes_are_the_specs(draw: Callable[..., Weights], model: str) -> None:
    spec = catalog.get_spec(model)
    for precision in ("float32", "float64"):
        weights = draw(spec, 3, precision)
        assert [(name, value.shape) for name, value in weights.items()] == [(t.name, t.shape) for t in spec.tensors()]
        assert {value.dtype.name for name, value in weights.items() if not name.endswith("num_batches_tracked")} == {precision}
        assert all(value.dtype == np.int64 for name, value in weights.items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("draw", [initial_weights, parity_weights])
def test_float32_is_float64_rounded_once(draw: Callable[..., Weights], spec: Spec) -> None:
    narrow, wide = draw(spec, 0, "float32"), draw(spec, 0, "float64")
    assert all((narrow[name] == value.astype(narrow[name].dtype)).all() for name, value in wide.items())


def test_seeds_differ_and_tensors_have_their_own_streams() -> None:
    base, other = (initial_weights(catalog.get_spec("mlp"), seed) for seed in (0, 1))
    assert not (base["fc1.weight"] == other["fc1.weight"]).any()
    wider = initial_weights(catalog.get_spec("mlp", num_classes=3, dropout=0.5), 0)
    assert (wider["fc2.weight"] == base["fc2.weight"]).all()


def test_distributions_are_he_normal_and_uniform() -> None:
    weights = initial_weights(catalog.get_spec("resnet20"), 0, "float64")
    kernel = weights["layer3.1.conv1.weight"]
    # Standard deviation sqrt(2 / fan_out); its own standard error is sigma / sqrt(2 n).
    sigma = math.sqrt(2.0 / (64 * 9))
    assert abs(kernel.std() - sigma) < 5 * sigma / math.sqrt(2 * kernel.size)
    assert abs(kernel.mean()) < 5 * sigma / math.sqrt(kernel.size)
    assert np.abs(weights["fc.weight"]).max() < 1 / math.sqrt(64)
    assert np.abs(weights["fc.weight"]).max() > 0.95 / math.sqrt(64)
    assert np.abs(weights["fc.bias"]).max() < 1 / math.sqrt(64)
    constants = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    assert all((weights[f"bn1.{name}"] == value).all() for name, value in constants.items())


def test_parity_weights_make_every_term_count(spec: Spec) -> None:
    weights, plain = parity_weights(spec, 0), initial_weights(spec, 0, "float64")
    for tensor in spec.parameters():
        value = weights[tensor.name]
        assert len(np.unique(value)) == value.size, tensor.name
        if tensor.kind == "norm_weight":
            scale = BRANCH if tensor.layer in spec.branch_ends else 1.0
            assert 0.5 * scale < value.min() < value.max() < 1.5 * scale
        elif tensor.kind in ("norm_bias", "bias"):
            assert (value != 0.0).all()
            assert np.abs(value).max() < 1.2  # six standard deviations of N(0, 0.2)
        else:
            assert (value == plain[tensor.name]).all()


def test_calibration_recovers_the_statistics_of_the_batch(spec: Spec) -> None:
    weights = parity_weights(spec, 0)
    momentum = 0.1
    after, batch = dict(weights), {}
    for tensor in spec.tensors():
        if tensor.kind in ("running_mean", "running_var"):
            batch[tensor.name] = 0.3 + np.arange(tensor.shape[0]) / 7.0
            after[tensor.name] = (1.0 - momentum) * weights[tensor.name] + momentum * batch[tensor.name]
    found = calibrated(spec, weights, after, momentum)
    for name, value in weights.items():
        if name in batch:
            # Eight bits of mantissa: half a unit in the eighth place.
            assert (np.abs(found[name] - batch[name]) <= 2.0**-8 * np.abs(batch[name])).all()
            assert (found[name] * 2.0**12 % 1.0 == 0.0).all()
        else:
            assert found[name] is value


def test_calibration_does_not_see_the_last_bits(spec: Spec) -> None:
    weights = parity_weights(spec, 0)
    after = {name: value + 0.37 if "running" in name else value for name, value in weights.items()}
    nudged = {name: np.nextafter(value, np.inf) if "running" in name else value for name, value in after.items()}
    one, other = calibrated(spec, weights, after, 0.1), calibrated(spec, weights, nudged, 0.1)
    assert digest(one) == digest(other) != digest(weights)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_one_ulp_away(spec: Spec, precision: str) -> None:
    weights = parity_weights(spec, 0, precision)
    moved = one_ulp_away(spec, weights, 0)
    trainable = {tensor.name for tensor in spec.parameters()}
    ups = 0
    for name, value in weights.items():
        assert moved[name].dtype == value.dtype
        if name not in trainable:
            assert moved[name] is value
            continue
        up, down = (np.nextafter(value, np.array(to, value.dtype)) for to in (np.inf, -np.inf))
        assert ((moved[name] == up) | (moved[name] == down)).all()
        ups += int((moved[name] == up).sum())
    count = sum(weights[name].size for name in trainable)
    assert abs(ups - count / 2) < 5 * math.sqrt(count) / 2
    assert digest(one_ulp_away(spec, weights, 1)) != digest(moved) == digest(one_ulp_away(spec, weights, 0))
