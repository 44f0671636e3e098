"""`triptych predict` as a user calls it: all kinds of files in three frameworks, and bad files among good ones."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.core import catalog, checkpoint, contract, initialize

Python = Callable[..., "subprocess.CompletedProcess[str]"]
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny CIFAR ResNet with labels."""
    spec = catalog.tiny(catalog.get_spec("resnet20"))
    return checkpoint.save(tmp_path_factory.mktemp("weights") / "tiny", spec, initialize.initial_weights(spec, 0), labels=LABELS)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of every kind, a damaged one, one that is none, and a link."""
    folder = tmp_path_factory.mktemp("photographs")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "rgb.jpg")
    image.save(folder / "turned.jpg", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "grey.PNG", "PNG")
    (folder / "below").mkdir()
    image.save(folder / "below" / "rgb.png")
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:400])
    (folder / "page.png").write_text("<html>")
    (folder / "link.png").symlink_to(folder / "below" / "rgb.png")
    return folder


def test_good_files_are_answered_and_bad_ones_named(python: Python, weights: Path, photographs: Path) -> None:
    arguments = [str(photographs), "missing.jpg", "--weights", str(weights), "--top", "3", "--json"]
    done = python("-m", "triptych.cli", "predict", *arguments)
    assert done.returncode == 8, done.stderr
    result = json.loads(done.stdout)
    answered = [Path(row["image"]).name for row in result["images"]]
    assert answered == ["rgb.png", "cmyk.jpg", "grey.PNG", "rgb.jpg", "turned.jpg"]
    assert [Path(row["image"]).name for row in result["refused"]] == ["cut.jpg", "page.png", "missing.jpg"]
    for row in result["images"]:
        assert list(row["predictions"]) == contract.installed()
        assert row["agree"]
        for classes in row["predictions"].values():
            probabilities = [item["probability"] for item in classes]
            assert probabilities == sorted(probabilities, reverse=True)
            assert [item["label"] for item in classes] == [LABELS[item["class"]] for item in classes]
            assert len(classes) == 3
    for reason in ("cut.jpg: the image is truncated", "page.png: neither JPEG nor PNG", "missing.jpg: no such file"):
        assert reason in done.stderr


def test_the_text_has_a_line_a_framework(python: Python, weights: Path, photographs: Path) -> None:
    first = contract.installed()[0]
    done = python("-m", "triptych.cli", "predict", str(photographs / "rgb.jpg"), "--weights", str(weights), "--framework", first)
    assert done.returncode == 0, done.stderr
    title, line = done.stdout.splitlines()
    assert title == str(photographs / "rgb.jpg")
    assert line.split()[0] == first
    assert line.count("%") == 5
    assert done.stderr == ""


def test_a_bare_file_of_weights_needs_a_model(python: Python, weights: Path, photographs: Path) -> None:
    done = python("-m", "triptych.cli", "predict", str(photographs / "rgb.jpg"), "--weights", str(weights / "model.safetensors"))
    assert done.returncode == 2
    assert "give --model" in done.stderr
