"""What a run shows while it goes: `metrics.jsonl`, TensorBoard's event files, a trace by the framework's own profiler.

Events are written with `tensorboard` itself, the library that also shows them (`tensorboard --logdir RUN`): its record writer and protocol
buffers, because its `EventFileWriter` loads TensorFlow wherever it is installed, also into a JAX process. `tensorboardX` is smaller but
shows nothing. Each start of a run writes a file of its own, whose first event tells readers to drop what an earlier start wrote from that
step on.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.summary.writer.record_writer import RecordWriter

from triptych.core.errors import InputRefused
from triptych.core.spec import Preprocessing
from triptych.training.job import Watch
from triptych.training.records import METRICS, Metrics, storing

EVENTS = "tensorboard"
PROFILE_AFTER = 3
"""Steps before the profile begins: compilation and first allocations are another matter."""
BINS = 30
SCALARS = ("loss", "learning_rate", "images_per_second", "data_wait", "loss_scale")


class EventFile:
    """One TensorBoard event file. Every event is written at once and whole, so that a crash cuts off the last one at most."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """Begin a file; readers drop what earlier files say about `first_step` and later. StorageError when it cannot be written."""
        self.path = directory / f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}"
        with storing(self.path):
            directory.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(self.path.open("xb", buffering=0))
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One number for each tag."""
        self._summary(step, [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])

    def images(self, step: int, tag: str, pixels: np.ndarray) -> None:
        """(N, H, W, C) uint8, one channel or three."""
        size = {"height": pixels.shape[1], "width": pixels.shape[2], "colorspace": pixels.shape[3]}
        drawn = [Summary.Image(encoded_image_string=_png(image), **size) for image in pixels]
        self._summary(step, [Summary.Value(tag=f"{tag}/{i}", image=image) for i, image in enumerate(drawn)])

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """How the values of each array are distributed."""
        self._summary(step, [Summary.Value(tag=f"weights/{name}", histo=_histogram(array)) for name, array in arrays.items()])

    def close(self) -> None:
        """No more events."""
        with storing(self.path):
            self._records.close()

    def _summary(self, step: int, values: Sequence[Summary.Value]) -> None:
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **what: Any) -> None:
        with storing(self.path):
            self._records.write(Event(wall_time=time.time(), **what).SerializeToString())


def _png(pixels: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(encoded, "PNG")
    return encoded.getvalue()


def _histogram(array: np.ndarray) -> HistogramProto:
    values = np.asarray(array, np.float64).reshape(-1)
    values = values[np.isfinite(values)]
    if not values.size:
        return HistogramProto()
    counts, edges = np.histogram(values, BINS)
    return HistogramProto(
        min=values.min(), max=values.max(), num=values.size, sum=values.sum(), sum_squares=np.square(values).sum(),
        bucket_limit=edges[1:], bucket=counts,
    )  # fmt: skip


def pixels(images: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """(N, crop, crop, C) normalized -> (N, crop, crop, C) uint8: what the model is given, as a person sees it."""
    mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
    levels: np.ndarray = np.clip(np.rint((images * std + mean) * 255.0), 0, 255).astype(np.uint8)
    return levels


class Watcher:
    """Takes down what a run tells it, step by step. A context manager; raises StorageError when something cannot be written."""

    def __init__(self, out: Path, watch: Watch, room: Any, first_step: int, kept: Sequence[Mapping[str, Any]]) -> None:
        """Watch a run that goes on at `first_step`; `kept` is what its metrics hold of the steps before."""
        self.watch, self._room, self._directory = watch, room, out / EVENTS
        self._profile_at, self._shown, self._judged = first_step + PROFILE_AFTER, False, -1
        with contextlib.ExitStack() as opened:
            self._metrics = opened.enter_context(Metrics(out / METRICS, kept))
            self._events = EventFile(self._directory, first_step) if watch.tensorboard else None
            if self._events is not None:
                opened.callback(self._events.close)
            self._profile = opened.enter_context(contextlib.ExitStack())
            self._closing = opened.pop_all()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)

    def before(self, step: int, images: np.ndarray, preprocessing: Preprocessing) -> None:
        """A step begins on these images: the first ones are shown, the profiler is started and stopped."""
        if self._events is not None and self.watch.images and not self._shown:
            self._events.images(step, "inputs", pixels(images[: self.watch.images], preprocessing))
        self._shown = True
        if self.watch.profile_steps is None:
            return
        if step == self._profile_at:
            self._profile.enter_context(self._room.profile(self._directory))
        elif step == self._profile_at + self.watch.profile_steps:
            self._profile.close()

    def step(self, row: Mapping[str, Any]) -> None:
        """A step has ended."""
        self._metrics.write(row)
        if self._events is not None:
            self._events.scalars(row["step"], {f"train/{name}": row[name] for name in SCALARS if name in row})

    def evaluation(self, row: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
        """The model was judged after a step, on its way."""
        self._metrics.write({"step": row["step"], "evaluation": row})
        self.judged(row)
        if self._events is not None and self.watch.histograms:
            self._events.histograms(row["step"], weights)

    def judged(self, row: Mapping[str, Any]) -> None:
        """How the model did on the test images after a step; said twice of a step, it counts once."""
        if self._events is not None and row["step"] != self._judged:
            self._events.scalars(row["step"], {f"test/{name}": row[name] for name in ("loss", "accuracy")})
        self._judged = row["step"]

    def note(self, step: int, text: str) -> None:
        """Something that the user should know came up at a step."""
        self._metrics.write({"step": step, "note": text})


def scalars(directory: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) of every scalar under a run's directory, by step; what a resumed run wrote again counts once, with its last value.

    A record that a crash cut off ends its file. Raises InputRefused when there are no event files.
    """
    files = sorted(directory.rglob("events.out.tfevents.*"), key=lambda file: file.name)
    if not files:
        raise InputRefused(f"{directory} holds no TensorBoard event files (events.out.tfevents.*); was it trained with watch.tensorboard?")
    found: dict[tuple[int, str], float] = {}
    for file in files:
        for event in _events(file):
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[0] < event.step}
            found |= {(event.step, value.tag): value.simple_value for value in event.summary.value if value.HasField("simple_value")}
    yield from ((step, tag, value) for (step, tag), value in sorted(found.items()))


def _events(file: Path) -> Iterator[Any]:
    reader = PyRecordReader_New(str(file))
    with contextlib.suppress(OutOfRangeError, DataLossError):
        while True:
            reader.GetNext()
            yield Event.FromString(reader.record())


def export_csv(directory: Path, out: Path) -> None:
    """All scalars under a run's directory (of one framework) as CSV with the columns step, tag, value.

    Values are float32, as TensorBoard keeps them, in the shortest decimal form that gives the same float32.
    """
    with storing(out), out.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("step", "tag", "value"))
        rows.writerows((step, tag, str(np.float32(value))) for step, tag, value in scalars(directory))
