"""What stops a run, or is said about it, before it wastes its time: numbers that are none, memory that grows or ends, slow precisions."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from triptych.core import environment, tensor_file
from triptych.core.errors import StorageError, TriptychError, UsageError
from triptych.core.recipe import Recipe
from triptych.core.sampling import Batch
from triptych.training.checkpoints import newest
from triptych.training.job import Job
from triptych.training.records import storing, write_whole

# A loss that is no number


def not_finite(out: Path, job: Job, framework: str, batch: Batch, images: np.ndarray, loss: float, learning_rate: float) -> TriptychError:
    """The error for a loss of NaN or infinity, after saving all that reproduces it in `OUT/nonfinite-STEP/`.

    The weights after the step are worthless, and those before it are gone; but a resumed run is bit-exact. So the directory is a run of
    its own: `job.json`, a copy of the newest good checkpoint (none: the run is replayed from its start) and the command that trains from
    there into the same step; beside them the batch as the pipeline gave it.
    """
    directory = out / f"nonfinite-{batch.step:06d}"
    samples = batch.indices.tolist()
    told = f"the loss of step {batch.step} is {loss}; training cannot go on. Its samples are {samples}. "
    remedy = "Lower the learning rate, clip gradients, or look at these images. "
    try:
        command = _save_reproducer(directory, out, job, framework, batch, images, loss, learning_rate)
    except (StorageError, OSError) as error:
        return TriptychError(f"{told}{remedy}What reproduces it could not be saved: {error}")
    return TriptychError(f"{told}{remedy}{directory} holds the batch and the state to replay it from: {command}")


def _save_reproducer(
    directory: Path, out: Path, job: Job, framework: str, batch: Batch, images: np.ndarray, loss: float, learning_rate: float
) -> str:
    """Fill the directory; the command that replays."""
    found = newest(out)
    with storing(directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        if found is not None:
            shutil.copytree(found.path, directory / "checkpoint")
    start = "never" if found is None else str(directory / "checkpoint")
    command = shlex.join([Path(sys.executable).name, "-m", "triptych.training.worker", str(directory), framework, start])
    arrays = {"images": images, "targets": batch.targets, "indices": batch.indices}
    write_whole(directory / "batch.safetensors", tensor_file.encode(arrays))
    write_whole(directory / "job.json", json.dumps(job.to_json(), indent=1))
    report = {
        "schema": 1, "framework": framework, "step": batch.step, "epoch": batch.epoch, "loss": str(loss), "learning_rate": learning_rate,
        "samples": batch.indices.tolist(), "replays_from_step": 0 if found is None else found.next_step, "command": command,
    }  # fmt: skip
    write_whole(directory / "report.json", json.dumps(report, indent=1))
    return command


# Memory

WINDOWS = 6
"""Windows that must all rise before it is called growth: five rises in a row, about as large as each other."""
STEPS_A_WINDOW = 20
SETTLING = 40
"""Steps before anything is judged: compilation, allocators' pools and the first evaluation make memory grow, and that ends."""
LEAST_GROWTH = 64 * 2**20
LEAST_A_STEP = 16 * 2**10
"""Bytes; what allocators lose by fragmentation in a run of thousands of steps lies below."""


def own_memory() -> int:
    """Bytes of this process's own memory: resident and not shared, so without mapped files (Linux; elsewhere the peak so far)."""
    try:
        _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    except OSError:
        return peak_memory()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Bytes of this process's largest resident size so far, without what its parent had before it was started (Linux)."""
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if found:
            return int(found.group(1)) * 1024
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class MemoryGuard:
    """Tells memory that grows steadily over the steps, as a graph that something keeps alive from step to step makes it grow.

    It keeps the smallest reading of each window of steps, which peaks within steps do not reach. When there are 12, pairs become one, so
    that they span the whole run and slow growth is seen, too, only later. Growth that levels off is none.
    """

    def __init__(self, settling: int = SETTLING, reading: Callable[[], int] = own_memory) -> None:
        self._settling, self._reading, self._told = settling, reading, False
        self._length, self._window, self._lows = STEPS_A_WINDOW, list[int](), list[int]()

    def after_step(self) -> str | None:
        """Take a reading; what to say about it, once."""
        self._settling -= 1
        if self._told or self._settling >= 0:
            return None
        self._window.append(self._reading())
        if len(self._window) < self._length:
            return None
        self._lows.append(min(self._window))
        self._window.clear()
        found = self._growth()
        if len(self._lows) == 2 * WINDOWS:
            self._lows = [min(pair) for pair in zip(self._lows[::2], self._lows[1::2], strict=True)]
            self._length *= 2
        self._told = found is not None
        return found

    def _growth(self) -> str | None:
        lows = np.array(self._lows[-WINDOWS:])
        rises, steps = np.diff(lows), (len(lows) - 1) * self._length
        if len(lows) < WINDOWS or rises.min() < 0.6 * rises.mean() or rises.sum() < max(LEAST_GROWTH, steps * LEAST_A_STEP):
            return None
        return (
            f"memory grows with every step: {rises.sum() / 2**20:.0f} MiB in the last {steps} steps, {rises.sum() / steps / 2**20:.2f} MiB "
            "a step. A retained graph? Keep numbers of a step (float(loss)), not its tensors, and no list of batches"
        )


@contextlib.contextmanager
def memory_advice(recipe: Recipe) -> Iterator[None]:
    """UsageError, with the micro-batch size to try, in place of what a framework raises when memory ends."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UsageError(f"out of memory in a training step: {_smaller(recipe)} ({type(error).__name__}: {_first_line(error)})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, PyTorch, TensorFlow or JAX says that memory has ended; no framework is imported to ask."""
    names = {kind.__name__ for kind in type(error).__mro__}
    words = ("RESOURCE_EXHAUSTED", "can't allocate memory", "CUDA out of memory", "MPS backend out of memory")
    return bool(names & {"MemoryError", "OutOfMemoryError", "ResourceExhaustedError"}) or any(word in str(error) for word in words)


def _smaller(recipe: Recipe) -> str:
    """What keeps the global batch and needs less memory."""
    total = recipe.global_batch_size
    present = recipe.micro_batch_size or total
    fitting = [size for size in range(1, present // 2 + 1) if total % size == 0]
    if not fitting:
        return "micro-batches are of one image already; recompute activations, --set remat=true, or take smaller images or a smaller model"
    return (
        f"accumulate gradients over smaller parts, --set micro_batch_size={fitting[-1]} (now {present}); "
        f"the global batch stays {total}, BatchNorm sees the parts"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


# Precision

_INSTRUCTIONS = {"bfloat16": ("bf16", "AVX512-BF16, AMX-BF16"), "float16": ("fp16", "AVX512-FP16, AMX-FP16")}


def half_precision(recipe: Recipe, device: str) -> str | None:
    """What to say before the first step when the processor only emulates the recipe's half precision; accelerators have theirs."""
    half, cpu = recipe.mixed_precision, environment.cpu()
    if half is None or device != "cpu":
        return None
    name, instructions = _INSTRUCTIONS[half]
    if cpu["simd"].get(name, True):
        return None
    return (
        f"{cpu['model']} has no native {half} ({instructions}): it is emulated, and likely slower than float32. "
        "For speed take --set precision=float32"
    )
