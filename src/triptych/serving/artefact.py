"""What is served: an artefact that `triptych export` wrote, its hashes checked. It is opened by a process of its own (`worker.py`)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.core import catalog
from triptych.core.errors import FrameworkMissing, InputRefused, UsageError
from triptych.core.spec import ImageSpec, from_dict
from triptych.data import imagenet
from triptych.export import matrix, record, runtimes

PLATFORMS = {"onnxruntime": "onnx_onnxv1", "saved_model": "tensorflow_savedmodel"}
"""The runtimes that serve, and what the protocol calls their files."""
SERVED = matrix.run_by(*PLATFORMS)
VERSION = "1"
INPUT, OUTPUT = "images", "logits"


@dataclass(frozen=True, slots=True)
class Artefact:
    """A verified artefact: its directory, its format and who wrote it, the model's spec, and size and hash of every file."""

    directory: Path
    format: str
    source: str
    spec: ImageSpec
    files: Mapping[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def cell(self) -> matrix.Cell:
        """Its place in the matrix."""
        return next(cell for cell in matrix.CELLS if (cell.source, cell.format) == (self.source, self.format))

    @property
    def runtime(self) -> str:
        """What runs it."""
        return str(self.cell.runtime)

    @property
    def path(self) -> Path:
        """The file or folder that the runtime opens."""
        return self.directory / matrix.FORMATS[self.format].file

    @property
    def channels_first(self) -> bool:
        """Whether a sample is (C, H, W), as in files from PyTorch, or (H, W, C), as in all that TensorFlow runs."""
        return self.cell.layout == "NCHW"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample, in the file's own layout."""
        height, width, channels = self.spec.input_shape
        return (channels, height, width) if self.channels_first else (height, width, channels)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes where they are known: a thousand classes of images prepared as ImageNet's are ImageNet's."""
        is_imagenet = self.spec.num_classes == len(imagenet.classes()) and self.spec.preprocessing == catalog.IMAGENET
        return imagenet.names() if is_imagenet else None

    def metadata(self) -> dict[str, Any]:
        """The model's metadata in the protocol's words."""
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": PLATFORMS[self.runtime],
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *self.shape]}],
            "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1, self.spec.num_classes]}],
        }


def find(directory: Path, formats: Collection[str]) -> Path:
    """The artefact's directory: `directory` itself, or the only one in it of these formats. UsageError otherwise."""
    if (directory / record.NAME).is_file():
        return directory
    below = sorted(path.parent for path in directory.glob(f"*/{record.NAME}")) if directory.is_dir() else []
    fit = [path for path in below if path.name.partition("-")[2] in formats]
    if len(fit) == 1:
        return fit[0]
    example = _example(formats)
    if not below:
        raise UsageError(f"{directory} holds no {record.NAME}: give an artefact's directory, as written by `{example}`")
    if not fit:
        raise UsageError(f"{directory} holds {', '.join(path.name for path in below)}; wanted is {' or '.join(formats)}: `{example}`")
    raise UsageError(f"{directory} holds {len(fit)} artefacts that fit; choose one of {', '.join(map(str, fit))}")


def _example(formats: Collection[str]) -> str:
    """The command of the first that is written in one go, or of the first."""
    cell = min((cell for cell in matrix.CELLS if cell.possible and cell.format in formats), key=lambda cell: cell.via is not None)
    return f"triptych export resnet20 --from {cell.source} --to {cell.format} --out exported"


def load(directory: Path, formats: Collection[str] = SERVED) -> Artefact:
    """Verify the artefact of a directory.

    Raises UsageError for a format that is not among `formats`, or a model that images alone do not feed; InputRefused for files that are
    not what was exported; FrameworkMissing without what runs it.
    """
    directory = find(directory, formats)
    kept = record.read(directory)
    if kept.get("format") not in formats:
        raise UsageError(f"{directory} is a {kept.get('format')!r}; wanted is {' or '.join(formats)}: `{_example(formats)}`")
    if not kept.get("passed"):
        raise InputRefused(f"{directory / record.NAME} does not say that the artefact passed its verification; export it again")
    found = _told(directory, kept)
    missing = runtimes.missing(found.runtime)
    if missing is not None:
        raise FrameworkMissing(missing)
    return found


def _told(directory: Path, kept: dict[str, Any]) -> Artefact:
    try:
        spec, source = catalog.fed_by_images(from_dict(kept["spec"])), str(kept["source"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputRefused(f"{directory / record.NAME} describes no model of ours ({type(error).__name__}: {error})") from None
    if source not in [cell.source for cell in matrix.CELLS if cell.possible and cell.format == kept["format"]]:
        raise InputRefused(f"{directory / record.NAME} names {source!r} as the source of a {kept['format']}, which none of ours writes")
    if not re.fullmatch(r"\w[\w.-]*", spec.name):
        raise InputRefused(f"{directory / record.NAME} names its model {spec.name!r}; a name has letters, digits, '_', '-' and '.'")
    return Artefact(directory, str(kept["format"]), source, spec, kept["files"])
