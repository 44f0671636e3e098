"""`triptych worker`: be the host that starts one framework's workers, for an orchestrator in another container."""

from __future__ import annotations

from pathlib import Path

import click

from triptych.cli import emit, json_option


@click.command("worker")
@click.argument("framework")
@click.option(
    "--listen", type=click.Path(path_type=Path), required=True, metavar="SOCKET", help="The Unix socket to make; a shared volume's."
)
@json_option
def worker_command(framework: str, listen: Path, as_json: bool) -> None:
    """Start worker processes of FRAMEWORK for whoever opens SOCKET, until ended.

    `parity`, `bench` and `report` use it instead of processes of their own when TRIPTYCH_HOSTS names it: FRAMEWORK=/SOCKET, several
    separated by commas. Both sides must run the same code and see the run directory at the same path.
    """
    from triptych.core import listen as host

    told = {"framework": framework, "listening": str(listen)}
    host.serve(framework, listen, lambda: emit(told, as_json, f"{framework}: listening at {listen}"))
