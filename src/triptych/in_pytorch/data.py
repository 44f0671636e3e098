"""Images, natively: torchvision decodes, resizes and crops; a `DataLoader` feeds the trainer.

Images are (N, C, H, W) float32 tensors in [0, 255] until they are normalized, as a rule in channels-last memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

from triptych.core.contract import DEFAULT_LOADER, Loader
from triptych.core.environment import usable_cores
from triptych.core.errors import InputRefused, TriptychError, UsageError
from triptych.core.preprocess import GREY, Draw, Geometry, Transforms, draw, geometry
from triptych.core.sampling import Batch, Mix
from triptych.core.spec import Preprocessing
from triptych.data import Source
from triptych.data.reader import Reader
from triptych.in_pytorch.model import full_precision

_READ_MODES = {1: ImageReadMode.GRAY, 3: ImageReadMode.RGB}


def decode(encoded: bytes, channels: int) -> np.ndarray:
    """JPEG or PNG bytes, already vetted by `data.images`, -> (H, W, C) uint8; torchvision's pixels are Pillow's (numerics 19).

    Raises InputRefused for bytes that do not decode to 8-bit pixels, UsageError for a channel count other than 1 or 3.
    """
    if channels not in _READ_MODES:
        raise UsageError(f"images are decoded to 1 (grey) or 3 (RGB) channels; given channels={channels}")
    try:
        image = _decode(torch.frombuffer(bytearray(encoded), dtype=torch.uint8), _READ_MODES[channels])
    except (RuntimeError, ValueError) as error:
        raise InputRefused(f"torchvision cannot decode these {len(encoded)} bytes: {error}") from error
    if image.dtype != torch.uint8 or image.shape[0] != channels:
        raise InputRefused(f"decoded to {image.shape[0]} channels of {image.dtype}; expected {channels} of uint8: convert the file first")
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def resize(image: np.ndarray, box: Geometry) -> np.ndarray:
    """(H, W, C) uint8 -> resized and cropped (crop, crop, C) float32 in [0, 255], never rounded (numerics 20)."""
    return _image(_resize(_batch(image[None]), box))


def preprocess(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32: resized, cropped, `(x / 255 - mean) / std`."""
    return _image(_preprocess(_batch(image[None]), preprocessing))


