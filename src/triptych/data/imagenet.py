"""ImageNet's 1000 classes: WordNet ids in sorted order, which is the order of every published classifier's outputs."""

from __future__ import annotations

import functools
import json
from importlib import resources


@functools.cache
def classes() -> tuple[tuple[str, str], ...]:
    """(wnid, name) by class index."""
    text = resources.files("triptych.data").joinpath("imagenet_classes.json").read_text(encoding="utf-8")
    return tuple((wnid, name) for wnid, name in json.loads(text))


def wnids() -> tuple[str, ...]:
    """The WordNet id of each class index."""
    return tuple(wnid for wnid, _ in classes())


def names() -> tuple[str, ...]:
    """The readable name of each class index; two names ("crane", "maillot") stand for two classes each."""
    return tuple(name for _, name in classes())
