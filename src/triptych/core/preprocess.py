"""What happens to an image, as data, and its arithmetic. Executed natively in `in_*/data.py`.

Every box is computed here, once, and passed to the frameworks: their own rounding differs (numerics 22).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from triptych.core.errors import UsageError
from triptych.core.spec import Preprocessing

GREY = (0.299, 0.587, 0.114)
"""ITU-R 601 luma, with which contrast and saturation blend (numerics 32)."""

# The random words of a sample, by what they are for. Each transform has its own, so that switching one on changes no other.
ATTEMPTS = 10
_FLIP, _PAD_CROP, _JITTER, _ORDER, _ERASING = 0, slice(1, 3), slice(3, 7), slice(7, 11), 11
_CROP_ATTEMPTS = slice(24, 24 + 4 * ATTEMPTS)
_ERASE_ATTEMPTS = slice(64, 64 + 4 * ATTEMPTS)
WORDS = 104


@dataclass(frozen=True, slots=True)
class Geometry:
    """Resize to (resized_height, resized_width), then cut `crop` x `crop` pixels at (top, left)."""

    resized_height: int
    resized_width: int
    top: int
    left: int
    crop: int


@dataclass(frozen=True, slots=True)
class RandomResizedCrop:
    """A window of `scale` of the area and `ratio` (width over height, log-uniform), resized to the crop (Szegedy et al. 2015).

    As in torchvision, ten attempts to fit one in; then the largest centred window whose ratio is allowed.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True, slots=True)
