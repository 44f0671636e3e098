"""One framework's process, held alive: a line of JSON in and one out for each thing asked. Between turns it sleeps in a read."""

from __future__ import annotations

import gc
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from comparison.setting import MODES, Arrays, Frame, Lane, Setting, frame
from triptych.core.conversation import answer_all
from triptych.core.difference import sketch

SKETCH = 2**18
"""Elements a tensor that are compared, at an even stride: every one of a gradient of the block, a share of 64 such gradients."""
Answer = dict[str, Any]


class Worker:
    """What is done in the process; everything asked and answered is plain data, tensors go into files."""

    def __init__(self, framework: str) -> None:
        self.framework, self.lanes = framework, dict[str, Lane]()
        self._frame: Frame | None = None

    @property
    def frame(self) -> Frame:
        """The framework's module, imported when it is first needed."""
        self._frame = self._frame or frame(self.framework)
        return self._frame

    def ask(self, do: str, **given: Any) -> Answer:
        """Do one of `start`, `prove`, `build`, `turn`, `report`, `release`. Raises what that raises."""
        actions = {
            "start": self._start, "prove": self._prove, "build": self._build, "turn": self._turn, "report": self._report,
            "release": self._release,
        }  # fmt: skip
        answer: Answer = actions[do](**given)
        return answer

    def _start(self) -> Answer:
        started = perf_counter()
        _ = self.frame
        return {"import_seconds": perf_counter() - started}

    def _prove(self, setting: dict[str, Any], modes: list[str], out: str) -> Answer:
        """Outputs of the lanes of these modes in float64, written to `out`."""
        held, found = Setting(**setting), dict[str, Arrays]()
        for name in held.lane_names(self.framework, tuple(modes)):
            with self.frame.running("float64"):
                lane = self._lane(held, name, "float64")
                found[name] = outputs(held, lane, lane.run())
        return _written(found, out)

    def _build(self, setting: dict[str, Any], modes: list[str], out: str) -> Answer:
        """Every lane of the modes in float32: seconds of a first and a second call, outputs of the first; why, when one fails."""
        held, found, told = Setting(**setting), dict[str, Arrays](), dict[str, Any]()
        for name in held.lane_names(self.framework, tuple(modes)):
            try:
                with self.frame.running("float32"):
                    lane = self._lane(held, name, "float32")
                    first, result = _timed(lane)
                    found[name] = outputs(held, lane, result)
                    second, _ = _timed(lane)
                self.lanes[name], told[name] = lane, {"first_call_seconds": first, "second_call_seconds": second}
            except Exception as error:  # what a framework cannot do is a row of the table, too
                text = str(error).strip().partition("\n")[0][:300]
                told[name] = {"failure": f"{type(error).__name__}: {text}"}
        return {**_written(found, out), "told": told}

    def _turn(self, lane: str, repeats: int) -> Answer:
        """Mean seconds of a call, over `repeats` of them: by the clock, and of this process's threads."""
        run = self.lanes[lane].run
        with self.frame.running("float32"):
            started, worked = perf_counter(), process_time()
            for _ in range(repeats):
                run()
            wall, cpu = perf_counter() - started, process_time() - worked
            return {"wall": wall / repeats, "cpu": cpu / repeats}

    def _report(self, setting: dict[str, Any]) -> Answer:
        held = Setting(**setting)
        with self.frame.running("float32"):
            return {"modes": self.frame.report(held, held.weights("float32"))}

    def _release(self) -> Answer:
        self.lanes.clear()
        gc.collect()
        self.frame.release()
        return {}

    def _lane(self, setting: Setting, name: str, precision: str) -> Lane:
        mode, _, way = name.partition(" ")
        assert mode in MODES[self.framework]
        return self.frame.lane(setting, setting.weights(precision), precision, mode, way)


def outputs(setting: Setting, lane: Lane, result: Any) -> Arrays:
    """What a lane computed, and the means of per-sample gradients, in float64; large tensors as a sketch."""
    found = lane.read(result)
    if setting.part == "per_sample":
        found |= {f"mean {name}": array.mean(0, np.float64) for name, array in found.items() if not name.startswith("mean ")}
    return {name: sketch(np.asarray(array, np.float64), SKETCH) for name, array in found.items()}


def _timed(lane: Lane) -> tuple[float, Any]:
    started = perf_counter()
    result = lane.run()
    return perf_counter() - started, result


def _written(found: dict[str, Arrays], out: str) -> Answer:
    np.savez(Path(out), **{f"{lane}|{name}": array for lane, arrays in found.items() for name, array in arrays.items()})
    return {"out": out}


def read(path: str) -> dict[str, Arrays]:
    """What `_written` wrote, by lane."""
    found: dict[str, Arrays] = {}
    with np.load(path) as held:
        for key in held.files:
            lane, _, name = key.partition("|")
            found.setdefault(lane, {})[name] = held[key]
    return found


def main(framework: str) -> None:
    """Answer until the input ends."""
    answer_all(Worker(framework).ask)
