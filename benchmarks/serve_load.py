"""`triptych serve` under load: what batching brings, whether saturation leaves memory flat and every accepted request answered, and what
happens when the model's process is killed.

    .venv/bin/python benchmarks/serve_load.py DIR [--also DIR] [--rounds 12] [--seconds 5] [--saturate 600] [--kill 30]
    .venv/bin/python benchmarks/serve_load.py --write-doc      # the tables of docs/serving.md, from the record

DIR is an artefact of `triptych export`, `--also` another one that only the last part serves. Some 14 minutes with these settings:

- turns: a batched and an unbatched server run all the time; in a turn every client sends one image at a time to one of them, as a binary
  tensor, and waits for its answer. The ratio of throughputs is by pairs of turns of one round; the order changes from round to round.
- saturation: more clients than the queue has places. Who is refused (503) comes back when `Retry-After` says; whatever else is not an
  answer has failed. Resident memory is read every five seconds.
- kills: the model's process is killed (SIGKILL) every five seconds under load, when there is one.

Clients and servers share the machine's cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from clients import REFUSED, Load, load
from measuring import RESULTS, fill, head, write_json
from serve_fuzz import request
from served import busy_seconds, repeatedly, serving

from triptych.bench.script import at_least
from triptych.bench.statistics import PERCENTILES, paired_interval, percentiles
from triptych.core.conversation import available_threads
from triptych.export import runtimes
from triptych.serving import artefact

DOCUMENT = Path(__file__).parents[1] / "docs" / "serving.md"
KINDS = {"batched": [], "unbatched": ["--max-batch", "1"]}
COMMAND = "benchmarks/serve_load.py"
SPENT = ("server", "worker", "client")


def body_of(served: artefact.Artefact) -> bytes:
    """A request for one image, with binary tensors both ways."""
    image = np.random.default_rng(0).standard_normal((1, *served.shape), dtype=np.float32).tobytes()
    tensor = {"name": "images", "datatype": "FP32", "shape": [1, *served.shape], "parameters": {"binary_data_size": len(image)}}
    start = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return request(f"/v2/models/{served.name}/infer", start + image, {"inference-header-content-length": str(len(start))})


def told(loads: list[Load]) -> dict[str, Any]:
    """What clients saw; a percentile is null below the samples that it needs."""
    seconds = [value for each in loads for value in each.seconds]
    statuses = sum((each.statuses for each in loads), collections.Counter[int]())
    return {
        "answers_per_second": [each.answers_per_second for each in loads], "samples": len(seconds),
        "seconds": {"p50": float(np.median(seconds)), **percentiles(seconds), "longest": max(seconds)},
        "samples_needed": {name: needed for name, (_, needed) in PERCENTILES.items()},
        "statuses": {str(status): count for status, count in statuses.items()}, "failed": sum(each.failed for each in loads),
    }  # fmt: skip


def runtime_alone(model: artefact.Artefact) -> dict[str, dict[str, float]]:
    """Seconds an image in the runtime alone, the fastest of 15 turns, by the size of the batch: what batching can win there.

    With one thread, with two, and by two sessions of one thread each, which compute a batch of that size at the same time.
    """
    return {f"{sessions} x {threads}": _alone(model, sessions, threads) for sessions, threads in ((1, 1), (1, 2), (2, 1))}


def _alone(model: artefact.Artefact, sessions: int, threads: int) -> dict[str, float]:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    runs = [runtimes.opened(model.runtime, model.path) for _ in range(sessions)]
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    found = {}
    with ThreadPoolExecutor(sessions) as pool:
        for size in (1, 2, 4, 8, 16, 32):
            batch, seconds = np.zeros((size, *model.shape), np.float32), []
            for _ in range(16):
                began = time.perf_counter()
                list(pool.map(lambda run, batch=batch: run(batch), runs))
                seconds.append(time.perf_counter() - began)
            found[str(size)] = min(seconds[1:]) / size / sessions
    return found


def turns(directory: Path, sent: bytes, given: argparse.Namespace) -> dict[str, Any]:
    """Batched against unbatched."""
    loads: dict[str, list[Load]] = {kind: [] for kind in KINDS}
    spent: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with serving(directory, KINDS) as servers:
        for served in servers.values():
            load(served.port, sent, given.clients, min(2.0, given.seconds))
        others, started = busy_seconds(servers), time.perf_counter()
        for number in range(given.rounds):
            for kind in list(KINDS)[:: 1 if number % 2 else -1]:
                began = servers[kind].cpu_seconds()
                loads[kind].append(found := load(servers[kind].port, sent, given.clients, given.seconds))
                seconds = {name: value - began[name] for name, value in servers[kind].cpu_seconds().items()} | {"client": found.cpu_seconds}
                spent[kind].append({name: value / found.statuses.total() for name, value in seconds.items()})
                say(f"round {number + 1}: {kind:<10}{found.answers_per_second:8.1f} answers/s, processor time an answer {spent[kind][-1]}")
        others = (busy_seconds(servers) - others) / (time.perf_counter() - started) / (os.cpu_count() or 1)
    rates = {kind: [each.answers_per_second for each in loads[kind]] for kind in KINDS}
    ratio, interval = paired_interval(rates["batched"], rates["unbatched"])
    rows = {
        kind: told(loads[kind]) | {"median_answers_per_second": statistics.median(rates[kind]), "cpu_seconds_an_answer": spent[kind]}
        for kind in KINDS
    }
    say(f"batched over unbatched: {ratio:.2f} {interval}")
    return {"batched_over_unbatched": ratio, "interval": interval, "rows": rows, "others_share_of_cores": others}


def saturation(directory: Path, sent: bytes, given: argparse.Namespace) -> dict[str, Any]:
    """More clients than the queue has places, for minutes."""
    read: list[dict[str, float]] = []
    with serving(directory, {"batched": []}) as servers:
        served = servers["batched"]
        with repeatedly(lambda passed: read.append({"seconds": passed, **served.memory()})):
            found = load(served.port, sent, given.saturating, given.saturate)
        restarts = served.metric("triptych_worker_restarts_total")
    memory = {name: flatness([(each["seconds"], each[name]) for each in read]) for name in ("server", "worker")}
    say(f"saturation: {found.answers_per_second:.1f} answers/s, {dict(found.statuses)}, memory {memory}")
    what = {"clients": given.saturating, "for_seconds": given.saturate, "worker_restarts": restarts}
    return {**what, **told([found]), "resident_bytes": memory, "readings": read}


def flatness(points: list[tuple[float, float]]) -> dict[str, float]:
    """First and last reading of bytes, and the slope of a straight line through all but the first tenth, in bytes a minute."""
    later = np.array(points[len(points) // 10 :])
    return {"start": points[0][1], "end": points[-1][1], "slope_per_minute": 60 * float(np.polyfit(later[:, 0], later[:, 1], 1)[0])}


def kills(directory: Path, sent: bytes, given: argparse.Namespace) -> dict[str, Any]:
    """The model's process is killed time and again."""
    killed: list[float] = []
    with serving(directory, {"batched": []}) as servers:
        served = servers["batched"]

        def kill(passed: float) -> None:
            if served.ready():
                os.kill(served.worker, signal.SIGKILL)
                killed.append(passed)

        with repeatedly(kill):
            found = load(served.port, sent, given.clients, given.kill)
        restarts = served.metric("triptych_worker_restarts_total")
        starts = [json.loads(line)["seconds"] for line in served.log.read_text().splitlines() if '"event": "worker"' in line]
    say(
        f"{len(killed)} kills of {directory.name}: {dict(found.statuses)}, {restarts:g} restarts, longest answer {max(found.seconds):.2f} s"
    )
    return {"kills": killed, "worker_restarts": restarts, "worker_start_seconds": starts, **told([found])}


