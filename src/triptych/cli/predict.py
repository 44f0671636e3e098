"""`triptych predict`: what single images show, in one framework or several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from triptych.cli import emit, json_option
from triptych.cli.evaluate import refusal_message
from triptych.core.contract import DEVICES, PRECISIONS
from triptych.core.errors import InputRefused


@click.command("predict")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path())
@click.option("--weights", required=True, metavar="DIR", type=click.Path(), help="A canonical checkpoint.")
@click.option("--model", default=None, metavar="NAME", help="The model; the checkpoint says which, this makes sure.")
@click.option("--framework", default="all", show_default=True, help="pytorch, tensorflow, jax, several separated by commas, or all.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="How many classes to show.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@json_option
def predict_command(images: tuple[str, ...], framework: str, top: int, as_json: bool, **options: Any) -> None:
    """Classify JPEG and PNG files; a folder stands for the images in it and below.

    Unusual files (CMYK, 16 bits, palettes, EXIF-rotated) are converted. Damaged or unsafe ones are refused by name, the others are
    answered, and the exit code is 8.
    """
    from triptych import evaluation

    frameworks = evaluation.chosen_frameworks(framework)
    job = evaluation.Job(files=tuple(path for image in images for path in _expanded(image)), **options)
    result = evaluation.predict(job, frameworks, top)
    emit(result, as_json, "\n".join(_text(image) for image in result["images"]))
    if result["refused"]:
        raise InputRefused(refusal_message(result["refused"], "not classified"))


def _expanded(image: str) -> list[str]:
    """A folder's images, sorted; links are not followed. A file, or a folder without images, stands for itself."""
    from triptych.data.images import EXTENSIONS

    if not os.path.isdir(image):
        return [image]
    files = (Path(folder, name) for folder, _, names in os.walk(image) for name in names if not name.startswith("."))
    return sorted(str(path) for path in files if path.suffix.lower() in EXTENSIONS and not path.is_symlink()) or [image]


def _text(image: dict[str, Any]) -> str:
    lines = [image["image"].encode(errors="replace").decode() + ("" if image["agree"] else "   (the frameworks differ)")]
    for framework, classes in image["predictions"].items():
        lines.append(f"  {framework:<12}" + ", ".join(f"{row['label']} {row['probability']:.2%}" for row in classes))
    return "\n".join(lines)
