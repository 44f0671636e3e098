"""What `triptych evaluate` and `triptych predict` do: stream images through one model in several frameworks, and compare.

One framework a process: `python -m triptych.evaluation RUN FRAMEWORK` reads `job.json` from the run directory and leaves
`<framework>/logits.npy` and `<framework>/observations.json` (or `error.json`). The parent, numpy only, computes accuracy and agreement.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import catalog, checkpoint, contract
from triptych.core.errors import InputRefused, TriptychError, UsageError
from triptych.core.spec import ImageSpec, Preprocessing, Spec
from triptych.data import Source, fitting, folders, imagenet, open_source
from triptych.data import images as image_files
from triptych.data.source import ContentHash

TOP = 5


@dataclass(frozen=True, slots=True)
class Job:
    """Which images go through which weights, and how: plain data, the same for every worker. `data` is a set, `files` are single images."""

    weights: str
    model: str | None = None
    data: str | None = None
    files: tuple[str, ...] = ()
    split: str = "test"
    limit: int | None = None
    ground_truth: str | None = None
    synsets: str | None = None
    precision: str = "float32"
    device: str = "auto"
    batch_size: int = 32

    def source(self) -> Source:
        """The images, opened anew."""
        if self.data is None:
            return folders.open_files([Path(name) for name in self.files])
        ground_truth, synsets = (Path(name) if name else None for name in (self.ground_truth, self.synsets))
        return open_source(self.data, self.split, ground_truth=ground_truth, synsets=synsets).take(self.limit)

    def subject(self) -> Subject:
        """The weights, verified. UsageError when they are of another model than asked for."""
        path = Path(self.weights)
        if path.is_file():
            if self.model is None:
                raise UsageError(f"{path} is a file, which does not say what model it holds: give --model, or a checkpoint directory")
            spec = catalog.fed_by_images(catalog.get_spec(self.model))
            return Subject(spec, checkpoint.load_weights(path, spec, precision=self.precision), _labels(spec, None))
        loaded = checkpoint.load(path, precision=self.precision)
        if self.model not in (None, loaded.spec.name):
            raise UsageError(f"{path} holds a {loaded.spec.name}, not a {self.model}; leave --model out, or give other weights")
        return Subject(catalog.fed_by_images(loaded.spec), loaded.weights, _labels(loaded.spec, loaded.labels))


@dataclass(frozen=True, slots=True)
class Subject:
    """A model by its spec, canonical weights, and the label of each class (None: nobody said)."""

    spec: ImageSpec
    weights: checkpoint.Weights
    labels: tuple[str, ...] | None


def _labels(spec: Spec, saved: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The checkpoint's labels; a thousand classes of images prepared as ImageNet's are ImageNet's."""
    is_imagenet = spec.num_classes == len(imagenet.classes()) and spec.preprocessing == catalog.IMAGENET
    return saved or (imagenet.names() if is_imagenet else None)


# One framework


@dataclass(frozen=True, slots=True)
class Inference:
    """What one framework made of a source: (N, classes) logits (NaN rows where an image was refused) and the reasons of refusal.

    `images_per_second` is of reading, decoding, preprocessing and the forward pass; with several batches the first, which compiles,
    is left out. `inputs_sha256` is the content hash of what was accepted.
    """

    logits: np.ndarray
    refused: dict[int, str]
    images_per_second: float
    inputs_sha256: str


