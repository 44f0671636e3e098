"""Speed, debugging, what the chapter expected: what is read of committed records, asked of them, and said of absent ones."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import main
from triptych.core.contract import FRAMEWORKS
from triptych.core.errors import InputRefused
from triptych.report import gather, measurements, pipeline, write_report
from triptych.report.bars import INFERENCE, TRAINING, bars
from triptych.report.blocks import Block, Cell, Note, Picture, Table, Text
from triptych.report.debugging import debugging
from triptych.report.evidence import Evidence, from_dict, to_dict
from triptych.report.expected import EXPECTED, expected
from triptych.report.exported import exported
from triptych.report.performance import performance
from triptych.report.verdict import Claim

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
ENVIRONMENT = {"cpu": {"model": "Test CPU", "cores": 2, "affinity": 2}}
SERVED = {
    "pytorch/default": 1.0, "pytorch/tuned": 0.6, "pytorch/tuned_compiled": 0.5, "pytorch/stock": 0.9, "onnxruntime/default": 0.55,
    "openvino/default": 0.5, "tensorflow/default": 0.8, "tensorflow/tuned": 0.6, "tensorflow/stock": 0.75, "jax/default": 1.0,
    "jax/tuned": 0.5, "jax/stock": 0.9,
}  # fmt: skip
"""Seconds of an inference suite in which every bar holds."""
TRAINED = {
    f"{name}/{lane}": value for name in FRAMEWORKS for lane, value in {"default": 1.0, "tuned": 0.45, "stock": 1.0}.items()
}  # fmt: skip


def bench(
    name: str, seconds: dict[str, float | None], mode: str = "inference", model: str = "resnet50", width: float = 0.02, size: int = 8
) -> dict[str, Any]:
    """A record of `triptych bench` at batch `size`: who takes how long, with intervals `width` wide on both sides; None failed."""
    rows = [{**row(*contestant.split("/"), mode, model, value), "batch_size": size} for contestant, value in seconds.items()]
    timed = [(contestant, value) for contestant, value in seconds.items() if value is not None]
    pairs = [
        {
            "a": a, "b": b, "ratio": x / y, "interval": [x / y * (1 - width), x / y * (1 + width)],
            "winner": None if abs(x / y - 1) <= width else a if x < y else b,
        }
        for (a, x), (b, y) in itertools.combinations(timed, 2)
    ]  # fmt: skip
    group = {"model": model, "mode": mode, "batch_size": size, "rounds": 20, "noisy_rounds": 3, "a_a": {"smallest_difference": 0.01}}
    return {
        "schema": 1, "environment": ENVIRONMENT, "command": f"triptych bench {name}", "suite": {"name": name, "new": 1}, "rows": rows,
        "frameworks": {name: {"import_seconds": 2.0, "lines_of_code": 5} for name in FRAMEWORKS},
        "groups": [{**group, "comparisons": pairs}],
    }  # fmt: skip


def row(framework: str, lane: str, mode: str, model: str, seconds: float | None) -> dict[str, Any]:
    head = {"framework": framework, "model": model, "options": {}, "lane": lane, "mode": mode, "batch_size": 8}
    if seconds is None:
        return {**head, "certificate": {"kind": "none", "reason": "it broke"}, "median": None, "interval": None, "failure": "it broke"}
    unequal = {"kind": "none", "reason": "another model", "flop_ratio": 0.94}
    equal = {"kind": "parity" if lane != "stock" else "outputs"}
    return {
        **head, "certificate": unequal if (framework, lane) == ("tensorflow", "stock") else equal, "median": seconds,
        "interval": [0.99 * seconds, 1.01 * seconds], "n": 20, "images_per_second": 8 / seconds, "build_seconds": 0.5,
        "first_call_seconds": seconds + 1, "compile_seconds": 1.0, "peak_memory_bytes": 2**30 + len(framework), "peak_share": 0.5,
        "unknown_to_us": [1],
    }  # fmt: skip


def shape_error(framework: str, mode: str, *, named: bool) -> dict[str, Any]:
    return {
        "framework": framework, "mode": mode, "bug": "linear", "layer": "fc", "stage": "calling", "exception": "a.b.ShapeError",
        "message": "64 and 65", "names_layer": named, "names_both_sizes": True, "shows_call": True,
        "model_line": None, "traceback_lines": 20,
    }  # fmt: skip


def group(part: str, seconds: dict[str, float]) -> dict[str, Any]:
    lanes = {name: {"seconds": [value * (1 + 0.001 * i) for i in range(5)]} for name, value in seconds.items()}
    setting = {"part": part, "workload": "block", "task": "forward", "batch_size": 8}
    return {"schema": 1, "groups": [{"key": f"{part}/8", "setting": setting, "lanes": lanes, "twin": None}]}


def artefact(source: str, kind: str, runtime: str, seconds: float, error: float = 3e-7) -> dict[str, Any]:
    def call(batch: int) -> dict[str, Any]:
        return {
            "median_seconds": seconds * batch, "interval": [0.99 * seconds * batch, 1.01 * seconds * batch],
            "images_per_second": 1 / seconds, "times_the_fastest": seconds, "times_the_fastest_interval": [0.98 * seconds, 1.02 * seconds],
        }  # fmt: skip

    return {
        "source": source, "format": kind, "runtime": runtime, "model": "resnet50", "passed": True, "worst_error": error, "bytes": 2**20,
        "load_seconds": 0.5, "latency": {"1": call(1), "7": call(7)}, "failure": None, "unavailable": None, "unknown_to_us": 1,
    }  # fmt: skip


def exports(jpeg: bool = True, only: str = "") -> dict[str, Any]:
    """A record of the matrix of exports: ONNX Runtime first, OpenVINO 1.01 of it and not told apart, LiteRT in int8 before both."""
    rows = [
        artefact("pytorch", "onnx", "onnxruntime", 1.0), artefact("pytorch", "openvino", "openvino", 1.01),
        artefact("tensorflow", "onnx", "onnxruntime", 1.1), artefact("tensorflow", "saved_model", "saved_model", 2.0),
        artefact("tensorflow", "tflite_float16", "litert", 0.7, 4e-4), artefact("jax", "stablehlo", "stablehlo", 3.0),
    ]  # fmt: skip
    rows[3]["serve_images"] = {"passed": True} if jpeg else None
    return {"environment": ENVIRONMENT, "rows": [row for row in rows if only in row["source"]]}


def whole() -> dict[str, Any]:
    """A record of each part, under its path, in which every bar holds and JAX is what the chapter expects."""
    profiled = {"model": "resnet50", "mode": "training_step", "lane": "default", "batch_size": 8, "environment": ENVIRONMENT}
    step = {"step_seconds": 2.0, "categories": {"convolution": 1.5, "novel": 0.3}, "unattributed_share": 0.1, "mixed_share": 0.0}
    top = [{"operation": "conv", "share": 0.7, "category": "convolution"}]
    speeds = [
        {"framework": name, "model": "resnet50", "lane": lane, "against": "stock", "ratio": 2.5, "interval": [2.4, 2.6], "n": 9}
        for name in FRAMEWORKS
        for lane in ("default", "tuned")
    ]
    return {
        "bench/inference.json": bench("inference", SERVED),
        "bench/training.json": bench("training", TRAINED, mode="training_step", size=32),
        "profile/resnet50.json": {
            **profiled, "rows": [{"framework": name, **step, "top": top} for name in FRAMEWORKS] + [{"framework": "x", "failure": "broke"}],
        },
        "debugging/shape_bug.json": {
            "environment": ENVIRONMENT, "bugs": [{"name": "linear", "text": "65 for 64"}],
            "rows": [shape_error(name, mode, named=name != "pytorch") for name in FRAMEWORKS for mode in ("eager", "compiled")],
        },
        "transformer/passes.json": group("passes", {"pytorch/eager": 2.0, "jax/eager": 3.0, "jax/jit": 1.0, "tensorflow/eager": 2.0}),
        "transformer/vmap.json": group("vmap", {"jax/jit loop": 2.0, "jax/jit vmap": 1.0, "jax/jit batched": 1.0}),
        "export/matrix.json": exports(),
        "speed/step.json": {"rows": speeds},
    }  # fmt: skip


def evidence_of(folder: Path, files: dict[str, Any]) -> Evidence:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"schema": 1, **data}))
    return Evidence(**gather.recorded(folder), commands=dict(pipeline.commands()))


def failed(claims: list[Claim]) -> list[str]:
    return [claim.text for claim in claims if claim.holds is not True]


def text_of(blocks: list[Block]) -> str:
    return " ".join(cell.text for block in blocks if isinstance(block, Table) for line in block.rows for cell in line)


def test_every_bar_can_hold(tmp_path: Path) -> None:
    claims = list(bars(evidence_of(tmp_path, whole())))
    assert failed(claims) == []
    assert len(claims) == len(INFERENCE) + len(TRAINING) + 2 * len(FRAMEWORKS)
    assert all(claim.command for claim in claims)
    served = claims[0]
    assert "PyTorch tuned and compiled, over torchvision" in served.text
    assert served.measured.startswith("1.80× (1.76 to 1.84); 50% of peak")
    assert "openvino" in claims[1].text.lower(), "the faster of the two is the rival"
    assert "0.94× the FLOPs" in claims[2].text


@pytest.mark.parametrize(
    ("slower", "text"),
    [
        ({"pytorch/tuned": 0.62, "pytorch/tuned_compiled": 0.61}, "torchvision"),
        ({"openvino/default": 0.46}, "OpenVINO"),
        ({"onnxruntime/default": 0.46}, "OpenVINO"),
        ({"tensorflow/tuned": 0.69}, "predict"),
        ({"jax/tuned": 0.66}, "plain jit"),
    ],
)
def test_a_lane_that_is_too_slow_fails_its_bar(slower: dict[str, float], text: str, tmp_path: Path) -> None:
    claims = list(bars(evidence_of(tmp_path, {"bench/inference.json": bench("inference", {**SERVED, **slower})})))
    fallen = [claim.text for claim in claims if claim.holds is False]
    assert any(text in each for each in fallen)


def test_a_training_step_is_held_to_its_bars_at_a_batch_one_trains_on(tmp_path: Path) -> None:
    slow = {f"{name}/{lane}": 1.0 for name in FRAMEWORKS for lane in ("default", "tuned", "stock")}
    told = {}
    for size in (8, 32):
        evidence = evidence_of(tmp_path / str(size), {"bench/x.json": bench("x", slow, mode="training_step", size=size)})
        told[size] = [claim.holds for claim in bars(evidence) if claim.text.startswith("Training step")]
    assert told == {8: [], 32: [True, False] * len(FRAMEWORKS)}


def test_the_lower_end_counts_where_it_is_asked_for(tmp_path: Path) -> None:
    wide = evidence_of(tmp_path, {"bench/inference.json": bench("inference", SERVED, width=0.08)})
    assert [claim.holds for claim in bars(wide)][:2] == [True, False]


@pytest.mark.parametrize("absent", ["openvino/default", "jax/stock", "jax/tuned"])
def test_a_bar_without_one_of_its_sides_is_not_shown(absent: str, tmp_path: Path) -> None:
    claims = list(bars(evidence_of(tmp_path, {"bench/inference.json": bench("inference", {**SERVED, absent: None})})))
    served = claims[: len(INFERENCE)]
    assert [claim.holds for claim in served].count(None) == 1
    assert False not in [claim.holds for claim in served]


def test_an_empty_folder_names_every_command_and_claims_nothing(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, {})
    assert {claim.holds for claim in bars(evidence)} == {None}
    notes = [block.text for block in [*performance(evidence), *debugging(evidence), *exported(evidence)] if isinstance(block, Note)]
    asked = {part: command for part, command in measurements.COMMANDS.items() if part not in ("passes", "vmaps")}
    assert all(any(command in note for note in notes) for command in asked.values())
    table = next(block for block in expected(evidence) if isinstance(block, Table))
    assert {line[3].text for line in table.rows} == {"not measured"}
    assert len(table.rows) == len(EXPECTED)


def test_every_part_has_its_table(tmp_path: Path) -> None:
    evidence = evidence_of(tmp_path, whole())
    assert not [
        part
        for part in evidence.missing
        if part in measurements.COMMANDS and part not in ("bench_latency", "bench_quick", "bench_resnet50")
    ]
    shown = [*performance(evidence), *debugging(evidence), *exported(evidence)]
    captions = " ".join(block.caption for block in shown if isinstance(block, (Table, Picture)))
    for words in (
        "what was asked",
        "inference, suite inference",
        "every pair",
        "first step",
        "profiled iteration",
        "shape bug",
        "exported to",
        "Every artefact",
    ):
        assert words in captions
    words = text_of(shown)
    for cell in ("1.80× (1.76 to 1.84)", "1.00 GiB", "not: another model (0.94× our FLOPs)", "novel", "ShapeError", "4.5 s"):
        assert cell in words
    assert "2 cores of Test CPU" in str([block for block in shown if not isinstance(block, (Table, Picture))])


def test_a_failed_case_is_a_row_with_its_reason_and_a_lane_that_is_not_there_is_told(tmp_path: Path) -> None:
    files = {"bench/inference.json": bench("inference", {**SERVED, "jax/tuned": None, "jax/default": None})}
    files["bench/inference.json"]["rows"][-3]["unavailable"] = True
    shown = list(performance(evidence_of(tmp_path, files)))
    table = next(block for block in shown if isinstance(block, Table) and "No such lane" in block.caption)
    assert "JAX default" in table.caption
    lines = [line for line in table.rows if line[2] == Cell("failed", "fail")]
    assert [(line[1].text, line[-1].text) for line in lines] == [("JAX\u00a0tuned", "it broke")]
    assert len(table.rows) == len(SERVED) - 1


def test_a_latency_has_percentiles_where_the_steps_are_enough(tmp_path: Path) -> None:
    record = bench("latency", SERVED, size=1)
    record["rows"][0] |= {"n": 140, "p90": 1.2, "p95": 1.34, "p99": None, "slowest": 1.5}
    shown = performance(evidence_of(tmp_path, {"bench/latency.json": record, "bench/inference.json": bench("inference", SERVED)}))
    (table,) = [block for block in shown if isinstance(block, Table) and "latency of a batch" in block.caption]
    assert "suite latency" in table.caption, "the other suite has no percentile, and no such table"
    first = [cell.text for cell in table.rows[0]]
    assert first == ["1", "PyTorch\u00a0default", "1,000 ms", "1,200 ms", "1,340 ms", "n/a", "1,500 ms", "140"]
    assert [cell.text for cell in table.rows[1]][3:6] == ["n/a"] * 3
    assert len(table.rows) == len(SERVED)


def test_a_warm_compile_cache_is_told_and_shows_no_time_to_a_first_step(tmp_path: Path) -> None:
    files = {"bench/inference.json": bench("inference", SERVED)}
    files["bench/inference.json"]["suite"]["compile_cache"] = "warm"
    shown = [*performance(evidence := evidence_of(tmp_path, files)), *debugging(evidence)]
    assert "an earlier process" in str([block for block in shown if isinstance(block, Text)])
    assert any("No time to the first step" in block.text for block in shown if isinstance(block, Note))


def test_exports_are_held_to_their_bounds_and_the_fastest_runtime_is_named(tmp_path: Path) -> None:
    record = exports()
    shown = list(exported(evidence_of(tmp_path, {**whole(), "export/matrix.json": record})))
    claims = next(block for block in shown if isinstance(block, Table) and "asked" in block.caption)
    assert [(line[1].text, line[3].text) for line in claims.rows] == [
        ("5 of 5, the worst 3.0e-07", "holds"),
        ("1 of 1, the worst 4.0e-04", "holds"),
    ]
    told = [block.text for block in shown if isinstance(block, Text)]
    assert any(
        "ONNX Runtime (pytorch-onnx) is first at batch 1: 1e+03 ms" in text and "not told apart from OpenVINO" in text for text in told
    )
    last = [block for block in shown if isinstance(block, Table)][-1]
    assert last.rows[0][1].text == "LiteRT, float16 weights"
    record["rows"][0] |= {"passed": False, "failure": "0.1 at batch 7, bound 1e-5", "latency": {}}
    shown = list(exported(evidence_of(tmp_path, {**whole(), "export/matrix.json": record})))
    claims = next(block for block in shown if isinstance(block, Table) and "asked" in block.caption)
    assert [line[3].text for line in claims.rows] == ["fails", "holds"]
    assert any(Cell("0.1 at batch 7, bound 1e-5", "fail") in line for block in shown if isinstance(block, Table) for line in block.rows)
    assert any("No artefact was measured" in block.text for block in exported(Evidence()) if isinstance(block, Note))


@pytest.mark.parametrize(
    ("change", "where", "verdict"),
    [
        ({}, "XLA gains", "agrees"),
        ({"transformer/passes.json": group("passes", {"pytorch/eager": 1.0, "jax/jit": 2.0})}, "XLA gains", "differs"),
        ({"transformer/passes.json": group("passes", {"pytorch/eager": 1.0, "jax/jit": 1.0})}, "XLA gains", "undecided"),
        ({}, "vmap", "agrees"),
        ({}, "highest throughput", "undecided"),
        ({"bench/inference.json": bench("inference", {**SERVED, "jax/tuned": 0.3})}, "highest throughput", "agrees"),
        ({"bench/inference.json": bench("inference", {**SERVED, "jax/tuned": 0.9})}, "highest throughput", "differs"),
        ({}, "easiest to debug", "in part"),
        ({}, "less memory", "agrees"),
        ({}, "deployment", "agrees"),
        ({"export/matrix.json": exports(jpeg=False)}, "deployment", "undecided"),
        ({"export/matrix.json": exports(only="pytorch")}, "deployment", "differs"),
        ({"export/matrix.json": {"rows": []}}, "deployment", "not measured"),
    ],
)
def test_a_verdict_follows_from_the_records(change: dict[str, Any], where: str, verdict: str, tmp_path: Path) -> None:
    table = next(block for block in expected(evidence_of(tmp_path, {**whole(), **change})) if isinstance(block, Table))
    assert next(line[3].text for line in table.rows if where in line[0].text) == verdict


def test_the_committed_records_are_read_and_survive_the_evidence() -> None:
    evidence = gather.renewed(Evidence(), COMMITTED)
    assert {suite.name for suite in evidence.performance.suites} >= {"quick"}
    assert {profile.framework for profile in evidence.performance.profiles} == set(FRAMEWORKS)
    assert len(evidence.performance.shape_errors) == 18
    assert from_dict(json.loads(json.dumps(to_dict(evidence)))) == evidence


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("bench/inference.json", {"rows": [{"framework": "jax"}]}),
        ("bench/inference.json", {"suite": None}),
        ("profile/resnet50.json", {"rows": [{"framework": "jax"}]}),
        ("debugging/shape_bug.json", {"rows": [{"framework": 3}]}),
        ("debugging/shape_bug.json", {"bugs": [1]}),
        ("transformer/passes.json", {"groups": [{}]}),
        ("transformer/vmap.json", {"groups": 3}),
        ("export/matrix.json", {"rows": [{"source": "jax"}]}),
        ("export/matrix.json", {"rows": [artefact("jax", "novel", "onnxruntime", 1.0)]}),
    ],
)
def test_a_file_that_is_no_record_is_refused_by_name(path: str, change: dict[str, Any], tmp_path: Path) -> None:
    files = whole()
    files[path] |= change
    with pytest.raises(InputRefused, match=rf"{Path(path).name} is no record"):
        evidence_of(tmp_path, files)


def test_an_earlier_reports_evidence_is_shown_with_the_records_of_today(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "records").mkdir()
    write_report(Evidence(created="2026-01-01"), tmp_path / "old")
    evidence_of(tmp_path / "records", {"bench/inference.json": bench("inference", SERVED)})
    given = ["--evidence", str(tmp_path / "old" / "evidence.json"), "--records", str(tmp_path / "records")]
    with pytest.raises(SystemExit) as ended:
        main(["report", *given, "--out", str(tmp_path / "new")])
    assert ended.value.code == 0
    assert "INCOMPLETE" in capsys.readouterr().out
    page = (tmp_path / "new" / "report.html").read_text()
    assert "1.80× (1.76 to 1.84)" in page
    assert "2026-01-01" in page
    assert (tmp_path / "new" / "figures" / "bench-inference-resnet50-inference.png").exists()
