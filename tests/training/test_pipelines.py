"""The three input pipelines yield the same batches: targets equal, pixels within 0.05 of 255 after every transform."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from triptych.core import contract
from triptych.core.contract import Loader
from triptych.core.preprocess import ColorJitter, RandomErasing, RandomResizedCrop, Transforms
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source, open_source
from triptych.training.loop import in_memory

FRAMEWORKS = contract.installed()
LEVELS = 0.05
"""Of 255: how far apart two frameworks' pixels may be (numerics 20)."""
JITTER = ColorJitter(0.4, 0.4, 0.4, 0.1)
# One transform more in each, with crops of either kind; the last has everything on.
STAGES = {
    "padded crop": Transforms(pad_crop=4),
    "padded crop, flip": Transforms(pad_crop=4, flip=0.5),
    "random resized crop, flip": Transforms(RandomResizedCrop(), flip=0.5),
    "jitter": Transforms(RandomResizedCrop(), flip=0.5, jitter=JITTER),
    "erasing": Transforms(RandomResizedCrop(), flip=0.5, jitter=JITTER, erasing=RandomErasing()),
    "everything": Transforms(RandomResizedCrop(), 0, 0.5, JITTER, RandomErasing(), 0.2, 1.0),
}


def levels(channels: int, crop: int, short_side: int | None = None) -> Preprocessing:
    """A normalization that leaves pixels as they are, in [0, 255]: (x / 255 - 0) / (1 / 255)."""
    return Preprocessing(short_side, crop, (0.0,) * channels, (1.0 / 255.0,) * channels)


def assert_same_batches(source: Source, transforms: Transforms, preprocessing: Preprocessing, batch_size: int, epochs: int = 2) -> None:
    """Two epochs through every installed framework's pipeline, held against the first one's."""
    plan = SamplingPlan(source.labels, len(source.classes), batch_size, 3, transforms, preprocessing.crop)
    steps = epochs * plan.steps_per_epoch
    rooms = [contract.load(name) for name in FRAMEWORKS]
    streams = [room.batches(source, plan.batches(0, steps), preprocessing, transforms, Loader(workers=0)) for room in rooms]
    seen = 0
    for step, made in enumerate(zip(*streams, strict=True)):
        (images, targets), *others = made
        assert images.shape == (batch_size, preprocessing.crop, preprocessing.crop, preprocessing.channels)
        assert 0.0 <= images.min() <= images.max() <= 255.01
        for framework, (pixels, labels) in zip(FRAMEWORKS[1:], others, strict=True):
            np.testing.assert_array_equal(labels, targets)
            assert np.abs(pixels - images).max() <= LEVELS, (framework, step)
        seen += 1
    assert seen == steps > 0


@pytest.mark.parametrize("crop", [32, 20], ids=["whole", "smaller"])
@pytest.mark.parametrize("stage", STAGES)
def test_of_the_embedded_digits(stage: str, crop: int) -> None:
    source = open_source("digits", "train").take(96)
    assert_same_batches(source, STAGES[stage], levels(1, crop), 32)


def test_two_frameworks_that_draw_apart_would_be_seen() -> None:
    """The comparison can fail: another seed is another batch."""
    source, transforms, preprocessing = open_source("digits", "train").take(32), STAGES["padded crop"], levels(1, 32)
    room = contract.load(FRAMEWORKS[0])
    pixels = []
    for seed in (3, 4):
        plan = SamplingPlan(source.labels, 10, 32, seed, transforms, 32)
        ((images, _),) = room.batches(source, plan.batches(0, 1), preprocessing, transforms)
        pixels.append(np.sort(images.reshape(-1)))
    assert np.abs(pixels[0] - pixels[1]).max() > LEVELS


@pytest.mark.parametrize("stage", STAGES)
def test_of_real_cifar10_in_memory(stage: str, real_data: Path) -> None:
    source = in_memory(open_source(str(real_data / "cifar10"), "train").take(256), 3)
    assert isinstance(source.images, np.ndarray)
    assert_same_batches(source, STAGES[stage], levels(3, 32), 64)


@pytest.mark.parametrize("stage", ["padded crop, flip", "everything"])
def test_of_real_photographs_from_files(stage: str, real_data: Path) -> None:
    source = open_source(str(real_data / "imagenet-samples"), "test").take(24)
    known = dataclasses.replace(source, labels=np.maximum(source.labels, 0))
    assert not isinstance(known.images, np.ndarray)
    assert len({image.shape for image in itertools.islice(map(_size, map(known.image, range(8))), 8)}) > 1
    assert_same_batches(known, STAGES[stage], levels(3, 64), 8)


def _size(encoded: bytes | np.ndarray) -> np.ndarray:
    assert isinstance(encoded, bytes)
    return contract.load(FRAMEWORKS[0]).decode(encoded, 3)
