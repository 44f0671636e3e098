"""`triptych serve`: an exported model behind an HTTP server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from triptych.cli import emit, json_option
from triptych.core.errors import FrameworkMissing, UsageError

MIB = 2**20
SECONDS = click.FloatRange(min=0, min_open=True)
SERVERS = ("tf-serving", "triton", "ovms")


@click.command("serve")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one, which the log tells.")
@click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images computed at once; 1 turns it off.")
@click.option("--max-delay", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Milliseconds to wait for company.")
@click.option("--max-queue", type=click.IntRange(min=1), default=256, show_default=True, help="Images that may wait.")
@click.option("--max-body", type=click.IntRange(min=1), default=32, show_default=True, help="MiB of one request's body.")
@click.option("--max-pixels", type=click.IntRange(min=1), default=16_000_000, show_default=True, help="Pixels of an uploaded image.")
@click.option("--timeout", type=SECONDS, default=30.0, show_default=True, help="Seconds to send a body, and seconds to wait for an answer.")
@click.option("--drain", type=click.IntRange(min=1), default=30, show_default=True, help="Seconds that requests have to finish at the end.")
@click.option("--layout", type=click.Choice(SERVERS), help="Serve nothing: write the model repository of another server to --out.")
@click.option("--out", metavar="REPOSITORY", type=click.Path(path_type=Path, file_okay=False), help="With --layout: a directory to make.")
@click.option("--overwrite", is_flag=True, help="With --layout: replace a repository that is there.")
@json_option
def serve_command(
    directory: Path, host: str, port: int, max_batch: int, max_delay: float, max_queue: int, max_body: int, max_pixels: int, timeout: float,
    drain: int, layout: str | None, out: Path | None, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Serve what `triptych export` wrote to DIR, ONNX or SavedModel: the Open Inference Protocol v2, POST /predict, a page at /.

    Log lines are JSON, on stderr. SIGTERM lets the requests that were accepted finish, then ends with exit code 0. With --layout, the
    artefact is written as a model repository of TensorFlow Serving (SavedModel), Triton (ONNX) or OpenVINO Model Server (OpenVINO IR)
    instead, opened in its runtime and compared.
    """
    if max_queue < max_batch:
        raise UsageError(f"--max-queue {max_queue} must hold a batch, of --max-batch {max_batch}")
    if (layout is None) != (out is None) or (overwrite and layout is None):
        raise UsageError(f"--layout and --out go together, and --overwrite with them: --layout {'|'.join(SERVERS)} --out REPOSITORY")
    from triptych.serving.options import Options

    options = Options(
        max_batch=max_batch, max_delay=max_delay / 1000, max_queue=max_queue, max_body=max_body * MIB, max_pixels=max_pixels,
        body_seconds=timeout, request_seconds=timeout, drain_seconds=drain,
    )  # fmt: skip
    if layout is not None and out is not None:
        _write(layout, directory, out, options, overwrite, as_json)
    else:
        _serve(directory, host, port, options)


def _write(layout: str, directory: Path, out: Path, options: Any, overwrite: bool, as_json: bool) -> None:
    from triptych.cli.progress import status
    from triptych.serving import layouts

    with status(f"{layout} of {directory}"):
        row = layouts.write(layouts.LAYOUTS[layout], directory, out, options, overwrite)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    text = f"{out}: {row['model']}, version {row['version']}, {row['format']} for {row['server']}, which was not run"
    emit({**row, "out": str(out)}, as_json, "\n".join([text, f"error from the artefact: {errors}", *sorted(row["files"])]))


def _serve(directory: Path, host: str, port: int, options: Any) -> None:
    from triptych.core.contract import not_installed

    reason = not_installed("The server", ("starlette", "uvicorn", "prometheus_client"), "serve")
    if reason is not None:
        raise FrameworkMissing(reason)
    from triptych.serving import server

    server.run(directory, host, port, options)
