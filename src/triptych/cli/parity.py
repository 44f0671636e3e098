"""`triptych parity`: climb the ladder, plant faults, or measure the float32 noise that sets the tolerances."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from triptych.cli import emit, json_option
from triptych.cli.progress import status
from triptych.core import contract
from triptych.core.errors import ParityFailed, UsageError
from triptych.core.spec import Spec


@click.command("parity")
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path), help="A canonical checkpoint directory; without it, parity weights.")
@click.option("--frameworks", help="Two or more, comma-separated; all installed ones when not given. The first is the reference.")
@click.option("--precision", type=click.Choice(contract.PRECISIONS), help="One precision only; both when not given.")
@click.option("--fault", help="Plant a fault: a NAME of the table, `all`, or FILE:function (see triptych.parity.faults).")
@click.option("--full", is_flag=True, help="With --fault: plant in the model itself, not in a tiny spec with the same kinds of layers.")
@click.option("--calibrate", is_flag=True, help="Measure the model's float32 noise and write it to the tolerance table.")
@click.option("--device", type=click.Choice(contract.DEVICES), default="cpu", show_default=True)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Keep the run directory here; it must not exist. A temporary one when not given."
)
@json_option
def parity_command(
    model: str, weights: Path | None, frameworks: str | None, precision: str | None, fault: str | None, full: bool,
    calibrate: bool, device: str, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Prove that MODEL is the same in every framework; exit code 4 when it is not."""
    from triptych.core import catalog

    spec = catalog.get_spec(model)
    chosen = _frameworks(frameworks)
    with _run_directory(out) as run, status("starting the workers") as progress:
        if calibrate:
            _calibrate(spec, device, run, progress, as_json)
        elif fault:
            _plant(spec if full else catalog.tiny(spec), fault, chosen, run, progress, as_json)
        else:
            _prove(model, spec, weights, chosen, precision, device, run, progress, as_json)


def _prove(
    model: str, spec: Spec, weights: Path | None, frameworks: tuple[str, ...], precision: str | None, device: str, run: Path,
    progress: Callable[[str], None], as_json: bool,
) -> None:  # fmt: skip
    from triptych.parity.certify import certify
    from triptych.parity.prove import table

    precisions = (precision,) if precision else ("float64", "float32")
    result = certify(model, spec, weights, frameworks, precisions, device, run, progress)
    emit(result, as_json, table(result))
    if result["verdict"] != "pass":
        raise ParityFailed(f"{model} is not the same in {', '.join(frameworks)}; the first divergence is named above")


def _plant(spec: Spec, fault: str, frameworks: tuple[str, ...], run: Path, progress: Callable[[str], None], as_json: bool) -> None:
    from triptych.parity import faults, planting

    names = tuple(faults.expressible(spec)[0]) if fault == "all" else (faults.find(fault, spec).name,)
    result = planting.plant_all(spec, names, frameworks, run, progress)
    emit(result, as_json, planting.table(result))
    escaped = [
        f"{row['name']} in {row['framework']}"
        for row in result["faults"]
        if not (row["caught"] and row["right_rung"] and row["right_layer"])
    ]
    if result["clean"] != "pass" or escaped:
        raise ParityFailed(f"the clean ladder {result['clean']}ed; not caught as expected: {', '.join(escaped) or 'none'}")


def _calibrate(spec: Spec, device: str, run: Path, progress: Callable[[str], None], as_json: bool) -> None:
    from triptych.parity.calibrate import measure_noise, record

    rows = [record(row) for row in measure_noise(spec, device, run, progress)]
    emit(rows, as_json, "\n".join(f"{row['model']}: {len(row['noise'])} groups measured over {row['seeds']} seeds" for row in rows))


def _frameworks(text: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(","))) if text else tuple(contract.installed())
    for name in names:
        contract.check_installed(name)
    if len(names) < 2:
        raise UsageError(f"a proof needs two frameworks or more; installed: {', '.join(contract.installed()) or 'none'}")
    return names


@contextmanager
def _run_directory(out: Path | None) -> Iterator[Path]:
    """The given directory, which must be new; or a temporary one, removed afterwards."""
    if out is not None:
        if out.exists():
            raise UsageError(f"--out {out} exists already; name a new directory")
        yield out
        return
    temporary = Path(tempfile.mkdtemp(prefix="triptych-parity-"))
    try:
        yield temporary / "run"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
