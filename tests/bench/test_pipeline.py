"""Training steps that are timed with their data: what the clock sees, what is checked, and what is kept apart."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from triptych.bench import pipeline, session
from triptych.core import catalog, contract
from triptych.core.contender import WITH_DATA
from triptych.core.errors import UsageError
from triptych.data import open_source

FRAMEWORKS = contract.installed()


def test_frameworks_make_their_batches_while_they_are_timed_and_agree(lab: Any, tmp_path: Any) -> None:
    suite = lab.suite(modes=[WITH_DATA], frameworks=FRAMEWORKS, rounds=3, steps=2, check_every=2)
    group = lab.group(suite, {name: lab.Local(name) for name in FRAMEWORKS})
    made = lab.record(tmp_path / "tiny.json", suite, [group])
    assert session.outcome(made) is None, made["rows"]
    for row in made["rows"]:
        assert (row["mode"], row["data"], row["n"]) == (WITH_DATA, "digits", 6)
        assert row["certificate"]["checked"]["turns"] == 2
        assert row["certificate"]["checked"]["worst_error"] <= 1e-5
        assert row["certificate"]["checked"]["after_update"]["worst_error"] <= 1e-5


def test_steps_with_data_and_without_are_never_compared(lab: Any) -> None:
    suite = lab.suite(modes=["training_step", WITH_DATA], frameworks=["pytorch"], lanes=["default", "stock"])
    bare, with_data = suite.groups()
    assert {case.mode for case in bare} == {"training_step"}
    assert {case.mode for case in with_data} == {WITH_DATA}
    reasons = {case.lane: case.unavailable() for case in with_data}
    assert reasons == {"default": None, "stock": "what a user writes without us has an input pipeline of its own"}


class Slow:
    """A pipeline whose first batch takes 200 ms and the others 30; it notes what was asked for, and that it was closed."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.closed = 0

    def batches(self, number: int, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches for ever."""
        try:
            for count in range(1000):
                time.sleep(0.2 if count == 0 else 0.03)
                self.asked.append(number + count)
                yield np.zeros((4, 8, 8, 1), np.float32), np.zeros(4, np.int64)
        finally:
            self.closed += 1


def test_the_clock_sees_the_making_of_a_batch_but_not_the_start_of_the_pipeline(lab: Any) -> None:
    suite, local, slow = lab.suite(modes=[WITH_DATA], frameworks=["pytorch"]), lab.Local("pytorch"), Slow()
    ((case,),) = suite.groups()
    built = local.ask("build", key="x", case=case.to_json(), given=str(lab.proof.weights), seed=0, data="digits")
    assert built["data"] == "digits"
    local.worker.held["x"].pipeline = slow
    seconds = local.ask("turn", key="x", number=7, seed=0, steps=3)["seconds"]
    assert len(seconds) == 3
    assert all(0.03 <= each < 0.2 for each in seconds)
    assert (slow.asked, slow.closed) == ([7, 8, 9, 10], 1), "one more than is timed, and then nothing runs any more"


def test_grey_images_fit_a_model_of_colour_ones() -> None:
    digits, spec = open_source("digits", "train"), catalog.get_spec("resnet20")
    made = pipeline.open_pipeline(contract.load(FRAMEWORKS[0]), spec, "digits", 4, 0)
    images, labels = next(made.batches(0, 1))
    assert images.shape == (4, 32, 32, 3)
    order = made.plan.batch(0).indices
    assert labels.tolist() == digits.labels[order].tolist()
    red, green, blue = ((images * spec.preprocessing.std + spec.preprocessing.mean)[..., channel] for channel in range(3))
    np.testing.assert_allclose(red, green, atol=1e-5)
    np.testing.assert_allclose(red, blue, atol=1e-5)


def test_no_two_turns_get_the_same_batches_and_every_framework_gets_the_same() -> None:
    spec = catalog.get_spec("mlp", hidden=[8])
    seen = {name: pipeline.open_pipeline(contract.load(name), spec, "digits", 4, 0) for name in FRAMEWORKS}
    first = {name: next(made.batches(3, 1)) for name, made in seen.items()}
    images, labels = first[FRAMEWORKS[0]]
    for others, other_labels in first.values():
        np.testing.assert_allclose(others, images, atol=3e-3)
        assert other_labels.tolist() == labels.tolist()
    assert not np.array_equal(next(seen[FRAMEWORKS[0]].batches(4, 1))[0], images)


def test_data_of_too_few_images_or_too_many_classes_cost_the_row(lab: Any) -> None:
    suite = lab.suite(modes=[WITH_DATA], frameworks=["pytorch"], batch_sizes=[4000])
    (entry,) = lab.group(suite, {"pytorch": lab.Local("pytorch")}).entries
    assert entry.failure is not None
    assert "a global batch of 4000 needs at least as many samples" in entry.failure
    with pytest.raises(UsageError, match="labels 0 to 9"):
        pipeline.open_pipeline(None, dataclasses.replace(catalog.get_spec("mlp"), num_classes=3), "digits", 4, 0)
