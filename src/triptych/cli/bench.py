"""`triptych bench SUITE`: time proven models against each other. `triptych bench compare OLD NEW`: find what became slower."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from triptych.cli import called, emit, json_option
from triptych.core.errors import Regression, TooNoisy, UsageError

if TYPE_CHECKING:
    from triptych.bench.suite import Suite


@click.command("bench")
@click.argument("what", nargs=-1, metavar="[SUITE | compare OLD NEW]")
@click.option("--frameworks", help="Comma-separated; without it, the suite's.")
@click.option("--lanes", help="Comma-separated; without it, the suite's.")
@click.option("--modes", help="Comma-separated: inference, training_step, training_step_with_data.")
@click.option("--batch-sizes", help="Comma-separated; without it, the suite's.")
@click.option("--rounds", type=click.IntRange(min=2), help="Turns of each case; without it, the suite's.")
@click.option("--threads", type=click.IntRange(min=1), help="Of every framework alike; without it, the suite's, or the cores there are.")
@click.option(
    "--compile-cache", type=click.Choice(["cold", "warm"]), help="Compile everything anew, or find it compiled; without it, the suite's."
)
@click.option("--data", help="Training images of training_step_with_data, as `triptych train` takes them; without it, the suite's.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the inputs and the order of turns.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The record; without it, WORK/SUITE.json.")
@click.option(
    "--work", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/bench"), show_default=True, help="Proofs, logs."
)
@click.option("--dry-run", is_flag=True, help="Check the suite and list its cases; nothing is started.")
@json_option
def bench_command(
    what: tuple[str, ...], frameworks: str | None, lanes: str | None, modes: str | None, batch_sizes: str | None, rounds: int | None,
    threads: int | None, compile_cache: str | None, data: str | None, seed: int | None, out: Path | None, work: Path, dry_run: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Time SUITE (quick, resnet50, inference, latency, training, or a .yaml file): ours only with a proof, in interleaved turns;
    intervals of paired ratios.

    Exit code 4: a proof failed or outputs strayed; 1: another case failed; either way the record holds all rows. `compare`: 6 when
    something became slower, 5 when the records cannot tell.
    """
    if what[:1] == ("compare",):
        _compare(what[1:], as_json)
        return
    if len(what) > 1:
        raise UsageError(f"one suite at a time; given {', '.join(what)}. To compare records: triptych bench compare OLD NEW")
    from triptych.bench import session, suite
    from triptych.cli.progress import status

    chosen = suite.load(
        what[0] if what else "quick", frameworks=_listed(frameworks), lanes=_listed(lanes), modes=_listed(modes),
        batch_sizes=_listed(batch_sizes), rounds=rounds, threads=threads, compile_cache=compile_cache, data=data, seed=seed,
    )  # fmt: skip
    if dry_run:
        planned = session.plan(chosen)
        emit(planned, as_json, _planned(chosen, planned))
        return
    out = out or work / f"{chosen.name}.json"
    with status(f"bench {chosen.name}") as progress:
        made = session.run(chosen, called("bench", *(what or ("quick",))), work, out, progress)
    emit(made, as_json, f"{table(made)}\n{out}, raw samples beside it")
    failed = session.outcome(made)
    if failed is not None:
        raise failed


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _planned(chosen: Suite, planned: dict[str, Any]) -> str:
    lines = [
        f"{row['model']}/{row['mode']}/{row['batch_size']}/{row['framework']}/{row['lane']}"
        + (f": not here, {row['unavailable']}" if row["unavailable"] else "")
        for row in planned["cases"]
    ]
    end = f"{len(lines)} cases, {planned['turns']} turns in {chosen.rounds} rounds, {planned['threads']} threads; nothing was timed"
    return "\n".join([*lines, end])


HEAD = (
    f"  {'lane':<26}{'median':>11}{'95 % interval':>28}{'p90':>9}{'p95':>9}{'p99':>9}{'images/s':>10}{'peak':>7}{'memory':>10}"
    f"{'compile':>9}  proof"
)


