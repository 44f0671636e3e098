"""`triptych parity`: climb the ladder, plant faults, or measure the float32 noise that sets the tolerances."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from triptych.cli import emit, json_option
from triptych.cli.progress import status
from triptych.core import contract
from triptych.core.errors import ParityFailed, UsageError
from triptych.core.spec import Spec

if TYPE_CHECKING:
    from triptych.parity.plan import Plan


@click.command("parity")
@click.argument("model", required=False)
@click.option("--recipe", help="Prove a training recipe in float64: a shipped one, or a .yaml file; it names model and data.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="With --recipe: change a value of it.")
@click.option("--steps", type=click.IntRange(min=1), help="With --recipe: synchronised steps with each optimizer; 50 when not given.")
@click.option("--batch-size", type=click.IntRange(min=1), help="With --recipe: another batch, in as many micro-batches.")
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
    model: str | None, recipe: str | None, overrides: tuple[str, ...], steps: int | None, batch_size: int | None, weights: Path | None,
    frameworks: str | None, precision: str | None, fault: str | None, full: bool, calibrate: bool, device: str, out: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Prove that MODEL, or training by --recipe, is the same in every framework; exit code 4 when it is not."""
    from triptych.core import catalog

    _check_together(model, recipe, overrides, steps, batch_size, precision, fault, calibrate)
    chosen = _frameworks(frameworks)
    if recipe is not None:
        plan = _recipe_plan(recipe, overrides, chosen, steps, batch_size, device)
        with _run_directory(out) as run, status("starting the workers") as progress:
            _prove_recipe(recipe, plan, weights, run, progress, as_json)
        return
    assert model is not None
    spec = catalog.get_spec(model)
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


def _check_together(
    model: str | None, recipe: str | None, overrides: tuple[str, ...], steps: int | None, batch_size: int | None, precision: str | None,
    fault: str | None, calibrate: bool,
) -> None:  # fmt: skip
    """UsageError for options that do not go together."""
    if (model is None) == (recipe is None):
        raise UsageError("give one of the two: a MODEL, or --recipe, which names its own (another one: --set model=NAME)")
    if recipe is None and (overrides or steps or batch_size):
        raise UsageError("--set, --steps and --batch-size are for --recipe; a MODEL is proven with the ladder's own recipes")
    if recipe is not None and (fault or calibrate):
        raise UsageError("--fault and --calibrate are for a MODEL; faults of training are planted in the ladder's own recipes")
    if recipe is not None and precision == "float32":
        raise UsageError("a recipe is proven in float64: float32's tolerances are measured for the ladder's own recipes only")


def _recipe_plan(
    name: str, overrides: tuple[str, ...], frameworks: tuple[str, ...], steps: int | None, batch_size: int | None, device: str
) -> Plan:
    """The climb of a recipe: its model as it fits its data, its transforms, and the recipe itself in a few steps."""
    from triptych.data import open_source
    from triptych.parity import recipes
    from triptych.training import recipe_file

    parsed = recipe_file.load(name, overrides)
    source = open_source(parsed.data, "train")
    job = parsed.job(len(source))
    return recipes.recipe_plan(
        job.spec(source), job.recipe, job.transforms, job.data, frameworks, steps=steps or recipes.STEPS, batch_size=batch_size,
        uneven=job.uneven, execution=job.execution, device=device,
    )  # fmt: skip


def _prove_recipe(name: str, plan: Plan, weights: Path | None, run: Path, progress: Callable[[str], None], as_json: bool) -> None:
    from triptych.parity.certify import certify_recipe
    from triptych.parity.prove import table

    result = certify_recipe(name, plan, weights, run, progress)
    emit(result, as_json, table(result))
    if result["verdict"] != "pass":
        raise ParityFailed(f"training by {name} is not the same in {', '.join(plan.frameworks)}; the first divergence is named above")


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
    from triptych.core import workers

    names = tuple(dict.fromkeys(text.split(","))) if text else tuple(workers.available())
    for name in names:
        workers.check_available(name)
    if len(names) < 2:
        raise UsageError(f"a proof needs two frameworks or more; installed: {', '.join(workers.available()) or 'none'}")
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
