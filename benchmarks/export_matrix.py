"""Every artefact of one model: exported, verified, and timed in one interleaved run.

    .venv/bin/python benchmarks/export_matrix.py [--model resnet50] [--rounds 15] [--calls 2]
    .venv/bin/python benchmarks/export_matrix.py --write-doc      # the tables of docs/export.md, from the record and from the code

`triptych export MODEL --to all` first; what an interrupted run has verified already is not made again. Then a process a runtime
holds all of its artefacts, and in each round every artefact takes a turn of `--calls` calls at each batch size, in random order. A row has
the median over rounds with its 95 % interval, and its ratio to the fastest row in float32 of that batch size, by pairs of the same round.

With one thread (OMP_NUM_THREADS=1) the seconds are those that the process computed (`time.process_time`), which on a shared machine are not
those that it waited for a core; with several they are those of the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, fill, head, write_json
from safetensors.numpy import save_file

from triptych.bench.script import at_least
from triptych.bench.statistics import median_interval, paired_interval
from triptych.core import catalog, contract, storage
from triptych.core.conversation import available_threads
from triptych.core.errors import InputRefused
from triptych.core.spec import Spec
from triptych.export import matrix, record, runtimes, session
from triptych.export.images import BATCHES

COMMAND = "benchmarks/export_matrix.py"
CLOCKS = {True: "computed_seconds", False: "seconds"}
"""Which seconds are told, by whether there is one thread."""
DOCUMENT = Path(__file__).parents[1] / "docs" / "export.md"
KEPT = (
    "source", "format", "runtime", "model", "layout", "passed", "failure", "unavailable", "worst_error", "tolerance", "checks",
    "same_class", "of_images", "calibration", "serve_images", "bytes", "files", "written_with", "versions", "frameworks_loaded",
    "import_seconds", "load_seconds", "first_call_seconds",
)  # fmt: skip


def rows_of(spec: Spec, out: Path) -> list[dict[str, Any]]:
    """A row for each cell: of those that are there, verified, as recorded; the rest exported now."""
    rows = {cell.name: verified(out / cell.name, spec) for cell in matrix.chosen(contract.installed(), ["all"])}
    missing = tuple(cell for cell in matrix.CELLS if cell.name in rows and rows[cell.name] is None)
    made = session.run(session.Request(spec, None, missing, out, command=COMMAND), lambda text: print(text, flush=True)) if missing else []  # noqa: T201
    rows |= {f"{row['source']}-{row['format']}": row for row in made}
    return [{key: row[key] for key in KEPT if key in row} for row in rows.values() if row is not None]


def verified(directory: Path, spec: Spec) -> dict[str, Any] | None:
    """The record of an artefact of this model, None without one."""
    with contextlib.suppress(InputRefused):
        found = record.read(directory)
        return found if found["model"] == spec.name and found["passed"] else None
    return None


@contextlib.contextmanager
def runtimes_of(rows: list[dict[str, Any]], out: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """A process for each runtime, holding its artefacts by their names; stopped on the way out."""
    held = {name: session.process(name, folder / f"{name}.log") for name in dict.fromkeys(row["runtime"] for row in rows)}
    layouts = {cell.name: cell.layout for cell in matrix.CELLS}
    try:
        for row in rows:
            artefact = out / name_of(row) / matrix.FORMATS[row["format"]].file
            held[row["runtime"]].ask("open", key=name_of(row), artefact=str(artefact), channels_first=layouts[name_of(row)] == "NCHW")
        yield held
    finally:
        for process in held.values():
            process.stop()


def name_of(row: dict[str, Any]) -> str:
    """The name of the artefact's directory."""
    return f"{row['source']}-{row['format']}"


def timed(
    rows: list[dict[str, Any]], out: Path, spec: Spec, rounds: int, calls: int, batches: Sequence[int] = BATCHES
) -> dict[tuple[str, int], list[float]]:
    """Seconds of a call, the median of each turn, by artefact and batch size."""
    folder, order = out / "timing", random.Random(0)
    folder.mkdir(exist_ok=True)
    inputs = folder / "inputs"
    images = np.random.default_rng(0).standard_normal((max(batches), *spec.input_shape), dtype=np.float32)
    save_file({"images": images}, inputs)
    seconds: dict[tuple[str, int], list[float]] = {(name_of(row), batch): [] for row in rows for batch in batches}
    with runtimes_of(rows, out, folder) as held:
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", flush=True)  # noqa: T201
            turns = [(row, batch) for row in rows for batch in batches]
            for row, batch in order.sample(turns, len(turns)):
                answer = held[row["runtime"]].ask("time", key=name_of(row), inputs=str(inputs), batch=batch, calls=calls)
                seconds[name_of(row), batch].append(statistics.median(answer[CLOCKS[available_threads() == 1]]))
    return seconds