def infer(
    room: contract.Room,
    model: contract.Model,
    source: Source,
    batch_size: int = 32,
    *,
    logits: np.ndarray | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> Inference:
    """Every image of `source` through a model, one batch in memory at a time.

    `logits`, when given, is filled in place (a memory map, for large sets). `advance` is told how many images each batch had.
    """
    preprocessing = catalog.fed_by_images(model.spec).preprocessing
    if logits is None:
        logits = np.empty((len(source), model.spec.num_classes), dtype=model.precision)
    logits[:] = np.nan
    refused: dict[int, str] = {}
    content, timed, started = ContentHash(), 0, time.perf_counter()
    for first in range(0, len(source), batch_size):
        indices = range(first, min(first + batch_size, len(source)))
        accepted, images = _prepared(room, preprocessing, source, indices, refused, content)
        if accepted:
            # A short batch would be compiled anew: it is filled up, and the surplus dropped.
            filled = images if first == 0 else images + [images[0]] * (batch_size - len(images))
            logits[accepted] = model.predict(np.stack(filled))[: len(accepted)]
        if first == 0 and len(source) > batch_size:
            started = time.perf_counter()
        else:
            timed += len(indices)
        advance(len(indices))
    rate = timed / max(time.perf_counter() - started, 1e-9)
    return Inference(logits, refused, rate, content.hexdigest())


def _prepared(
    room: contract.Room,
    preprocessing: Preprocessing,
    source: Source,
    indices: Sequence[int],
    refused: dict[int, str],
    content: ContentHash,
) -> tuple[list[int], list[np.ndarray]]:
    """Indices and preprocessed images (crop, crop, C) float32 of what is accepted; the reasons for the rest go to `refused`."""
    accepted: list[int] = []
    images: list[np.ndarray] = []
    for index in indices:
        try:
            raw = source.image(index)
            images.append(room.preprocess(_decoded(room, raw, source.names[index], preprocessing.channels), preprocessing))
        except InputRefused as error:
            refused[index] = str(error)
            continue
        content.add(raw, source.label(index))
        accepted.append(index)
    return accepted, images


def _decoded(room: contract.Room, image: bytes | np.ndarray, name: str, channels: int) -> np.ndarray:
    """(H, W, channels) uint8. UsageError for an array of another number of channels."""
    if isinstance(image, bytes):
        vetted = image_files.vet(image, name, channels)
        try:
            return room.decode(vetted, channels)
        except Exception as error:  # a native decoder's own errors; vetting leaves none that we know of
            raise InputRefused(f"{name}: its native decoder refused it ({error})") from error
    if image.shape[-1] != channels:
        raise UsageError(f"the images have {image.shape[-1]} channel(s), the model takes {channels}; use weights made for such images")
    return image


# Workers


def work(run_directory: Path, framework: str) -> None:
    """A worker's whole life: leaves `logits.npy` and `observations.json` in its folder, or `error.json` for a user's error."""
    directory = run_directory / framework
    try:
        job = Job(**json.loads((run_directory / "job.json").read_text()))
        source, subject = job.source(), job.subject()
        room = contract.load(framework)
        model = room.create_model(subject.spec, subject.weights, precision=job.precision, device=job.device)
        shape = (len(source), subject.spec.num_classes)
        logits = np.lib.format.open_memmap(directory / "logits.npy", mode="w+", dtype=job.precision, shape=shape)
        with _progress(framework, len(source)) as advance:
            inference = infer(room, model, source, job.batch_size, logits=logits, advance=advance)
        logits.flush()
    except TriptychError as error:
        _write_json(directory / "error.json", {"message": str(error), "exit_code": error.exit_code})
        sys.exit(error.exit_code)
    observations = {field: getattr(inference, field) for field in ("refused", "images_per_second", "inputs_sha256")}
    _write_json(directory / "observations.json", {**observations, "versions": room.versions(), "device": model.device})


@contextlib.contextmanager
def _progress(framework: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, when that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task(framework, total=total)
        yield lambda images: progress.advance(task, images)


def _write_json(path: Path, data: Any) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, allow_nan=False))
    partial.replace(path)


@contextlib.contextmanager
def run_workers(job: Job, frameworks: Sequence[str]) -> Iterator[dict[str, Inference]]:
    """What each framework made of the job, one worker after the other; the logits live while the context is open.

    Raises what a worker raised, and TriptychError with the end of its output when one died.
    """
    with tempfile.TemporaryDirectory(prefix="triptych-") as name:
        run_directory = Path(name)
        _write_json(run_directory / "job.json", dataclasses.asdict(job))
        inferences = {framework: _run_worker(run_directory, framework) for framework in frameworks}
        if len({inference.inputs_sha256 for inference in inferences.values()}) > 1:
            raise InputRefused("the images changed while the frameworks read them, one after the other; leave them alone and repeat")
        yield inferences


def _run_worker(run_directory: Path, framework: str) -> Inference:
    directory = run_directory / framework
    directory.mkdir()
    # On a terminal the worker's progress shows; else its output is kept for the case that it dies. `-P`: never import from the cwd.
    output = None if sys.stderr.isatty() else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, "-P", "-m", "triptych.evaluation", str(run_directory), framework],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=output,
        env={"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ},
    )
    if (directory / "error.json").exists():
        error = json.loads((directory / "error.json").read_text())
        raise _error_class(error["exit_code"])(error["message"])
    if done.returncode != 0:
        lines = (done.stderr or b"").decode(errors="replace").strip().splitlines()
        raise TriptychError(f"the {framework} worker ended with code {done.returncode}" + "".join(f"\n  {line}" for line in lines[-5:]))
    observed = json.loads((directory / "observations.json").read_text())
    refused = {int(index): reason for index, reason in observed["refused"].items()}
    logits = np.load(directory / "logits.npy", mmap_mode="r")
    return Inference(logits, refused, observed["images_per_second"], observed["inputs_sha256"])


def _error_class(exit_code: int) -> type[TriptychError]:
    return next((kind for kind in TriptychError.__subclasses__() if kind.exit_code == exit_code), TriptychError)


