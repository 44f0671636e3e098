"""`triptych report`: prove, train, compare, and write the report."""

from __future__ import annotations

from pathlib import Path

import click

from triptych.cli import emit, json_option
from triptych.core.errors import ParityFailed


@click.command("report")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/report"), show_default=True, help="Where the report is written.")
@click.option(
    "--runs", type=click.Path(path_type=Path), default=Path("runs/evidence"), show_default=True, help="Where runs are kept and reused."
)
@click.option(
    "--records", type=click.Path(path_type=Path, file_okay=False), default=Path("benchmarks/results"), show_default=True,
    help="Committed records of what was measured; absent ones are noted.",
)  # fmt: skip
@click.option("--fresh", is_flag=True, help="Reuse nothing.")
@click.option(
    "--evidence", type=click.Path(path_type=Path, dir_okay=False), default=None,
    help="Run nothing: the evidence.json of an earlier report, with the records as they are now.",
)  # fmt: skip
@json_option
def report_command(out: Path, runs: Path, records: Path, fresh: bool, evidence: Path | None, as_json: bool) -> None:
    """Prove resnet50, plant faults, train resnet20 in every installed framework, and write report.md and report.html."""
    from triptych.cli.progress import status
    from triptych.report import gather, pipeline, write_report

    with status("reading what is there") as show:
        work = pipeline.Pipeline(runs, fresh, records, show)
        found = gather.renewed(gather.read(evidence), records) if evidence else pipeline.evidence(work)
        verdict = write_report(found, out)
    steps = [{"name": s.name, "reused": s.reused, "seconds": s.seconds} for s in work.steps]
    claims = [{"claim": c.text, "measured": c.measured, "asked": c.asked, "holds": c.holds} for c in verdict.claims]
    lines = [verdict.headline]
    lines += [
        f"  {'yes' if c.holds else 'NO ' if c.holds is False else '?  '}  {c.text}: {c.measured} (asked: {c.asked})" for c in verdict.claims
    ]
    lines += [f"  {s.name}: {'reused' if s.reused else f'{s.seconds or 0.0:.0f} s'}" for s in work.steps]
    lines += [f"written: {out / 'report.md'}, {out / 'report.html'}"]
    emit({"verdict": verdict.word, "claims": claims, "steps": steps, "out": str(out)}, as_json, "\n".join(lines))
    if verdict.word == "FAIL":
        raise ParityFailed("the report's evidence does not hold; see the claims above")
