"""One framework's process, held alive: `python -m triptych.bench.worker FRAMEWORK`, a line of JSON in and one out for each thing asked.

It builds contenders, times their turns by its own clock, and answers only when everything is there; between turns it sleeps in a read.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from triptych.bench import machine, tracing
from triptych.bench.pipeline import open_pipeline
from triptych.core import batch as batches
from triptych.core import catalog, contract, initialize
from triptych.core.batch import Inputs
from triptych.core.contender import WITH_DATA, Contender
from triptych.core.conversation import answer_all
from triptych.core.spec import Spec
from triptych.export import runtimes

Answer = dict[str, Any]


@dataclass(slots=True)
class Held:
    """A contender and what its batches are like."""

    contender: Contender
    mode: str
    spec: Spec
    batch_size: int
    given: str
    """The file of its weights, or of the exported model."""
    pipeline: Any = None
    """Where its batches come from when they are timed, too (`bench/pipeline.py`)."""


@dataclass(slots=True)
class Turn:
    """What one turn showed."""

    resident: int | None = field(default_factory=machine.begin_memory_phase)
    seconds: list[float] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)
    outputs: list[np.ndarray] | None = None

    def time(self, run: Callable[..., np.ndarray], *given: Any) -> np.ndarray:
        """One step: what it returns, its seconds and joules noted."""
        energy = machine.energy()
        started = perf_counter()
        output = run(*given)
        self.seconds.append(perf_counter() - started)
        self.joules.append(machine.joules(energy, machine.energy()))
        return output

    def to_json(self) -> Answer:
        """Plain data."""
        return {
            "seconds": self.seconds,
            "joules": self.joules,
            "resident_bytes": self.resident,
            "peak_bytes": None if self.resident is None else machine.peak_memory(),
            "outputs": None if self.outputs is None else [np.asarray(each, np.float64).tolist() for each in self.outputs],
        }


class Worker:
    """What is done in the process; everything asked and answered is plain data."""

    def __init__(self, framework: str) -> None:
        self.framework = framework
        self.held: dict[str, Held] = {}
        self._inputs: tuple[Any, tuple[Inputs, np.ndarray]] | None = None
        self._room: Any = None

    def ask(self, do: str, **given: Any) -> Answer:
        """Do one of `start`, `kernel`, `peak`, `export`, `build`, `turn`, `stray`, `trace`, `release`. Raises what that raises."""
        actions: dict[str, Callable[..., Answer]] = {
            "start": self._start, "kernel": self._kernel, "peak": self._peak, "export": self._export,
            "build": self._build, "turn": self._turn, "stray": self._stray, "trace": self._trace, "release": self._release,
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
        seconds = perf_counter() - started
        told = {} if self.framework in runtimes.RUNTIMES else room.numerics()
        return {"import_seconds": seconds, "versions": room.versions(), "numerics": told, "cores": machine.cores(None)}

    def _kernel(self) -> Answer:
        return {"seconds": machine.kernel_seconds()}

    def _peak(self) -> Answer:
        return {"flops": machine.peak_flops()}

    def _export(self, model: str, options: Mapping[str, Any], weights: str, path: str) -> Answer:
        """Write these canonical weights as a model that runtimes read."""
        made = self.room.create_model(catalog.get_spec(model, **options), load_file(weights), precision="float32", device="cpu")
        self.room.export(made, "onnx", Path(path))
        return {}

    def _create(self, spec: Spec, given: str, lane: str, mode: str) -> Contender:
        """A lane from canonical weights, or a runtime's from the exported model."""
        foreign = self.framework in runtimes.RUNTIMES
        made: Contender = self.room.contender(Path(given)) if foreign else self.room.contender(spec, load_file(given), lane, mode)
        return made

    def _build(self, key: str, case: Mapping[str, Any], given: str, seed: int, data: str = "") -> Answer:
        """Create the contender from the file `given` and make its first call; open `data` when batches are to be timed, too."""
        assert self.room, "imported before it is timed"
        spec = catalog.get_spec(case["model"], **case["options"])
        mode = "training_step" if case["mode"] == WITH_DATA else case["mode"]
        with contextlib.nullcontext({}) if self.framework in runtimes.RUNTIMES else self.room.phases() as phases:
            started = perf_counter()
            contender = self._create(spec, given, case["lane"], mode)
            built = perf_counter()
            held = Held(contender, mode, spec, case["batch_size"], given)
            batch = contender.stage(*self._batch(held, seed, 0))
            staged = perf_counter()
            contender.run(batch)
            first = perf_counter() - staged
        if case["mode"] == WITH_DATA:
            held.pipeline = open_pipeline(self.room, spec, data, case["batch_size"], seed)
        self.held[key] = held
        return {
            "build_seconds": built - started, "first_call_seconds": first, "phases": phases, "compiles": contender.compiles,
            "levers": list(contender.levers), "unequal": contender.unequal, "macs": contender.macs,
            "data": None if held.pipeline is None else held.pipeline.source.name,
        }  # fmt: skip

    def _turn(self, key: str, number: int, seed: int, steps: int = 1, warm_up: int = 0, check: bool = False) -> Answer:
        """Seconds and joules of each of `steps` steps, on inputs of their own, numbered from `number` on; peak and growth of memory.

        `warm_up` steps come before, untimed, on the first inputs. With `check` the first timed step starts from the first weights, and its
        outputs are told: logits; or the loss, and that of another step on the same inputs, which shows what the first did to the weights.
        """
        held = self.held[key]
        for _ in range(warm_up):
            held.contender.run(held.contender.stage(*self._batch(held, seed, number)))
        if check and held.mode != "inference":
            held.contender.start_from(load_file(held.given))
        return (self._bare if held.pipeline is None else self._with_data)(held, number, seed, steps, check).to_json()

    def _stray(self, key: str, number: int, seed: int, perturbations: int) -> Answer:
        """What a check of a training lane tells when every weight is moved by one unit in the last place, once for each perturbation."""
        held, outputs = self.held[key], []
        for perturbation in range(perturbations if held.mode != "inference" else 0):
            held.contender.start_from(initialize.one_ulp_away(held.spec, load_file(held.given), perturbation))
            batch = held.contender.stage(*self._batch(held, seed, number))
            outputs.append([float(held.contender.run(batch)) for _ in range(2)])
        return {"outputs": outputs}

    def _bare(self, held: Held, number: int, seed: int, steps: int, check: bool) -> Turn:
        """Steps on images that are there before the clock starts."""
        turn = Turn()
        for step in range(steps):
            batch = held.contender.stage(*self._batch(held, seed, number + step))
            output = turn.time(held.contender.run, batch)
            if check and step == 0:
                turn.outputs = [output] if held.mode == "inference" else [output, held.contender.run(batch)]
        return turn

    def _with_data(self, held: Held, number: int, seed: int, steps: int, check: bool) -> Turn:
        """Steps that wait for their batch, the first of which, with the start of the pipeline, is not timed.

        What is checked are two steps on the numbers that all frameworks share to the last bit: pixels they resize by themselves.
        """
        contender, turn = held.contender, Turn()
        if check:
            batch = contender.stage(*self._batch(held, seed, number))
            turn.outputs = [contender.run(batch), contender.run(batch)]
        with contextlib.closing(held.pipeline.batches(number, steps)) as fed:
            contender.run(contender.stage(*next(fed)))
            for _ in range(steps):
                turn.time(lambda: contender.run(contender.stage(*next(fed))))
        return turn

    def _trace(self, key: str, case: Mapping[str, Any], data: str | None, directory: str, repeats: int) -> Answer:
        """Trace warmed steps, their batches from the room's own pipeline, and read the trace (`bench/tracing.py`)."""
        spec = catalog.get_spec(case["model"], **case["options"])
        return tracing.traced(self.framework, self.held[key].contender, case, spec, data, Path(directory), repeats)

    def _release(self) -> Answer:
        self.held.clear()
        if self.framework not in runtimes.RUNTIMES and self._room is not None:
            self._room.forget()
        gc.collect()
        return {}

    def _batch(self, held: Held, seed: int, number: int) -> tuple[Inputs, np.ndarray]:
        """Inputs and labels of this number, the same in every process and lane; those of the last number are kept."""
        what = (held.spec, held.batch_size, seed, number)
        if self._inputs is None or self._inputs[0] != what:
            numbers = np.random.Generator(np.random.Philox(key=[seed, number]))
            inputs = batches.random(held.spec, held.batch_size, numbers)
            self._inputs = what, (inputs, numbers.integers(batches.num_labels(held.spec), size=held.batch_size))
        return self._inputs[1]


def main(framework: str) -> None:
    """Answer until the input ends."""
    answer_all(Worker(framework).ask)


if __name__ == "__main__":
    main(sys.argv[1])
