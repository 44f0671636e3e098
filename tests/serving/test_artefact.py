"""What may be served, and that images are prepared as the three frameworks prepare them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from triptych.cli.serve import serve_command
from triptych.core import catalog, contract
from triptych.core.difference import scaled_error
from triptych.core.errors import InputRefused, UsageError
from triptych.core.spec import Preprocessing, to_dict
from triptych.core.tolerance import NORMALIZED_PIXEL
from triptych.serving import artefact
from triptych.serving.images import normalized, resized

SMALL = Preprocessing(None, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
SIZES = [(300, 400), (400, 300), (32, 32), (256, 256), (97, 61), (1200, 900), (20, 500)]


def test_an_artefact_is_found_and_described(exported):
    for directory in (exported, exported.parent):
        served = artefact.load(directory)
        assert (served.name, served.shape, served.channels_first) == ("resnet20", (3, 32, 32), True)


def test_what_was_altered_is_not_served(written, tmp_path):
    directory = written(tmp_path)
    (directory / "model.onnx").write_bytes((directory / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(InputRefused, match=r"model\.onnx is not what was exported"):
        artefact.load(directory)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"format": "tflite"}, UsageError, "wanted is saved_model or onnx or onnx_opset11 or onnx_int8"),
        ({"passed": False}, InputRefused, "passed its verification"),
        ({"spec": {"family": "other"}}, InputRefused, "describes no model"),
        ({"spec": to_dict(catalog.get_spec("text_image"))}, UsageError, "cannot be fed with images alone"),
        ({"source": "elsewhere"}, InputRefused, "names 'elsewhere'"),
        ({"spec": to_dict(catalog.get_spec("resnet20")) | {"name": "../../x"}}, InputRefused, "names its model '../../x'"),
        ({"format": "onnx_int8", "source": "jax"}, InputRefused, "names 'jax' as the source of a onnx_int8"),
    ],
)
def test_a_record_that_does_not_vouch_is_refused(written, tmp_path, changes, error, text):
    with pytest.raises(error, match=text):
        artefact.load(written(tmp_path, **changes))


def test_a_folder_without_or_with_several_is_refused(written, tmp_path):
    with pytest.raises(UsageError, match="triptych export resnet20 --from pytorch --to onnx --out"):
        artefact.load(tmp_path)
    written(tmp_path)
    written(tmp_path / "more").rename(tmp_path / "jax-onnx")
    with pytest.raises(UsageError, match="holds 2 artefacts"):
        artefact.load(tmp_path)


def test_only_other_formats_are_told(tmp_path):
    (tmp_path / "jax-stablehlo").mkdir()
    (tmp_path / "jax-stablehlo" / "export.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="jax-stablehlo; wanted is saved_model or"):
        artefact.load(tmp_path)


def test_a_queue_must_hold_a_batch(exported):
    result = CliRunner().invoke(serve_command, [str(exported), "--max-batch", "8", "--max-queue", "7"])
    assert isinstance(result.exception, UsageError)
    assert "--max-queue 7" in str(result.exception)


@pytest.mark.parametrize("framework", contract.FRAMEWORKS)
def test_images_are_prepared_as_the_framework_does(framework):
    room, random = contract.load(framework), np.random.default_rng(0)
    for size in SIZES:
        for preprocessing in (SMALL, catalog.IMAGENET):
            image = random.integers(0, 256, (*size, 3), np.uint8)
            found = normalized(resized(image, preprocessing), preprocessing)
            bound = 0.0 if preprocessing is SMALL and size == (32, 32) else NORMALIZED_PIXEL
            assert scaled_error(found, room.preprocess(image, preprocessing)) <= bound, (size, preprocessing)


def test_labels_are_imagenets_where_it_is(served):
    assert served.labels is None
    assert len(dataclasses.replace(served, spec=catalog.get_spec("resnet50")).labels or ()) == 1000


@pytest.mark.parametrize(
    ("source", "kind", "first"), [("pytorch", "onnx", True), ("pytorch", "saved_model", False), ("jax", "onnx", False)]
)
def test_the_layout_is_that_of_the_file_and_not_of_who_wrote_it(source: str, kind: str, first: bool, tmp_path: Path) -> None:
    spec = catalog.fed_by_images(catalog.get_spec("resnet20"))
    assert artefact.Artefact(tmp_path, kind, source, spec, {}).shape == ((3, 32, 32) if first else (32, 32, 3))
