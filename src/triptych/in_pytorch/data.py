"""Images, natively: torchvision decodes, resizes and crops; a `DataLoader` feeds the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import Geometry, geometry
from triptych.core.spec import Preprocessing

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
    images: np.ndarray, labels: np.ndarray, indices: Iterable[np.ndarray], preprocessing: Preprocessing
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The training pipeline: for each array of indices, (images (N, H, W, C) float32 preprocessed, labels (N,)).

    `images` is (samples, H, W, C) uint8. The order is the caller's, and no global random number is drawn.
    """
    dataset = TensorDataset(torch.tensor(images), torch.tensor(labels))
    # The sampler yields whole batches of indices, so the dataset is indexed once a batch: `batch_size=None`.
    # The loader draws a seed for its workers, of which there are none: from a generator of its own, not the caller's.
    collate = partial(_collate, preprocessing=preprocessing)
    for x, y in DataLoader(dataset, sampler=indices, batch_size=None, collate_fn=collate, generator=torch.Generator()):
        yield x.permute(0, 2, 3, 1).contiguous().numpy(), y.numpy()


def _decode(encoded: Tensor, mode: ImageReadMode) -> Tensor:
    """(bytes,) uint8 -> (C, H, W)."""
    with warnings.catch_warnings():
        # Since 0.29 torchvision announces that its decoders will move to TorchCodec; a user can do nothing about it.
        warnings.filterwarnings("ignore", message="The image decoding", category=DeprecationWarning)
        return decode_image(encoded, mode=mode)


def interpolate(x: Tensor, height: int, width: int) -> Tensor:
    """(N, C, H, W) float32 -> (N, C, height, width): bilinear, antialiased."""
    return transforms.resize_image(x, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)


def _collate(sample: tuple[Tensor, Tensor], preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    images, labels = sample
    return _preprocess(images.permute(0, 3, 1, 2).to(torch.float32), preprocessing), labels


def _preprocess(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    x = _resize(x, geometry(preprocessing, *x.shape[2:])) / 255.0
    return transforms.normalize_image(x, list(preprocessing.mean), list(preprocessing.std))


def _resize(x: Tensor, box: Geometry) -> Tensor:
    if tuple(x.shape[2:]) != (box.resized_height, box.resized_width):
        x = interpolate(x, box.resized_height, box.resized_width)
    return transforms.crop_image(x, box.top, box.left, box.crop, box.crop)


def _batch(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 -> (N, C, H, W) float32."""
    return torch.from_numpy(np.array(images.transpose(0, 3, 1, 2), dtype=np.float32, order="C"))


def _image(x: Tensor) -> np.ndarray:
    """(1, C, H, W) -> (H, W, C)."""
    return np.ascontiguousarray(x[0].permute(1, 2, 0).numpy())
