"""An uploaded image, prepared for the model without any framework: vetted, decoded and resized by Pillow, normalized by numpy.

Pillow resizes images of floats with the same triangle filter, antialiased and never rounded to integers (numerics 20, 21); a test holds
this to the three rooms.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from triptych.core.preprocess import geometry
from triptych.core.spec import Preprocessing
from triptych.data import images as image_files


def prepared(data: bytes, preprocessing: Preprocessing, max_pixels: int) -> np.ndarray:
    """JPEG or PNG bytes -> (crop, crop, C) float32. InputRefused for what is damaged, unsafe or larger than `max_pixels`."""
    channels = preprocessing.channels
    vetted = image_files.vet(data, "the upload", channels, max_pixels)
    return normalized(resized(image_files.decode(vetted, channels), preprocessing), preprocessing)


def resized(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(H, W, C) uint8 -> (crop, crop, C) float32 in [0, 255]."""
    box = geometry(preprocessing, *image.shape[:2])
    rows, columns = slice(box.top, box.top + box.crop), slice(box.left, box.left + box.crop)
    if image.shape[:2] == (box.resized_height, box.resized_width):
        return image[rows, columns].astype(np.float32)
    size = box.resized_width, box.resized_height
    planes = (Image.fromarray(image[..., channel].astype(np.float32)) for channel in range(image.shape[2]))
    return np.stack([np.asarray(plane.resize(size, Image.Resampling.BILINEAR))[rows, columns] for plane in planes], axis=-1)


def normalized(image: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(..., C) float32 in [0, 255] -> (x / 255 - mean) / std, in float32."""
    mean, std = (np.asarray(row, np.float32) for row in (preprocessing.mean, preprocessing.std))
    return np.asarray((image / np.float32(255.0) - mean) / std, np.float32)
