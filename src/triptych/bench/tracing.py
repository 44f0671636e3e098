"""Warmed steps under a framework's own profiler, in its worker's process: seconds with and without it, and one step's trace, read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from triptych.bench import attribution, machine, perfetto
from triptych.core import catalog, contract
from triptych.core.architecture import ImageArchitecture
from triptych.core.batch import Inputs, random
from triptych.core.contender import Contender
from triptych.core.errors import UsageError
from triptych.core.preprocess import NO_TRANSFORMS, RandomResizedCrop, Transforms
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import ImageSpec, Spec
from triptych.core.trace import DATA, STEP
from triptych.data import Source, open_source

Batches = Iterator[tuple[Inputs, np.ndarray]]

WARM_UP = 2
TRANSFORMS = {"training_step": Transforms(random_resized_crop=RandomResizedCrop(), flip=0.5), "inference": NO_TRANSFORMS}
"""What happens to the images on their way, by mode: when training, what ImageNet's recipe has."""
TRACE, NATIVE = "trace.json.gz", "native"


def traced(
    framework: str, contender: Contender, case: Mapping[str, Any], spec: Spec, data: str | None, directory: Path, repeats: int
) -> dict[str, Any]:
    """Where one step's time went, and the seconds of `repeats` steps without and with the profiler, which take turns.

    Of the traced steps the one of median length is read and kept: `directory/trace.json.gz`, and as the framework wrote it under
    `directory/native`. `data` is what `triptych.data.open_source` takes; None: images of random pixels, in memory, and of what takes
    something else, noise.
    """
    room = contract.load(framework)
    name, batches = _batches(room, spec, data, case, WARM_UP + 2 * repeats)
    for _ in range(WARM_UP):
        _step(room, contender, batches)
    kept = directory / NATIVE
    native = [directory / f"{NATIVE}-{number}" for number in range(repeats)]
    for folder in (kept, *native):
        shutil.rmtree(folder, ignore_errors=True)
    bare, under, before = [], [], machine.counters()
    for folder in native:
        bare.append(_step(room, contender, batches))
        with room.profile(folder):
            under.append(_step(room, contender, batches))
    weather = machine.weather(before, machine.counters())
    native.pop(int(np.argsort(under)[(repeats - 1) // 2])).rename(kept)
    for folder in native:
        shutil.rmtree(folder)
    events = room.operators(kept, spec)
    perfetto.write(directory / TRACE, perfetto.trace_events(contract.FRAMEWORKS[framework].title, events))
    found = attribution.attribute(events)
    return {**found.to_json(), "untraced_seconds": bare, "traced_seconds": under, "weather": weather, "data": name}


def _step(room: Any, contender: Contender, batches: Batches) -> float:
    started = perf_counter()
    with room.annotate(STEP):
        with room.annotate(DATA):
            batch = contender.stage(*next(batches))
        contender.run(batch)
    return perf_counter() - started


def _batches(room: Any, spec: Spec, data: str | None, case: Mapping[str, Any], steps: int) -> tuple[str, Batches]:
    """What the batches are made of, and as many of them: of images by the room's own pipeline."""
    size = case["batch_size"]
    if data is None and not isinstance(spec, ImageArchitecture):
        return "synthetic", noise(spec, size)
    images = catalog.fed_by_images(spec)
    source = synthetic(images, size) if data is None else opened(data, images)
    transforms = TRANSFORMS[case["mode"]]
    plan = SamplingPlan(source.labels, spec.num_classes, size, 0, transforms, images.preprocessing.crop)
    return source.name, room.batches(source, plan.batches(0, steps), images.preprocessing, transforms)


def noise(spec: Spec, batch_size: int) -> Batches:
    """Random inputs of any kind, and random classes, for ever."""
    numbers = np.random.default_rng(0)
    while True:
        yield random(spec, batch_size, numbers), numbers.integers(spec.num_classes, size=batch_size)


def synthetic(spec: ImageSpec, batch_size: int) -> Source:
    """Random pixels of the size that the preprocessing resizes to, and random classes: enough for two batches."""
    numbers, side = np.random.default_rng(0), spec.preprocessing.resize_short_side or spec.preprocessing.crop
    count = 2 * batch_size
    pixels = numbers.integers(256, size=(count, side, side, spec.in_channels), dtype=np.uint8)
    labels = numbers.integers(spec.num_classes, size=count)
    classes = tuple(map(str, range(spec.num_classes)))
    return Source("synthetic", "train", classes, labels, pixels, [f"image {i}" for i in range(count)])


def opened(data: str, spec: Spec) -> Source:
    """The training images at a path. UsageError for a model of other inputs, or labels that it has no class for."""
    catalog.fed_by_images(spec)
    source = open_source(data, "train")
    if not 0 <= source.labels.min() <= source.labels.max() < spec.num_classes:
        span = f"{source.labels.min()} to {source.labels.max()} (-1: unknown)"
        raise UsageError(f"{source.name} has labels {span}; {spec.name} has {spec.num_classes} classes: give data of no more")
    return source
