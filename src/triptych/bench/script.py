"""What the stand-alone scripts of `benchmarks/` share: their options, the images they train on, and what they print.

Model, input pipeline and training loop are each script's own, as a user of its framework writes them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from triptych.bench import machine
from triptych.core import catalog
from triptych.core.environment import cpu, versions
from triptych.core.errors import TriptychError
from triptych.data import Source, open_source
from triptych.data import images as image_files

PRECISIONS = ("float32", "bfloat16")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of pixels in [0, 1]: RGB."""


def options(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, the same of every script, and `images`, the training images that it names; a mistake is told, and exit code 2."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--model", default="resnet50", help="Any image model of `triptych list`.")
    parser.add_argument("--data", help="Training images: a folder of class folders, ...; without it, the embedded digits.")
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--image-size", type=at_least(1), default=224)
    parser.add_argument("--steps", type=at_least(2), default=20, help="The first one is told apart: it traces and compiles.")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="Of products; weights and loss stay float32.")
    parser.add_argument("--learning-rate", type=float, help="Without it, 0.1 for each 256 images of a batch (Goyal et al. 2017).")
    parser.add_argument("--compile", action="store_true", help="torch.compile, or XLA in TensorFlow; JAX always compiles.")
    parser.add_argument("--workers", type=at_least(0), default=2, help="Processes or threads that prepare images.")
    parser.add_argument("--json", action="store_true", help="Print the result as JSON, with every step.")
    given = parser.parse_args(arguments)
    given.learning_rate = 0.1 * given.batch_size / 256 if given.learning_rate is None else given.learning_rate
    try:
        catalog.get_spec(given.model, image_size=given.image_size)
        given.images = Images(open_source(given.data or "digits", "train"))
    except TriptychError as error:
        parser.error(str(error))
    return given


def at_least(least: int) -> Any:
    """An option's type: a whole number, not less than `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return number


class Images:
    """Labelled images by index: ((H, W, 3) uint8, class), vetted and decoded when asked for; grey ones have three equal channels."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = self.source.image(int(index))
        if isinstance(image, bytes):
            image = image_files.decode(image_files.vet(image, self.source.names[int(index)], 3), 3)
        return np.broadcast_to(image, (*image.shape[:2], 3)).copy(), self.source.label(int(index))


@dataclass(slots=True)
class Progress:
    """The seconds and the loss of each step, from its batch's making to its loss; memory from here on."""

    given: argparse.Namespace
    framework: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    began: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        machine.begin_memory_phase()

    def step(self, loss: float) -> None:
        """A step has ended, and with it its loss is known."""
        now = perf_counter()
        self.seconds.append(now - self.began)
        self.losses.append(float(loss))
        self.began = now

    def finish(self, device: str, device_memory_bytes: int | None = None) -> dict[str, Any]:
        """The result, printed too. `device_memory_bytes` is the peak where the device has memory of its own."""
        given, later = self.given, np.array(self.seconds[1:])
        low, median, high = (given.batch_size / np.quantile(later, q) for q in (0.75, 0.5, 0.25))
        bf16 = cpu()["simd"].get("bf16", False)
        result = {
            "framework": self.framework, "model": given.model, "data": "digits" if given.data is None else "files", "device": device,
            "precision": given.precision, "bfloat16_instructions": bf16, "compile": given.compile or self.framework == "jax",
            "batch_size": given.batch_size, "image_size": given.image_size, "steps": len(self.seconds),
            "images_per_second": {"median": float(median), "quartiles": [float(low), float(high)]},
            "loss": {"first": self.losses[0], "last": self.losses[-1]}, "first_step_seconds": self.seconds[0],
            "peak_memory_bytes": machine.peak_memory(), "device_memory_bytes": device_memory_bytes,
            "versions": versions(), "step_seconds": self.seconds, "losses": self.losses,
        }  # fmt: skip
        sys.stdout.write((json.dumps(result, allow_nan=False) if given.json else text(result)) + "\n")
        return result


def text(result: dict[str, Any]) -> str:
    """The result for people."""
    speed, loss, memory = result["images_per_second"], result["loss"], result["peak_memory_bytes"]
    low, high = speed["quartiles"]
    what = f"{result['model']}, batch {result['batch_size']}, {result['image_size']} px, {result['precision']}, {result['device']}"
    lines = [
        f"{result['framework']}: {what}",
        f"images/s             {speed['median']:.1f} (quartiles {low:.1f} to {high:.1f}, {result['steps'] - 1} steps)",
        f"time to first step   {result['first_step_seconds']:.1f} s",
        f"loss                 {loss['first']:.4f} to {loss['last']:.4f}",
        f"peak memory          {'n/a' if memory is None else f'{memory / 2**30:.2f} GiB'}",
    ]
    return "\n".join(lines)
