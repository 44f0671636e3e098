"""torchvision and timm load a canonical checkpoint unchanged."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from triptych.core import catalog, checkpoint, contract, initialize, philox
from triptych.core.spec import Spec


@functools.cache
def _weights(spec: Spec, precision: str) -> checkpoint.Weights:
    """Quick random weights; Philox would take seconds for a ResNet-18."""
    rng = np.random.default_rng(7)
    return {tensor.name: rng.standard_normal(tensor.shape).astype(initialize.dtype_of(tensor, precision)) for tensor in spec.tensors()}


def weights_of(spec: Spec, precision: str = "float32") -> checkpoint.Weights:
    """Weights in which every tensor differs and the counters count."""
    return {name: np.array(3, np.int64) if array.dtype.kind == "i" else array.copy() for name, array in _weights(spec, precision).items()}


def bits(array: np.ndarray) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """All that makes an array what it is."""
    return array.dtype, array.shape, array.tobytes()


def check_equal(left: checkpoint.Weights, right: checkpoint.Weights) -> None:
    """Same names in the same order, same dtypes, shapes and bits."""
    assert list(left) == list(right)
    assert [name for name in left if bits(left[name]) != bits(right[name])] == []


def test_torchvision_loads_it_strictly(tmp_path: Path) -> None:
    contract.load("pytorch")
    from safetensors.torch import load_file
    from torchvision.models import resnet18

    spec = catalog.get_spec("resnet18")
    weights = weights_of(spec)
    model = resnet18(weights=None)
    model.load_state_dict(load_file(checkpoint.save(tmp_path / "c", spec, weights) / "model.safetensors"), strict=True)
    check_equal({name: tensor.numpy() for name, tensor in model.state_dict().items()}, weights)


@pytest.mark.parametrize("options", [{}, {"num_classes": 7, "in_channels": 1, "image_size": 64}])
def test_timm_loads_it_from_the_directory(tmp_path: Path, options: dict[str, int]) -> None:
    contract.load("pytorch")
    timm = pytest.importorskip("timm", reason="timm, a peer that must load our checkpoints, is not installed")
    spec = catalog.get_spec("resnet18", **options)
    weights = weights_of(spec)
    directory = checkpoint.save(tmp_path / "c", spec, weights, labels=[f"class {i}" for i in range(spec.num_classes)])
    model = timm.create_model(f"local-dir:{directory}", pretrained=True)
    check_equal({name: tensor.numpy() for name, tensor in model.state_dict().items()}, weights)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (spec.in_channels, spec.image_size, spec.image_size)
    assert data["interpolation"] == "bilinear"
    assert (tuple(data["mean"]), tuple(data["std"])) == (spec.preprocessing.mean, spec.preprocessing.std)
    assert int(spec.image_size / data["crop_pct"]) == spec.preprocessing.resize_short_side


def test_timm_loads_a_vit_from_the_directory_and_its_logits_are_ours(tmp_path: Path) -> None:
    room = contract.load("pytorch")
    timm = pytest.importorskip("timm", reason="timm, a peer that must load our checkpoints, is not installed")
    import torch

    spec = catalog.get_spec("vit_tiny_patch16_224", num_classes=7, in_channels=1, image_size=64)
    weights = initialize.parity_weights(spec, 0, "float32")
    directory = checkpoint.save(tmp_path / "c", spec, weights)
    peer = timm.create_model(f"local-dir:{directory}", pretrained=True).double().eval()
    check_equal({name: tensor.float().numpy() for name, tensor in peer.state_dict().items()}, weights)
    images = philox.normal("images", (2, *spec.input_shape))
    with torch.no_grad():
        expected = peer(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    model = room.create_model(spec, {name: value.astype(np.float64) for name, value in weights.items()}, precision="float64", device="cpu")
    np.testing.assert_allclose(model.predict(images), expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def test_timm_loads_the_file(tmp_path: Path) -> None:
    contract.load("pytorch")
    timm = pytest.importorskip("timm", reason="timm, a peer that must load our checkpoints, is not installed")
    spec = catalog.get_spec("resnet18")
    directory = checkpoint.save(tmp_path / "c", spec, weights_of(spec))
    model = timm.create_model("resnet18", checkpoint_path=str(directory / "model.safetensors"))
    check_equal({name: tensor.numpy() for name, tensor in model.state_dict().items()}, weights_of(spec))


def test_timm_does_not_build_something_else_for_a_model_it_lacks(tmp_path: Path) -> None:
    contract.load("pytorch")
    timm = pytest.importorskip("timm", reason="timm, a peer that must load our checkpoints, is not installed")
    spec = catalog.get_spec("resnet20")
    directory = checkpoint.save(tmp_path / "c", spec, weights_of(spec))
    assert "pretrained_cfg" not in json.loads((directory / "config.json").read_text())
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{directory}", pretrained=True)


@pytest.mark.parametrize("image_size", range(32, 400, 7))
def test_crop_fraction_gives_timm_our_resize(image_size: int) -> None:
    preprocessing = catalog.get_spec("resnet18", image_size=image_size).preprocessing
    assert preprocessing.resize_short_side is not None
    assert int(image_size / checkpoint._crop_pct(image_size, preprocessing.resize_short_side)) == preprocessing.resize_short_side
