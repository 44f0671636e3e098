"""`triptych export`: a model in every format of a framework, each reloaded in its own runtime and compared before it has a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from triptych.cli import called, emit, json_option
from triptych.core.errors import FrameworkMissing, UsageError


@click.command("export")
@click.argument("model", required=False)
@click.option("--from", "sources", default=None, help="pytorch, tensorflow, jax, several separated by commas; without it, all installed.")
@click.option("--to", "formats", multiple=True, help="A format; repeat it, separate several by commas, or say all.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Directory for the artefacts, one folder each.")
@click.option("--weights", metavar="DIR", type=click.Path(), help="A canonical checkpoint; without it, parity weights of seed 0.")
@click.option("--data", metavar="PATH|digits", help="Images to verify on, test split; else those of --calibration, or the embedded digits.")
@click.option("--calibration", metavar="PATH|digits", help="Images that int8 formats take ranges from, training split; without it, --data.")
@click.option("--calibration-images", type=click.IntRange(min=32), default=512, show_default=True, help="So many of them.")
@click.option("--limit", type=click.IntRange(min=8), help="Compare classes on so many images; else 32, or all where weights are rounded.")
@click.option("--num-classes", type=click.IntRange(min=1), help="Without a checkpoint: classes.")
@click.option("--in-channels", type=click.IntRange(min=1), help="Without a checkpoint: input channels.")
@click.option("--image-size", type=click.IntRange(min=1), help="Without a checkpoint: image size.")
@click.option("--overwrite", is_flag=True, help="Replace artefacts that are there.")
@click.option("--list", "listed", is_flag=True, help="Show which format each framework exports to, how, or why not.")
@json_option
def export_command(
    model: str | None, sources: str | None, formats: tuple[str, ...], out: Path | None, weights: str | None, listed: bool, as_json: bool,
    num_classes: int | None, in_channels: int | None, image_size: int | None, **images: Any,
) -> None:  # fmt: skip
    """Export MODEL, for example `triptych export resnet50 --from pytorch --to onnx --out exported`.

    Each artefact is reloaded in a fresh process of its own runtime and held to the framework's outputs on real images, in batches of 7 and
    of 1: OUT/FRAMEWORK-FORMAT holds it and export.json with the errors. What does not agree is removed, and the exit code is 7.

    int8 formats take the ranges of their activations from training images: give those of the model by --calibration. They are never
    verified on these; their classes, and with --weights their accuracy, are compared on the test images (at most 10,000, or 1 GiB).
    """
    from triptych.export import matrix

    if listed:
        emit(matrix.table(), as_json, _listed())
        return
    if model is None or not formats or out is None:
        raise UsageError("give MODEL, --to and --out, for example: triptych export resnet50 --to all --out exported; --list shows formats")
    wanted = [name.strip() for text in formats for name in text.split(",")]
    cells, every = matrix.chosen(_sources(sources), wanted), "all" in wanted
    if not every:
        _check_installed(cells)
    if images["calibration"] and not any(matrix.FORMATS[cell.format].calibration for cell in cells):
        raise UsageError(f"--calibration is for {', '.join(row.name for row in matrix.FORMATS.values() if row.calibration)}: leave it out")
    options = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    given = {name: value for name, value in options.items() if value is not None}
    images["optional_calibration"] = every and images["calibration"] is None
    _export(model, tuple(cells), out, weights, as_json, given, images)


def _sources(names: str | None) -> list[str]:
    from triptych.core import contract

    return contract.installed() if names in (None, "all") else list(dict.fromkeys(name.strip() for name in str(names).split(",")))


def _check_installed(cells: list[Any]) -> None:
    reason = next((reason for cell in cells if (reason := cell.missing())), None)
    if reason is not None:
        raise FrameworkMissing(reason)


def _export(
    model: str, cells: tuple[Any, ...], out: Path, weights: str | None, as_json: bool, options: dict[str, Any], images: dict[str, Any]
) -> None:
    from triptych.cli.progress import status
    from triptych.core import catalog, checkpoint
    from triptych.export import session

    spec, loaded, labels = catalog.fed_by_images(catalog.get_spec(model, **options)), None, None
    if weights is not None:
        stored = checkpoint.load(weights, precision="float32")
        if stored.spec.name != spec.name or options:
            raise UsageError(f"{weights} holds a {stored.spec.name}; name it as MODEL, and give no options of its own")
        spec, loaded, labels = catalog.fed_by_images(stored.spec), stored.weights, stored.labels
    request = session.Request(spec, loaded, cells, out, command=called("export", model), labels=labels, **images)
    with status(f"export {model}") as progress:
        rows = session.run(request, progress)
    emit({"model": spec.name, "out": str(out), "rows": rows}, as_json, "\n".join(_line(row) for row in rows))
    failed = session.outcome(rows)
    if failed is not None:
        raise failed


def _line(row: dict[str, Any]) -> str:
    name = f"{row['source']}-{row['format']}"
    if row["unavailable"]:
        return f"{name:<32}not here: {row['unavailable']}"
    if row["failure"]:
        return f"{name:<32}FAILED: {row['failure']}"
    size, load, first = row["bytes"] / 2**20, row["load_seconds"], row["latency"]["1"]["median_seconds"] * 1e3
    text = f"{name:<32}{row['runtime']:<14}error {row['worst_error']:.1e}  {size:8.2f} MiB  load {load:6.2f} s  batch 1 {first:8.2f} ms"
    text += f"  same class {row['same_class']} of {row['of_images']}"
    right = row.get("accuracy")
    return text if right is None else f"{text}, accuracy {right['artefact']:.2%} (source {right['source']:.2%})"


def _listed() -> str:
    from triptych.export import matrix

    lines = [f"{cell.source:<12}{cell.format:<20}{cell.runtime or 'no':<14}{cell.how}" for cell in matrix.CELLS]
    return "\n".join([*lines, *(f"{way}: {why}" for way, why in matrix.BACKWARD.items())])
