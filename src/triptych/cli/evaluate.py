"""`triptych evaluate`: accuracy on a labeled set in one framework or several, and whether they agree on every image."""

from __future__ import annotations

from typing import Any

import click

from triptych.cli import emit, json_option
from triptych.core.contract import DEVICES, PRECISIONS
from triptych.core.errors import InputRefused

_FRAMEWORKS_HELP = "pytorch, tensorflow, jax, several separated by commas, or all (that are installed)."


@click.command("evaluate")
@click.option("--data", required=True, metavar="PATH|digits", help="A folder, archive or Parquet file; or the embedded digits.")
@click.option("--weights", required=True, metavar="DIR", type=click.Path(), help="A canonical checkpoint.")
@click.option("--model", default=None, metavar="NAME", help="The model; the checkpoint says which, this makes sure.")
@click.option("--framework", default="all", show_default=True, help=_FRAMEWORKS_HELP)
@click.option("--split", type=click.Choice(["test", "train"]), default="test", show_default=True, help="test stands for validation, too.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Only so many images, evenly spaced over the set.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--ground-truth", type=click.Path(), default=None, help="Labels of flat ImageNet images: WordNet ids, or ids of --synsets.")
@click.option("--synsets", type=click.Path(), default=None, help="A WordNet id a line, by ILSVRC2012_ID; or the devkit's meta.mat.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@json_option
def evaluate_command(framework: str, as_json: bool, **options: Any) -> None:
    """Measure top-1 and top-5 accuracy, and on how many images the frameworks name the same class.

    \b
    PATH is any of
      train-*.parquet, test-*.parquet                 the Hub's Parquet layout
      cifar-10-python.tar.gz, cifar-10-batches-py     CIFAR-10, also the binary version
      <class>/*.JPEG                                  class folders, with an optional classes.json
      ILSVRC2012_val_00000001.JPEG ...                flat ImageNet validation set with its ground truth
    """
    from triptych import evaluation

    frameworks = evaluation.chosen_frameworks(framework)
    result = evaluation.evaluate(evaluation.Job(**options), frameworks)
    emit(result, as_json, _text(result))
    if result["refused"]:
        raise InputRefused(refusal_message(result["refused"], "left out"))


def refusal_message(refused: list[dict[str, str]], done: str) -> str:
    """One line an image that was refused, with the reason."""
    return f"{len(refused)} image(s) refused and {done}:" + "".join(f"\n  {row['reason']}" for row in refused)


def _text(result: dict[str, Any]) -> str:
    data = result["data"]
    lines = [f"{result['model']} on {data['name']}, {data['split']} split, {data['images']:,} images, {result['precision']}"]
    lines.append(f"{'framework':<12}{'top-1':>9}{'top-5':>9}{'images/s':>10}")
    for name, row in result["frameworks"].items():
        lines.append(f"{name:<12}{row['top1']:>9.2%}{row['top5']:>9.2%}{row['images_per_second']:>10.1f}")
    if len(result["frameworks"]) > 1:
        lines.append(_agreement_text(result["agreement"]))
    return "\n".join(lines)


def _agreement_text(agreement: dict[str, Any]) -> str:
    text = f"same first class in all: {agreement['all']:,} of {agreement['images']:,} images"
    text += f"; largest logit difference {agreement['largest_logit_difference']:.1e} at a scale of {agreement['logit_scale']:.1f}"
    return text + (f"; they differ on {', '.join(agreement['differing'])}" if agreement["differing"] else "")
