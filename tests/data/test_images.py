"""What reaches a native decoder: refusals by name, files that pass unchanged, and equal pixels in three frameworks."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.core import catalog, contract
from triptych.core.errors import InputRefused
from triptych.core.preprocess import geometry
from triptych.data import images

WIDTH, HEIGHT = 61, 43


def pixels(channels: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A gradient with noise: every channel different, nothing symmetric, (H, W, C) uint8."""
    y, x = np.mgrid[:height, :width]
    planes = np.stack([(3 * x + c * y + 40 * c) % 256 for c in range(channels)], axis=-1)
    noise = np.random.default_rng(7).integers(0, 30, planes.shape)
    return np.clip(planes + noise, 0, 255).astype(np.uint8)


def encoded(mode: str, kind: str, **options: Any) -> bytes:
    """An image of a Pillow mode, as JPEG or PNG bytes."""
    array = pixels({"L": 1, "LA": 2, "CMYK": 4, "RGBA": 4}.get(mode, 3))
    image = Image.fromarray(array[:, :, 0] if mode == "L" else array, "RGB" if mode in ("P", "1") else mode)
    return saved(image.convert(mode), kind, **options)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(orientation: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded("RGB", kind, exif=exif)


def png(bits: int, color: int, samples: bytes, *, width: int, height: int) -> bytes:
    """A PNG written by hand, for what Pillow does not write: 16-bit RGB, 2-bit grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = len(samples) // height
    lines = b"".join(b"\0" + samples[i * rows : (i + 1) * rows] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def deep_grey() -> np.ndarray:
    return (pixels(1)[:, :, 0].astype(np.uint16) << 8) + 137


UNCHANGED: dict[str, Callable[[], bytes]] = {
    "jpeg-rgb": lambda: encoded("RGB", "JPEG", quality=90),
    "jpeg-rgb-444": lambda: encoded("RGB", "JPEG", quality=95, subsampling=0),
    "jpeg-rgb-422": lambda: encoded("RGB", "JPEG", quality=60, subsampling=1),
    "jpeg-progressive": lambda: encoded("RGB", "JPEG", quality=80, progressive=True),
    "jpeg-grey": lambda: encoded("L", "JPEG"),
    "jpeg-upright": lambda: rotated(1, "JPEG"),
    "jpeg-restarts": lambda: encoded("RGB", "JPEG", restart_marker_blocks=2),
    "jpeg-comment": lambda: encoded("RGB", "JPEG", comment=b"\xff\xc0 not a frame"),
    "png-rgb": lambda: encoded("RGB", "PNG"),
    "png-grey": lambda: encoded("L", "PNG"),
}
CONVERTED: dict[str, Callable[[], bytes]] = {
    "jpeg-cmyk": lambda: encoded("CMYK", "JPEG"),
    **{f"jpeg-orientation-{n}": (lambda n=n: rotated(n, "JPEG")) for n in range(2, 9)},
    "png-orientation-6": lambda: rotated(6, "PNG"),
    "png-rgba": lambda: encoded("RGBA", "PNG"),
    "png-grey-alpha": lambda: encoded("LA", "PNG"),
    "png-palette": lambda: encoded("P", "PNG"),
    "png-palette-alpha": lambda: encoded("P", "PNG", transparency=bytes(range(256))),
    "png-transparent-color": lambda: encoded("RGB", "PNG", transparency=(3, 43, 83)),
    "png-one-bit": lambda: encoded("1", "PNG"),
    "png-two-bits": lambda: png(2, 0, bytes(range(48)), width=16, height=12),
    "png-16-bit-grey": lambda: saved(Image.fromarray(deep_grey()), "PNG"),
    "png-16-bit-rgb": lambda: png(16, 2, pixels(3).astype(">u2").tobytes(), width=WIDTH, height=HEIGHT),
}
KINDS = {**UNCHANGED, **CONVERTED}


@pytest.mark.parametrize("kind", UNCHANGED)
def test_what_decoders_agree_on_passes_unchanged(kind: str) -> None:
    data = UNCHANGED[kind]()
    assert images.vet(data, kind, 3) is data


@pytest.mark.parametrize("kind", CONVERTED)
def test_the_rest_becomes_an_eight_bit_png(kind: str) -> None:
    vetted = images.vet(CONVERTED[kind](), kind, 3)
    with Image.open(io.BytesIO(vetted)) as image:
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
    assert images.vet(vetted, kind, 3) is vetted


@pytest.mark.parametrize("kind", ["jpeg-rgb", "png-rgb", "png-rgba", "jpeg-cmyk"])
def test_color_becomes_grey_for_a_grey_model(kind: str) -> None:
    with Image.open(io.BytesIO(images.vet(KINDS[kind](), kind, 1))) as image:
        assert (image.format, image.mode) == ("PNG", "L")
    grey = UNCHANGED["jpeg-grey"]()
    assert images.vet(grey, "grey", 1) is grey


def test_orientation_is_applied() -> None:
    upright = images.decode(images.vet(rotated(6, "PNG"), "a.png", 3), 3)
    np.testing.assert_array_equal(upright, np.rot90(pixels(3), -1))


def test_sixteen_bits_keep_their_high_byte_and_alpha_is_dropped() -> None:
    grey = images.decode(images.vet(CONVERTED["png-16-bit-grey"](), "deep.png", 1), 1)
    np.testing.assert_array_equal(grey[:, :, 0], deep_grey() >> 8)
    color = images.decode(images.vet(CONVERTED["png-rgba"](), "alpha.png", 3), 3)
    np.testing.assert_array_equal(color, pixels(4)[:, :, :3])


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("framework", contract.FRAMEWORKS)
def test_native_decoders_give_pillows_pixels(framework: str, channels: int) -> None:
    room = contract.load(framework)
    for kind, make in KINDS.items():
        vetted = images.vet(make(), kind, channels)
        decoded = room.decode(vetted, channels)
        assert decoded.dtype == np.uint8, kind
        np.testing.assert_array_equal(decoded, images.decode(vetted, channels), err_msg=kind)


JPEG, PNG = UNCHANGED["jpeg-rgb"](), UNCHANGED["png-rgb"]()
REFUSED = {
    "empty": (b"", "empty"),
    "text": (b"<html>not an image</html>", "neither JPEG nor PNG"),
    "gif": (saved(Image.new("P", (4, 4)), "GIF"), "GIF"),
    "tiff": (saved(Image.new("RGB", (4, 4)), "TIFF"), "TIFF"),
    "bmp": (saved(Image.new("RGB", (4, 4)), "BMP"), "BMP"),
    "webp": (saved(Image.new("RGB", (4, 4)), "WEBP"), "WebP"),
    "jpeg-half": (JPEG[: len(JPEG) // 2], "truncated"),
    "jpeg-no-end": (JPEG[:-2], "truncated"),
    "jpeg-header-only": (JPEG[:30], "truncated"),
    "jpeg-signature": (JPEG[:3], "truncated"),
    "png-half": (PNG[: len(PNG) // 2], "truncated"),
    "png-signature": (PNG[:8], "truncated"),
    "png-flipped": (PNG[:-40] + bytes([PNG[-40] ^ 1]) + PNG[-39:], "damaged"),
    "sliver": (saved(Image.new("L", (1, 101)), "PNG"), "100 times longer"),
    "png-bomb": (png(8, 2, b"", width=60_000, height=60_000), "bomb"),
    "png-bomb-under-pillows-limit": (png(1, 0, b"", width=8_001, height=8_000), "bomb"),
    "jpeg-bomb": (JPEG.replace(struct.pack(">HH", HEIGHT, WIDTH), struct.pack(">HH", 65_000, 65_000), 1), "bomb"),
    "png-zero": (png(8, 2, b"", width=0, height=5), "0 x 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsafe_and_damaged_files_are_refused_by_name(case: str) -> None:
    data, reason = REFUSED[case]
    with pytest.raises(InputRefused, match=reason) as refusal:
        images.vet(data, "photos/cat.jpg", 3)
    assert str(refusal.value).startswith("photos/cat.jpg: ")


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_decoded", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputRefused, match="bomb"):
        images.vet(REFUSED["png-bomb"][0], "bomb.png", 3)


def test_files_larger_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", len(PNG) - 1)
    (tmp_path / "large.png").write_bytes(PNG)
    for attempt in (lambda: images.vet(PNG, "large.png", 3), lambda: images.read(tmp_path / "large.png")):
        with pytest.raises(InputRefused, match=r"large\.png: larger than"):
            attempt()


@given(data=st.binary(max_size=400), start=st.sampled_from([b"", JPEG[:2], JPEG[:160], PNG[:8], PNG[:33]]))
def test_arbitrary_bytes_are_refused_and_nothing_else(data: bytes, start: bytes) -> None:
    with pytest.raises(InputRefused, match=r"^fuzz: "):
        images.vet(start + data, "fuzz", 3)


@pytest.mark.parametrize("name", ["missing.png", "folder", "pipe"])
def test_what_is_not_a_regular_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputRefused, match=name):
        images.read(tmp_path / name)


def test_real_photographs_are_decoded_equal_and_resized_alike(real_data: Path) -> None:
    preprocessing = catalog.IMAGENET
    rooms = [contract.load(name) for name in contract.installed()]
    files = sorted((real_data / "imagenet-samples").rglob("*.JPEG"))
    assert len(files) == 200
    worst = 0.0
    for file in files:
        vetted = images.vet(images.read(file), file.name, 3)
        reference = images.decode(vetted, 3)
        resized = []
        for room in rooms:
            decoded = room.decode(vetted, 3)
            np.testing.assert_array_equal(decoded, reference, err_msg=file.name)
            resized.append(room.resize(decoded, geometry(preprocessing, *decoded.shape[:2])))
        worst = max(worst, float(np.ptp(np.stack(resized), axis=0).max()))
    assert worst <= 0.05