def batches(
    source: Source, plan: Iterable[Batch], preprocessing: Preprocessing, transforms: Transforms, loader: Loader = DEFAULT_LOADER
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The input pipeline: for each batch of the plan, float32 images (N, crop, crop, C) and their targets.

    A `DataLoader` whose sampler is the plan and whose dataset turns one batch of it into tensors: in this process for images in one
    array, which is faster than handing tensors over, and in worker processes for files: up to four, one a core. With a cache each
    process keeps what it has decoded, in its memory or in a file of its own (`PATH.0`, `PATH.1`, ...). No global random number is drawn.
    Raises InputRefused for a file that is refused, StorageError for a cache that cannot be written.
    """
    in_memory = isinstance(source.images, np.ndarray)
    dataset = (InMemory if in_memory else FromFiles)(source, preprocessing, transforms, loader)
    workers = loader.workers if loader.workers is not None else 0 if in_memory else min(4, usable_cores())
    prepared = DataLoader(
        dataset, sampler=cast("Iterable[int]", plan), batch_size=None, num_workers=workers,
        prefetch_factor=max(1, loader.prefetch) if workers else None, pin_memory=torch.cuda.is_available(),
        # The loader draws a seed for its workers: from a generator of its own, not the caller's.
        generator=torch.Generator(),
    )  # fmt: skip
    for made in prepared:
        if isinstance(made, TriptychError):
            raise made
        images, targets = made
        yield images.numpy(), targets.numpy()


class Batches(Dataset[object]):
    """Batches by their row of the plan: the first images, one a target, transformed and mixed; or the error that one of them raised."""

    def __init__(self, source: Source, preprocessing: Preprocessing, transforms: Transforms, loader: Loader) -> None:
        self.source, self.preprocessing, self.transforms, self.loader = source, preprocessing, transforms, loader

    def __getitem__(self, batch: Batch) -> tuple[Tensor, Tensor] | TriptychError:
        try:
            images = mix(self.load(batch), len(batch.targets), batch.mix)
        except TriptychError as error:  # raised where it is understood: a worker would wrap it in its own traceback
            return error
        return images.permute(0, 2, 3, 1).contiguous(), torch.from_numpy(np.array(batch.targets))

    def load(self, batch: Batch) -> Tensor:
        """Every image of the batch's indices, transformed."""
        raise NotImplementedError


class InMemory(Batches):
    """From one array (samples, H, W, C) uint8, a batch at a time."""

    def __init__(self, source: Source, preprocessing: Preprocessing, transforms: Transforms, loader: Loader) -> None:
        super().__init__(source, preprocessing, transforms, loader)
        images = np.asarray(source.images)
        self.height, self.width = images.shape[1:3]
        check_padding(transforms, self.height, self.width)
        self.pixels = torch.from_numpy(images if images.flags.writeable else images.copy())

    def load(self, batch: Batch) -> Tensor:
        """Crop and flip in one gather, resize, then what is left."""
        crop, indices = self.preprocessing.crop, torch.from_numpy(np.asarray(batch.indices, np.int64))
        found = draw(self.transforms, batch.words, self.height, self.width, crop)
        if found.window is None:
            x = self.pixels[indices].permute(0, 3, 1, 2).to(torch.float32)
            return augment(_resize(x, geometry(self.preprocessing, self.height, self.width)), found, self.preprocessing)
        windows, flip = torch.from_numpy(found.window).long(), found.flip
        flips = torch.zeros(len(indices), dtype=torch.bool) if flip is None else torch.from_numpy(flip)
        if self.transforms.pad_crop:
            x = cut_windows(self.pixels, indices, windows, self.transforms.pad_crop, flips)
            x = x if x.shape[2] == crop else interpolate(x, crop, crop)
        else:
            x = resize_windows(self.pixels[indices].permute(0, 3, 1, 2).to(torch.float32), windows, crop, flips)
        return augment(x, Draw(None, None, found.jitter, found.order, found.erase), self.preprocessing)


class FromFiles(Batches):
    """From encoded images, one by one."""

    _reader: Reader | None = None

    def load(self, batch: Batch) -> Tensor:
        """Decode, crop and resize each image, then the rest for all of them."""
        crop = self.preprocessing.crop
        images = [self._decoded(int(index)) for index in batch.indices]
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (1, 2))
        found = draw(self.transforms, batch.words, heights, widths, crop)
        cut = [self._cut(image, None if found.window is None else found.window[i]) for i, image in enumerate(images)]
        return augment(torch.cat(cut), found, self.preprocessing)

    def _decoded(self, index: int) -> Tensor:
        """(C, H, W) uint8."""
        if self._reader is None:  # in the worker that reads: each has its own
            worker, cache = get_worker_info(), self.loader.cache
            path = cache if cache in (None, "memory") or worker is None else f"{cache}.{worker.id}"
            self._reader = Reader(self.source, self.preprocessing.channels, decode, path)
        image = self._reader.read(index)[0]
        pixels = decode(image, self.preprocessing.channels) if isinstance(image, bytes) else image
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def _cut(self, image: Tensor, window: np.ndarray | None) -> Tensor:
        """(C, H, W) uint8 -> (1, C, crop, crop) float32: the window of the padded image, or the evaluation's crop."""
        x, crop, padding = image[None].to(torch.float32), self.preprocessing.crop, self.transforms.pad_crop
        if window is None:
            return _resize(x, geometry(self.preprocessing, *image.shape[1:]))
        if padding:
            check_padding(self.transforms, *image.shape[1:])
            x = torch.nn.functional.pad(x, (padding,) * 4, mode="reflect")
        top, left, height, width = (int(value) for value in window)
        return _resize(x[:, :, top : top + height, left : left + width], Geometry(crop, crop, 0, 0, crop))


