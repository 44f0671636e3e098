"""The same wrong shape in the native network of each framework, eager and compiled: what does the error tell its reader?

    .venv/bin/python benchmarks/shape_bug.py [--framework F]

Three bugs (`debugging/bugs.py`), each planted as a user of the framework would write it, each in a process of its own framework. Of every
error is recorded what can be counted: its type, whether the message names the layer and both sizes, whether the traceback shows the call
and a line of the model, and how long it is. Written to benchmarks/results/debugging/shape_bug.json, or where --out says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from debugging.bugs import BUGS, MODEL, MODES, Bug
from debugging.message import told
from measuring import RESULTS, head, write_json

from triptych.core import contract
from triptych.core.environment import PACKAGE

COMMAND = ".venv/bin/python benchmarks/shape_bug.py"


def measure(framework: str, program: Any, bug: Bug, mode: str) -> dict[str, Any]:
    """A row: what the error of one bug tells, and whether it came when the network was built or when it was called."""
    about = {"framework": framework, "mode": mode, "bug": bug.name, "layer": bug.layer}
    model = None
    try:
        model = program.network(bug)
        program.call(model, bug, mode)
    except Exception as error:  # whatever a framework raises is what is measured
        stage = "building" if model is None else "calling"
        rooms = PACKAGE / contract.framework(framework).package.rpartition(".")[2]
        return {**about, "stage": stage, **told(error, bug, rooms)}
    return {**about, "stage": None, "exception": None}


def rows(framework: str) -> list[dict[str, Any]]:
    """Every bug in every mode, in this process."""
    contract.load(framework)
    program = importlib.import_module(f"debugging.{contract.framework(framework).package.rpartition('.')[2]}")
    return [measure(framework, program, bug, mode) for bug in BUGS.values() for mode in MODES]


def asked(framework: str) -> list[dict[str, Any]]:
    """The rows of a framework, from a process of its own."""
    command = [sys.executable, __file__, "--worker", framework]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure in each framework, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="All that are installed, without it.")
    parser.add_argument("--out", type=Path, default=RESULTS / "debugging" / "shape_bug.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        sys.stdout.write(json.dumps(rows(given.worker)) + "\n")
        return
    found = [row for name in given.framework or contract.installed() for row in asked(name)]
    bugs = [{"name": bug.name, "layer": bug.layer, "right": bug.right, "wrong": bug.wrong, "text": bug.text} for bug in BUGS.values()]
    write_json(given.out, {**head(COMMAND), "model": MODEL, "bugs": bugs, "rows": found})
    sys.stdout.write(f"{len(found)} errors: {given.out}\n")


if __name__ == "__main__":
    main()
