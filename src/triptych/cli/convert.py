"""`triptych convert`: a foreign PyTorch file into a canonical checkpoint, and a report of what mapped to what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from triptych.cli import emit, json_option

if TYPE_CHECKING:
    from triptych.core.importers import Imported


@click.command("convert")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="Catalogued model the weights belong to (`triptych list`).")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory to write the checkpoint to.")
@click.option("--num-classes", type=click.IntRange(min=1), help="Expected classes; inferred from the tensors when left out.")
@click.option("--in-channels", type=click.IntRange(min=1), help="Expected input channels; inferred from the tensors when left out.")
@click.option("--image-size", type=click.IntRange(min=1), help="Image size the weights were trained at; the model's own when left out.")
@click.option("--ema", is_flag=True, help="Take the averaged (EMA) weights of a training checkpoint that holds both.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint directory.")
@json_option
def convert_command(file: Path, model: str, out: Path, ema: bool, overwrite: bool, as_json: bool, **options: int | None) -> None:
    """Import the PyTorch or safetensors weights FILE (.pth .pt .th .bin .safetensors) into the canonical format.

    Nothing in the file is run. Every key that is unmatched, missing or mis-shaped is an error that lists it.
    """
    from triptych.core import catalog, checkpoint, foreign_file, importers

    given = {option: value for option, value in options.items() if value is not None}
    catalog.get_spec(model, **given)  # a mistyped name is reported before a large file is read
    content = foreign_file.read(file)
    imported = importers.to_canonical(content, model, source=str(file), ema=ema, **given)
    source = {"file": file.name, "sha256": _sha256(file)}
    provenance = {"converted_from": {**source, "ema": ema}, "notes": list(imported.report.notes)}
    checkpoint.save(out, imported.spec, imported.weights, provenance=provenance, overwrite=overwrite)
    emit(_as_data(imported, source, out), as_json, _as_text(imported, file, out))


def _sha256(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_data(imported: Imported, source: dict[str, Any], out: Path) -> dict[str, Any]:
    import dataclasses

    from triptych.core import checkpoint
    from triptych.core.spec import to_dict

    return {
        "model": imported.spec.name,
        "out": str(out),
        "source": source,
        "precision": checkpoint.precision_of(imported.weights),
        "tensors": len(imported.weights),
        "spec": to_dict(imported.spec),
        "notes": list(imported.report.notes),
        "mapped": [dataclasses.asdict(row) for row in imported.report.rows],
    }


def _as_text(imported: Imported, file: Path, out: Path) -> str:
    from triptych.core import checkpoint

    spec, report = imported.spec, imported.report
    unchanged = sum(row.source == row.canonical for row in report.rows)
    lines = [
        f"{file.name} -> {out}",
        f"  {spec.name}, {spec.num_classes} classes, {len(imported.weights)} tensors, {checkpoint.precision_of(imported.weights)}",
        f"  {len(report.rows)} keys read: {unchanged} unchanged, {len(report.renamed)} renamed",
        *(f"  {note}" for note in report.notes),
    ]
    if report.renamed:
        width = max(len(row.source) for row in report.renamed)
        lines += [
            "",
            f"  {'key in the file':<{width}}    canonical key",
            *(f"  {row.source:<{width}} -> {row.canonical}" for row in report.renamed),
        ]
    return "\n".join(lines)
