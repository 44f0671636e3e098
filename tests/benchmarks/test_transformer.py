"""The transformer comparison: what is not equal is not timed, and the document has the numbers of the record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comparison import hlo, pages, proof, records, rounds, tables, worker
from comparison.setting import MODES, TASKS, Setting

from triptych.core import contract

# One mode a framework: compilers of C++ and of XLA's HLO take seconds each.
QUICK = {"pytorch": ("eager",), "tensorflow": ("function",), "jax": ("jit",)}
INSTALLED = contract.installed()
PROVEN = [
    ("passes", "block", "gradient"), ("passes", "vit", "step"), ("vmap", "vit", "forward"), ("per_sample", "block", "gradient"),
    ("layers", "block", "layer_norm"), ("gradients", "block", "attention"),
]  # fmt: skip


@pytest.fixture(scope="module")
def workers() -> dict[str, Any]:
    return {name: worker.Worker(name) for name in ("pytorch", "tensorflow", "jax") if name in INSTALLED}


def measured(setting: Setting, workers: dict[str, Any], tmp_path: Path, seconds: float = 1e-4) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "TURN_SECONDS", seconds)
        return rounds.measure(setting, workers, 2, tmp_path, QUICK)


# What `vmap` makes of PyTorch's fused attention is one of the things that are measured.
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning")
@pytest.mark.skipif(len(INSTALLED) < 2, reason="a comparison needs two frameworks")
@pytest.mark.parametrize(
    ("part", "workload", "task"),
    PROVEN,
)
def test_lanes_are_equal_and_then_timed(part: str, workload: str, task: str, workers: dict[str, Any], tmp_path: Path) -> None:
    setting = Setting(part, workload, task, 2, tiny=True)
    group = measured(setting, workers, tmp_path)
    assert [precision for precision, found in group["proof"].items() if not found["passed"]] == []
    assert len(group["lanes"]) == sum(len(setting.lane_names(name, QUICK[name])) for name in workers)
    assert {name: len(lane["seconds"]) for name, lane in group["lanes"].items()} == dict.fromkeys(group["lanes"], 2)
    json.dumps(group, allow_nan=False)


@dataclasses.dataclass
class Wrong:
    """A worker whose float32 lanes are a little off."""

    right: Any
    precision: str

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        answer = self.right.ask(do, **given)
        if do == {"float64": "prove", "float32": "build"}[self.precision]:
            with np.load(answer["out"]) as held:
                moved = {name: held[name] * (1.0 + {"float64": 1e-10, "float32": 1e-4}[self.precision]) for name in held.files}
            np.savez(answer["out"], **moved)
        return answer


@pytest.mark.skipif(len(INSTALLED) < 2, reason="a comparison needs two frameworks")
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_what_is_not_equal_is_not_timed(precision: str, workers: dict[str, Any], tmp_path: Path) -> None:
    names = list(workers)[:2]
    pair = {names[0]: workers[names[0]], names[1]: Wrong(workers[names[1]], precision)}
    group = measured(Setting("layers", "block", "gelu", 2, tiny=True), pair, tmp_path)
    failed = {name.partition("/")[0] for name, lane in group["lanes"].items() if "failure" in lane and not lane["seconds"]}
    assert not group["proof"][precision]["passed"]
    assert failed == (set(names) if precision == "float64" else {names[1]})


def test_a_lane_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    class Broken(worker.Worker):
        def _lane(self, setting: Setting, name: str, precision: str) -> Any:
            if precision == "float32":
                raise NotImplementedError("no such thing\nsecond line")
            return super()._lane(setting, name, precision)

    told = Broken(INSTALLED[0]).ask(
        "build", setting=Setting("layers", "block", "gelu", 2, True).to_json(), modes=QUICK[INSTALLED[0]], out=str(tmp_path / "x.npz")
    )["told"]
    assert told == {QUICK[INSTALLED[0]][0]: {"failure": "NotImplementedError: no such thing"}}


def test_lanes_with_nothing_in_common_prove_nothing() -> None:
    one = {"output": np.ones(3)}
    assert proof.in_float64({"a": one, "b": one})["passed"]
    assert not proof.in_float64({"a": one})["passed"]
    assert not proof.in_float64({"a": one, "b": one, "c": {"loss": np.ones(())}})["passed"]
    assert not proof.in_float64({"a": one, "b": {"output": np.ones(4)}})["passed"]
    assert not proof.in_float64({"a": one, "b": {"output": np.array([1.0, np.nan, 1.0])}})["passed"]


def test_kernels_are_counted_in_the_entry_computation_alone() -> None:
    text = """HloModule jit_f, entry_computation_layout={(f32[2]{0})->f32[2]{0}}

%fused_computation (param_0: f32[2]) -> f32[2] {
  %param_0 = f32[2]{0} parameter(0)
  %exp.1 = f32[2]{0} exponential(%param_0)
  ROOT %add.1 = f32[2]{0} add(%exp.1, %param_0), metadata={op_name="f (g)"}
}

