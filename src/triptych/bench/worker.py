"""One framework's process, held alive: `python -m triptych.bench.worker FRAMEWORK`, a line of JSON in and one out for each thing asked.

It builds contenders, times their turns by its own clock, and answers only when everything is there; between turns it sleeps in a read.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from triptych.bench import machine, tracing
from triptych.core import catalog, contract
from triptych.core.contender import Contender
from triptych.core.conversation import answer_all
from triptych.core.spec import Spec
from triptych.export import runtimes

Answer = dict[str, Any]


@dataclass(slots=True)
class Held:
    """A contender and what its inputs are like."""

    contender: Contender
    mode: str
    shape: tuple[int, ...]
    classes: int


class Worker:
    """What is done in the process; everything asked and answered is plain data."""

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self.held: dict[str, Held] = {}
        self._inputs: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None
        self._room: Any = None

    def ask(self, do: str, **given: Any) -> Answer:
        """Do one of `start`, `kernel`, `peak`, `export`, `build`, `turn`, `trace`, `release`. Raises what that raises."""
        actions: dict[str, Callable[..., Answer]] = {
            "start": self._start, "kernel": self._kernel, "peak": self._peak, "export": self._export,
            "build": self._build, "turn": self._turn, "trace": self._trace, "release": self._release,
        }  # fmt: skip
        return actions[do](**given)

    @property
    def room(self) -> Any:
        """The framework's room, or the runtime's module, imported when it is first asked for."""
        if self._room is None:
            self._room = (runtimes if self.framework in runtimes.RUNTIMES else contract).load(self.framework)
        return self._room

    def _start(self) -> Answer:
        started = perf_counter()
        room = self.room
        return {"import_seconds": perf_counter() - started, "versions": room.versions()}

    def _kernel(self) -> Answer:
        return {"seconds": machine.kernel_seconds()}

    def _peak(self) -> Answer:
        return {"flops": machine.peak_flops()}

    def _export(self, model: str, options: Mapping[str, Any], weights: str, path: str) -> Answer:
        """Write these canonical weights as a model that runtimes read."""
        from safetensors.numpy import load_file

        made = self.room.create_model(catalog.get_spec(model, **options), load_file(weights), precision="float32", device="cpu")
        self.room.export(made, "onnx", Path(path))
        return {}

    def _create(self, spec: Spec, given: str, lane: str, mode: str) -> Contender:
        """A lane from canonical weights, or a runtime's from the exported model."""
        from safetensors.numpy import load_file

        foreign = self.framework in runtimes.RUNTIMES
        made: Contender = self.room.contender(Path(given)) if foreign else self.room.contender(spec, load_file(given), lane, mode)
        return made

    def _build(self, key: str, case: Mapping[str, Any], given: str, seed: int) -> Answer:
        """Create the contender from the file `given` and make its first call."""
        assert self.room, "imported before it is timed"
        spec = catalog.get_spec(case["model"], **case["options"])
        with contextlib.nullcontext({}) if self.framework in runtimes.RUNTIMES else self.room.phases() as phases:
            started = perf_counter()
            contender = self._create(spec, given, case["lane"], case["mode"])
            built = perf_counter()
            held = Held(contender, case["mode"], (case["batch_size"], *spec.input_shape), spec.num_classes)
            batch = contender.stage(*self._batch(held, seed, 0))
            staged = perf_counter()
            contender.run(batch)
            first = perf_counter() - staged
        self.held[key] = held
        return {
            "build_seconds": built - started, "first_call_seconds": first, "phases": phases, "compiles": contender.compiles,
            "levers": list(contender.levers), "unequal": contender.unequal, "macs": contender.macs,
        }  # fmt: skip

    def _turn(self, key: str, number: int, seed: int, steps: int = 1, check: bool = False) -> Answer:
        """Seconds and joules of each of `steps` steps, on images of their own, numbered from `number` on; peak and growth of memory.

        With `check` the first step starts from the first weights, and its outputs are told: logits; or the loss, and the loss of another
        step on the same images, which shows what the first did to the weights.
        """
        held, seconds, joules, outputs = self.held[key], [], [], None
        if check:
            held.contender.reset()
        resident = machine.begin_memory_phase()
        for step in range(steps):
            batch = held.contender.stage(*self._batch(held, seed, number + step))
            energy = machine.energy()
            started = perf_counter()
            output = held.contender.run(batch)
            seconds.append(perf_counter() - started)
            joules.append(machine.joules(energy, machine.energy()))
            if check and step == 0:
                outputs = [output] if held.mode == "inference" else [output, held.contender.run(batch)]
        return {
            "seconds": seconds,
            "joules": joules,
            "resident_bytes": resident,
            "peak_bytes": None if resident is None else machine.peak_memory(),
            "outputs": None if outputs is None else [np.asarray(each, np.float64).tolist() for each in outputs],
        }

    def _trace(self, key: str, case: Mapping[str, Any], data: str | None, directory: str, repeats: int) -> Answer:
        """Trace warmed steps, their batches from the room's own pipeline, and read the trace (`bench/tracing.py`)."""
        spec = catalog.get_spec(case["model"], **case["options"])
        return tracing.traced(self.framework, self.held[key].contender, case, spec, data, Path(directory), repeats)

    def _release(self) -> Answer:
        self.held.clear()
        gc.collect()
        return {}

    def _batch(self, held: Held, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of this number, the same in every process and lane; those of the last number are kept."""
        what = (held.shape, held.classes, seed, number)
        if self._inputs is None or self._inputs[0] != what:
            numbers = np.random.Generator(np.random.Philox(key=[seed, number]))
            images = numbers.standard_normal(held.shape, dtype=np.float32)
            self._inputs = what, (images, numbers.integers(held.classes, size=held.shape[0]))
        return self._inputs[1]


def main(framework: str) -> None:
    """Answer until the input ends."""
    answer_all(Worker(framework).ask)


if __name__ == "__main__":
    main(sys.argv[1])
