"""Training batches of a proof: what the frameworks' own pipelines make, stage by stage, and the batches that all of them step on.

Rung 2 holds the pipelines against each other, to rounding; from rung 4 on every framework computes on the very same bits, which the
reference's pipeline made once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from triptych.core.contract import Loader
from triptych.core.preprocess import Transforms
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing, Spec
from triptych.data import Source, open_source
from triptych.parity import plan as plans
from triptych.parity.observation import Observation, StoredTensors, write_tensors
from triptych.parity.plan import Plan
from triptych.parity.subject import Subject

BatchOf = Callable[[int], tuple[np.ndarray, np.ndarray]]

PADDED = Transforms(pad_crop=4, flip=0.5)
"""The other kind of crop, beside the plan's own transforms."""
# The pictures that stand in for data: larger than their crop, so that windows are enlarged and reduced.
PICTURES, HEIGHT, WIDTH, CROP = 8, 56, 64, 32
# Two steps of the standard plan, of which the first pastes and the second blends.
STEPS = range(1, 3)


def observe(subject: Subject) -> Iterator[Observation]:
    """Rung 2 of training batches: pixels after each transform, then whole batches and their targets."""
    plan, preprocessing = subject.plan, _preprocessing(subject)
    for name, transforms in stages(plan).items():
        for step, (pixels, _) in zip(STEPS, _made(subject, transforms, _levels(preprocessing), STEPS), strict=True):
            yield Observation(2, "augmented", f"batch after {name}", pixels, step)
    for step, (images, targets) in zip(STEPS, _made(subject, _fitting(plan), preprocessing, STEPS), strict=True):
        yield Observation(2, "targets", "targets of the batch", targets, step)
        yield Observation(2, "mixed", "batch after normalization, erasing, mixing", images, step)


def stages(plan: Plan) -> dict[str, Transforms]:
    """The plan's transforms that leave pixels in [0, 255], one more in each; what is switched off has no stage of its own."""
    whole = _fitting(plan)
    crop = dataclasses.replace(whole, flip=0.0, jitter=None, erasing=None, mixup=0.0, cutmix=0.0)
    flip = dataclasses.replace(crop, flip=whole.flip)
    jitter = dataclasses.replace(flip, jitter=whole.jitter)
    ordered = {} if plan.data else {PADDED: "padded crop, flip"}
    for transforms, name in ((crop, "crop"), (flip, "crop, flip"), (jitter, "crop, flip, jitter")):
        ordered.setdefault(transforms, name)
    return {name: transforms for transforms, name in ordered.items()}


def write_batches(subject: Subject, path: Path) -> None:
    """What the subject's pipeline makes of the plan's data for every step of the training rungs, into one file."""
    plan = subject.plan
    steps = range(max(1, plan.steps, plan.adamw_steps, plan.free_steps))
    tensors: dict[str, np.ndarray] = {}
    for step, (images, targets) in zip(steps, _made(subject, _fitting(plan), _preprocessing(subject), steps), strict=True):
        tensors |= {f"images/{step}": images, f"targets/{step}": targets}
    write_tensors(path, tensors)


def read_batches(path: Path) -> BatchOf:
    """The batches of a file that `write_batches` wrote, by their step: images (N, H, W, C) float32, and targets."""
    stored = StoredTensors(path)
    return lambda step: (stored[f"images/{step}"], stored[f"targets/{step}"])


def _made(subject: Subject, transforms: Transforms, preprocessing: Preprocessing, steps: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of these steps from the subject's pipeline, which gets no processes of its own for so few."""
    plan, source = subject.plan, _source(subject.plan)
    sampling = SamplingPlan(
        source.labels, plan.spec.num_classes, plan.training_batch, plan.sgd.seed, transforms, preprocessing.crop, plan.uneven
    )
    return subject.batches(source, sampling.batches(steps.start, steps.stop), preprocessing, transforms, Loader(workers=0))


def _source(plan: Plan) -> Source:
    """The training images of the plan's data; without any, a few pictures."""
    if plan.data:
        return open_source(plan.data, "train")
    channels, classes = _of_images(plan.spec).channels, plan.spec.num_classes
    names = [f"picture {number}" for number in range(PICTURES)]
    images = np.stack([plans.picture(name, HEIGHT, WIDTH, channels) for name in names])
    return Source("pictures", "train", tuple(map(str, range(classes))), np.arange(PICTURES) % classes, images, names)


def _preprocessing(subject: Subject) -> Preprocessing:
    """The subject's normalization, at the size of the training rungs; of pictures, at theirs."""
    fitted, own = _of_images(subject.plan.training_spec), subject.preprocessing
    assert own is not None, "a fault may change it, not take it away"
    short_side, crop = (fitted.resize_short_side, fitted.crop) if subject.plan.data else (None, min(fitted.crop, CROP))
    return dataclasses.replace(own, resize_short_side=short_side, crop=crop)


def _of_images(spec: Spec) -> Preprocessing:
    assert spec.preprocessing is not None, "`Plan.not_applicable` leaves the rung out"
    return spec.preprocessing


def _levels(preprocessing: Preprocessing) -> Preprocessing:
    """A normalization that leaves pixels as they are: (x / 255 - 0) / (1 / 255)."""
    channels = preprocessing.channels
    return dataclasses.replace(preprocessing, mean=(0.0,) * channels, std=(1.0 / 255.0,) * channels)


def _fitting(plan: Plan) -> Transforms:
    """The plan's transforms; colour jitter is told for grey and colour images only."""
    return plan.transforms if _of_images(plan.spec).channels in (1, 3) else dataclasses.replace(plan.transforms, jitter=None)
