"""What a proof computes: one plan, the same numbers for every worker."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from triptych.core import catalog, philox, recipe
from triptych.core.batch import Inputs, drawn
from triptych.core.contract import DEFAULT_EXECUTION, Execution
from triptych.core.difference import SKETCH
from triptych.core.preprocess import ColorJitter, RandomErasing, RandomResizedCrop, Transforms
from triptych.core.recipe import SGD, AdamW, Recipe, Schedule
from triptych.core.spec import Preprocessing, Spec, from_dict, to_dict

ALL_RUNGS = (1, 2, 3, 4, 5, 6, 7, 8)

# Small rates keep the free run in the regime where divergence can be compared at all (docs/numerics.md, "Rounding grows while training").
SCHEDULE = Schedule(peak=2e-3, warmup_steps=4, total_steps=40)
SGD_RECIPE = Recipe(SGD(momentum=0.9, nesterov=True, weight_decay=5e-4), SCHEDULE, global_batch_size=4, label_smoothing=0.1, ema_decay=0.9)
ADAMW_RECIPE = Recipe(AdamW(weight_decay=1e-2), SCHEDULE, global_batch_size=4, label_smoothing=0.1, ema_decay=0.9)
TRANSFORMS = Transforms(RandomResizedCrop(), 0, 0.5, ColorJitter(0.4, 0.4, 0.4, 0.1), RandomErasing(), mixup=0.2, cutmix=1.0)
"""Of rung 2, when no recipe names others: each one on, the padded crop excepted, which is shown beside them."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One climb of the ladder in one precision. `frameworks[0]` is the reference: it calibrates and writes the trajectory.

    With `data` the training rungs step on batches of that data, transformed by `transforms`, which the reference's pipeline makes once
    for all; without, on normal noise. `free` names the recipes of rung 8, of which `sketch` elements of each tensor are kept at every step.
    """

    spec: Spec
    frameworks: tuple[str, ...]
    precision: str
    rungs: tuple[int, ...] = ALL_RUNGS
    device: str = "cpu"
    seed: int = 0
    forward_batch: int = 2
    training_batch: int = 4
    steps: int = 10
    adamw_steps: int = 3
    free_steps: int = 6
    perturbations: int = 5
    free: tuple[str, ...] = ("sgd",)
    sketch: int = SKETCH
    sgd: Recipe = SGD_RECIPE
    adamw: Recipe = ADAMW_RECIPE
    transforms: Transforms = TRANSFORMS
    data: str | None = None
    uneven: Literal["drop", "pad"] = "drop"
    execution: Execution = DEFAULT_EXECUTION
    calibrate: bool = True
    faults: tuple[str, ...] = ()
    trajectory: str = "trajectory"
    keep_trajectory: bool = False
    float32_logits: bool = False

    @property
    def training_spec(self) -> Spec:
        """The spec at the image size of rungs 4 to 8."""
        return catalog.at_proof_size(self.spec)

    @property
    def not_applicable(self) -> dict[int, str]:
        """The rungs of the plan at which this model has nothing to show, by number, and why."""
        reason = f"{self.spec.name} takes {'; '.join(map(str, self.spec.inputs()))}: there are no images to decode, resize or normalize"
        return {2: reason} if 2 in self.rungs and self.spec.preprocessing is None else {}

    @property
    def calibrates(self) -> bool:
        """Whether the given weights first get running statistics, for which a model must have some."""
        return self.calibrate and any(tensor.kind == "running_mean" for tensor in self.spec.tensors())

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The two recipes by their optimizers."""
        return {"sgd": self.sgd, "adamw": self.adamw}

    def to_json(self) -> dict[str, Any]:
        """Plain data; `Plan.from_json` is its inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        recipes = {kind: recipe.to_dict(each) for kind, each in self.recipes.items()}
        parts = {"transforms": dataclasses.asdict(self.transforms), "execution": dataclasses.asdict(self.execution)}
        return {**fields, "schema": 1, "spec": to_dict(self.spec), **recipes, **parts}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` described."""
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "schema"}
        fields["spec"] = from_dict(fields["spec"])
        fields["sgd"], fields["adamw"] = recipe.from_dict(fields["sgd"]), recipe.from_dict(fields["adamw"])
        fields["transforms"], fields["execution"] = _transforms(fields["transforms"]), Execution(**fields["execution"])
        return cls(**fields)


