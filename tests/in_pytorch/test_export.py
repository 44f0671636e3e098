"""Every family of models as TorchScript and as a torch.export program, of any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, initialize
from triptych.core.errors import UsageError
from triptych.core.spec import Spec
from triptych.export import runtimes

FAMILIES = {name: catalog.tiny(catalog.get_spec(name)) for name in ("mlp", "resnet20", "resnet50", "vit_tiny_patch16_224")}


def created(room: Any, spec: Spec) -> Any:
    """A model with parity weights."""
    return room.create_model(spec, initialize.parity_weights(spec, 0, "float32"), precision="float32", device="cpu")


@pytest.mark.parametrize(
    ("target", "runtime"), [("torchscript", "torchscript"), ("torchscript_script", "torchscript"), ("torch_export", "torch_export")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported(family: str, target: str, runtime: str, room: Any, tmp_path: Path) -> None:
    model = created(room, FAMILIES[family])
    before, modules = model.weights(), dict(model.native.named_modules())
    room.export(model, target, tmp_path / "model")
    run = runtimes.opened(runtime, tmp_path / "model")
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, *model.spec.input_shape), dtype=np.float32)
        np.testing.assert_allclose(run(images.transpose(0, 3, 1, 2).copy()), model.predict(images), rtol=1e-5, atol=1e-5)
    assert dict(model.native.named_modules()) == modules, "the model that was exported is as it was"
    assert all(np.array_equal(value, before[name]) for name, value in model.weights().items())


def test_an_unknown_format_is_refused_with_those_there_are(room: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="PyTorch writes no 'pdf'; choose from torchscript, "):
        room.export(created(room, FAMILIES["mlp"]), "pdf", tmp_path / "x")
