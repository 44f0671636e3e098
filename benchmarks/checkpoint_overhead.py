"""What checkpoints cost that are written in the background: seconds of training with them over seconds without, in turns.

    TRIPTYCH_DATA=DIR .venv/bin/python benchmarks/checkpoint_overhead.py [--framework F] [--every 50] [--rounds 20] [--set KEY=VALUE]

Two processes a framework train the same run by the real loop, one with a checkpoint every `--every` steps, the other with none. Both
are held alive and wait for their turns: a turn is `--every` steps, from the middle of an interval to the middle of the next, so that
it contains one checkpoint with all that follows from it. A round gives each one turn, in random order; the ratio is of the same round.
The recipe of resnet20 on CIFAR-10 saves once in 390 steps; here it is 50, to be on the safe side.
Rows of frameworks that are not measured now are kept from the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, head, write_json

from triptych.bench.statistics import paired_interval
from triptych.core import contract
from triptych.core.environment import code_hash
from triptych.data import open_source
from triptych.training import checkpoints, recipe_file
from triptych.training.job import Intervals, Job, describe
from triptych.training.loop import train

COMMAND = "benchmarks/checkpoint_overhead.py"
RECIPE = "cifar10_resnet20"
# One image size and a slice of the data: what is measured is a step and a checkpoint, not an epoch.
SETTINGS = ("device=cpu", "progressive=[]", "limits.limit_batches=60")
LIMIT = 1.035


def job_of(data: str, steps: int, overrides: Sequence[str]) -> Job:
    """The run without checkpoints, long enough for all turns."""
    recipe = recipe_file.load(RECIPE, [*SETTINGS, f"data={json.dumps(data)}", f"steps={steps}", *overrides])
    return dataclasses.replace(recipe.job(len(open_source(data, "train"))), intervals=Intervals())


def work(run: Path, framework: str, every: int) -> None:
    """A contestant: trains the run of a folder, and at the middle of every interval tells its seconds and waits for its next turn."""
    began = 0.0

    def turn(told: dict[str, Any]) -> None:
        nonlocal began
        if "step" in told and told["step"] % every == every // 2:
            sys.stdout.write(f"{time.perf_counter() - began!r}\n")
            sys.stdout.flush()
            sys.stdin.readline()
            began = time.perf_counter()

    train(describe(run), framework, run / framework, turn)


class Contestant:
    """A training process that waits for its turns."""

    def __init__(self, job: Job, framework: str, every: int, run: Path) -> None:
        run.mkdir()
        (run / "job.json").write_text(json.dumps(job.to_json()))
        command = [sys.executable, __file__, "--worker", str(run), framework, "--every", str(every)]
        quiet = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.out, self.seconds, self.ready = run / framework, list[float](), False
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)

    def turn(self) -> float:
        """Seconds of one turn; the first one leads to the middle of the first interval. SystemExit when the process has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.ready:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        self.ready = True
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the training process ended with code {self.process.wait()}; its message is above")
        return float(answer)

    def end(self) -> None:
        """Kill it: what is still to be trained is of no use."""
        self.process.kill()
        self.process.wait()


def measure(job: Job, framework: str, every: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of every turn with and without checkpoints, and the bytes of a checkpoint. The first two turns of each are thrown away."""
    jobs = {"without": job, "with": dataclasses.replace(job, intervals=Intervals(checkpoint=every))}
    contestants: dict[str, Contestant] = {}
    try:
        for name, each in jobs.items():
            contestants[name] = Contestant(each, framework, every, folder / name)
            contestants[name].turn()  # alone, until it waits: start-up is not to disturb the other
        for contestant in contestants.values():
            contestant.turn()
        order, shuffle = list(contestants.values()), random.Random(0)
        for number in range(rounds):
            shuffle.shuffle(order)
            for contestant in order:
                contestant.seconds.append(contestant.turn())
            latest = {name: round(contestant.seconds[-1], 2) for name, contestant in contestants.items()}
            sys.stderr.write(f"{framework}: round {number + 1} of {rounds}: {latest} s\n")
    finally:
        for contestant in contestants.values():
            contestant.end()
    out = contestants["with"].out
    names, done = checkpoints.written(out), every * (rounds + 1)
    if not names or int(names[-1]) < done or checkpoints.written(contestants["without"].out):
        raise SystemExit(f"{framework}: checkpoints {names} after {done} steps; one every {every} steps was to be measured against none")
    newest = out / checkpoints.STEPS / names[-1]
    return {
        "seconds": {name: contestant.seconds for name, contestant in contestants.items()},
        "checkpoint_bytes": sum(path.stat().st_size for path in newest.iterdir()),
    }


def as_row(job: Job, framework: str, every: int, measured: dict[str, Any]) -> dict[str, Any]:
    """The row of a framework."""
    seconds = measured["seconds"]
    ratio, interval = paired_interval(seconds["with"], seconds["without"])
    return {
        "framework": framework, "ratio": ratio, "interval": interval, "n": len(seconds["with"]), "limit": LIMIT, "model": job.model,
        "batch_size": job.recipe.global_batch_size, "every_steps": every, "every_seconds": float(np.median(seconds["without"])),
        "checkpoint_bytes": measured["checkpoint_bytes"], "code_sha256": code_hash(), "seconds": seconds,
    }  # fmt: skip


def merged(path: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    """The row, and what the file holds of other frameworks."""
    held = json.loads(path.read_text())["rows"] if path.exists() else []
    return [each for each in held if each["framework"] != row["framework"]] + [row]


def arguments() -> argparse.Namespace:
    """The command line."""
    folder = os.environ.get("TRIPTYCH_DATA")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default=f"{folder}/cifar10" if folder else None, help="CIFAR-10, in any form that Triptych reads.")
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="All that are installed, without it.")
    parser.add_argument("--every", type=int, default=50, help="Steps from one checkpoint to the next, at least 2.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"An override of the recipe {RECIPE}.")
    parser.add_argument("--out", type=Path, default=RESULTS / "resume" / "overhead.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.data is None and given.worker is None:
        parser.error("name the data: --data PATH/TO/cifar10, or TRIPTYCH_DATA, the folder that holds cifar10/")
    if given.every < 2:
        parser.error(f"--every {given.every}: a turn begins in the middle of an interval, which takes 2 steps or more")
    return given


def main() -> None:
    """One framework after the other, each recorded when it is done."""
    given = arguments()
    if given.worker:
        work(Path(given.worker[0]), given.worker[1], given.every)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that no worker is left behind
    data = str(Path(given.data).resolve()) if Path(given.data).exists() else given.data
    job = job_of(data, given.every * (given.rounds + 3), given.set)
    options = [f"--every {given.every}", f"--rounds {given.rounds}", *(f"--set '{each}'" for each in given.set)]
    for framework in given.framework or contract.installed():
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(job, framework, given.every, given.rounds, Path(folder))
        row = {**as_row(job, framework, given.every, measured), "command": " ".join([COMMAND, "--framework", framework, *options])}
        write_json(given.out, {**head(COMMAND), "rows": merged(given.out, row)})
        sys.stderr.write(f"{framework}: {row['ratio']:.4f} {row['interval']}, a checkpoint of {row['checkpoint_bytes']:,} bytes\n")


if __name__ == "__main__":
    main()
