"""What stands between a file and a native decoder: refuse what is unsafe or damaged, normalize what decoders disagree on.

The three native decoders give equal pixels for baseline and progressive RGB or grey JPEG and for 8-bit RGB or grey PNG: such
files pass unchanged. They disagree on the rest (CMYK gives 3 channels in Pillow and TensorFlow and 4 in torchvision; nobody
applies EXIF orientation; grey from RGB is computed in three ways), so Pillow converts it, once, to an 8-bit PNG:

- CMYK and YCCK by Pillow's formula; 16 bits keep their high byte; palettes are looked up; alpha is dropped, not composited;
- an EXIF-rotated image is turned upright; RGB becomes grey by ITU-R 601 (Pillow's "L") when the model takes one channel.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from triptych.core.errors import InputRefused

MAX_BYTES = 64 * 1024**2
MAX_PIXELS = 64_000_000
# Resizing the short side to 256 makes an image of 256 x 256 x the aspect ratio: a sliver would become a bomb after decoding.
MAX_ASPECT = 100
EXTENSIONS = (".jpeg", ".jpg", ".png")

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_ORIENTATION = 0x0112
# Start-of-frame markers: 0xC0-0xCF without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BASELINE, _PROGRESSIVE = 0xC0, 0xC2


def read(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a regular file of at most 64 MiB. Raises InputRefused, naming the file."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputRefused(f"{path}: not a regular file")
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputRefused(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if len(data) > MAX_BYTES:
        raise InputRefused(f"{path}: larger than {MAX_BYTES // 1024**2} MiB")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe without a writer would block for ever in a plain open.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def vet(data: bytes, name: str, channels: int, max_pixels: int = MAX_PIXELS) -> bytes:
    """JPEG or PNG bytes that are safe and that the three native decoders turn into equal (H, W, `channels`) pixels.

    `channels` is 3 (RGB) or 1 (grey). Raises InputRefused, starting with `name`, for anything that is not a whole JPEG or PNG, has
    more than `max_pixels` (64 megapixels; read off the header before anything is decoded) or is a hundred times longer than wide.
    """
    header = _header(data, name)
    _check_size(name, *header.size, max_pixels)
    image = _decoded(data, name)
    _check_size(name, *image.size, max_pixels)
    if header.common and image.mode in (("RGB", "L") if channels == 3 else ("L",)) and _upright(image):
        return data
    return _as_png(image, channels)


def decode(vetted: bytes, channels: int) -> np.ndarray:
    """What vetted bytes hold, decoded by Pillow: (H, W, C) uint8."""
    with Image.open(io.BytesIO(vetted)) as image:
        pixels = np.array(image.convert("RGB" if channels == 3 else "L"))
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


class _Header:
    """What the first bytes say: (width, height), and whether this is a kind that every decoder treats alike."""

    __slots__ = ("common", "size")

    def __init__(self, width: int, height: int, common: bool) -> None:
        self.size, self.common = (width, height), common


def _header(data: bytes, name: str) -> _Header:
    if not data:
        raise InputRefused(f"{name}: the file is empty")
    if len(data) > MAX_BYTES:
        raise InputRefused(f"{name}: larger than {MAX_BYTES // 1024**2} MiB")
    try:
        if data.startswith(_PNG_SIGNATURE):
            return _png_header(data)
        if data.startswith(_JPEG_SIGNATURE):
            return _jpeg_header(data)
    except (struct.error, IndexError):
        raise InputRefused(f"{name}: truncated in its header") from None
    raise InputRefused(f"{name}: neither JPEG nor PNG by its content{_looks_like(data)}; convert it to one of them")


def _png_header(data: bytes) -> _Header:
    width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
    grey_or_rgb = color in (0, 2)
    return _Header(width, height, common=grey_or_rgb and bits == 8)


def _jpeg_header(data: bytes) -> _Header:
    """Walk the segments to the first start of frame, as libjpeg does."""
    position = 2
    while True:
        while data[position] != 0xFF:
            position += 1
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker in _FRAMES:
            bits, height, width, components = struct.unpack_from(">BHHB", data, position + 2)
            return _Header(width, height, common=marker in (_BASELINE, _PROGRESSIVE) and bits == 8 and components in (1, 3))
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # markers without a segment
            continue
        position += struct.unpack_from(">H", data, position)[0]


def _looks_like(data: bytes) -> str:
    kinds = {b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"BM": "BMP", b"RIFF": "WebP", b"%PDF": "PDF", b"\0\0\0": "HEIC or AVIF"}
    return next((f" (it looks like {kind})" for start, kind in kinds.items() if data.startswith(start)), "")


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise InputRefused(f"{name}: an image of {width} x {height} pixels")
    if width * height > max_pixels:
        raise InputRefused(f"{name}: {width} x {height} pixels are more than {max_pixels:,} (a decompression bomb?); scale it down first")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputRefused(f"{name}: {width} x {height} is more than {MAX_ASPECT} times longer than wide; crop it first")


def _decoded(data: bytes, name: str) -> Image.Image:
    """The image, wholly decoded: what is truncated or damaged shows here and not inside a native decoder."""
    try:
        if data.startswith(_PNG_SIGNATURE):
            # Pillow skips the checksums of pixel chunks when loading; libpng, under TensorFlow and torchvision, does not.
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
        image.load()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, zlib.error, bomb errors, ...
        reason = "truncated" if "truncated" in str(error).lower() else f"damaged ({error})"
        raise InputRefused(f"{name}: the image is {reason}") from None
    return image


def _upright(image: Image.Image) -> bool:
    """Whether neither EXIF orientation nor a transparent color changes what the decoders show."""
    return "transparency" not in image.info and _orientation(image) in (None, 1)


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:  # unreadable EXIF says nothing about orientation; the pixels were decoded already
        return None


def _as_png(image: Image.Image, channels: int) -> bytes:
    if _orientation(image) not in (None, 1):
        image = ImageOps.exif_transpose(image)
    image = _eight_bit(image).convert("RGB" if channels == 3 else "L")
    image.info = {}  # no profile, gamma or EXIF that a decoder might act on
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=1)
    return encoded.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    """RGB, L or CMYK, 8 bits. Pillow *clips* 16-bit grey when converting; the high byte is what libpng and 16-bit RGB give."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # straight to RGB, Pillow warns about transparent palettes
    if image.mode in ("LA", "1"):
        return image.convert("L")
    return image
