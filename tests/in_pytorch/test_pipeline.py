"""What is PyTorch's own in its pipeline: datasets that can be sent to a process, a filter of its own, global settings left alone."""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.core.contract import Loader
from triptych.core.preprocess import ColorJitter, RandomErasing, RandomResizedCrop, Transforms
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source
from triptych.in_pytorch.data import FromFiles, InMemory, interpolate, resize_windows

EVERYTHING = Transforms(RandomResizedCrop(), 0, 0.5, ColorJitter(0.4, 0.4, 0.4, 0.1), RandomErasing(0.5), 0.2, 1.0)
PREPROCESSING = Preprocessing(None, 20, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def noise() -> np.ndarray:
    """(12, 20, 20, 3) uint8."""
    return np.random.default_rng(0).integers(0, 256, (12, 20, 20, 3)).astype(np.uint8)


def source_of(images: Any) -> Source:
    """Images with twelve labels of ten classes."""
    return Source("noise", "train", tuple(map(str, range(10))), np.arange(12) % 10, images, [f"image {i}" for i in range(12)])


def as_png(image: np.ndarray) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def plan_of(source: Source) -> SamplingPlan:
    """Batches of five."""
    return SamplingPlan(source.labels, 10, 5, 4, EVERYTHING, 20)


@pytest.mark.parametrize("files", [False, True], ids=["array", "files"])
def test_a_dataset_can_be_sent_to_a_process_that_was_not_forked(files: bool, room: Any) -> None:
    images = noise()
    source = source_of([as_png(image) for image in images] if files else images)
    dataset = (FromFiles if files else InMemory)(source, PREPROCESSING, EVERYTHING, Loader())
    batch = plan_of(source).batch(3)
    pixels = dataset[batch][0]
    sent, received = pickle.loads(pickle.dumps((dataset, batch)))
    np.testing.assert_array_equal(sent[received][0], pixels)


@pytest.mark.parametrize(("size", "crop"), [(40, 40), (40, 30), (300, 96), (30, 112)])
def test_windows_of_a_batch_are_resized_as_torchvision_resizes_one(size: int, crop: int) -> None:
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.integers(0, 256, (6, 3, size, size)).astype(np.float64))
    sides = generator.integers(size // 4, size + 1, (6, 2))
    windows = np.concatenate([(generator.random((6, 2)) * (size + 1 - sides)).astype(np.int64), sides], axis=1)
    made = resize_windows(x.float(), torch.from_numpy(windows), crop, torch.arange(6) % 2 == 1)
    for i, (top, left, height, width) in enumerate(windows):
        expected = interpolate(x[i : i + 1, :, top : top + height, left : left + width], crop, crop)[0]  # in float64: exact
        torch.testing.assert_close(made[i], (expected.flip(2) if i % 2 else expected).float(), rtol=0, atol=1e-4)


def test_a_caller_s_low_precision_changes_no_pixel(room: Any) -> None:
    source = source_of(noise())
    plan, before = plan_of(source), torch.get_float32_matmul_precision()
    ((expected, _),) = room.batches(source, plan.batches(0, 1), PREPROCESSING, EVERYTHING)
    try:
        torch.set_float32_matmul_precision("medium")
        ((made, _),) = room.batches(source, plan.batches(0, 1), PREPROCESSING, EVERYTHING)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(made, expected)


def test_the_callers_random_stream_is_left_alone(room: Any) -> None:
    torch.manual_seed(3)
    drawn = [torch.rand(2) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(torch.rand(2), drawn[0])
    source = source_of(noise())
    list(room.batches(source, plan_of(source).batches(0, 2), PREPROCESSING, EVERYTHING))
    assert torch.equal(torch.rand(2), drawn[1])