def table(made: dict[str, Any]) -> str:
    """A record as text: the groups, their rows, who was faster, what this machine could show; and under what numerics."""
    lines = []
    for group in made["groups"]:
        key = {name: group[name] for name in ("model", "mode", "batch_size")}
        rows = [row for row in made["rows"] if all(row[name] == value for name, value in key.items())]
        data = next((f", data: {row['data']}" for row in rows if row.get("data")), "")
        lines.append(f"\n{group['model']}, {group['mode'].replace('_', ' ')}, batch {group['batch_size']}{data}")
        lines.append(HEAD)
        lines += [_line(row) for row in rows]
        lines += [f"  {_pair(pair)}" for pair in group["comparisons"]]
        lines += [f"  {note}" for row in rows for note in _notes(row)]
        if group["a_a"]:
            smallest = f"the smallest difference this machine could show: {group['a_a']['smallest_difference']:.1%}"
            lines.append(f"  {smallest}; {group['noisy_rounds']} of {group['rounds']} rounds were noisy")
    return "\n".join([*lines, "", *_policy(made)]).lstrip("\n")


def _line(row: dict[str, Any]) -> str:
    name = f"{row['framework']}/{row['lane']}"
    if "failure" in row:
        return f"  {name:<26}{'not here' if row['unavailable'] else 'FAILED'}: {row['failure']}"
    low, high = row["interval"]
    interval = f"{low * 1e3:.3f} to {high * 1e3:.3f} ms"
    latency = "".join("      n/a" if row[name] is None else f"{row[name] * 1e3:>9.3f}" for name in ("p90", "p95", "p99"))
    memory = "n/a" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:.0f} MiB"
    figures = f"{row['median'] * 1e3:>8.3f} ms{interval:>28}{latency}{row['images_per_second']:>10.1f}{row['peak_share']:>7.0%}{memory:>10}"
    return f"  {name:<26}{figures}{row['compile_seconds']:>7.1f} s  {row['certificate']['kind']}"


def _notes(row: dict[str, Any]) -> list[str]:
    """Beside a row: why it is no equal of ours, samples far out, which are in its figures like all others, when a compilation has paid."""
    if "failure" in row:
        return []
    name, steps, count = f"{row['framework']}/{row['lane']}", row.get("break_even_steps"), row["outliers"]
    far = f"{name}: {count} of {row['n']} samples far out, the slowest {row['slowest'] * 1e3:.3f} ms; none is dropped"
    paid = f"{name}: has made up for its compilation after {steps} steps"
    proof = row["certificate"]
    unequal = f"{name}: another model, {proof.get('reason')}; {proof.get('flop_ratio', 0.0):.2f} times the FLOPs"
    return [unequal] * ("flop_ratio" in proof) + [far] * bool(count) + [paid] * bool(steps)


def _policy(made: dict[str, Any]) -> list[str]:
    """Threads, cores, caches and what float32 means, the same for all; then what each framework says of it."""
    machine, cache = made["machine"], made["suite"]["compile_cache"]
    bound = f"bound to cores {', '.join(map(str, machine['cores']))}" if machine["cores"] else "bound to no cores"
    lines = [f"{machine['threads']} threads, {bound}; compile cache: {cache}"]
    lines += [f"numerics, {what}: {how}" for what, how in machine["numerics"].items()]
    for name, told in made["frameworks"].items():
        lines += [f"{name}: " + "; ".join(f"{what} {how}" for what, how in told["numerics"].items())] * bool(told["numerics"])
    return lines


def _pair(pair: dict[str, Any]) -> str:
    low, high = pair["interval"]
    who = f"{pair['winner']} is faster" if pair["winner"] else "no winner"
    return f"{pair['a']} / {pair['b']}: {pair['ratio']:.3f} ({low:.3f} to {high:.3f}): {who}"


def _compare(paths: tuple[str, ...], as_json: bool) -> None:
    if len(paths) != 2:
        raise UsageError(f"compare takes two records, OLD and NEW; given {len(paths)}")
    from triptych.bench import compare

    result = compare.compare(Path(paths[0]), Path(paths[1]))
    emit(result, as_json, compare.table(result))
    verdicts = [row["verdict"] for row in result["rows"]]
    if "slower" in verdicts:
        raise Regression(f"{verdicts.count('slower')} of {len(verdicts)} case(s) became slower")
    if "cannot tell" in verdicts:
        hint = f"a regression of {compare.THRESHOLD:.0%} could hide in them: take more rounds, or a quieter machine"
        raise TooNoisy(f"{verdicts.count('cannot tell')} of {len(verdicts)} case(s) cannot be told; {hint}")
