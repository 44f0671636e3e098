"""`triptych bench`: what is refused, and a whole small run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from triptych.bench import record, suite
from triptych.cli import main
from triptych.core import contract


def ends(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    shown = capsys.readouterr()
    return int(end.value.code or 0), shown.out, shown.err


@pytest.mark.parametrize("name", suite.names())
def test_a_dry_run_lists_the_cases_of_a_shipped_suite_and_starts_nothing(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    code, out, _ = ends([name, "--dry-run", "--json"], capsys)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert time.process_time() - started < 60
    planned = json.loads(out)
    assert planned["cases"]
    assert {case["framework"] for case in planned["cases"]} >= set(contract.FRAMEWORKS)
    assert not [case for case in planned["cases"] if case["framework"] == "jax" and "compiled" in case["lane"]]


def test_without_a_suite_it_is_the_quick_one(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ends(["--dry-run"], capsys)
    assert code == 0
    assert "resnet20/training_step/32/jax/default" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["quik"], 2, "did you mean 'quick'?"),
        (["quick", "resnet50"], 2, "one suite at a time"),
        (["quick", "--frameworks", "caffe"], 2, "frameworks.0"),
        (["quick", "--batch-sizes", "0"], 2, "batch_sizes.0"),
        (["quick", "--lanes", "default,default"], 2, "once"),
        (["quick", "--rounds", "1"], 2, "rounds"),
        (["quick", "--threads", "0"], 2, "threads"),
        (["quick", "--modes", "training_step_with_data", "--data", "absent"], 2, "no data at absent"),
        (["quick", "--compile-cache", "tepid"], 2, "tepid"),
        (["compare", "one.json"], 2, "given 1"),
        (["compare", "one.json", "two.json"], 8, "one.json"),
        (["absent.yaml"], 8, "absent.yaml"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, _, err = ends(arguments, capsys)
    assert (found, says in err) == (code, True), err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a list", "mapping"),
        ("name: [", "YAML"),
        ("name: x", "models"),
        ("name: x\nmodels: [{name: mlp}]\nround: 3", "round"),
        ("name: x\nmodels: []", "models"),
        ("name: &a x\nmodels: [{name: *a}]", "anchors"),
        (f"name: {'x' * 2**20}", "larger"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    code, _, err = ends([str(path)], capsys)
    assert (code, says in err) == (8, True), err


@pytest.mark.parametrize("model", ["{name: resnet5}", "{name: mlp, options: {depth: 3}}", "{name: mlp, options: {dropout: 0.5}}"])
def test_a_model_that_cannot_be_timed_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: x\nmodels: [{model}]")
    code, _, err = ends([str(path), "--dry-run"], capsys)
    assert (code, "triptych:" in err) == (2, True), err


SUITE = """
name: whole
models: [{name: mlp, options: {hidden: [8], image_size: 8}}]
lanes: [default, stock]
batch_sizes: [2]
rounds: 3
threads: 1
check_every: 2
"""


def test_a_whole_run_proves_times_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if len(contract.installed()) < 2:
        pytest.skip("a proof needs two frameworks")
    path, out = tmp_path / "whole.yaml", tmp_path / "whole.json"
    path.write_text(SUITE)
    frameworks = ",".join(contract.installed()[::2])
    code, shown, err = ends([str(path), "--frameworks", frameworks, "--out", str(out), "--work", str(tmp_path / "work")], capsys)
    assert code == 0, err
    made, lines = record.read(out)
    assert str(tmp_path) not in json.dumps(made)
    assert made["machine"]["peak_flops"] > 1e8
    rows: list[dict[str, Any]] = made["rows"]
    timed = [row for row in rows if "failure" not in row]
    assert {row["lane"] for row in timed} == {"default"}
    assert all(row["unavailable"] for row in rows if "failure" in row)
    assert {row["certificate"]["kind"] for row in timed} == {"parity"}
    assert {row["certificate"]["verdict"] for row in timed} == {"pass"}
    assert all(row["certificate"]["checked"]["turns"] == 2 and 0.0 < row["peak_share"] < 1.0 for row in timed)
    told = [made["frameworks"][row["framework"]] for row in timed]
    assert all(each["import_seconds"] > 0.0 and each["cores"] == made["machine"]["cores"] for each in told)
    assert (
        made["frameworks"]["pytorch"]["numerics"].items()
        >= {"matmul": "ieee", "ONEDNN_DEFAULT_FPMATH_MODE": "STRICT", "threads": "1"}.items()
    )
    assert "pytorch: matmul ieee; convolution ieee" in shown
    assert "1 threads, bound to cores 0; compile cache: cold" in shown or made["machine"]["cores"] != [0]
    assert len([line for line in lines if "turns" in line]) == len(timed)
    assert "pytorch/default" in shown