def _transforms(data: Mapping[str, Any]) -> Transforms:
    """What `dataclasses.asdict` and JSON made of transforms."""
    kinds: dict[str, Any] = {"random_resized_crop": RandomResizedCrop, "jitter": ColorJitter, "erasing": RandomErasing}
    parts = {
        name: kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in data[name].items()})
        for name, kind in kinds.items()
        if data[name] is not None
    }
    return Transforms(**{**data, **parts})


def forward_inputs(plan: Plan) -> Inputs:
    """The batch of rung 3: images and features standard normal, float64, which subjects round to their precision; ids at random."""
    return _drawn(plan.spec, f"plan/{plan.seed}/forward", plan.forward_batch)


def training_batch(plan: Plan, step: int) -> tuple[Inputs, np.ndarray]:
    """Inputs, floats in float64, and int labels (N,) of one training step."""
    spec, n = plan.training_spec, plan.training_batch
    inputs = _drawn(spec, f"plan/{plan.seed}/train/{step}", n)
    labels = philox.bits(f"plan/{plan.seed}/labels/{step}", n) % np.uint64(spec.num_classes)
    return inputs, labels.astype(np.int64)


def _drawn(spec: Spec, stream: str, count: int) -> Inputs:
    def of(name: str) -> str:
        return f"{stream}/{name}" if name else stream

    return drawn(spec, count, lambda name, shape: philox.normal(of(name), shape), lambda name, shape: philox.uniform(of(name), shape))


def encoded_images(preprocessing: Preprocessing) -> dict[str, bytes]:
    """Files for rung 2: JPEGs of several shapes and a PNG smaller than the crop, from smooth noise (no data set needed)."""
    crop = preprocessing.crop
    shapes = {
        "wide.jpg": (crop + 77, 2 * crop + 31),
        "tall.jpg": (2 * crop + 3, crop + 19),
        "square.jpg": (crop, crop),
        "small.png": (crop // 2 + 5, crop // 2 + 9),
    }
    return {name: _encode(picture(name, height, width, preprocessing.channels), name) for name, (height, width) in shapes.items()}


def picture(name: str, height: int, width: int, channels: int) -> np.ndarray:
    """Smooth noise with edges: sums of blocks of three sizes, full range, uint8."""
    total = np.zeros((height, width, channels))
    for cell, weight in ((32, 120.0), (8, 90.0), (1, 45.0)):
        grid = philox.uniform(f"picture/{name}/{cell}", (height // cell + 1, width // cell + 1, channels))
        total += weight * grid.repeat(cell, axis=0).repeat(cell, axis=1)[:height, :width]
    return np.asarray(total, dtype=np.uint8)


def _encode(picture: np.ndarray, name: str) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.save(buffer, "JPEG" if name.endswith("jpg") else "PNG", **({"quality": 90} if name.endswith("jpg") else {}))
    return buffer.getvalue()


def pictures(preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    """uint8 images for rung 2 of models whose channels no image file has."""
    crop = preprocessing.crop
    return {"array": picture("array", crop + 3, crop + 14, preprocessing.channels)}


def spec_sha256(spec: Spec) -> str:
    """Hash of a spec's canonical JSON."""
    return hashlib.sha256(json.dumps(to_dict(spec), sort_keys=True).encode()).hexdigest()


def weights_sha256(items: Iterable[tuple[str, np.ndarray]]) -> str:
    """Hash of names, dtypes, shapes and bytes, in canonical order."""
    digest = hashlib.sha256()
    for name, value in items:
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def load(run: Path) -> tuple[Plan, dict[str, np.ndarray]]:
    """The plan of a run directory, and its weights."""
    from safetensors.numpy import load_file

    return Plan.from_json(json.loads((run / "plan.json").read_text())), load_file(run / "inputs.safetensors")
