"""The classes of a set become the model's, or are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.errors import UsageError
from triptych.core.spec import Spec
from triptych.data import imagenet
from triptych.data.fitting import fitted
from triptych.data.source import Source


def model(classes: int) -> Spec:
    return dataclasses.replace(catalog.get_spec("mlp"), num_classes=classes)


def labeled(*classes: str) -> Source:
    return Source("test", "test", classes, np.arange(len(classes)), [b""] * len(classes), list(classes))


def test_class_indices_are_the_models() -> None:
    assert fitted(labeled("x", "y"), model(2), None).labels.tolist() == [0, 1]
    assert fitted(labeled("x", "y"), model(2), ("u", "v")).labels.tolist() == [0, 1]
    by_label = fitted(labeled("cat", "dog"), model(3), ("dog", "frog", "cat"))
    assert by_label.labels.tolist() == [2, 0]
    by_wnid = fitted(labeled("n01443537", "n15075141"), model(1000), imagenet.names())
    assert by_wnid.labels.tolist() == [1, 999]


def test_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"test has 2 classes, mlp with these weights has 3; .*classes\.json"):
        fitted(labeled("x", "y"), model(3), None)
