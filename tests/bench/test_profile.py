"""One warmed step of a very small ResNet in each framework, traced and read; and a program's text, read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from triptych.bench import perfetto, profile
from triptych.core import catalog, contract
from triptych.core.conversation import Failed
from triptych.core.errors import UsageError
from triptych.core.spec import Spec, StageSpec
from triptych.core.trace import CATEGORIES, DATA, STEP

EXPECTED = {
    "training_step": {"convolution", "matrix_product", "normalization", "elementwise", "optimizer", "data"},
    "inference": {"convolution", "matrix_product", "normalization", "elementwise", "data"},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Spec:
    """What the catalogue calls resnet20 is one residual block: XLA compiles every layer."""
    spec = catalog.tiny(catalog.get_spec("resnet20"))
    spec = catalog.with_options(dataclasses.replace(spec, stages=(StageSpec(1, 8, 1),)), image_size=16)
    monkeypatch.setattr(catalog, "get_spec", lambda name, **options: spec)
    monkeypatch.setattr(profile, "environment", dict)
    return spec


def request(framework: str, mode: str = "training_step", **given: Any) -> profile.Request:
    return profile.Request("resnet20", (framework,), mode, **{"batch_size": 2, "repeats": 1, "threads": 1, **given})


@pytest.mark.parametrize("framework", contract.FRAMEWORKS)
def test_a_step_is_traced_and_its_time_told(framework: str, small: Spec, lab: Any, tmp_path: Path) -> None:
    if framework not in contract.installed():
        pytest.skip(f"{framework} is not installed")
    made = profile.run(request(framework), "triptych profile", tmp_path, lambda text: None, lambda name, log: lab.Local(name))
    (row,) = made["rows"]
    assert "failure" not in row, row
    assert json.loads((tmp_path / "profile.json").read_text()) == made
    assert str(tmp_path) not in json.dumps(made)
    categories = row["categories"]
    assert list(categories) == list(CATEGORIES)
    assert {name for name, seconds in categories.items() if seconds > 0.0} >= EXPECTED["training_step"]
    assert sum(categories.values()) + row["unattributed_seconds"] == pytest.approx(row["step_seconds"])
    assert row["unattributed_share"] < 0.9
    assert row["weather"]["seconds"] >= sum(row["untraced_seconds"] + row["traced_seconds"])
    assert len(row["untraced_seconds"]) == len(row["traced_seconds"]) == 1
    assert {each["category"] for each in row["top"]} <= set(CATEGORIES)
    assert row["lines_of_code"] > 1000
    _check_trace(tmp_path / row["trace"], contract.FRAMEWORKS[framework].title)
    assert perfetto.read(tmp_path / "trace.json.gz")
    assert [path.name for path in (tmp_path / framework).iterdir() if path.is_dir()] == ["native"]


def _check_trace(path: Path, title: str) -> None:
    rows = perfetto.read(path)
    assert {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": title}} in rows
    shown = [row for row in rows if row["ph"] == "X"]
    assert all(row["dur"] >= 0.0 and isinstance(row["ts"], float) for row in shown)
    assert {row["name"] for row in shown} >= {STEP, DATA}
    assert {row["cat"] for row in shown} >= {"convolution", "normalization", "optimizer"}
    ends: dict[int, list[float]] = {}
    for row in shown:  # in order of their beginnings: those of a thread are nested or disjoint, or Perfetto does not show them
        open_ = ends.setdefault(row["tid"], [])
        while open_ and open_[-1] <= row["ts"] + 2e-3:
            open_.pop()
        assert not open_ or row["ts"] + row["dur"] <= open_[-1] + 2e-3
        open_.append(row["ts"] + row["dur"])


def test_inference_has_no_optimizer(small: Spec, lab: Any, tmp_path: Path) -> None:
    made = profile.run(request("pytorch", "inference"), "", tmp_path, lambda text: None, lambda name, log: lab.Local(name))
    told = {name for name, seconds in made["rows"][0]["categories"].items() if seconds > 0.0}
    assert told - {"other"} == EXPECTED["inference"]


@pytest.mark.parametrize("framework", contract.FRAMEWORKS)
def test_a_model_without_images_is_traced_on_noise(framework: str, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if framework not in contract.installed():
        pytest.skip(f"{framework} is not installed")
    monkeypatch.setattr(profile, "environment", dict)
    options = {"tokens": 4, "width": 8, "heads": 2, "mlp_width": 12}
    asked = profile.Request("transformer_block", (framework,), options=options, batch_size=2, repeats=1, threads=1)
    made = profile.run(asked, "", tmp_path, lambda text: None, lambda name, log: lab.Local(name))
    told = {name for name, seconds in made["rows"][0]["categories"].items() if seconds > 0.0}
    assert {"matrix_product", "normalization", "elementwise", "optimizer"} <= told
    assert (made["image_size"], made["rows"][0]["data"]) == (None, "synthetic")
    with pytest.raises(UsageError, match="cannot be fed with images alone"):
        dataclasses.replace(asked, data="digits").spec()


class Broken:
    """A worker that cannot build anything."""

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        if do == "start":
            return {"versions": {}}
        raise Failed("RuntimeError", "out of luck")


def test_a_framework_that_fails_is_a_row_with_its_reason(small: Spec, tmp_path: Path) -> None:
    made = profile.run(request("pytorch"), "", tmp_path, lambda text: None, lambda name, log: Broken())
    assert made["rows"][0]["failure"] == "RuntimeError: out of luck"
    error = profile.outcome(made)
    assert error is not None
    assert (error.exit_code, "out of luck" in str(error)) == (1, True)


def test_data_with_classes_that_the_model_lacks_are_refused_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="has labels"):
        profile.Request("mlp", ("pytorch",), data="digits", options={"num_classes": 3, "in_channels": 1, "image_size": 8}).spec()


PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_computation (p: f32[2,4]) -> f32[2,4] {
  %p = f32[2,4]{1,0} parameter(0)
  %maximum.1 = f32[2,4]{1,0} maximum(%p, %p), metadata={op_name="jit(step)/jvp(ResNet)/relu/max" stack_frame_id=2}
  ROOT %multiply.2 = f32[2,4]{1,0} multiply(%maximum.1, %p), metadata={op_name="jit(step)/jvp(ResNet)/bn1/mul" stack_frame_id=3}
}

ENTRY %main.1 (x.1: f32[2,4]) -> (f32[2,4], f32[]) {
  %x.1 = f32[2,4]{1,0} parameter(0), metadata={op_name="x"}
  %copy_fusion.3 = f32[2,4]{1,0} copy(%x.1)
  %dot.4 = f32[2,4]{1,0} dot(%copy_fusion.3, %x.1), metadata={op_name="jit(step)/transpose(jvp(ResNet))/conv1/conv_general_dilated"}
  %fusion.5 = f32[2,4]{1,0} fusion(%dot.4), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(step)/jvp(ResNet)/bn1/mul"}
  %add.6 = f32[2,4]{1,0} add(%fusion.5, %x.1), metadata={op_name="jit(step)/jvp(ResNet)/add"}
  %subtract.7 = f32[2,4]{1,0} subtract(%add.6, %x.1), metadata={op_name="jit(step)/optimizer/sub"}
  %reduce.8 = f32[] reduce(%subtract.7), metadata={op_name="jit(step)/jvp()/reduce_sum"}
  ROOT %tuple.9 = (f32[2,4]{1,0}, /*index=1*/f32[]) tuple(%subtract.7, %reduce.8)
}
"""


def test_the_text_of_a_program_of_xla_tells_what_its_instructions_are_for() -> None:
    if "jax" not in contract.installed():
        pytest.skip("jax is not installed")
    contract.load("jax")
    from triptych.in_jax.profile import instructions

    kinds = {"conv1": "convolution", "bn1": "normalization", "relu": "elementwise"}
    events = {name: made.event("jit_step", kinds) for name, made in instructions(PROGRAM).items()}
    told = {name: (event.operation, event.category, event.layer, event.also) for name, event in events.items()}
    assert told["dot.4"] == ("conv_general_dilated (backward)", "convolution", "conv1", ())
    assert told["copy_fusion.3"] == ("copy_fusion for conv_general_dilated (backward)", "convolution", "conv1", ())
    assert told["fusion.5"] == ("mul", "normalization", "bn1", ("elementwise",))
    assert told["add.6"] == ("add", "elementwise", "", ())
    assert told["subtract.7"] == ("sub", "optimizer", "", ())
    assert told["reduce.8"] == ("reduce_sum", "other", "", ())
    assert instructions(PROGRAM)["dot.4"].code == "dot"
