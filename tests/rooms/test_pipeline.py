"""The input pipeline of every room against a few lines of numpy: every transform, arrays and files, however it is run."""

from __future__ import annotations

import colorsys
import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core import contract
from triptych.core.contract import Loader
from triptych.core.errors import InputRefused, StorageError, UsageError
from triptych.core.preprocess import (
    GREY,
    NO_TRANSFORMS,
    ColorJitter,
    Draw,
    Geometry,
    RandomErasing,
    RandomResizedCrop,
    Transforms,
    draw,
    geometry,
)  # fmt: skip
from triptych.core.sampling import Batch, SamplingPlan, in_order
from triptych.core.spec import Preprocessing
from triptych.data import Source

SAMPLES, SIDE, SIZE = 12, 20, 5
JITTER = ColorJitter(0.4, 0.4, 0.4, 0.1)
EVERYTHING = Transforms(RandomResizedCrop(), 0, 0.5, JITTER, RandomErasing(0.5), 0.2, 1.0)
TRANSFORMS = {
    "none": NO_TRANSFORMS,
    "pad_crop": Transforms(pad_crop=4),
    "random_resized_crop": Transforms(RandomResizedCrop()),
    "flip": Transforms(flip=0.5),
    "jitter": Transforms(jitter=JITTER),
    "erasing": Transforms(erasing=RandomErasing(0.7)),
    "mixup": Transforms(mixup=0.8),
    "cutmix": Transforms(cutmix=1.0),
    "everything": EVERYTHING,
    "cifar": Transforms(None, 2, 0.5, JITTER, RandomErasing(0.5), 0.2, 1.0),
}
# Levels of 255 that a pixel may be off (the contract between the frameworks), in units after normalization by the smallest deviation.
LEVELS = 0.05


@pytest.fixture(scope="module", params=contract.installed())
def room(request: pytest.FixtureRequest) -> Any:
    """One framework's room after the other."""
    return contract.load(request.param)


def recipe_of(channels: int, crop: int = SIDE) -> Preprocessing:
    """Constants that differ by channel."""
    return Preprocessing(None, crop, (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels])


