"""`triptych list` and `triptych info`: what the catalogue holds. No numpy, no framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import click

from triptych.cli import emit, json_option
from triptych.core import catalog, cost
from triptych.core.architecture import ImageArchitecture
from triptych.core.errors import UsageError
from triptych.core.spec import Preprocessing, Spec, to_dict


@click.command("list")
@click.argument("pattern", default="*")
@json_option
def list_command(pattern: str, as_json: bool) -> None:
    """List the catalogued models that match PATTERN (shell style, e.g. 'resnet*')."""
    names = catalog.list_models(pattern)
    if not names:
        raise UsageError(f"no catalogued model matches {pattern!r}; `triptych list` shows all {len(catalog.CATALOG)}")
    rows = [{"name": name, "parameters": catalog.CATALOG[name].parameters, "summary": catalog.CATALOG[name].summary} for name in names]
    emit(rows, as_json, "\n".join(f"{row['name']:<16}{row['parameters']:>12,}  {row['summary']}" for row in rows))


@click.command("info")
@click.argument("model")
@click.option("--num-classes", type=int, help="Classes of the head.")
@click.option("--in-channels", type=int, help="Channels of the input image.")
@click.option("--image-size", type=int, help="Height and width of the input image.")
@click.option("--tokens", type=int, help="Of transformer_block: the length of the sequence.")
@click.option("--width", type=int, help="Of transformer_block: the features of a token.")
@click.option("--heads", type=int, help="Of transformer_block: the heads of its attention.")
@click.option("--mlp-width", type=int, help="Of transformer_block: the width inside its MLP.")
@click.option("--layers", "show_layers", is_flag=True, help="Show the layer table, in execution order.")
@json_option
def info_command(model: str, show_layers: bool, as_json: bool, **options: int | None) -> None:
    """Show MODEL: parameters, FLOPs, input, preprocessing and, with --layers, every layer."""
    spec = catalog.get_spec(model, **{name: value for name, value in options.items() if value is not None})
    total = cost.cost(spec)
    data = _description(model, spec, total)
    if show_layers:
        data["layers"] = [dataclasses.asdict(layer) for layer in total.layers]
    emit(data, as_json, "\n".join(_info_lines(data, spec, total if show_layers else None)))


def _description(model: str, spec: Spec, total: cost.Cost) -> dict[str, Any]:
    entry = catalog.CATALOG[model]
    return {
        "name": model,
        "summary": entry.summary,
        "source": entry.source,
        "parameters": total.parameters,
        "macs": total.macs,
        "flops": total.flops,
        "convention": cost.CONVENTION,
        "tensors": len(spec.tensors()),
        "intermediates": len(spec.intermediates()),
        "spec": to_dict(spec),
    }


def _info_lines(data: dict[str, Any], spec: Spec, layers: cost.Cost | None) -> Iterator[str]:
    yield f"{data['name']}: {data['summary']} ({data['source']})\n"
    rows = {
        "input": _inputs(spec),
        "preprocessing": _preprocessing(spec.preprocessing),
        "parameters": f"{data['parameters']:,}",
        "MACs": f"{data['macs']:,}  ({data['macs'] / 1e9:.3g} G)",
        "FLOPs": f"{data['flops']:,}  ({data['flops'] / 1e9:.3g} G) {'an image' if isinstance(spec, ImageArchitecture) else 'a sample'}",
        "state": f"{data['tensors']} tensors; {data['intermediates']} named intermediates",
    }
    yield from (f"  {name:<14}{text}" for name, text in rows.items())
    yield f"\n  {data['convention']}."
    if layers is not None:
        yield "\n" + "\n".join(_layer_table(layers))


def _inputs(spec: Spec) -> str:
    if isinstance(spec, ImageArchitecture):
        height, width, channels = spec.input_shape
        return f"{height} x {width} x {channels} (H, W, C), {spec.num_classes} classes"
    each = " for each token" if len(spec.output_shape) > 1 else ""
    return f"{'; '.join(map(str, spec.inputs()))}; {spec.num_classes} outputs{each}"


def _preprocessing(step: Preprocessing | None) -> str:
    if step is None:
        return "none: no image files go in"
    resize = "no resizing" if step.resize_short_side is None else f"short side to {step.resize_short_side} (bilinear, antialiased)"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (step.mean, step.std))
    return f"{resize}, centre crop {step.crop}, mean ({mean}), std ({std})"


def _layer_table(total: cost.Cost) -> Iterator[str]:
    width = max(len(layer.name) for layer in total.layers) + 2
    yield f"  {'layer':<{width}}{'op':<21}{'output':>16}{'parameters':>13}{'MACs':>15}"
    for layer in total.layers:
        output = " x ".join(map(str, layer.output))
        yield f"  {layer.name:<{width}}{layer.op:<21}{output:>16}{layer.parameters:>13,}{layer.macs:>15,}"
