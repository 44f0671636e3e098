"""One framework's training process: `python -m triptych.training.worker RUN FRAMEWORK RESUME`.

It trains `RUN/job.json` into `RUN/FRAMEWORK`.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triptych.core import workers
from triptych.core.errors import FrameworkMissing, InputRefused, Interrupted, StorageError, TriptychError, UsageError
from triptych.training import job as jobs
from triptych.training.job import Job
from triptych.training.loop import Progress, train
from triptych.training.records import storing, write_whole

ERROR = "error.json"
GRACE_SECONDS = 60.0


def run_worker(job: Job, framework: str, run: Path, progress: Progress = lambda told: None, *, resume: str = "never") -> dict[str, Any]:
    """Train in a fresh process of its own and return its result; `progress` and `resume` as in `loop.train`.

    Raises what the worker raised, with its exit code; TriptychError with the end of its log when it died otherwise. Asked to stop
    (SIGTERM, Ctrl-C), it lets the worker finish its step and save.
    """
    directory = run / framework
    with storing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ERROR).unlink(missing_ok=True)
        log = (directory / "worker.log").open("ab")
    with log:
        write_whole(run / "job.json", json.dumps(job.to_json(), indent=1))
        settings = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
        arguments = [str(run), framework, resume]
        started = workers.start("triptych.training.worker", framework, arguments, settings=settings, log=log, stdout=True)
    with started as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                progress(_told(line.decode(errors="replace").strip()))
            code = process.wait()
        except BaseException:
            if _stop(process) == Interrupted.exit_code:
                raise _failure(framework, directory, Interrupted.exit_code) from None
            raise
        finally:
            process.kill()
    if code != 0:
        raise _failure(framework, directory, code)
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


def _told(line: str) -> dict[str, Any]:
    """What a line of the worker says; one that is not the loop's, as a library may print, is a note."""
    with contextlib.suppress(ValueError):
        told = json.loads(line)
        if isinstance(told, dict):
            return told
    return {"note": line}


def in_words(told: Mapping[str, Any]) -> str:
    """What the loop told, as one line."""
    return str(told["note"]) if "note" in told else f"step {told['step']} of {told['steps']}, loss {told['loss']:.4f}"


def _stop(process: workers.Process) -> int | None:
    """Ask the worker to save, and wait for it as long as a step and a checkpoint may take; its exit code."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(GRACE_SECONDS)
    return None


def _failure(framework: str, directory: Path, code: int) -> TriptychError:
    """What the worker raised, as the same kind of error."""
    log = (directory / "worker.log").read_text(errors="replace")[-2000:]
    if not (directory / ERROR).exists():
        if code == -signal.SIGKILL:
            log = f"it was killed, as systems do when memory ends: a smaller micro_batch_size keeps the global batch and needs less.\n{log}"
        return TriptychError(f"training in {framework} failed:\n{log}")
    told = json.loads((directory / ERROR).read_text())
    kinds = {kind.__name__: kind for kind in (UsageError, FrameworkMissing, InputRefused, Interrupted, StorageError)}
    return kinds.get(told["kind"], TriptychError)(f"training in {framework}: {told['message']}")


def main(run: Path, framework: str, resume: str) -> None:
    """The worker's side: train the run's job, one line of JSON a step; the first SIGTERM or SIGINT asks it to stop."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, frame: asked.append(caught))

    def show(told: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(told) + "\n")

    directory = run / framework
    try:
        train(jobs.describe(run), framework, directory, show, resume=resume, stopping=lambda: bool(asked))
    except TriptychError as error:
        with contextlib.suppress(OSError):  # the directory may be what is gone
            (directory / ERROR).write_text(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
