"""The stand-alone scripts: a few steps on the embedded digits and on a folder of images, the same options and keys in all."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.bench import script
from triptych.core import catalog, contract
from triptych.core.spec import StageSpec

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--model", "resnet20", "--image-size", "32", "--batch-size", "4", "--steps", "2", "--workers", "0"]


def main_of(framework: str) -> Callable[[list[str]], dict[str, Any]]:
    """`main` of a framework's script."""
    if framework not in contract.installed():
        pytest.skip(f"{framework} is not installed")
    contract.load(framework)
    spec = importlib.util.spec_from_file_location(f"resnet50_{framework}", BENCHMARKS / framework / "resnet50.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    main: Callable[[list[str]], dict[str, Any]] = module.main
    return main


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the catalogue calls resnet20 is one residual block: XLA compiles every layer."""
    spec = dataclasses.replace(catalog.tiny(catalog.get_spec("resnet20", image_size=32)), name="resnet20", stages=(StageSpec(1, 8, 1),))
    monkeypatch.setattr(catalog, "get_spec", lambda name, **options: catalog.with_options(spec, **options))


@pytest.mark.parametrize("framework", contract.FRAMEWORKS)
def test_it_trains_on_the_digits_in_mixed_precision(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of(framework)
    result = main([*SMALL, "--precision", "bfloat16", "--json"])
    if framework == "jax":
        assert main.__globals__["train_step"]._cache_size() == 1, "the step was compiled more than once"
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert (result["framework"], result["model"], result["precision"], result["data"]) == (framework, "resnet20", "bfloat16", "digits")
    assert len(result["losses"]) == len(result["step_seconds"]) == 2
    assert 0.5 < result["loss"]["first"] < 10.0
    assert result["loss"]["first"] != result["loss"]["last"]
    low, high = result["images_per_second"]["quartiles"]
    assert 0.0 < low <= result["images_per_second"]["median"] <= high
    assert result["first_step_seconds"] > 0.0
    assert list(result) == KEYS


KEYS = [
    "framework", "model", "data", "device", "precision", "bfloat16_instructions", "compile", "batch_size", "image_size", "steps",
    "images_per_second", "loss", "first_step_seconds", "peak_memory_bytes", "device_memory_bytes", "versions", "step_seconds", "losses",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three images, of different sizes, one of them grey."""
    numbers = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i, shape in enumerate([(40, 30, 3), (33, 50, 3), (35, 35)]):
            Image.fromarray(numbers.integers(256, size=shape, dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_it_trains_on_a_folder_of_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = main_of(contract.installed()[0])([*SMALL, "--data", str(folder)])
    assert result["data"] == "files"
    assert str(folder) not in json.dumps(result)
    assert "images/s" in capsys.readouterr().out


def test_images_are_rgb_whatever_they_were(folder: Path) -> None:
    found = script.options("", ["--data", str(folder)]).images
    assert [(image.shape, image.dtype, label) for image, label in found][::3] == [((40, 30, 3), np.uint8, 0), ((40, 30, 3), np.uint8, 1)]
    assert found[2][0].shape == (35, 35, 3)
    assert script.options("", []).images[0][0].shape == (32, 32, 3)


def test_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, why in (
        (["--steps", "1"], "less than 2"), (["--batch-size", "0"], "less than 1"), (["--precision", "float8"], "invalid choice"),
        (["--data", "nowhere"], "no data at"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            script.options("", arguments)
        assert end.value.code == 2
        assert why in capsys.readouterr().err
