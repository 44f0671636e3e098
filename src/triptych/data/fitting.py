"""Whether the classes of a set are those of a model."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.core.errors import UsageError
from triptych.core.spec import Spec
from triptych.data import imagenet
from triptych.data.source import Source


def fitted(source: Source, spec: Spec, labels: Sequence[str] | None) -> Source:
    """`source` with its labels as the model's class indices: as they are, by the model's own `labels`, or by ImageNet's WordNet ids.

    Raises UsageError when the classes do not fit the model.
    """
    classes, count = source.classes, spec.num_classes
    for names in (labels, imagenet.wnids() if count == len(imagenet.classes()) else None):
        index_of = {name: index for index, name in enumerate(names or ())}
        if names and len(index_of) == count and set(classes) <= set(index_of):
            return source.relabeled(names, index_of)
    if len(classes) != count:
        raise UsageError(
            f"{source.name} has {len(classes)} classes, {spec.name} with these weights has {count}; "
            "use weights trained for these classes, or add a classes.json that gives each class its index"
        )
    return source
