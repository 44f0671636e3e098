"""A run killed again and again with SIGKILL, and resumed each time: its last state against that of the uninterrupted run, bit for bit.

    .venv/bin/python benchmarks/kill_resume.py [--framework F] [--kills 24] [--steps 240] [--seed 0] [--set KEY=VALUE]

Every other kill is at a random moment: some time after a random step, or after the start of the process, when it may still be importing.
The others are aimed at a checkpoint that is being written: the killer watches the run's directory and strikes when it sees the unfinished
checkpoint with a given number of files, 0 to 6 (all of them, not yet renamed), the number hit least so far. `during_save` counts kills
that left an unfinished checkpoint behind, whatever they were aimed at; `boundaries` by how many files it had.
`bitwise_equal`: the tensor files of the last checkpoint (weights, statistics, momentum, average) byte for byte, its counts, the trained
weights, and the losses of all steps. Rows of frameworks that are not killed now are kept from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measuring import RESULTS, head, write_json

from triptych.core import checkpoint, contract
from triptych.data import open_source
from triptych.training import checkpoints, recipe_file
from triptych.training.job import Job

COMMAND = "benchmarks/kill_resume.py"
RECIPE = "digits_resnet20"
SETTINGS = (
    "device=cpu", "options={image_size: 16}", "epochs=null", "schedule.warmup_steps=20", "loss_scaling={initial: 64, interval: 20}",
    "intervals.checkpoint=2", "intervals.evaluate=60",
)  # fmt: skip
BOUNDARIES = range(len(checkpoint.FILES) + 1)
LONGEST_PAUSE = 1.0
"""Seconds between a step and a random kill, at most."""


def job_of(steps: int, overrides: Sequence[str]) -> Job:
    """The run: everything on that has a state, checkpoints as frequent as no one needs them."""
    recipe = recipe_file.load(RECIPE, [*SETTINGS, f"steps={steps}", *overrides])
    return recipe.job(len(open_source(recipe.data, "train")))


@dataclasses.dataclass(frozen=True, slots=True)
class Aim:
    """When to kill: once step `after` is saved, at the sight of a checkpoint of `files` files; or `pause` seconds later, but at the latest
    when step `latest` is saved."""

    after: int
    latest: int
    pause: float | None = None
    files: int | None = None


@contextlib.contextmanager
def worker(run: Path, framework: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process that `triptych train --resume auto` starts; it does not outlive the block."""
    command = [sys.executable, "-m", "triptych.training.worker", str(run), framework, "auto"]
    settings = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    with (run / "log").open("ab") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **settings})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def finish(run: Path, framework: str) -> float:
    """Train to the end; the seconds until the first checkpoint, start-up included. SystemExit when the run fails."""
    began = time.monotonic()
    with worker(run, framework) as process:
        wait_for(lambda: position(run / framework) > 0, process)
        seconds = time.monotonic() - began
        if process.wait() != 0:
            raise SystemExit(f"the worker ended with code {process.returncode}; its log:\n{log_of(run)}")
    return seconds


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until `condition()` or the end of the process."""
    while not condition() and process.poll() is None:
        time.sleep(0.0002)


def position(out: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    names = checkpoints.written(out)
    return int(names[-1]) if names else 0


def unfinished(out: Path) -> dict[str, int]:
    """Checkpoints on their way: how many files each has so far."""
    found = {}
    for folder in (out / checkpoints.STEPS).glob(".*.partial"):
        try:
            found[folder.name] = len(os.listdir(folder))
        except FileNotFoundError:  # renamed meanwhile
            continue
    return found


def killed(run: Path, framework: str, aim: Aim) -> dict[str, Any]:
    """One life: start, kill as aimed, and say what was left. SystemExit when the run ended before."""
    out = run / framework
    left_before, began, started = set(unfinished(out)), position(out), time.monotonic()

    def fresh() -> list[int]:
        return [files for name, files in unfinished(out).items() if name not in left_before]

    with worker(run, framework) as process:
        wait_for(lambda: position(out) >= aim.after, process)
        wanted, end = aim.files, time.monotonic() + (aim.pause or 0.0)
        if wanted is not None:
            wait_for(lambda: any(files >= wanted for files in fresh()), process)
        else:
            wait_for(lambda: time.monotonic() >= end or position(out) >= aim.latest, process)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"ended with code {process.returncode} before it was killed: give more --steps; its log:\n{log_of(run)}")
    seconds = time.monotonic() - started
    left = fresh()
    return {**dataclasses.asdict(aim), "from": began, "to": position(out), "files_left": left[0] if left else None, "seconds": seconds}


def log_of(run: Path) -> str:
    """The end of the worker's log."""
    return (run / "log").read_text()[-2000:]


