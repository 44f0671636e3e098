"""What int8 costs in accuracy and brings in speed, for each runtime that it is exported to, against float32 in the same runtime.

    .venv/bin/python benchmarks/export_int8.py --part accuracy --data FOLDER    # CIFAR-10; minutes
    .venv/bin/python benchmarks/export_int8.py --part speed                     # ResNet-50, on a quiet machine; a quarter of an hour
    .venv/bin/python benchmarks/export_int8.py --write-doc                      # the tables of docs/export.md, from the record

accuracy: a trained checkpoint is exported to float32 and int8, calibrated on images of the training split, and each artefact names the
class of all test images. speed: ResNet-50 with parity weights, in one interleaved run: a process a runtime holds both artefacts, and in
each round each takes a turn of `--calls` calls at each batch size, in random order; a ratio is float32's seconds over int8's in the same
round. Its ranges come from a few embedded digits: how much is computed does not depend on them.

A part replaces its own half of the record alone. The bar stands beside what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import export_matrix
from export_matrix import name_of
from measuring import RESULTS, head, write_json

from triptych.bench.script import at_least
from triptych.bench.statistics import median_interval, paired_interval
from triptych.core import catalog, checkpoint, storage
from triptych.core.conversation import available_threads
from triptych.core.errors import ExportFailed
from triptych.export import matrix, runtimes, session

COMMAND = "benchmarks/export_int8.py"
PAIRS = (("pytorch", "onnx", "onnx_int8"), ("pytorch", "openvino", "openvino_int8"), ("tensorflow", "tflite", "tflite_int8"))
"""Source, float32 and int8, a runtime each."""
LOST_POINTS, FASTER = 0.3, 1.5
"""The bars: percentage points of accuracy that may be lost, and how many times as fast int8 must be, at the lower end."""
BATCHES = (8, 1)
CALIBRATION_FOR_SPEED = 96
CHECKPOINT = RESULTS / "cifar10" / "checkpoints" / "resnet20-pytorch"


def cells() -> tuple[matrix.Cell, ...]:
    """Both of each pair."""
    named = [(source, name) for source, *names in PAIRS for name in names]
    return tuple(cell for cell in matrix.CELLS if (cell.source, cell.format) in named)


def exported(request: session.Request) -> dict[str, dict[str, Any]]:
    """The rows of an export, by the names of their artefacts. ExportFailed unless all are there and verified."""
    rows = session.run(request, lambda text: print(text, flush=True))  # noqa: T201
    wrong = [f"{name_of(row)}: {row['failure'] or row['unavailable']}" for row in rows if not row["passed"]]
    if wrong:
        raise ExportFailed("; ".join(wrong))
    return {name_of(row): row for row in rows}


def accuracy(weights: Path, data: Path, work: Path) -> dict[str, Any]:
    """A row a runtime: right answers of both on all test images, and on how many int8 names the class that the framework names."""
    stored = checkpoint.load(weights, precision="float32")
    spec = catalog.fed_by_images(stored.spec)
    rows = exported(
        session.Request(
            spec, stored.weights, cells(), work / "accuracy", str(data), overwrite=True, command=COMMAND, labels=stored.labels, limit=10_000
        )
    )
    told = [accuracy_row(rows[f"{source}-{exact}"], rows[f"{source}-{rounded}"]) for source, exact, rounded in PAIRS]
    command = f"{COMMAND} --part accuracy --weights {weights.name} --data {data.name}"
    return {**head(command), "model": spec.name, "weights": weights.name, "bar_points": LOST_POINTS, "rows": told}


def accuracy_row(exact: dict[str, Any], rounded: dict[str, Any]) -> dict[str, Any]:
    """What one runtime lost."""
    shares = exact["accuracy"]["artefact"], rounded["accuracy"]["artefact"]
    lost = 100.0 * (shares[0] - shares[1])
    return {
        "runtime": rounded["runtime"], "source": rounded["source"], "format": rounded["format"], "images": rounded["accuracy"]["images"],
        "accuracy_float32": shares[0], "accuracy_int8": shares[1], "lost_points": lost, "holds": bool(lost <= LOST_POINTS),
        "same_class": rounded["same_class"], "of_images": rounded["of_images"], "worst_error": rounded["worst_error"],
        "bytes_float32": exact["bytes"], "bytes_int8": rounded["bytes"], "calibration": rounded["calibration"],
        "versions": rounded["versions"], "written_with": rounded["written_with"],
    }  # fmt: skip


def speed(model: str, rounds: int, calls: int, work: Path) -> dict[str, Any]:
    """A row a runtime and batch size: medians of both, and how many times as fast int8 is, with its interval."""
    spec, out = catalog.fed_by_images(catalog.get_spec(model)), work / "speed"
    rows = exported(session.Request(spec, None, cells(), out, overwrite=True, command=COMMAND, calibration_images=CALIBRATION_FOR_SPEED))
    seconds = export_matrix.timed(list(rows.values()), out, spec, rounds, calls, BATCHES)
    told = []
    for source, exact, rounded in PAIRS:
        both = f"{source}-{exact}", f"{source}-{rounded}"
        told += [speed_row(rows[both[1]], batch, seconds[both[0], batch], seconds[both[1], batch]) for batch in BATCHES]
    return {
        **head(f"{COMMAND} --part speed --model {model} --rounds {rounds} --calls {calls}"),
        "model": model,
        "image_size": spec.preprocessing.crop,
        "threads": available_threads(),
        "seconds": export_matrix.CLOCKS[available_threads() == 1],
        "load_average": os.getloadavg(),
        "bar": FASTER,
        "rows": told,
    }


def speed_row(row: dict[str, Any], batch: int, exact: list[float], rounded: list[float]) -> dict[str, Any]:
    """Two artefacts of one runtime at one batch size."""
    ratio, interval = paired_interval(exact, rounded)
    return {
        "runtime": row["runtime"], "source": row["source"], "format": row["format"], "batch_size": batch, "rounds": len(exact),
        "median_float32": median_interval(exact)[0], "interval_float32": median_interval(exact)[1],
        "median_int8": median_interval(rounded)[0], "interval_int8": median_interval(rounded)[1],
        "times_as_fast": ratio, "times_as_fast_interval": interval, "holds": bool(interval[0] >= FASTER),
        "versions": row["versions"],
    }  # fmt: skip


def table(recorded: dict[str, Any]) -> str:
    """The record as docs/export.md shows it."""
    return "\n\n".join(show(recorded[part]) for part, show in SHOWN.items() if part in recorded)


def accuracy_table(part: dict[str, Any]) -> str:
    """Right answers, float32 and int8."""
    first = part["rows"][0]
    how = f"{first['images']:,} test images, ranges from {first['calibration']['images']} training images"
    lines = [
        f"`{part['command']}`: {part['model']} as trained ({part['weights']}), {how}.",
        "",
        f"| runtime | float32 | int8 | points lost ({part['bar_points']} allowed) | same class | error | MiB, float32 and int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        cells = [
            runtimes.ADAPTERS[row["runtime"]].title, f"{row['accuracy_float32']:.2%}", f"{row['accuracy_int8']:.2%}",
            f"{row['lost_points']:+.2f}{'' if row['holds'] else ' **fails**'}", f"{row['same_class']:,} of {row['of_images']:,}",
            f"{row['worst_error']:.1e}", f"{row['bytes_float32'] / 2**20:.2f}, {row['bytes_int8'] / 2**20:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(part: dict[str, Any]) -> str:
    """Seconds of a batch, float32 and int8."""
    clock = "computed" if part["seconds"] == export_matrix.CLOCKS[True] else "by the clock"
    where = f"{part['threads']} thread(s) of {part['environment']['cpu']['model']}"
    lines = [
        f"`{part['command']}`: {part['image_size']} pixels, {where}, milliseconds {clock}, load average {part['load_average'][0]:.1f}.",
        "",
        f"| runtime | batch | float32 | int8 | times as fast ({part['bar']} asked at the lower end) |",
        "|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        low, high = row["times_as_fast_interval"]
        cells = [
            runtimes.ADAPTERS[row["runtime"]].title, str(row["batch_size"]), f"{row['median_float32'] * 1e3:.1f}",
            f"{row['median_int8'] * 1e3:.1f}", f"{row['times_as_fast']:.2f} [{low:.2f}, {high:.2f}]{'' if row['holds'] else ' **fails**'}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = {"accuracy": accuracy_table, "speed": speed_table}


def main() -> None:
    """Export, measure, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--part", choices=list(SHOWN))
    parser.add_argument("--weights", type=Path, default=CHECKPOINT, help="accuracy: a trained checkpoint.")
    parser.add_argument("--data", type=Path, help="accuracy: the data that it was trained and is tested on.")
    parser.add_argument("--model", default="resnet50", help="speed: the model.")
    parser.add_argument("--rounds", type=at_least(2), default=20)
    parser.add_argument("--calls", type=at_least(1), default=3, help="Timed calls of a turn; one more goes before them.")
    parser.add_argument("--work", type=Path, default=Path("runs/export-int8"))
    parser.add_argument("--out", type=Path, default=RESULTS / "export" / "int8.json")
    parser.add_argument("--write-doc", action="store_true", help="Write the tables of docs/export.md from the record, too.")
    given = parser.parse_args()
    if given.part == "accuracy" and given.data is None:
        parser.error("--part accuracy takes --data, for example the folder of CIFAR-10")
    recorded: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {"schema": 1}
    if given.part is not None:
        storage.make_directory(given.work)
        if given.part == "accuracy":
            recorded["accuracy"] = accuracy(given.weights, given.data, given.work)
        else:
            recorded["speed"] = speed(given.model, given.rounds, given.calls, given.work)
        write_json(given.out, recorded)
    if given.write_doc:
        export_matrix.write_doc({"int8": table(recorded)})


if __name__ == "__main__":
    main()
