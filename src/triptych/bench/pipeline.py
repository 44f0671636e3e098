"""Training batches of a room's own input pipeline, for steps that are timed together with their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from triptych.bench.tracing import TRANSFORMS, opened
from triptych.core import catalog
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing, Spec
from triptych.data import Source

AHEAD = 16
"""Batches that a turn could still ask for when it ends: its last step finds the pipeline as busy as the others did."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Training images of a source, cropped at random, flipped and batched by a plan that every framework shares."""

    room: Any
    source: Source
    plan: SamplingPlan
    preprocessing: Preprocessing

    def batches(self, number: int, steps: int) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
        """The batches from `number` of the plan on, for one step to start with and `steps` more, by the room's `batches`.

        A generator: closed, it prepares nothing more, so that no other contestant's turn pays for it.
        """
        made: Generator[tuple[np.ndarray, np.ndarray], None, None] = self.room.batches(
            self.source, self.plan.batches(number, number + 1 + steps + AHEAD), self.preprocessing, self.plan.transforms
        )
        return made


def open_pipeline(room: Any, spec: Spec, data: str, batch_size: int, seed: int) -> Pipeline:
    """The pipeline over the training images of `data`, which `triptych.data.open_source` takes; grey ones in equal channels.

    UsageError for a model of other inputs, images that do not fit it, or too few for a batch.
    """
    fed = catalog.fed_by_images(spec)
    source = in_channels(opened(data, spec), fed.in_channels)
    plan = SamplingPlan(source.labels, spec.num_classes, batch_size, seed, TRANSFORMS["training_step"], fed.preprocessing.crop)
    return Pipeline(room, source, plan, fed.preprocessing)


def in_channels(source: Source, channels: int) -> Source:
    """Grey images in memory with as many equal channels as a model takes; anything else as it is, files being decoded as they should."""
    images = source.images
    if not isinstance(images, np.ndarray) or images.shape[-1] != 1:
        return source
    return dataclasses.replace(source, images=images.repeat(channels, axis=-1))