class ColorJitter:
    """Brightness, contrast, saturation: factors uniform in [max(0, 1 - x), 1 + x]; hue: a shift uniform in [-x, x] turns, x <= 0.5.

    In an order drawn for each image. On pixels in [0, 255], clamped after each: brightness f x; contrast f x + (1 - f) mean(grey);
    saturation f x + (1 - f) grey; hue by HSV. Grey is ITU-R 601. The frameworks' own functions differ (numerics 32).
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


@dataclass(frozen=True, slots=True)
class RandomErasing:
    """With `probability`, a box of `scale` of the area and `ratio` becomes zero after normalization (Zhong et al. 2017)."""

    probability: float = 0.5
    scale: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)


@dataclass(frozen=True, slots=True)
class Transforms:
    """Training transforms, executed in this order: crop, resize to the crop, flip, jitter, normalize, erase, mix.

    The crop is `random_resized_crop`, or with `pad_crop` a window of the short side's size in the image padded by that many
    reflected pixels (He et al. 2015, §4.2), or neither: then as in evaluation. `flip` is the probability of a horizontal flip;
    `mixup` and `cutmix` are the alpha of Beta(alpha, alpha), 0 for off; with both on, a fair coin decides for each batch.
    """

    random_resized_crop: RandomResizedCrop | None = None
    pad_crop: int = 0
    flip: float = 0.0
    jitter: ColorJitter | None = None
    erasing: RandomErasing | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.random_resized_crop is not None and self.pad_crop:
            raise UsageError("random_resized_crop and pad_crop are two kinds of crop; choose one")
        for name, value in (("flip", self.flip), ("erasing.probability", self.erasing.probability if self.erasing else 0.0)):
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"{name}={value} must be a probability, in [0, 1]")
        if min(self.mixup, self.cutmix, self.pad_crop) < 0:
            raise UsageError(f"mixup={self.mixup}, cutmix={self.cutmix} and pad_crop={self.pad_crop} must not be negative")
        if self.jitter is not None and not 0.0 <= self.jitter.hue <= 0.5:
            raise UsageError(f"jitter.hue={self.jitter.hue} must be in [0, 0.5] turns")

    @property
    def random(self) -> bool:
        """Whether any transform of single images draws numbers."""
        return bool(self.random_resized_crop or self.pad_crop or self.flip or self.jitter or self.erasing)


NO_TRANSFORMS = Transforms()


@dataclass(frozen=True, slots=True, eq=False)
class Draw:
    """What the transforms of N images came to; None where a transform is off.

    `window` (N, 4) int32: top, left, height, width of the crop, in the image padded by `pad_crop`; `flip` (N,) bool; `jitter`
    (N, 4) float32: brightness, contrast, saturation, hue, in this order; `order` (N, 4) int32: which of the four comes first, second,
    ...; `erase` (N, 4) int32: a box in the crop, of height 0 where nothing is erased.
    """

    window: np.ndarray | None
    flip: np.ndarray | None
    jitter: np.ndarray | None
    order: np.ndarray | None
    erase: np.ndarray | None

    def row(self, index: int) -> Draw:
        """The draw of one image, as a draw of N = 1."""
        parts = (self.window, self.flip, self.jitter, self.order, self.erase)
        return Draw(*(None if part is None else part[index : index + 1] for part in parts))

    def parts(self) -> dict[str, np.ndarray]:
        """What was drawn, by name; what is off is left out."""
        named = {name: getattr(self, name) for name in DRAWN}
        return {name: part for name, part in named.items() if part is not None}


DRAWN = tuple(field.name for field in dataclasses.fields(Draw))
NO_DRAW = Draw(None, None, None, None, None)


def draw(transforms: Transforms, words: np.ndarray | None, heights: np.ndarray | int, widths: np.ndarray | int, crop: int) -> Draw:
    """The parameters for N images of heights x widths pixels, (N,) or one for all, from their (N, WORDS) random words.

    `crop` is the side of the result. Without words (evaluation) nothing is drawn.
    """
    if words is None:
        return NO_DRAW
    u = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    heights, widths = (np.broadcast_to(np.asarray(side, np.int64), len(u)) for side in (heights, widths))
    jitter = transforms.jitter
    return Draw(
        _window(transforms, u, heights, widths),
        u[:, _FLIP] < transforms.flip if transforms.flip else None,
        _jitter(jitter, u[:, _JITTER]) if jitter else None,
        np.argsort(u[:, _ORDER], axis=1).astype(np.int32) if jitter else None,
        _erase(transforms.erasing, u, crop) if transforms.erasing else None,
    )


def _window(transforms: Transforms, u: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray | None:
    if transforms.pad_crop:
        side, padding = np.minimum(heights, widths), 2 * transforms.pad_crop
        offsets = u[:, _PAD_CROP]
        top = (offsets[:, 0] * (heights + padding - side + 1)).astype(np.int64)
        left = (offsets[:, 1] * (widths + padding - side + 1)).astype(np.int64)
        return np.stack([top, left, side, side], axis=1).astype(np.int32)
    crop = transforms.random_resized_crop
    if crop is None:
        return None
    found = _fitting_box(u[:, _CROP_ATTEMPTS], heights, widths, crop.scale, crop.ratio)
    return np.where(found[:, 2:3] > 0, found, _largest_centred(heights, widths, crop.ratio)).astype(np.int32)


def _fitting_box(
    u: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """(N, 4) top, left, height, width of the first of ten random boxes that fits into its image; zeros where none does."""
    area, shape, vertical, horizontal = np.moveaxis(u.reshape(len(u), ATTEMPTS, 4), 2, 0)
    target = (scale[0] + area * (scale[1] - scale[0])) * (heights * widths)[:, None]
    aspect = np.exp(math.log(ratio[0]) + shape * (math.log(ratio[1]) - math.log(ratio[0])))
    w, h = np.rint(np.sqrt(target * aspect)).astype(np.int64), np.rint(np.sqrt(target / aspect)).astype(np.int64)
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    top = (vertical * (heights[:, None] - h + 1)).astype(np.int64)
    left = (horizontal * (widths[:, None] - w + 1)).astype(np.int64)
    boxes = np.stack([top, left, h, w], axis=2) * fits[..., None]
    first = fits.argmax(axis=1)
    return np.asarray(boxes[np.arange(len(u)), first])


def _largest_centred(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    aspect = widths / heights
    w = np.where(aspect > ratio[1], np.rint(heights * ratio[1]), widths).astype(np.int64)
    h = np.where(aspect < ratio[0], np.rint(widths / ratio[0]), heights).astype(np.int64)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def _jitter(jitter: ColorJitter, u: np.ndarray) -> np.ndarray:
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    bounds = [(max(0.0, 1.0 - x), 1.0 + x) for x in strengths] + [(-jitter.hue, jitter.hue)]
    low, high = np.array(bounds).T
    return np.asarray(low + u * (high - low), np.float32)


def _erase(erasing: RandomErasing, u: np.ndarray, crop: int) -> np.ndarray:
    side = np.full(len(u), crop)
    boxes = _fitting_box(u[:, _ERASE_ATTEMPTS], side, side, erasing.scale, erasing.ratio)
    return np.where((u[:, _ERASING] < erasing.probability)[:, None], boxes, 0).astype(np.int32)


def geometry(preprocessing: Preprocessing, height: int, width: int) -> Geometry:
    """The boxes for an image of height x width, by torchvision's arithmetic.

    Short side to `resize_short_side`, long side truncated; centred crop with Python's rounding. Without a short side an image
    that already has the crop's size on its short side is left alone and any other is resized to it.
    """
    short = preprocessing.resize_short_side or preprocessing.crop
    if height <= width:
        resized_height, resized_width = short, int(short * width / height)
    else:
        resized_height, resized_width = int(short * height / width), short
    crop = preprocessing.crop
    return Geometry(resized_height, resized_width, round((resized_height - crop) / 2.0), round((resized_width - crop) / 2.0), crop)