def next_aim(number: int, kills: int, steps: int, lives: Sequence[dict[str, Any]], start_up: float, chance: random.Random) -> Aim:
    """Such that the kills are spread over the run's steps, 20 left for the last; every sixth may come before its life's first step."""
    done = lives[-1]["to"] if lives else 0
    share = 1.5 * (steps - done) / (kills - number + 1)
    after, latest = (min(done + int(each), steps - 20) for each in (chance.uniform(0.0, share), share))
    if number % 6 == 0:
        return Aim(0, max(latest, done + 1), pause=chance.uniform(0.0, 1.2 * start_up))
    if number % 2 == 0:
        return Aim(after, max(latest, done + 1), pause=chance.uniform(0.0, LONGEST_PAUSE))
    hits = Counter(life["files_left"] for life in lives)
    return Aim(after, latest, files=min(BOUNDARIES, key=lambda files: hits[files]))


def differing(one: Path, other: Path, steps: int) -> list[str]:
    """What the last states of two runs do not share, bit for bit; none when they are the same run."""
    last = Path(checkpoints.STEPS) / f"{steps:06d}"
    tensors = [*(last / name for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.EMA)), Path("checkpoint") / checkpoint.MODEL]
    found = [str(path) for path in tensors if (one / path).read_bytes() != (other / path).read_bytes()]
    a, b = (checkpoints.load(run / last) for run in (one, other))
    for name in ("step", "loss_scale", "good_steps"):
        found += [name] if getattr(a.state, name) != getattr(b.state, name) else []
    found += ["next_step"] if a.next_step != b.next_step else []
    results = [json.loads((run / "result.json").read_text()) for run in (one, other)]
    return found + [name for name in ("losses", "evaluations", "correct") if results[0][name] != results[1][name]]


def survive(job: Job, framework: str, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """The row of a framework."""
    runs = [folder / framework / name for name in ("whole", "killed")]
    for run in runs:
        run.mkdir(parents=True)
        (run / "job.json").write_text(json.dumps(job.to_json()))
    whole, run = runs
    start_up, chance = finish(whole, framework), random.Random(seed)
    lives: list[dict[str, Any]] = []
    for number in range(kills):
        lives.append(killed(run, framework, next_aim(number, kills, job.steps, lives, start_up, chance)))
        sys.stderr.write(f"{framework}: kill {number + 1} of {kills}: {json.dumps(lives[-1])}\n")
    finish(run, framework)
    different = differing(whole / framework, run / framework, job.steps)
    told = [line for line in (run / "log").read_text().splitlines() if "passed over" in line or "not bit for bit" in line]
    boundaries = Counter(life["files_left"] for life in lives if life["files_left"] is not None)
    last = checkpoints.load(run / framework / checkpoints.STEPS / f"{job.steps:06d}")
    return {
        "framework": framework, "model": job.model, "kills": len(lives), "during_save": sum(boundaries.values()),
        "bitwise_equal": not different, "differing": different, "warnings": len(told), "steps": job.steps,
        "checkpoint_every": job.intervals.checkpoint, "boundaries": {str(files): boundaries[files] for files in BOUNDARIES},
        "seed": seed, "conditions": last.notes["conditions"], "lives": lives,
    }  # fmt: skip


def merged(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row, and what the file holds of other frameworks."""
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    return [each for each in held if each["framework"] != row["framework"]] + [row]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="All that are installed, without it.")
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--steps", type=int, default=240, help="Of the whole run, which is to outlast the kills.")
    parser.add_argument("--seed", type=int, default=0, help="Of the random moments.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"An override of the recipe {RECIPE}.")
    parser.add_argument("--out", type=Path, default=RESULTS / "resume" / "kills.json")
    return parser.parse_args()


def main() -> None:
    """One framework after the other, each recorded when it is done."""
    given = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that no worker is left behind
    job = job_of(given.steps, given.set)
    options = [f"--kills {given.kills}", f"--steps {given.steps}", f"--seed {given.seed}", *(f"--set '{each}'" for each in given.set)]
    for framework in given.framework or contract.installed():
        with tempfile.TemporaryDirectory() as folder:
            row = survive(job, framework, given.kills, given.seed, Path(folder))
        row |= {"command": " ".join([COMMAND, "--framework", framework, *options])}
        write_json(given.out, {**head(COMMAND), "job": job.to_json(), "rows": merged(given.out, row)})
        said = "bitwise equal" if row["bitwise_equal"] else f"DIFFERENT: {', '.join(row['differing'])}"
        sys.stderr.write(f"{framework}: {row['kills']} kills, {row['during_save']} during a save {row['boundaries']}: {said}\n")


if __name__ == "__main__":
    main()
