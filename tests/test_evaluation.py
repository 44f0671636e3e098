"""Streaming images through a model, ranks and agreement, class indices: the parts of evaluate and predict that need no framework."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych import evaluation
from triptych.core import catalog, checkpoint, contract, initialize
from triptych.core.errors import FrameworkMissing, TriptychError, UsageError
from triptych.core.spec import Preprocessing
from triptych.data import images as image_files
from triptych.data.source import Source

SPEC = catalog.get_spec("mlp", image_size=4)


class Room:
    """A framework of numpy: what it is shown, it records."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.spec, self.precision = SPEC, "float32"

    def decode(self, encoded: bytes, channels: int) -> np.ndarray:
        return image_files.decode(encoded, channels)

    def preprocess(self, image: np.ndarray, _: Preprocessing) -> np.ndarray:
        return image.astype(np.float32)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Logits that are highest at the class of the first pixel's value."""
        self.batches.append(len(images))
        return -np.abs(np.arange(10) - images[:, 0, 0, :1])


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


def source_of(images: Any, classes: tuple[str, ...] = tuple("0123456789")) -> Source:
    return Source("test", "test", classes, np.arange(len(images)) % 10, images, [f"{i}.png" for i in range(len(images))])


def infer(source: Source, batch_size: int) -> tuple[Room, evaluation.Inference]:
    room = Room()
    return room, evaluation.infer(room, room, source, batch_size)  # type: ignore[arg-type]


def test_images_go_through_in_order_in_batches_of_one_size() -> None:
    room, inference = infer(source_of([png(i) for i in range(7)]), 3)
    assert room.batches == [3, 3, 3]
    assert inference.logits.argmax(axis=1).tolist() == list(range(7))
    assert inference.refused == {}
    assert inference.inputs_sha256 == source_of([png(i) for i in range(7)]).sha256()
    assert infer(source_of([png(i) for i in range(2)]), 3)[0].batches == [2]


def test_a_refused_image_leaves_a_row_of_nan_and_a_reason() -> None:
    _, inference = infer(source_of([png(0), b"", png(2), b"GIF89a"]), 2)
    assert np.isnan(inference.logits).all(axis=1).tolist() == [False, True, False, True]
    assert inference.refused[1] == "1.png: the file is empty"
    assert "GIF" in inference.refused[3]
    _, nothing = infer(source_of([b"", b"x"]), 2)
    assert set(nothing.refused) == {0, 1}


def test_a_native_decoders_own_error_refuses_the_image_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> np.ndarray:
        raise RuntimeError("bad huffman code")

    monkeypatch.setattr(Room, "decode", fail)
    _, inference = infer(source_of([png(0)]), 2)
    assert inference.refused == {0: "0.png: its native decoder refused it (bad huffman code)"}


def test_arrays_of_another_number_of_channels_are_a_mistake() -> None:
    with pytest.raises(UsageError, match=r"3 channel\(s\), the model takes 1"):
        infer(source_of(np.zeros((2, 4, 4, 3), np.uint8)), 2)


def test_label_ranks_count_what_stands_before() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, 0.0, 1.0]])
    assert evaluation.label_ranks(logits, np.array([0, 2, 1])).tolist() == [2, 2, 2]
    assert evaluation.label_ranks(logits, np.array([1, 0, 2])).tolist() == [0, 0, 0]


def test_agreement_counts_images_and_names_the_others() -> None:
    logits = {
        "pytorch": np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]),
        "tensorflow": np.array([[1.0, 0.0], [0.0, 1.0], [3.0, 0.5]]),
        "jax": np.array([[0.0, 1.0], [0.0, 1.0], [3.0, 0.0]]),
    }
    result = evaluation.agreement(logits, ["a", "b", "c"])
    assert (result["images"], result["all"]) == (3, 2)
    assert result["pairs"] == {"pytorch/tensorflow": 3, "pytorch/jax": 2, "tensorflow/jax": 2}
    assert result["differing"] == ["a"]
    assert (result["largest_logit_difference"], result["logit_scale"]) == (1.0, 3.0)


def test_frameworks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "installed", lambda: ["pytorch", "jax"])
    assert evaluation.chosen_frameworks("all") == ["pytorch", "jax"]
    assert evaluation.chosen_frameworks("jax, pytorch,jax") == ["jax", "pytorch"]
    with pytest.raises(UsageError, match="unknown framework 'torch'"):
        evaluation.chosen_frameworks("torch")
    monkeypatch.setattr(contract.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FrameworkMissing, match=r"pip install 'triptych\[tensorflow\]'"):
        evaluation.chosen_frameworks("tensorflow")


def test_a_worker_that_dies_shows_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = SimpleNamespace(returncode=-9, stderr=b"one\ntwo\nthree\nfour\nfive\nout of memory\n")
    monkeypatch.setattr(evaluation.subprocess, "run", lambda *_, **__: dead)
    with (
        pytest.raises(TriptychError, match=r"(?s)jax worker ended with code -9\n  two.*out of memory$"),
        evaluation.run_workers(evaluation.Job("weights", data="digits"), ["jax"]),
    ):
        pass


def test_a_model_that_images_cannot_feed_is_refused(tmp_path: Path) -> None:
    spec = catalog.get_spec("transformer_block", tokens=2, width=4, heads=1, mlp_width=4)
    saved = checkpoint.save(tmp_path / "block", spec, initialize.initial_weights(spec, 0))
    for job in (evaluation.Job(str(saved)), evaluation.Job(str(saved / "model.safetensors"), "transformer_block")):
        with pytest.raises(UsageError, match="transformer_block cannot be fed with images alone: it takes features"):
            job.subject()