ENTRY %main.5 (x.1: f32[2]) -> (f32[2], f32[2]) {
  %x.1 = f32[2]{0} parameter(0), metadata={op_name="x"}
  %fusion = f32[2]{0} fusion(%x.1), kind=kLoop, calls=%fused_computation
  %ynn_fusion = f32[2]{0} fusion(%fusion), kind=kCustom, calls=%fused_computation
  %dot = f32[2]{0} dot(%fusion, %ynn_fusion), lhs_contracting_dims={0}
  ROOT %tuple.1 = (f32[2]{0}, f32[2]{0}) tuple(%dot, %fusion)
}
"""
    assert hlo.counts(text) == {"kernels": 3, "fusions": 1, "products": 1, "library_calls": 1, "copies": 0}
    assert hlo.instructions(text) == 5
    assert hlo.stablehlo_operations('%0 = stablehlo.constant dense<1>\n%1 = stablehlo.add %0, %0\n%2 = "stablehlo.gather"(%1)') == 2


def group(key: str, **seconds: list[float]) -> dict[str, Any]:
    part, workload, task, size = key.split("/")
    lanes = {name.replace("__", "/").replace("_", " "): {"first_call_seconds": 2.0, "seconds": taken} for name, taken in seconds.items()}
    return {
        "key": key, "setting": {"part": part, "workload": workload, "task": task, "batch_size": int(size)}, "lanes": lanes,
        "twin": {"of": next(iter(lanes)), "seconds": next(iter(seconds.values()))}, "rounds": [],
    }  # fmt: skip


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    first, second = group("passes/block/forward/8", jax__jit=[1.0, 1.0]), group("passes/block/step/8", jax__jit=[1.0, 1.0])
    for each in (first, second, first):
        records.keep(tmp_path, "passes", each, ["jax"], 2, "again")
    assert [each["key"] for each in records.groups(tmp_path, "passes")] == [second["key"], first["key"]]
    assert records.stands(tmp_path, "passes", first["key"], ["jax"], 2)
    assert not records.stands(tmp_path, "passes", first["key"], ["jax"], 3)
    assert not records.stands(tmp_path, "passes", first["key"], ["jax", "pytorch"], 2)
    assert not records.stands(tmp_path, "vmap", first["key"], ["jax"], 2)


def test_the_plan_has_every_part_and_only_what_was_asked_for() -> None:
    every = records.plan([*TASKS], ["block", "vit"], None, tiny=False)
    assert {each.part for each in every} == set(TASKS)
    assert len({each.key for each in every}) == len(every)
    assert [each.key for each in records.plan(["vmap"], ["block"], [2], tiny=True)] == ["vmap/block/forward/2"]
    assert {each.task for each in records.reported(every)} == {"forward", "gradient", "gelu", "attention"}


def test_tables_tell_ratios_intervals_and_what_cannot_be_told_apart() -> None:
    slow, fast, noisy = [2.0, 2.0, 2.0], [1.0, 1.0, 1.0], [1.0, 2.5, 2.0]
    table = tables.passes([group("passes/block/forward/8", pytorch__eager=slow, jax__jit=fast, jax__eager=noisy)], "block")
    assert "| 8 | JAX `jit` | 1000 ms, 2.00 [2.00, 2.00] | n/a | n/a |" in table
    assert "| 8 | PyTorch eager | 2000 ms, 1 | n/a | n/a |" in table
    assert "| 8 | JAX op by op | 2000 ms, ~ 1.00 [0.80, 2.00] | n/a | n/a |" in table
    paid = tables.compilation([group("passes/block/forward/8", jax__eager=slow, jax__jit=fast)])
    assert "| the block | forward | 8 | JAX `jit` | 2.00 [2.00, 2.00] | 2.0 s | 1 |" in paid


def test_the_document_has_the_numbers_of_the_record() -> None:
    text = pages.DOCUMENT.read_text(encoding="utf-8")
    assert text == pages.rendered(text, records.FOLDER)
    altered = text.replace("| PyTorch eager | ", "| PyTorch eager | 1", 1)
    assert altered != text == pages.rendered(altered, records.FOLDER)
    for figure in ("transformer-passes", "transformer-vmap", "transformer-per-sample"):
        assert f"../benchmarks/figures/{figure}.png" in text
        assert (pages.FIGURES / f"{figure}.png").is_file()


def test_everything_on_record_was_proven_equal() -> None:
    every = [each for part in TASKS for each in records.groups(records.FOLDER, part)]
    assert {each["setting"]["part"] for each in every} == set(TASKS)
    assert [each["key"] for each in every if not all(found["passed"] for found in each["proof"].values())] == []
    assert {name.partition("/")[0] for each in every for name in each["lanes"]} == set(MODES)