def photographs(channels: int = 3, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """(12, H, W, C) uint8, smooth enough for hues to mean something and rough enough for resizing to matter."""
    i, y, x, c = np.mgrid[:SAMPLES, :height, :width, :channels]
    waves = 128 + 100 * np.sin(x / (3 + c) + i) * np.cos(y / (4 - c) - i * c)
    return np.clip(waves + np.random.default_rng(3).normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


def source_of(images: Any) -> Source:
    """A source of these images, of ten classes."""
    count = len(images)
    return Source("waves", "train", tuple("0123456789"), np.arange(count) % 10, images, [f"image {i}" for i in range(count)])


def as_png(image: np.ndarray) -> bytes:
    """(H, W, C) uint8 as a file."""
    buffer = io.BytesIO()
    Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


def plan_of(source: Source, transforms: Transforms, crop: int = SIDE, seed: int = 4) -> SamplingPlan:
    """Batches of five: the last of an epoch is filled up."""
    return SamplingPlan(source.labels, 10, SIZE, seed, transforms, crop, "pad")


def jittered(pixels: np.ndarray, amounts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(H, W, C) float64, one operation after the other."""
    for operation in order:
        amount = float(amounts[operation])
        grey = pixels @ np.array(GREY) if pixels.shape[2] == 3 else pixels[..., 0]
        if operation == 0:
            pixels = amount * pixels
        elif operation == 1:
            pixels = amount * pixels + (1 - amount) * grey.mean()
        elif pixels.shape[2] == 3 and operation == 2:
            pixels = amount * pixels + (1 - amount) * grey[..., None]
        elif pixels.shape[2] == 3:
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in (pixels / 255).reshape(-1, 3)]
            turned = [colorsys.hsv_to_rgb((h + amount) % 1.0, s, v) for h, s, v in hsv]
            pixels = np.array(turned).reshape(pixels.shape) * 255
        pixels = np.clip(pixels, 0, 255)
    return pixels


def transformed(room: Any, image: np.ndarray, transforms: Transforms, preprocessing: Preprocessing, drawn: Draw) -> np.ndarray:
    """One image through the canonical order of things."""
    crop = preprocessing.crop
    if drawn.window is None:
        pixels = room.resize(image, geometry(preprocessing, *image.shape[:2]))
    else:
        top, left, height, width = drawn.window[0]
        padding = (transforms.pad_crop,) * 2
        padded = np.pad(image, (padding, padding, (0, 0)), "reflect")
        pixels = room.resize(padded[top : top + height, left : left + width], Geometry(crop, crop, 0, 0, crop))
    pixels = pixels.astype(np.float64)
    if drawn.flip is not None and drawn.flip[0]:
        pixels = pixels[:, ::-1]
    if drawn.jitter is not None and drawn.order is not None:
        pixels = jittered(pixels, drawn.jitter[0], drawn.order[0])
    normalized = (pixels / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    if drawn.erase is not None:
        top, left, height, width = drawn.erase[0]
        normalized[top : top + height, left : left + width] = 0.0
    return normalized


def expected(room: Any, images: Any, batch: Batch, transforms: Transforms, preprocessing: Preprocessing) -> np.ndarray:
    """A batch of the plan."""
    chosen = [images[i] for i in batch.indices]
    heights, widths = (np.array([image.shape[axis] for image in chosen]) for axis in (0, 1))
    drawn = draw(transforms, batch.words, heights, widths, preprocessing.crop)
    made = np.stack([transformed(room, image, transforms, preprocessing, drawn.row(i)) for i, image in enumerate(chosen)])
    if batch.mix is not None:
        partners, box = made[batch.mix.partner], batch.mix.box
        if box is None:
            made = batch.mix.share * made + (1 - batch.mix.share) * partners
        else:
            rows, columns = slice(box[0], box[0] + box[2]), slice(box[1], box[1] + box[3])
            made[:, rows, columns] = partners[:, rows, columns]
    return made[: len(batch.targets)]


def assert_equal_batches(given: Iterator[tuple[np.ndarray, np.ndarray]], wanted: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Targets exactly, pixels within `LEVELS` of 255."""
    for (x, y), (images, targets) in zip(given, wanted, strict=True):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(y, targets)
        np.testing.assert_allclose(x, images, rtol=0, atol=LEVELS / 255 / 0.3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [SIDE, 14], ids=["whole", "progressive"])
@pytest.mark.parametrize("files", [False, True], ids=["array", "files"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_batches_are_what_the_plan_says(name: str, files: bool, crop: int, channels: int, room: Any) -> None:
    transforms, preprocessing, images = TRANSFORMS[name], recipe_of(channels, crop), photographs(channels)
    source = source_of([as_png(image) for image in images] if files else images)
    plan = list(plan_of(source, transforms, crop).batches(1, 5))
    assert {batch.epoch for batch in plan} == {0, 1}
    wanted = [(expected(room, images, batch, transforms, preprocessing), batch.targets) for batch in plan]
    assert_equal_batches(room.batches(source, iter(plan), preprocessing, transforms), wanted)


def test_files_may_differ_in_size_and_kind(room: Any) -> None:
    images = [photographs(3, 17 + 3 * i, 40 - 2 * i)[i] for i in range(SAMPLES)]
    kinds = [as_png(image) if i % 3 else image for i, image in enumerate(images)]
    preprocessing = dataclasses.replace(recipe_of(3, 16), resize_short_side=18)
    for transforms in (NO_TRANSFORMS, EVERYTHING, TRANSFORMS["cifar"]):
        plan = list(plan_of(source_of(kinds), transforms, 16).batches(0, 3))
        wanted = [(expected(room, images, batch, transforms, preprocessing), batch.targets) for batch in plan]
        assert_equal_batches(room.batches(source_of(kinds), plan, preprocessing, transforms), wanted)


def test_jpegs_have_pillows_pixels(room: Any) -> None:
    buffers = [io.BytesIO() for _ in range(SAMPLES)]
    for image, buffer in zip(photographs(), buffers, strict=True):
        Image.fromarray(image).save(buffer, "JPEG", quality=80)
    for channels in (1, 3):
        decoded = [Image.open(buffer).convert("RGB" if channels == 3 else "L") for buffer in buffers]
        wanted = np.stack([np.asarray(image).reshape(SIDE, SIDE, channels) for image in decoded]) / 255
        plain = Preprocessing(None, SIDE, (0.0,) * channels, (1.0,) * channels)
        source = source_of([buffer.getvalue() for buffer in buffers])
        (images, _), *others = room.batches(source, in_order(source.labels, SAMPLES), plain, NO_TRANSFORMS)
        assert not others
        np.testing.assert_array_equal(images, wanted.astype(np.float32))


def test_evaluation_ends_with_a_smaller_batch_and_without_transforms(room: Any) -> None:
    images = photographs()
    made = list(room.batches(source_of(images), in_order(np.arange(SAMPLES), 5), recipe_of(3), EVERYTHING))
    assert [len(y) for _, y in made] == [5, 5, 2]
    np.testing.assert_allclose(np.concatenate([x for x, _ in made])[7], room.preprocess(images[7], recipe_of(3)), atol=1e-6)


def test_of_samples_that_are_only_mixed_in_nothing_comes_out(room: Any) -> None:
    images = photographs()
    whole = SamplingPlan(source_of(images).labels, 10, 6, 1, TRANSFORMS["mixup"], SIDE)
    (x, y), *_ = room.batches(source_of(images), whole.batches(0, 1), recipe_of(3), TRANSFORMS["mixup"])
    for rank in (0, 1):
        part = dataclasses.replace(whole, rank=rank, world=2)
        ((mine, targets),) = room.batches(source_of(images), part.batches(0, 1), recipe_of(3), TRANSFORMS["mixup"])
        np.testing.assert_array_equal(targets, y[3 * rank : 3 * rank + 3])
        np.testing.assert_allclose(mine, x[3 * rank : 3 * rank + 3], atol=1e-6)


@pytest.mark.parametrize("files", [False, True], ids=["array", "files"])
def test_parallelism_changes_neither_order_nor_pixels(files: bool, room: Any) -> None:
    images = photographs()
    source = source_of([as_png(image) for image in images] if files else images)
    plan = plan_of(source, EVERYTHING)
    runs = [
        list(room.batches(source, plan.batches(0, 12), recipe_of(3), EVERYTHING, Loader(workers, prefetch)))
        for workers, prefetch in ((0, 1), (1, 1), (2, 3), (None, 2))
    ]
    for run in runs[1:]:
        for (x, y), (images_, targets) in zip(runs[0], run, strict=True):
            np.testing.assert_array_equal(y, targets)
            np.testing.assert_array_equal(x, images_)


@pytest.mark.parametrize("cache", ["memory", "file"])
def test_with_a_cache_each_file_is_read_once(cache: str, room: Any, tmp_path: Path) -> None:
    images = [as_png(image) for image in photographs()]
    reads: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> bytes:
            reads.append(index)
            return images[index]

    plan = plan_of(source_of(images), EVERYTHING)
    kept = Loader(workers=0, cache="memory" if cache == "memory" else str(tmp_path / "decoded"))
    given = room.batches(source_of(Counted()), plan.batches(0, 12), recipe_of(3), EVERYTHING, kept)
    wanted = list(room.batches(source_of(images), plan.batches(0, 12), recipe_of(3), EVERYTHING))
    for (x, y), (pixels, targets) in zip(given, wanted, strict=True):
        np.testing.assert_array_equal(x, pixels)
        np.testing.assert_array_equal(y, targets)
    assert sorted(reads) == list(range(SAMPLES))
    with pytest.raises(StorageError, match="cannot cache decoded images in"):
        next(room.batches(source_of(images), plan.batches(0, 1), recipe_of(3), EVERYTHING, Loader(cache=str(tmp_path / "no" / "folder"))))


def test_errors_are_those_of_the_package(room: Any) -> None:
    images = [as_png(image) for image in photographs()]
    images[7] = images[7][:60]
    given = room.batches(source_of(images), in_order(np.arange(SAMPLES), 4), recipe_of(3), NO_TRANSFORMS)
    next(given)
    with pytest.raises(InputRefused, match="image 7"):
        next(given)

    def broken() -> Iterator[Batch]:
        yield from in_order(np.arange(4), 4)
        raise UsageError("the plan ends here")

    with pytest.raises(UsageError, match="the plan ends here"):
        list(room.batches(source_of(photographs()), broken(), recipe_of(3), NO_TRANSFORMS))
    wide = Transforms(pad_crop=20)
    for source in (source_of(photographs()), source_of([as_png(image) for image in photographs()])):
        with pytest.raises(UsageError, match="pad_crop=20"):
            list(room.batches(source, plan_of(source, wide).batches(0, 1), recipe_of(3), wide))


def test_an_endless_plan_can_be_left_and_an_empty_one_is_over(room: Any) -> None:
    endless = itertools.repeat(Batch(0, 0, np.array([1, 3]), np.array([1, 3])))
    source = source_of(photographs(1))
    made = list(itertools.islice(room.batches(source, endless, recipe_of(1), NO_TRANSFORMS), 3))
    assert [x.shape for x, _ in made] == [(2, SIDE, SIDE, 1)] * 3
    assert list(room.batches(source, [], recipe_of(1), NO_TRANSFORMS)) == []
