"""A finished run on CIFAR-10 as a committed record: RUN/result.json and its TensorBoard scalars -> OUT.json and OUT.csv.

    .venv/bin/python benchmarks/cifar10_record.py RUN OUT.json --data DIR --command "triptych train ..." [--checkpoint DIR]

RUN is one framework's directory of `triptych train`, OUT is named <model>-<framework>.json. `--checkpoint` copies the trained checkpoint.
A run that was stopped early, or saw other images than those of --data, is refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from measuring import write_json

from triptych.core import checkpoint
from triptych.data import Source, open_source
from triptych.training import watch

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


def epochs_of(result: dict[str, Any]) -> dict[str, Any]:
    """Mean training loss of each epoch, and evaluations as [step, epoch, accuracy, loss]; the last is of the final weights."""
    losses, epochs = result["losses"], result["epochs"]
    per_epoch = max(1, round(len(losses) / epochs))
    means = [float(np.mean(losses[start : start + per_epoch])) for start in range(0, len(losses), per_epoch)]
    rows = [[row["step"], (row["step"] + 1) / per_epoch, row["accuracy"], row["loss"]] for row in result["evaluations"]]
    final = [len(losses) - 1, epochs, result["test_accuracy"], result["test_loss"]]
    return {"train_loss": means, "evaluations": [row for row in rows if row[0] != final[0]] + [final]}


def record(run: Path, result: dict[str, Any], data: dict[str, Any], command: str) -> dict[str, Any]:
    """The JSON record."""
    spec = checkpoint.load(run / "checkpoint").spec
    parameters = sum(int(np.prod(tensor.shape)) for tensor in spec.parameters())
    kept = ("test_accuracy", "test_loss", "epochs", "seconds", "cpu_seconds", "seed", "versions")
    return {
        "schema": 1, "command": command, "model": spec.name, "framework": result["framework"], "data": data,
        **{name: result.get(name) for name in kept}, "test_correct": result["correct"], "test_images": result["test_images"],
        "steps": len(result["losses"]), "parameters": parameters, **epochs_of(result),
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
    if not (given.run / "result.json").is_file():
        parser.error(f"{given.run} holds no result.json: give one framework's directory of a run that has ended")
    result = json.loads((given.run / "result.json").read_text())
    data = described(open_source(given.data, "train"), open_source(given.data, "test"))
    if result["stopped"] or (result["train_images"], result["data_sha256"]) != (data["train_images"], data["train_sha256"]):
        raise SystemExit(f"{given.run} was stopped early, or trained on other images than all of {given.data}: no record is made of it")
    made = record(given.run, result, data, given.command)
    if given.checkpoint is not None:
        given.checkpoint.mkdir(parents=True, exist_ok=True)
        for name in CHECKPOINT_FILES:
            shutil.copyfile(given.run / "checkpoint" / name, given.checkpoint / name)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    watch.export_csv(given.run, given.out.with_suffix(".csv"))
    write_json(given.out, made)


if __name__ == "__main__":
    main()
