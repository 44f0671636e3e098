"""One framework's training process: `python -m triptych.training.worker RUN FRAMEWORK` trains `RUN/job.json` into `RUN/FRAMEWORK`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triptych.core.errors import TriptychError
from triptych.training import job as jobs
from triptych.training.job import Job
from triptych.training.loop import train


def run_worker(job: Job, framework: str, run: Path, progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Train in a fresh process of its own and return its result; TriptychError with the end of its log when it fails."""
    directory = run / framework
    directory.mkdir(parents=True, exist_ok=True)
    (run / "job.json").write_text(json.dumps(job.to_json(), indent=1))
    settings = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "triptych.training.worker", str(run), framework]
    with (
        (directory / "worker.log").open("wb") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **settings}) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                progress(line.decode(errors="replace").strip())
            code = process.wait()
        finally:
            process.kill()
    if code != 0:
        raise TriptychError(f"training in {framework} failed:\n{(directory / 'worker.log').read_text(errors='replace')[-2000:]}")
    result: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return result


def main(run: Path, framework: str) -> None:
    """The worker's side: train the run's job, one line of progress a step."""

    def show(step: int, steps: int, loss: float) -> None:
        sys.stdout.write(f"{framework}: step {step} of {steps}, loss {loss:.4f}\n")

    train(jobs.describe(run), framework, run / framework, show)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