def told(seconds: list[float], fastest: list[float], batch: int) -> dict[str, Any]:
    """Median, interval, throughput and the ratio to the fastest in float32."""
    median, interval = median_interval(seconds)
    ratio, ratio_interval = paired_interval(seconds, fastest)
    return {
        "median_seconds": median, "interval": interval, "images_per_second": batch / median, "rounds": len(seconds),
        "times_the_fastest": ratio, "times_the_fastest_interval": ratio_interval,
    }  # fmt: skip


def table(recorded: dict[str, Any]) -> str:
    """A record as the table of docs/export.md, the fastest at batch 1 first."""
    where = f"{recorded['threads']} thread(s) of {recorded['environment']['cpu']['model']}"
    clock = "seconds computed" if recorded["seconds"] == CLOCKS[True] else "seconds by the clock"
    busy = f"load average {recorded['load_average'][0]:.0f} at the end, {clock}"
    lines = [
        f"`{recorded['command']}`: {recorded['rows'][0]['model']}, {where}, {busy}.",
        "",
        "| artefact | runtime | worst error | MiB | load | batch 1 | times the fastest in float32 | batch 7 | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    live = sorted((row for row in recorded["rows"] if row["passed"]), key=lambda row: row["latency"]["1"]["median_seconds"])
    for row in live:
        one, seven = row["latency"]["1"], row["latency"]["7"]
        low, high = one["times_the_fastest_interval"]
        cells = [
            name_of(row), runtimes.ADAPTERS[row["runtime"]].title, f"{row['worst_error']:.1e}", f"{row['bytes'] / 2**20:.2f}",
            f"{row['load_seconds']:.2f} s", f"{one['median_seconds'] * 1e3:.2f} ms",
            f"{one['times_the_fastest']:.2f} [{low:.2f}, {high:.2f}]", f"{seven['median_seconds'] * 1e3:.2f} ms",
            f"{seven['images_per_second']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"| {name_of(row)} | {row['failure'] or row['unavailable']} |" for row in recorded["rows"] if not row["passed"]]
    return "\n".join(lines)


def blocks(recorded: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks of docs/export.md."""
    return {"cells": matrix.markdown(), "measured": table(recorded)}


def write_doc(tables: dict[str, str]) -> None:
    """Put tables between their marks in docs/export.md."""
    fill(DOCUMENT, tables)


def main() -> None:
    """Export, time, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--rounds", type=at_least(2), default=15)
    parser.add_argument("--calls", type=at_least(1), default=2, help="Timed calls of a turn; one more goes before them.")
    parser.add_argument("--work", type=Path, default=Path("runs/export-matrix"))
    parser.add_argument("--out", type=Path, default=RESULTS / "export" / "matrix.json")
    parser.add_argument("--write-doc", action="store_true", help="Only write the tables of docs/export.md, from the record.")
    given = parser.parse_args()
    if given.write_doc:
        write_doc(blocks(json.loads(given.out.read_text())))
        return
    spec = catalog.get_spec(given.model)
    storage.make_directory(given.work)
    rows = rows_of(spec, given.work)
    live = [row for row in rows if row["passed"]]
    seconds = timed(live, given.work, spec, given.rounds, given.calls)
    fastest: dict[str, Any] = {}
    for batch in BATCHES:
        exact = [row for row in live if matrix.FORMATS[row["format"]].bound == "float32"]
        first = min(exact, key=lambda row: statistics.median(seconds[name_of(row), batch]))
        fastest[str(batch)] = {"artefact": name_of(first), "runtime": first["runtime"]}
        for row in live:
            row.setdefault("latency", {})[str(batch)] = told(seconds[name_of(row), batch], seconds[name_of(first), batch], batch)
    command = f"{COMMAND} --model {given.model} --rounds {given.rounds} --calls {given.calls}"
    write_json(
        given.out,
        {
            **head(command),
            "threads": available_threads(),
            "seconds": CLOCKS[available_threads() == 1],
            "load_average": os.getloadavg(),
            "fastest": fastest,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
