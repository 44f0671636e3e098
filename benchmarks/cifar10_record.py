"""A finished run on CIFAR-10 as a committed record: RUN/result.json and its TensorBoard scalars -> OUT.json and OUT.csv.

    .venv/bin/python benchmarks/cifar10_record.py RUN OUT.json --data DIR --command "triptych train ..." [--checkpoint DIR]

RUN is one framework's directory of `triptych train`, OUT is named <model>-<framework>.json. `--checkpoint` copies the trained checkpoint.
A run that was stopped early, or saw other images than those of --data, is refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import write_json
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util import tensor_util

from triptych.core import checkpoint
from triptych.data import Source, open_source

JPEG = b"\xff\xd8\xff"
CHECKPOINT_FILES = ("config.json", "manifest.json", "model.safetensors")


def described(source: Source, test: Source) -> dict[str, Any]:
    """What the images are: JPEG files, which are not quite the pixels of the original CIFAR-10, or those pixels."""
    first = source.image(0)
    compressed = isinstance(first, bytes) and first.startswith(JPEG)
    note = (
        "This copy of CIFAR-10 keeps its images as JPEG files, for training and for testing: their pixels are not quite those of the "
        "original, so accuracies are not comparable to those on the original to the last tenth of a point."
        if compressed
        else "The pixels are those of the original."
    )
    name = "JPEG-compressed CIFAR-10" if compressed else "CIFAR-10"
    return {"name": name, "note": note, "train_images": len(source), "test_images": len(test), "train_sha256": source.sha256()}


def neutral(data: Any) -> Any:
    """Plain data in which a path of this machine is reduced to its last part."""
    if isinstance(data, dict):
        return {key: neutral(value) for key, value in data.items()}
    if isinstance(data, list):
        return [neutral(value) for value in data]
    return Path(data).name if isinstance(data, str) and data.startswith(("/", "~", "..")) else data


class Scalars:
    """The scalars of a run's TensorBoard event files; a step that was repeated after a resume counts with its last values."""

    def __init__(self, run: Path) -> None:
        self.values: dict[int, dict[str, float]] = {}
        self.seconds: dict[int, float] = {}
        self.trained = 0.0
        began: float | None = None
        files = sorted(run.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)
        if not files:
            raise SystemExit(f"{run} holds no TensorBoard event files (events.out.tfevents.*): train it with `triptych train` again")
        for file in files:
            times = [self._take(event) for event in EventFileLoader(str(file)).Load() if event.HasField("summary")]
            if times:
                began = times[0] if began is None else min(began, times[0])
                self.trained += times[-1] - times[0]
        self.began = began or 0.0

    def _take(self, event: Any) -> float:
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "scalars":
                number = np.float32(tensor_util.make_ndarray(value.tensor).item())
                self.values.setdefault(event.step, {})[value.tag] = number
                self.seconds[event.step] = event.wall_time
        return float(event.wall_time)

    def rows(self) -> Iterator[list[str]]:
        """A head, then a row a step: step, seconds since the first, and each tag; empty where there is no value."""
        tags = sorted({tag for values in self.values.values() for tag in values})
        yield ["step", "seconds", *tags]
        for step, values in sorted(self.values.items()):
            shown = [np.format_float_positional(values[tag], unique=True, trim="-") if tag in values else "" for tag in tags]
            yield [str(step), f"{self.seconds[step] - self.began:.1f}", *shown]


def epochs_of(result: dict[str, Any]) -> dict[str, Any]:
    """Mean training loss of each epoch, and evaluations as [step, epoch, accuracy, loss]; the last is of the final weights."""
    losses, epochs = result["losses"], result["epochs"]
    per_epoch = max(1, round(len(losses) / epochs))
    means = [float(np.mean(losses[start : start + per_epoch])) for start in range(0, len(losses), per_epoch)]
    rows = [[row["step"], (row["step"] + 1) / per_epoch, row["accuracy"], row["loss"]] for row in result["evaluations"]]
    final = [len(losses) - 1, epochs, result["test_accuracy"], result["test_loss"]]
    return {"train_loss": means, "evaluations": [row for row in rows if row[0] != final[0]] + [final]}


def record(run: Path, result: dict[str, Any], scalars: Scalars, data: dict[str, Any], command: str) -> dict[str, Any]:
    """The JSON record. `seconds` is that of training over all its sessions, when the run was resumed."""
    spec = checkpoint.load(run / "checkpoint").spec
    parameters = sum(int(np.prod(tensor.shape)) for tensor in spec.parameters())
    kept = ("test_accuracy", "test_loss", "epochs", "seed", "versions")
    return {
        "schema": 1, "command": command, "model": spec.name, "framework": result["framework"], "data": data,
        **{name: result[name] for name in kept}, "test_correct": result["correct"], "test_images": result["test_images"],
        "seconds": max(result["seconds"], scalars.trained), "steps": len(result["losses"]), "parameters": parameters, **epochs_of(result),
        "job": neutral(result["job"]), "triptych": result["environment"]["triptych"], "environment": result["environment"],
    }  # fmt: skip


def main() -> None:
    """Write the record, its scalars, and the checkpoint when asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--command", required=True, help="What trained the run, without paths of this machine.")
    parser.add_argument("--checkpoint", type=Path, help="Where the trained checkpoint is copied to.")
    given = parser.parse_args()
    result = json.loads((given.run / "result.json").read_text())
    data = described(open_source(given.data, "train"), open_source(given.data, "test"))
    if result["stopped"] or (result["train_images"], result["data_sha256"]) != (data["train_images"], data["train_sha256"]):
        raise SystemExit(f"{given.run} was stopped early, or trained on other images than all of {given.data}: no record is made of it")
    scalars = Scalars(given.run)
    made = record(given.run, result, scalars, data, given.command)
    if given.checkpoint is not None:
        given.checkpoint.mkdir(parents=True, exist_ok=True)
        for name in CHECKPOINT_FILES:
            shutil.copyfile(given.run / "checkpoint" / name, given.checkpoint / name)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(scalars.rows())
    write_json(given.out, made)


if __name__ == "__main__":
    main()
