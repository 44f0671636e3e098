"""A process that writes artefacts or runs them: `python -m triptych.export.worker ROLE`, a framework or a runtime; lines of JSON.

A framework's process prepares the images, tells its own outputs and writes. A runtime's process opens one artefact and runs it; no
framework but the runtime's own can be imported there, and it tells which are loaded. Arrays travel as files.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from triptych.core import contract, initialize, spec
from triptych.core.conversation import answer_all
from triptych.export import runtimes
from triptych.export.images import BATCHES, COUNT

Answer = dict[str, Any]
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax")


class Without:
    """A finder of modules that finds all but some: to this process these are not installed."""

    def __init__(self, finder: Any, names: Collection[str]) -> None:
        self.finder, self.names = finder, names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As the finder answers; None for what is left out."""
        return None if name in self.names else self.finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


class Worker:
    """What is done in the process; everything asked and answered is plain data."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.run: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
        self._model: Any = None
        self._images: np.ndarray | None = None
        self._library: Any = None

    def ask(self, do: str, **given: Any) -> Answer:
        """Do one of the things below. Raises what that raises."""
        actions: dict[str, Callable[..., Answer]] = {
            "start": self._start, "load": self._load, "prepare": self._prepare, "calibration": self._calibration,
            "intermediates": self._intermediates, "write": self._write, "convert": self._convert, "quantize": self._quantize,
            "open": self._open, "run": self._run, "time": self._time, "serve": self._serve, "diverge": self._diverge,
        }  # fmt: skip
        return actions[do](**given)

    @property
    def library(self) -> Any:
        """The framework's room or the runtime's module, imported when it is first asked for."""
        if self._library is None:
            self._library = (runtimes if self.role in runtimes.ADAPTERS else contract).load(self.role)
        return self._library

    def _start(self) -> Answer:
        started = perf_counter()
        versions = self.library.versions()
        return {"import_seconds": perf_counter() - started, "versions": versions}

    # A framework

    def _load(self, described: Mapping[str, Any], weights: str) -> Answer:
        """Take a model: its spec as plain data, canonical weights from a file."""
        self._model = self.library.create_model(spec.from_dict(dict(described)), load_file(weights), precision="float32", device="cpu")
        return {}

    def _prepare(self, folder: str, inputs: str, outputs: str, calibrated: str | None) -> Answer:
        """Decode and preprocess natively, and write the images and the model's own logits for each batch and for all of them.

        With `calibrated`, the weights' running statistics first become those of the first images, and the weights are written there.
        """
        self._images = images = self._prepared(folder)
        if calibrated is not None:
            self._calibrate(images)
            save_file(self._model.weights(), calibrated)
        save_file({"images": images}, inputs)
        save_file(logits(self._model.predict, images), outputs)
        return {}

    def _prepared(self, folder: str) -> np.ndarray:
        given = self._model.spec.preprocessing
        encoded = (path.read_bytes() for path in sorted(Path(folder).iterdir()))
        return np.stack([self.library.preprocess(self.library.decode(each, given.channels), given) for each in encoded])

    def _calibration(self, folder: str, inputs: str) -> Answer:
        """Decode and preprocess images natively, and write them."""
        save_file({"images": self._prepared(folder)}, inputs)
        return {}

    def _calibrate(self, images: np.ndarray) -> None:
        norm = getattr(self._model.spec, "batch_norm", None)
        if norm is not None:
            after = self._model.forward(images[: sum(BATCHES)], training=True).state
            self._model.load_weights(initialize.calibrated(self._model.spec, self._model.weights(), after, norm.momentum))

    def _intermediates(self, path: str) -> Answer:
        """Write what every layer makes of the first image, NHWC, with their order as a prefix of the name."""
        assert self._images is not None
        seen = self._model.forward(self._images[:1]).intermediates
        save_file({f"{number:04d} {name}": value for number, (name, value) in enumerate(seen.items())}, path)
        return {}

    def _write(self, target: str, path: str, calibration: str | None = None) -> Answer:
        images = {} if calibration is None else {"calibration": load_file(calibration)["images"]}
        self.library.export(self._model, target, Path(path), **images)
        return {}

    def _convert(self, given: str, path: str) -> Answer:
        """What another worker wrote, into the format of this one."""
        convert = self.library.convert if self.role in runtimes.ADAPTERS else self.library.saved_model_of_module
        convert(Path(given), Path(path))
        return {}

    def _quantize(self, given: str, path: str, calibration: str, channels_first: bool) -> Answer:
        """What another worker wrote, in 8 bits, with ranges from these images."""
        self.library.quantize(Path(given), Path(path), laid_out(load_file(calibration)["images"], channels_first))
        return {}

    # A runtime

    def _open(self, key: str, artefact: str, channels_first: bool) -> Answer:
        """Load an artefact, and hold it under a key."""
        assert self.library, "imported before it is timed"
        started = perf_counter()
        opened = runtimes.opened(self.role, Path(artefact), trusted=True)  # it was written a moment ago, by a worker of the same run
        seconds = perf_counter() - started
        self.run[key] = lambda images: opened(laid_out(images, channels_first))
        return {"load_seconds": seconds}

    def _run(self, key: str, inputs: str, outputs: str, count: int | None = None) -> Answer:
        """Write the logits of each batch and of the first `count` images, of all for None."""
        images = load_file(inputs)["images"][:count]
        started = perf_counter()
        self.run[key](batches(images)["7"])
        seconds = perf_counter() - started
        save_file(logits(self.run[key], images), outputs)
        return {"first_call_seconds": seconds, "frameworks_loaded": [name for name in FRAMEWORKS if name in sys.modules]}

    def _time(self, key: str, inputs: str, batch: int, calls: int) -> Answer:
        """Seconds of each of `calls` calls on one batch, by the clock and as the process computed; one call more goes before them."""
        images = load_file(inputs)["images"][:batch]
        seconds, computed = [], []
        for _ in range(calls + 1):
            started, start = perf_counter(), process_time()
            self.run[key](images)
            seconds.append(perf_counter() - started)
            computed.append(process_time() - start)
        return {"seconds": seconds[1:], "computed_seconds": computed[1:]}

    def _serve(self, artefact: str, encoded: Sequence[str], outputs: str) -> Answer:
        """Classes and probabilities of encoded images, by the signature that prepares them itself."""
        answer = self.library.served_images(Path(artefact), [Path(name).read_bytes() for name in encoded])
        save_file({name: np.ascontiguousarray(value) for name, value in answer.items()}, outputs)
        return {}

    def _diverge(self, artefact: str, inputs: str, reference: str, channels_first: bool) -> Answer:
        """The first layer whose value no node of an ONNX file has, and the node that comes nearest."""
        from triptych.export.divergence import first_divergence

        images = load_file(inputs)["images"][:1]
        found = load_file(reference)
        layers = {name.partition(" ")[2]: found[name] for name in sorted(found)}
        return {"divergence": first_divergence(Path(artefact), laid_out(images, channels_first), layers, self.library.all_outputs)}


def batches(images: np.ndarray) -> dict[str, np.ndarray]:
    """The batches that are checked, by their size, one after the other out of the images."""
    cut, start = {}, 0
    for size in BATCHES:
        cut[str(size)] = np.ascontiguousarray(images[start : start + size])
        start += size
    return cut


def logits(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> dict[str, np.ndarray]:
    """What a model makes of each batch, and of `all` images, some at a time: a batch of thousands would not fit in memory."""
    parts = [run(np.ascontiguousarray(images[start : start + COUNT])) for start in range(0, len(images), COUNT)]
    made = {name: run(batch) for name, batch in batches(images).items()} | {"all": np.concatenate(parts)}
    return {name: np.ascontiguousarray(value) for name, value in made.items()}


def laid_out(images: np.ndarray, channels_first: bool) -> np.ndarray:
    """(N, H, W, C) -> the layout of a file: (N, C, H, W) of PyTorch's."""
    return images.transpose(0, 3, 1, 2).copy() if channels_first else images


def alone(runtime: str) -> None:
    """From here on, no framework can be imported in this process but the runtime's own."""
    absent = set(FRAMEWORKS) - set(runtimes.ADAPTERS[runtime].needs)
    sys.meta_path[:] = [Without(finder, absent) for finder in sys.meta_path]


def main(role: str) -> None:
    """Answer until the input ends; a runtime is alone."""
    if role in runtimes.ADAPTERS:
        alone(role)
    answer_all(Worker(role).ask)


if __name__ == "__main__":
    main(sys.argv[1])