def blocks(record: dict[str, Any]) -> dict[str, str]:
    """What stands between the marks of docs/serving.md."""
    return {"turns": _turns(record), "saturation": _saturation(record["saturation"]), "kills": _kills(record["kills"])}


def _turns(record: dict[str, Any]) -> str:
    alone, others = record["runtime_seconds_an_image"], record["others_share_of_cores"]
    low, high = record["interval"]
    where = f"{record['threads']} thread(s) of {record['environment']['cpu']['model']}; other programs had {others:.0%} of the cores"
    lines = [
        f"`{record['command']}`, {where}.",
        "",
        "| | answers/s | p50 | p90 | p99 | answers, all 200 | processor time an answer: server | model | clients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in record["rows"].items():
        spent = [milliseconds(statistics.median(each[name] for each in row["cpu_seconds_an_answer"])) for name in SPENT]
        seen = [milliseconds(row["seconds"][name]) for name in ("p50", "p90", "p99")]
        all_good = row["samples"] == sum(row["statuses"].values())
        count = f"{row['samples']:,}" if all_good else f"{row['samples']:,} of {sum(row['statuses'].values()):,}"
        lines.append(f"| {kind} | {row['median_answers_per_second']:.0f} | {' | '.join([*seen, count, *spent])} |")
    pairs = len(record["rows"]["batched"]["answers_per_second"])
    return "\n".join([
        *lines, "",
        f"Batched over unbatched: {record['batched_over_unbatched']:.2f} (95 % interval {low:.2f} to {high:.2f}, {pairs} pairs).",
        "", "The runtime alone, milliseconds an image by the size of the batch:", "",
        f"| sessions x threads | {' | '.join(alone['1 x 1'])} |", "|---" * (len(alone["1 x 1"]) + 1) + "|",
        *(f"| {way} | {' | '.join(f'{value * 1e3:.2f}' for value in sizes.values())} |" for way, sizes in alone.items()),
    ])  # fmt: skip


def _saturation(part: dict[str, Any]) -> str:
    refused, memory = part["statuses"].get(str(REFUSED), 0), []
    for name, told in part["resident_bytes"].items():
        start, end, slope = told["start"] / 2**20, told["end"] / 2**20, told["slope_per_minute"] / 2**10
        memory.append(f"{name} {start:.1f} to {end:.1f} MiB, {slope:+.1f} KiB a minute")
    rate, p99 = part["answers_per_second"][0], milliseconds(part["seconds"]["p99"])
    return (
        f"{part['clients']} clients for {part['for_seconds']:.0f} s: {part['samples']:,} answers, {rate:.0f} a second, p99 {p99};\n"
        f"{refused:,} were refused (503) and came back, {part['failed']} failed, {part['worker_restarts']:.0f} restarts.\n"
        f"Resident memory: {'; '.join(memory)}."
    )


def _kills(parts: dict[str, Any]) -> str:
    lines = [
        "| artefact | kills | answers 200 | refused | failed | longest answer | a new process is ready after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in parts.items():
        cells = [
            name, str(len(part["kills"])), f"{part['samples']:,}", str(part["statuses"].get(str(REFUSED), 0)), str(part["failed"]),
            f"{part['seconds']['longest']:.2f} s", f"{statistics.median(part['worker_start_seconds']):.2f} s",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def milliseconds(seconds: float | None) -> str:
    """For people; n/a where there are too few samples."""
    return "n/a" if seconds is None else f"{seconds * 1e3:.2f} ms"


def say(text: str) -> None:
    """Progress."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    """Each part in turn, and one record of all."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", nargs="?")
    parser.add_argument("--also", type=Path, metavar="DIR", help="Another artefact, whose process is killed too.")
    parser.add_argument("--clients", type=at_least(1), default=32)
    parser.add_argument("--rounds", type=at_least(2), default=12)
    parser.add_argument("--seconds", type=float, default=5.0, help="Of a turn.")
    parser.add_argument("--saturating", type=at_least(1), default=320, help="Clients at saturation; the queue has 256 places.")
    parser.add_argument("--saturate", type=float, default=600.0, help="Seconds at saturation.")
    parser.add_argument("--kill", type=float, default=30.0, help="Seconds of kills, for each artefact.")
    parser.add_argument("--out", type=Path, default=RESULTS / "serve" / "load.json")
    parser.add_argument("--write-doc", action="store_true", help="Only write the tables of docs/serving.md, from the record.")
    given = parser.parse_args()
    if given.write_doc:
        fill(DOCUMENT, blocks(json.loads(given.out.read_text())))
        return
    if given.directory is None:
        parser.error("give DIR, an artefact's directory")
    models = {path: artefact.load(path) for path in (given.directory, *([given.also] if given.also else []))}
    model, sent = models[given.directory], body_of(models[given.directory])
    what = {"model": model.name, "source": model.source, "clients": given.clients, "options": KINDS}
    settings = f"--clients {given.clients} --rounds {given.rounds} --seconds {given.seconds:g}"
    also = "".join(f" --also {path.name}" for path in list(models)[1:])
    command = f"{COMMAND} {given.directory.name}{also} {settings} --saturate {given.saturate:g} --kill {given.kill:g}"
    record = {
        **head(command), **what, "threads": available_threads(), "load_average_before": os.getloadavg(),
        "runtime_seconds_an_image": runtime_alone(model), **turns(given.directory, sent, given),
        "kills": {f"{each.source}-{each.format}": kills(path, body_of(each), given) for path, each in models.items()},
        "saturation": saturation(given.directory, sent, given),
        "load_average": os.getloadavg(),
    }  # fmt: skip
    write_json(given.out, record)


if __name__ == "__main__":
    main()
