"""One transformer block and ViT-Tiny in JAX, PyTorch and TensorFlow: eager and compiled, `vmap`, per-sample and custom gradients.

    .venv/bin/python benchmarks/transformer.py [--part P] [--workload block] [--batch-size N] [--rounds 10] [--framework F] [--again]
    .venv/bin/python benchmarks/transformer.py --write-doc

A worker process a framework holds the lanes of a setting: the same canonical weights, and the same inputs as native tensors. They are
proven equal first, in float64 and in float32; then every round lets each take a turn in random order, while every other process sleeps.
Each setting is written to benchmarks/results/transformer/ when it is measured, so that a run that was interrupted goes on where it was;
`--again` measures anew what is on record. `--write-doc` measures nothing, and writes
figures and tables of docs/transformer.md from the records.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comparison import pages, records, rounds, worker
from comparison.setting import TASKS, WORKLOADS, Setting

from triptych.core import contract
from triptych.core.conversation import Failed, Process

COMMAND = "benchmarks/transformer.py"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="All that are installed, without it.")
    parser.add_argument("--part", action="append", choices=[*TASKS, records.REPORTS], help="All of them, without it.")
    parser.add_argument("--workload", action="append", choices=list(WORKLOADS))
    parser.add_argument("--batch-size", action="append", type=int)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="A toy of a network, to try the command.")
    parser.add_argument("--again", action="store_true", help="Measure what is on record anew.")
    parser.add_argument("--out", type=Path, default=records.FOLDER)
    parser.add_argument("--write-doc", action="store_true", help="Write tables and figures from the records; measure nothing.")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def command(part: str, setting: Setting, given: argparse.Namespace) -> str:
    """The command that measures one setting again."""
    size = f" --workload {setting.workload} --batch-size {setting.batch_size}"
    return f"{COMMAND} --part {part}{size} --rounds {given.rounds}" + " --tiny" * given.tiny


def reports(setting: Setting, workers: Mapping[str, Process]) -> dict[str, Any]:
    """What every framework's compiler made of one setting."""
    modes: dict[str, Any] = {}
    for name, process in workers.items():
        try:
            answer = process.ask("report", setting=setting.to_json())["modes"]
            modes |= {f"{name}/{mode}": found for mode, found in answer.items()}
            process.ask("release")
        except Failed as error:
            modes[name] = {"failure": str(error)}
    return {"key": setting.key, "setting": setting.to_json(), "modes": modes}


def main() -> None:
    """Measure every setting asked for that is not on record, or write the document."""
    given = arguments()
    if given.worker:
        worker.main(given.worker)
        return
    if given.write_doc:
        pages.write(given.out)
        return
    frameworks = given.framework or contract.installed()
    parts = given.part or [*TASKS, records.REPORTS]
    every = records.plan([*TASKS], given.workload or [*WORKLOADS], given.batch_size, given.tiny)
    work = [(each.part, each) for each in every if each.part in parts]
    work += [(records.REPORTS, each) for each in records.reported(every) if records.REPORTS in parts]
    if not given.again:
        work = [(part, each) for part, each in work if not records.stands(given.out, part, each.key, frameworks, given.rounds)]
    with tempfile.TemporaryDirectory() as folder, rounds.processes(frameworks, Path(__file__), Path(folder)) as workers:
        for number, (part, setting) in enumerate(work, 1):
            sys.stderr.write(f"{number} of {len(work)}: {part} {setting.key}\n")
            if part == records.REPORTS:
                group = reports(setting, workers)
            else:
                group = rounds.measure(setting, workers, given.rounds, Path(folder))
                sys.stderr.writelines(f"    {line}\n" for line in pages.summary(group))
            records.keep(given.out, part, group, frameworks, given.rounds, command(part, setting, given))


if __name__ == "__main__":
    main()