def chosen_frameworks(names: str) -> list[str]:
    """`all` (every installed one) or a comma-separated list, in order. UsageError or FrameworkMissing (the pip line) else."""
    chosen = contract.installed() if names == "all" else list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in chosen:
        if contract.framework(name).name not in contract.installed():
            contract.load(name)  # raises, with the pip line
    if not chosen:
        raise UsageError(f"no framework is installed; install one with: pip install 'triptych[{next(iter(contract.FRAMEWORKS))}]'")
    return chosen


# The whole job


def evaluate(job: Job, frameworks: Sequence[str]) -> dict[str, Any]:
    """Top-1 and top-5 accuracy in each framework and their agreement image by image, as plain data for JSON.

    Raises UsageError when the classes of the data are not those of the model.
    """
    subject = job.subject()
    source = fitting.fitted(job.source(), subject.spec, subject.labels)
    with run_workers(job, frameworks) as inferences:
        accepted = _accepted(source, inferences)
        labels = source.labels[accepted]
        logits = {name: _finite(name, inference.logits[accepted]) for name, inference in inferences.items()}
        rates = {name: inference.images_per_second for name, inference in inferences.items()}
        return {
            "model": subject.spec.name,
            "weights": job.weights,
            "precision": job.precision,
            "data": {"name": source.name, "split": source.split, "images": len(accepted), "classes": len(source.classes)},
            "inputs_sha256": next(iter(inferences.values())).inputs_sha256,
            "frameworks": {name: _accuracy(logits[name], labels) | {"images_per_second": rates[name]} for name in frameworks},
            "agreement": agreement(logits, [source.names[index] for index in accepted]),
            "refused": _refusals(source, inferences),
        }


def predict(job: Job, frameworks: Sequence[str], top: int = TOP) -> dict[str, Any]:
    """The `top` classes of each file in each framework, with probabilities, as plain data for JSON; refused files with the reason."""
    subject, source = job.subject(), job.source()
    with run_workers(job, frameworks) as inferences:
        accepted = _accepted(source, inferences)
        logits = {name: _finite(name, inference.logits[accepted]) for name, inference in inferences.items()}
        images = [
            {
                "image": source.names[index],
                "predictions": {name: _top_classes(rows[i], subject.labels, top) for name, rows in logits.items()},
                "agree": len({int(rows[i].argmax()) for rows in logits.values()}) == 1,
            }
            for i, index in enumerate(accepted)
        ]
        return {"model": subject.spec.name, "weights": job.weights, "images": images, "refused": _refusals(source, inferences)}


def _accepted(source: Source, inferences: dict[str, Inference]) -> list[int]:
    refused = {index for inference in inferences.values() for index in inference.refused}
    return [index for index in range(len(source)) if index not in refused]


def _refusals(source: Source, inferences: dict[str, Inference]) -> list[dict[str, str]]:
    reasons = {index: reason for inference in inferences.values() for index, reason in inference.refused.items()}
    return [{"image": source.names[index], "reason": reasons[index]} for index in sorted(reasons)]


def _finite(framework: str, logits: np.ndarray) -> np.ndarray:
    if not np.isfinite(logits).all():
        raise TriptychError(f"{framework} gives logits that are not finite; the weights are damaged, or were never trained")
    return logits


def _accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float | int]:
    """Share and number of images whose label is the first, and among the first five, classes."""
    ranks, images = label_ranks(logits, labels), max(len(labels), 1)
    correct = {name: int((ranks < k).sum()) for name, k in (("top1", 1), ("top5", TOP))}
    shares = {name: count / images for name, count in correct.items()}
    return {**shares, **{f"{name}_correct": count for name, count in correct.items()}}


def label_ranks(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes stand before the label, (N,); equal logits rank by index, so that a constant output earns nothing."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    ranks: np.ndarray = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    return ranks


def agreement(logits: dict[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
    """On how many images the frameworks have the same first class: all of them, and by pair; the first images where they differ.

    `largest_logit_difference` stands beside `logit_scale`, the largest logit.
    """
    first = {name: rows.argmax(axis=1) for name, rows in logits.items()}
    columns = np.stack(list(first.values()))
    same = (columns == columns[0]).all(axis=0)
    pairs = list(itertools.combinations(logits, 2))
    return {
        "images": len(names),
        "all": int(same.sum()),
        "pairs": {f"{a}/{b}": int((first[a] == first[b]).sum()) for a, b in pairs},
        "differing": [names[index] for index in np.flatnonzero(~same)[:10]],
        "largest_logit_difference": max((_largest(logits[a] - logits[b]) for a, b in pairs), default=0.0),
        "logit_scale": max(_largest(rows) for rows in logits.values()),
    }


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _top_classes(logits: np.ndarray, labels: tuple[str, ...] | None, top: int) -> list[dict[str, Any]]:
    """The `top` classes of one image by falling probability."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-logits, kind="stable")[:top]
    return [{"class": int(i), "label": labels[i] if labels else str(i), "probability": float(probabilities[i])} for i in order]


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
