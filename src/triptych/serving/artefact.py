"""What is served: an ONNX file that `triptych export` wrote, its hashes checked, opened by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import catalog
from triptych.core.errors import InputRefused, UsageError
from triptych.core.spec import ImageSpec, from_dict
from triptych.data import imagenet
from triptych.export import matrix, record, runtimes

RUNTIME = "onnxruntime"
SERVED = tuple(row.name for row in matrix.FORMATS.values() if row.name in ("onnx", "onnx_opset11"))
VERSION = "1"
INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True, slots=True)
class Served:
    """A model ready to run: `run` takes a batch (N, *shape) float32 in the file's own layout and gives logits (N, classes)."""

    name: str
    spec: ImageSpec
    source: str
    shape: tuple[int, int, int]
    labels: tuple[str, ...] | None
    run: Callable[[np.ndarray], np.ndarray]
    versions: dict[str, str]

    @property
    def channels_first(self) -> bool:
        """Whether a sample is (C, H, W), as in files from PyTorch, or (H, W, C)."""
        return self.source == "pytorch"

    def metadata(self) -> dict[str, Any]:
        """The model's metadata in the protocol's words."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "onnx_onnxv1",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self.shape]}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, self.spec.num_classes]}],
        }


def find(directory: Path) -> Path:
    """The artefact's directory: `directory` itself, or the only one in it that can be served. UsageError otherwise."""
    if (directory / record.NAME).is_file():
        return directory
    below = sorted(path.parent for path in directory.glob(f"*/{record.NAME}")) if directory.is_dir() else []
    fit = [path for path in below if path.name.partition("-")[2] in SERVED]
    if len(fit) == 1:
        return fit[0]
    example = "triptych export resnet20 --from pytorch --to onnx --out exported"
    if not below:
        raise UsageError(f"{directory} holds no {record.NAME}: give an artefact's directory, as written by `{example}`")
    if not fit:
        raise UsageError(f"{directory} holds {', '.join(path.name for path in below)}; only ONNX files are served: `{example}`")
    raise UsageError(f"{directory} holds {len(fit)} artefacts that can be served; choose one of {', '.join(map(str, fit))}")


def load(directory: Path) -> Served:
    """Verify the artefact of a directory and open it.

    Raises UsageError for a format that is not served, or a model that images alone do not feed; InputRefused for files that are not
    what was exported; FrameworkMissing without ONNX Runtime.
    """
    directory = find(directory)
    kept = record.read(directory)
    if kept.get("format") not in SERVED:
        raise UsageError(f"{directory} is a {kept.get('format')!r}; what can be served is {' and '.join(SERVED)}, on ONNX Runtime")
    if not kept.get("passed"):
        raise InputRefused(f"{directory / record.NAME} does not say that the artefact passed its verification; export it again")
    spec, source = _told(directory, kept)
    run = runtimes.opened(RUNTIME, directory / matrix.FORMATS[kept["format"]].file)
    height, width, channels = spec.input_shape
    shape = (channels, height, width) if source == "pytorch" else (height, width, channels)
    return Served(spec.name, spec, source, shape, labels(spec), run, runtimes.load(RUNTIME).versions())


def _told(directory: Path, kept: dict[str, Any]) -> tuple[ImageSpec, str]:
    try:
        spec, source = catalog.fed_by_images(from_dict(kept["spec"])), str(kept["source"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused(f"{directory / record.NAME} describes no model of ours ({type(error).__name__}: {error})") from None
    if source not in matrix.SOURCES:
        raise InputRefused(f"{directory / record.NAME} names {source!r} as its source; it must be one of {', '.join(matrix.SOURCES)}")
    return spec, source


def labels(spec: ImageSpec) -> tuple[str, ...] | None:
    """The names of the classes where they are known: a thousand classes of images prepared as ImageNet's are ImageNet's."""
    is_imagenet = spec.num_classes == len(imagenet.classes()) and spec.preprocessing == catalog.IMAGENET
    return imagenet.names() if is_imagenet else None
