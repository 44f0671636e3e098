"""`triptych train`: one model, one data set, one framework or several from the same initialization."""

from __future__ import annotations

from pathlib import Path

import click

from triptych.cli import emit, json_option
from triptych.core import contract
from triptych.core.errors import StorageError, UsageError


@click.command("train")
@click.argument("model")
@click.option("--data", default="digits", show_default=True, help="`digits` (embedded), or a path: CIFAR-10, class folders.")
@click.option("--framework", default="pytorch", show_default=True, help="One, several (comma-separated), or `all`.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run directory; must not exist, unless resumed.")
@click.option("--epochs", type=float, default=10.0, show_default=True)
@click.option("--batch-size", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--learning-rate", type=float, default=0.1, show_default=True, help="Peak, after linear warmup and before the cosine.")
@click.option("--warmup-epochs", type=float, default=1.0, show_default=True)
@click.option("--weight-decay", type=float, default=5e-4, show_default=True)
@click.option("--label-smoothing", type=click.FloatRange(0.0, 1.0, max_open=True), default=0.0, show_default=True)
@click.option("--ema", type=click.FloatRange(0.0, 1.0, max_open=True), help="Decay of a moving average of the weights.")
@click.option("--precision", type=click.Choice(contract.PRECISIONS), default="float32", show_default=True)
@click.option("--device", type=click.Choice(contract.DEVICES), default="auto", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--checkpoint-every", type=click.IntRange(min=1), help="Save the whole training state every so many steps.")
@click.option("--resume", type=click.Choice(("never", "auto")), default="never", show_default=True, help="auto: go on in --out.")
@json_option
def train_command(
    model: str, data: str, framework: str, out: Path, epochs: float, batch_size: int, learning_rate: float, warmup_epochs: float,
    weight_decay: float, label_smoothing: float, ema: float | None, precision: str, device: str, seed: int,
    checkpoint_every: int | None, resume: str, as_json: bool,
) -> None:  # fmt: skip
    """Train MODEL and save a canonical checkpoint, metrics.jsonl and result.json for each framework under --out."""
    from triptych.cli.progress import status
    from triptych.core.recipe import SGD
    from triptych.data import open_source
    from triptych.evaluation import chosen_frameworks
    from triptych.training.job import Intervals, Job, standard_recipe
    from triptych.training.worker import run_worker

    frameworks = chosen_frameworks(framework)
    if out.exists() and resume == "never":
        raise StorageError(f"--out {out} exists already; name a new directory, or go on in it with --resume auto")
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
    job = Job(model, data, recipe, steps, precision, device, intervals=Intervals(checkpoint=checkpoint_every))
    job.spec(source)
    with status("starting") as show:
        results = [run_worker(job, name, out, show, resume=resume) for name in frameworks]
    lines = [
        f"{r['framework']:<12}test accuracy {r['test_accuracy']:.2%}  {r['seconds']:.0f} s  {out / r['framework'] / 'checkpoint'}"
        for r in results
    ]
    emit(results, as_json, "\n".join(lines))
