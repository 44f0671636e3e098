"""What is calibrated on: training images, always the same, and none that is verified on."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.core import catalog
from triptych.core.errors import InputRefused, UsageError
from triptych.data import digits
from triptych.export import images

SPEC = catalog.get_spec("resnet20")
DIGITS = tuple("0123456789")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images in two class folders, and no training split of their own."""
    for number in range(40):
        path = tmp_path / "shapes" / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "shapes"


def test_calibration_takes_training_images_in_an_order_that_is_always_the_same() -> None:
    source = images.training(None, SPEC, None, trained=False)
    chosen = images.calibration(source, 3, 64, apart_from=set())
    assert chosen == images.calibration(source, 3, 64, apart_from=set())
    assert images.told(source, chosen)["images"] == 64
    pixels = [np.asarray(Image.open(io.BytesIO(each)).convert("L")) for each in chosen]
    train, test = (digits.open_digits(split).images[..., 0] for split in ("train", "test"))
    assert all((train == each).all((1, 2)).any() for each in pixels)
    shared = {each.tobytes() for each in train} & {each.tobytes() for each in test}
    assert not {each.tobytes() for each in pixels} & {each.tobytes() for each in test} - shared
    assert len({each.tobytes() for each in pixels}) > 60, "not one image again and again"


def test_what_is_verified_on_is_not_calibrated_on(folder: Path) -> None:
    _, verified = images.encoded(str(folder), 3, 8)
    source = images.training(str(folder), dataclasses.replace(SPEC, num_classes=2), None, trained=True)
    chosen = images.calibration(source, 3, 512, set(verified))
    assert len(chosen) == 32
    assert not set(chosen) & set(verified)
    _, verified = images.encoded(str(folder), 3, 9)
    with pytest.raises(
        InputRefused, match=r"shapes has 31 training image\(s\) that it is not verified on, too; calibrating takes 32 or more"
    ):
        images.calibration(source, 3, 512, set(verified))


def test_images_of_other_classes_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="shapes has 2 classes, resnet20 with these weights has 10"):
        images.training(str(folder), SPEC, None, trained=False)


def test_digits_stand_in_for_what_may_have_been_trained_on_them() -> None:
    wide = dataclasses.replace(SPEC, num_classes=100)
    assert images.training(None, wide, None, trained=False).name == "digits"
    assert images.training(None, SPEC, DIGITS, trained=True).split == "train"
    for spec, labels in ((wide, None), (SPEC, tuple("abcdefghij"))):
        with pytest.raises(UsageError, match="name resnet20's own by --calibration"):
            images.training(None, spec, labels, trained=True)


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "class0" / "00.png").rename(tmp_path / "outside.png")
    (folder / "class0" / "00.png").symlink_to(tmp_path / "outside.png")
    source = images.training(str(folder), dataclasses.replace(SPEC, num_classes=2), None, trained=False)
    with pytest.raises(InputRefused, match="a link that leads out of"):
        images.calibration(source, 3, 512, apart_from=set())


def test_as_many_images_are_compared_as_fit_in_memory() -> None:
    assert images.most(SPEC) == 10_000
    assert images.most(catalog.get_spec("resnet50")) == 2**30 // (224 * 224 * 3 * 4)