def check_padding(transforms: Transforms, height: int, width: int) -> None:
    """UsageError when an image has too few pixels to be padded by their reflection."""
    if transforms.pad_crop >= min(height, width):
        raise UsageError(f"pad_crop={transforms.pad_crop} reflects more than there is of an image of {height} x {width} pixels")


# --- Transforms of a batch ----------------------------------------------------------------------------------------------------


def cut_windows(images: Tensor, indices: Tensor, windows: Tensor, padding: int, flip: Tensor) -> Tensor:
    """(all, H, W, C) uint8 -> (N, C, side, side) float32: windows of the images padded by reflection, flipped where `flip`.

    One gather: the padding need not exist, and a flipped window is one read from right to left.
    """
    _, height, width, channels = images.shape
    position = torch.arange(int(windows[0, 2]))
    rows = reflection(windows[:, 0, None] + position - padding, height)
    columns = reflection(windows[:, 1, None] + position - padding, width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    places = ((indices[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]).flatten()
    cut = images.view(-1, channels).index_select(0, places)  # three times as fast as indexing, for rows this short
    cut = cut.view(len(indices), len(position), len(position), channels)
    return cut.permute(0, 3, 1, 2).to(torch.float32)


def reflection(positions: Tensor, size: int) -> Tensor:
    """Positions up to size - 1 beyond an edge -> those they mirror, the edge itself not repeated."""
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def resize_windows(x: Tensor, windows: Tensor, crop: int, flip: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, crop, crop): from each image its own window, resized as by `interpolate`, flipped where `flip`.

    torchvision resizes windows of one size only; so its filter is written as two matrix products for each image.
    """
    top, left, height, width = windows.unbind(1)
    vertical, horizontal = filter_weights(top, height, x.shape[2], crop), filter_weights(left, width, x.shape[3], crop)
    horizontal = torch.where(flip[:, None, None], horizontal.flip(1), horizontal)
    with full_precision():
        return vertical[:, None] @ x @ horizontal[:, None].transpose(2, 3)


def filter_weights(start: Tensor, length: Tensor, size: int, crop: int) -> Tensor:
    """(N, crop, size): what each of `size` pixels in a row adds to each of the `crop` pixels that [start, start + length) becomes.

    A triangle as wide as two pixels of the coarser grid, cut off at the window and summing up to one.
    """
    position = torch.arange(size, dtype=torch.float64)
    inside = (position >= start[:, None]) & (position < (start + length)[:, None])  # (N, size)
    ratio = length.double()[:, None] / crop  # (N, 1)
    centre = start[:, None] + (torch.arange(crop) + 0.5) * ratio  # (N, crop)
    distance = (centre[:, :, None] - (position + 0.5)).abs() / ratio.clamp(min=1.0)[:, :, None]
    weights = torch.where(inside[:, None, :], (1.0 - distance).clamp(min=0.0), 0.0)
    return (weights / weights.sum(dim=2, keepdim=True)).float()


def augment(x: Tensor, found: Draw, preprocessing: Preprocessing) -> Tensor:
    """(N, C, crop, crop) in [0, 255] -> flipped, jittered, normalized, erased, as was drawn."""
    if found.flip is not None:
        x = torch.where(torch.from_numpy(found.flip)[:, None, None, None], x.flip(3), x)
    if found.jitter is not None and found.order is not None:
        x = jitter(x, torch.from_numpy(found.jitter), torch.from_numpy(found.order))
    x = normalize(x, preprocessing)
    if found.erase is not None:
        x = torch.where(_inside(torch.from_numpy(found.erase), x.shape[2]), 0.0, x)
    return x


def normalize(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, C, H, W) in [0, 255] -> (x / 255 - mean) / std, in channels-last memory.

    By rows of the image, each one vector: to broadcast three values along the innermost axis takes five times as long.
    """
    rows = (x.permute(0, 2, 3, 1) / 255.0).flatten(2)  # (N, H, W * C)
    mean, std = (torch.tensor(values).repeat(x.shape[3]) for values in (preprocessing.mean, preprocessing.std))
    return rows.sub_(mean).div_(std).unflatten(2, (x.shape[3], x.shape[1])).permute(0, 3, 1, 2)


def jitter(x: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """Colour jitter by `core.preprocess.ColorJitter`'s formulas: `amounts` (N, 4), in the `order` (N, 4) of each image.

    torchvision's own functions clamp to [0, 1] and take one amount for all images (numerics 32).
    """
    steps = (brightness, contrast, saturation, hue)[: 4 if x.shape[1] == 3 else 2]
    x = x.clone()
    for place in range(order.shape[1]):
        for i, step in enumerate(steps):
            rows = (order[:, place] == i).nonzero().flatten()
            if len(rows):
                x[rows] = step(x[rows], amounts[rows, i, None, None, None]).clamp(0.0, 255.0)
    return x


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """f x; (N, C, H, W) and (N, 1, 1, 1), as the other steps."""
    return factor * x


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """f x + (1 - f) m, m the mean of the grey image."""
    return factor * x + (1.0 - factor) * _grey(x).mean(dim=(2, 3), keepdim=True)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """f x + (1 - f) grey."""
    return factor * x + (1.0 - factor) * _grey(x)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """The hue of HSV (Smith 1978) turned by `shift` turns."""
    value, low = x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True)
    chroma = value - low
    r, g, b = x.split(1, dim=1)
    safe = torch.where(chroma > 0.0, chroma, 1.0)
    sextant = torch.where(value == r, (g - b) / safe % 6.0, torch.where(value == g, (b - r) / safe + 2.0, (r - g) / safe + 4.0))
    turned = (torch.where(chroma > 0.0, sextant / 6.0, 0.0) + shift) % 1.0

    def channel(n: float) -> Tensor:
        k = (n + 6.0 * turned) % 6.0
        return value - chroma * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)

    return torch.cat([channel(n) for n in (5.0, 3.0, 1.0)], dim=1)


def _grey(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 1, H, W) ITU-R 601 grey, not rounded."""
    return (x * torch.tensor(GREY)[:, None, None]).sum(dim=1, keepdim=True) if x.shape[1] == 3 else x


def mix(x: Tensor, count: int, how: Mix | None) -> Tensor:
    """The first `count` images of a batch, by MixUp or CutMix with their partners among all of it."""
    own = x[:count]
    if how is None:
        return own
    partners = x[torch.from_numpy(np.asarray(how.partner, np.int64))]
    if how.box is not None:
        return torch.where(_inside(torch.tensor([how.box]), x.shape[2]), partners, own)
    share = np.float32(how.share)
    return float(share) * own + float(np.float32(1.0) - share) * partners


def _inside(boxes: Tensor, side: int) -> Tensor:
    """(N, 4) boxes -> (N, 1, side, side), whether a pixel is in its image's box."""
    position = torch.arange(side)
    rows, columns = ((position >= boxes[:, i, None]) & (position < (boxes[:, i] + boxes[:, i + 2])[:, None]) for i in (0, 1))
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _decode(encoded: Tensor, mode: ImageReadMode) -> Tensor:
    """(bytes,) uint8 -> (C, H, W)."""
    with warnings.catch_warnings():
        # Since 0.29 torchvision announces that its decoders will move to TorchCodec; a user can do nothing about it.
        warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
        return decode_image(encoded, mode=mode)


def interpolate(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, H, W) float32 -> (N, C, height, width): bilinear, antialiased."""
    return vision.resize_image(x, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)


def _preprocess(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    return normalize(_resize(x, geometry(preprocessing, *x.shape[2:])), preprocessing)


def _resize(x: Tensor, box: Geometry) -> Tensor:
    if tuple(x.shape[2:]) != (box.resized_height, box.resized_width):
        x = interpolate(x, box.resized_height, box.resized_width)
    return vision.crop_image(x, box.top, box.left, box.crop, box.crop)


def _batch(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32."""
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), dtype=np.float32, order="C"))


def _image(x: Tensor) -> np.ndarray:
    """(1, C, H, W) -> (H, W, C)."""
    return np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
