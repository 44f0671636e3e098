"""Every family of models as one StableHLO module, for every platform and any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.export
import numpy as np
import pytest

from triptych import in_jax
from triptych.core import catalog, initialize
from triptych.core.errors import UsageError
from triptych.export import runtimes
from triptych.in_jax.export import PLATFORMS

FAMILIES = {name: catalog.tiny(catalog.get_spec(name)) for name in ("mlp", "resnet50", "vit_tiny_patch16_224")}


def created(family: str) -> Any:
    """A model with parity weights."""
    spec = FAMILIES[family]
    return in_jax.create_model(spec, initialize.parity_weights(spec, 0, "float32"), precision="float32", device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported(family: str, tmp_path: Path) -> None:
    model = created(family)
    in_jax.export(model, "stablehlo", tmp_path / "model")
    assert jax.export.deserialize(bytearray((tmp_path / "model").read_bytes())).platforms == PLATFORMS
    run = runtimes.opened("stablehlo", tmp_path / "model")
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, *model.spec.input_shape), dtype=np.float32)
        np.testing.assert_allclose(run(images), model.predict(images), rtol=1e-5, atol=1e-5)


def test_an_unknown_format_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="JAX writes no 'pdf'; choose from stablehlo, "):
        in_jax.export(created("mlp"), "pdf", tmp_path / "x")


@pytest.mark.parametrize("family", FAMILIES)
def test_onnx_has_the_padding_of_max_pooling(family: str, tmp_path: Path) -> None:
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    model = created(family)
    in_jax.export(model, "onnx", tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((2, *model.spec.input_shape), dtype=np.float32)
    found = runtimes.opened("onnxruntime", tmp_path / "model.onnx")(images)
    np.testing.assert_allclose(found, model.predict(images), rtol=1e-5, atol=1e-5)
