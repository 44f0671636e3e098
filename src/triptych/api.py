"""The public face: one framework-neutral wrapper around three native models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from triptych.core import catalog, checkpoint, contract, initialize
from triptych.core.batch import Inputs
from triptych.core.contract import Model
from triptych.core.errors import UsageError
from triptych.core.initialize import Weights
from triptych.core.spec import Spec


class ZooModel:
    """A catalogued model in one framework. Numpy in, numpy out; `native` is the framework's own object, yours to use."""

    def __init__(self, model: Model, provenance: dict[str, Any] | None = None, labels: Sequence[str] | None = None) -> None:
        self.model = model
        self.provenance = provenance or {}
        self.labels = labels

    @property
    def spec(self) -> Spec:
        """The frozen spec, every constant explicit."""
        return self.model.spec

    @property
    def framework(self) -> str:
        """`pytorch`, `tensorflow` or `jax`."""
        return self.model.framework

    @property
    def native(self) -> Any:
        """The nn.Module, the keras.Model, or (flax module, variables)."""
        return self.model.native

    def predict(self, inputs: Inputs, batch_size: int | None = None) -> np.ndarray:
        """(N, H, W, C) float32 images, already preprocessed -> (N, classes) logits; UsageError for another shape.

        What else a model takes, `spec.inputs()` tells: of several inputs, a mapping from name to array. Logits are of `spec.output_shape`.
        """
        return self.model.predict(inputs, batch_size)

    def features(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """Every named intermediate in eval mode, in execution order, the same names in all frameworks; NHWC."""
        return self.model.forward(inputs).intermediates

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """A canonical checkpoint that every framework, torchvision and timm load. StorageError if it cannot be written."""
        return checkpoint.save(
            Path(directory), self.spec, self.model.weights(), provenance=self.provenance, labels=self.labels, overwrite=overwrite
        )

    def __repr__(self) -> str:
        return (
            f"ZooModel({self.spec.name!r}, framework={self.framework!r}, precision={self.model.precision!r}, device={self.model.device!r})"
        )


def create_model(
    name: str,
    framework: str,
    weights: str | Path | None = None,
    precision: str = "float32",
    device: str = "auto",
    seed: int = 0,
    head: Literal["keep", "new"] = "keep",
    **options: Any,
) -> ZooModel:
    """A catalogued model, ready to predict or to train natively.

    `weights` is a canonical checkpoint (a directory, or its `model.safetensors`); None draws the canonical initial weights of
    `seed`. `head="new"` keeps a checkpoint's backbone and draws a new classifier, for `num_classes` of your own. Options are those of
    `catalog.get_spec` (`num_classes`, `in_channels`, `image_size`; for `mlp` also `hidden`, `dropout`). With a checkpoint, options
    not given are the checkpoint's.

    Raises UsageError (name, option, framework, device), FrameworkMissing (with the pip line), InputRefused (checkpoint).
    """
    contract.check_installed(framework)
    contract.check_precision(precision)
    contract.check_device(device)
    if head not in ("keep", "new"):
        raise UsageError(f"head={head!r}; choose 'keep' or 'new'")
    spec, state, provenance, labels = _state(name, weights, seed, head, precision, options)
    room = contract.load(framework)
    return ZooModel(room.create_model(spec, state, precision=precision, device=device), provenance, labels)


def _state(
    name: str, weights: str | Path | None, seed: int, head: str, precision: str, options: dict[str, Any]
) -> tuple[Spec, Weights, dict[str, Any], Sequence[str] | None]:
    """Spec, canonical weights, provenance and labels of the model that `create_model` was asked for."""
    if weights is None:
        spec = catalog.get_spec(name, **options)
        return spec, initialize.initial_weights(spec, seed, precision), {"initialized": {"seed": seed}}, None
    path = checkpoint.directory_of(weights)
    stored, loaded, labels = _stored(name, path, precision, head, options)
    spec = catalog.with_options(stored, **options)
    if head == "new" and spec.head is None:
        raise UsageError(f"{name} has no classifier to draw anew; leave head='new' out")
    if head == "keep":
        if spec.num_classes != stored.num_classes:
            raise UsageError(f"{path} has {stored.num_classes} classes, not {spec.num_classes}; head='new' draws a new classifier")
        checkpoint.validate(spec, loaded, path)
        return spec, loaded, {"loaded_from": path.name}, labels
    kept = {key: value for key, value in loaded.items() if key.rpartition(".")[0] != spec.head}
    merged = {**initialize.initial_weights(spec, seed, precision), **kept}
    checkpoint.validate(spec, merged, path)
    return spec, merged, {"backbone_from": path.name, "new_head": {"seed": seed}}, None


def _stored(name: str, path: Path, precision: str, head: str, options: dict[str, Any]) -> tuple[Spec, Weights, Sequence[str] | None]:
    """Spec, weights and labels of a checkpoint. A bare safetensors file has no config: it is held to the catalogue's spec.

    With a new head `num_classes` is that of the new one, and the file's own is the catalogue's.
    """
    if path.is_dir():
        stored = checkpoint.load(path, precision=precision)
        if stored.spec.name != name:
            raise UsageError(f"{path} holds a {stored.spec.name}, not a {name}")
        return stored.spec, stored.weights, stored.labels
    spec = catalog.get_spec(name, **{key: value for key, value in options.items() if head == "keep" or key != "num_classes"})
    return spec, checkpoint.load_weights(path, spec, precision=precision), None


def assert_equal(a: ZooModel, b: ZooModel) -> None:
    """Climb the ladder with two models in this process, for your own tests: names, weights, forward in both modes, gradients.

    They must have the same spec and precision, and different or equal frameworks. Raises AssertionError naming the first tensor in
    execution order that diverges, its error and its tolerance. Both models are left as they were.
    """
    from triptych.parity.inprocess import first_divergence

    found = first_divergence(a.model, b.model)
    if found is not None:
        raise AssertionError(
            f"{a!r} and {b!r} differ: rung {found.rung}, tensor {found.tensor!r}: error {found.error:.2e} > tolerance {found.tolerance:.2e}"
        )
