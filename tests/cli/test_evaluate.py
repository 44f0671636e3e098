"""`triptych evaluate` as a user calls it: three frameworks on real digits, refused images, mistakes."""

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


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small MLP for digits, three classes of them named."""
    spec = catalog.get_spec("mlp", hidden=(16,), num_classes=10)
    directory = tmp_path_factory.mktemp("weights") / "mlp"
    return checkpoint.save(directory, spec, initialize.initial_weights(spec, 0), labels=tuple("0123456789"))


def test_three_frameworks_agree_on_every_digit(python: Python, weights: Path) -> None:
    done = python(
        "-m", "triptych.cli", "evaluate", "--data", "digits", "--weights", str(weights), "--limit", "40", "--batch-size", "16", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["data"] == {"name": "digits", "split": "test", "images": 40, "classes": 10}
    assert list(result["frameworks"]) == contract.installed()
    assert result["agreement"]["all"] == 40
    assert 0 < result["agreement"]["largest_logit_difference"] < 1e-5 * result["agreement"]["logit_scale"]
    assert len({row["top1_correct"] for row in result["frameworks"].values()}) == 1
    for row in result["frameworks"].values():
        assert row["top1"] == row["top1_correct"] / 40
        assert row["top5_correct"] >= row["top1_correct"]
        assert row["images_per_second"] > 0


def test_a_damaged_image_is_left_out_and_named(python: Python, weights: Path, tmp_path: Path) -> None:
    for label in ("3", "7"):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.fromarray(np.full((32, 32), 9 * int(label), np.uint8)).save(tmp_path / "data" / label / "good.png")
    (tmp_path / "data" / "7" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    arguments = ["--data", str(tmp_path / "data"), "--weights", str(weights), "--model", "mlp", "--framework", contract.installed()[0]]
    done = python("-m", "triptych.cli", "evaluate", *arguments)
    assert done.returncode == 8
    assert "mlp on data, test split, 2 images, float32" in done.stdout
    assert "1 image(s) refused and left out:\n  7/bad.png: truncated in its header" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "digits", "--model", "resnet20"], 2, "holds a mlp, not a resnet20"),
        (["--data", "digits", "--framework", "caffe"], 2, "unknown framework 'caffe'"),
        (["--data", "nowhere"], 2, "no data at nowhere"),
        (["--data", "."], 8, "no data set found there"),
        (["--data", "digits", "--limit", "0"], 2, "--limit"),
    ],
)
def test_mistakes_end_with_a_message_and_a_code(python: Python, weights: Path, arguments: list[str], code: int, message: str) -> None:
    done = python("-m", "triptych.cli", "evaluate", "--weights", str(weights), *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_altered_checkpoint_is_refused_before_any_framework_starts(python: Python, weights: Path, tmp_path: Path) -> None:
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in weights.iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= file.suffix == ".safetensors"
        (altered / file.name).write_bytes(content)
    done = python("-m", "triptych.cli", "evaluate", "--data", "digits", "--weights", str(altered))
    assert done.returncode == 8
    assert "model.safetensors" in done.stderr
