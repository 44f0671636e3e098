"""`triptych train`: a recipe, or one model by the standard recipe, in one framework or several from the same initialization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from triptych.cli import emit, json_option
from triptych.core import contract
from triptych.core.errors import StorageError, UsageError

if TYPE_CHECKING:
    from triptych.training.job import Job

STANDARD = (
    "epochs",
    "batch_size",
    "learning_rate",
    "warmup_epochs",
    "weight_decay",
    "label_smoothing",
    "ema",
    "pad_crop",
    "precision",
    "checkpoint_every",
)
"""Options of the standard recipe, which a recipe file says itself."""


@click.command("train")
@click.argument("recipe")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe: optimizer.learning_rate=0.1.")
@click.option("--data", help="`digits` (embedded), or a path: CIFAR-10, class folders. Without it, the recipe's; digits for a model.")
@click.option("--framework", default="pytorch", show_default=True, help="One, several (comma-separated), or `all`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory; must not exist, unless resumed.")
@click.option("--resume", default="never", show_default=True, metavar="auto|never|PATH", help="auto: from the newest good checkpoint.")
@click.option("--dry-run", is_flag=True, help="Resolve and check everything, print the recipe, train nothing: limits.dry_run.")
@click.option("--epochs", type=float, default=10.0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--learning-rate", type=float, default=0.1, show_default=True, help="Peak, after linear warmup and before the cosine.")
@click.option("--warmup-epochs", type=float, default=1.0, show_default=True)
@click.option("--weight-decay", type=float, default=5e-4, show_default=True)
@click.option("--label-smoothing", type=click.FloatRange(0.0, 1.0, max_open=True), default=0.0, show_default=True)
@click.option("--ema", type=click.FloatRange(0.0, 1.0, max_open=True), help="Decay of a moving average of the weights.")
@click.option("--pad-crop", type=click.IntRange(min=0), default=0, show_default=True, help="Crop images padded by so many pixels.")
@click.option("--precision", type=click.Choice(contract.PRECISIONS), default="float32", show_default=True)
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Save the whole training state every so many steps.")
@click.option("--device", type=click.Choice(contract.DEVICES), help="Without it, the recipe's; auto for a model.")
@click.option("--seed", type=int, help="Without it, the recipe's; 0 for a model.")
@json_option
@click.pass_context
def train_command(
    context: click.Context, /, recipe: str, overrides: tuple[str, ...], data: str | None, framework: str, out: Path, resume: str,
    dry_run: bool, device: str | None, seed: int | None, as_json: bool, **standard: Any,
) -> None:  # fmt: skip
    """Train RECIPE (a shipped recipe, a .yaml file, or a model by the standard recipe given in options).

    Saves a canonical checkpoint, metrics.jsonl, TensorBoard events and result.json for each framework under --out. Exit code 9: stopped,
    and the state saved; 10: something could not be written.
    """
    from triptych.cli.progress import training
    from triptych.evaluation import chosen_frameworks
    from triptych.training import recipe_file
    from triptych.training.records import storing, write_whole
    from triptych.training.worker import run_worker

    frameworks = chosen_frameworks(framework)
    if out.exists() and resume == "never":
        raise StorageError(f"--out {out} exists already; name a new directory, or go on in it with --resume auto")
    if recipe_file.is_recipe(recipe):
        given = [name for name in STANDARD if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} is of the standard recipe; change {recipe} with --set KEY=VALUE")
        parsed, job = _from_recipe(recipe, overrides, data, device, seed)
    else:
        if overrides:
            raise UsageError(f"--set changes a recipe, and {recipe!r} is none; shipped: {', '.join(recipe_file.names())}")
        parsed, job = None, _standard(recipe, data or "digits", device or "auto", seed or 0, **standard)
    if dry_run or job.limits.dry_run:
        text = "" if parsed is None else parsed.resolved()
        emit(job.to_json(), as_json, f"{text}# {job.steps} steps in {', '.join(frameworks)}; nothing was trained")
        return
    if parsed is not None:
        with storing(out):
            out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "recipe.yaml", parsed.resolved())
    with training(frameworks) as show:
        results = [run_worker(job, name, out, partial(show, name), resume=resume) for name in frameworks]
    emit(results, as_json, summary(results, out))


def summary(results: Sequence[Mapping[str, Any]], out: Path) -> str:
    """How the runs ended, as a table, and where things lie."""
    heads = ("framework", "test accuracy", "test loss", "time", "images/s", "data wait", "peak memory")
    rows = [
        (
            r["framework"], f"{r['test_accuracy']:.2%}", f"{r['test_loss']:.4f}", str(timedelta(seconds=round(r["seconds"]))),
            f"{r['images_per_second']:.0f}", f"{r['data_wait']:.1%}", f"{r['peak_memory_bytes'] / 2**30:.2f} GiB",
        )
        for r in results
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (heads, *rows)]
    lines += [f"{r['framework']}: {note}" for r in results for note in r["notes"]]
    lines += [f"{r['framework']}: {out / r['framework'] / 'checkpoint'}, metrics.jsonl and result.json beside it" for r in results]
    if any(r["job"]["watch"]["tensorboard"] for r in results):
        lines.append(f"curves: tensorboard --logdir {out}")
    return "\n".join(lines)


def _from_recipe(name: str, overrides: tuple[str, ...], data: str | None, device: str | None, seed: int | None) -> tuple[Any, Job]:
    from triptych.data import open_source
    from triptych.training import recipe_file

    options = [f"{key}={value}" for key, value in (("data", data), ("device", device), ("seed", seed)) if value is not None]
    parsed = recipe_file.load(name, (*overrides, *options))
    source = open_source(parsed.data, "train")
    job = parsed.job(len(source))
    job.spec(source)
    return parsed, job


def _standard(
    model: str, data: str, device: str, seed: int, epochs: float, batch_size: int, learning_rate: float, warmup_epochs: float,
    weight_decay: float, label_smoothing: float, ema: float | None, pad_crop: int, precision: str, checkpoint_every: int | None,
) -> Job:  # fmt: skip
    from triptych.core.preprocess import Transforms
    from triptych.core.recipe import SGD
    from triptych.data import open_source
    from triptych.training.job import Intervals, Job, standard_recipe

    if epochs <= 0 or learning_rate <= 0:
        raise UsageError(f"--epochs {epochs} and --learning-rate {learning_rate} must be positive")
    source = open_source(data, "train")
    samples = len(source)
    if samples < batch_size:
        raise UsageError(f"--batch-size {batch_size} is more than the {samples} training images of {data}")
    recipe, steps = standard_recipe(
        samples=samples, epochs=epochs, batch_size=batch_size, peak=learning_rate, warmup_epochs=warmup_epochs, seed=seed,
        optimizer=SGD(weight_decay=weight_decay), label_smoothing=label_smoothing, ema_decay=ema,
    )  # fmt: skip
    transforms = Transforms(pad_crop=pad_crop)
    job = Job(model, data, recipe, steps, precision, device, transforms=transforms, intervals=Intervals(checkpoint=checkpoint_every))
    job.spec(source)
    return job
