"""The orchestrator, with real tiny models whose workers live in this process."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from triptych.bench import record, session, turns
from triptych.bench.proof import Proof
from triptych.bench.suite import Case
from triptych.cli.bench import table
from triptych.core import catalog, contract, initialize
from triptych.core.conversation import Failed
from triptych.core.errors import ParityFailed

FRAMEWORKS = contract.installed()


@pytest.mark.parametrize("mode", ["inference", "training_step"])
def test_frameworks_take_turns_and_agree_while_they_are_timed(lab: Any, mode: str, tmp_path: Any) -> None:
    suite = lab.suite(modes=[mode], frameworks=FRAMEWORKS, rounds=5, check_every=2, steps=2)
    group = lab.group(suite, {name: lab.Local(name) for name in FRAMEWORKS})
    assert [entry.failure for entry in group.entries] == [None] * len(FRAMEWORKS)
    assert all(np.shape(entry.turns) == (5, 2) for entry in group.entries)
    assert np.shape(group.twin) == (5, 2)
    orders = [tuple(each["order"]) for each in group.rounds]
    assert len(set(orders)) > 1, "the order of turns is drawn anew"
    assert all(len(order) == len(FRAMEWORKS) + 1 for order in orders)
    assert all(each["others"] is None or 0.0 <= each["others"] <= 1.0 for each in group.rounds)
    made = lab.record(tmp_path / "tiny.json", suite, [group])
    assert session.outcome(made) is None
    for row in made["rows"]:
        assert row["certificate"]["kind"] == "parity"
        assert row["certificate"]["checked"]["turns"] == 3, "before the first round, and in every second"
        checked = row["certificate"]["checked"]
        assert checked["worst_error"] <= checked["tolerance"] == 1e-5
        assert ("after_update" in checked) == (mode == "training_step")
        updated = checked.get("after_update", checked)
        assert updated["worst_error"] <= updated["tolerance"] <= 2e-5, "a perceptron has no ReLU that close to zero"
        assert 0.0 < row["interval"][0] <= row["median"] <= row["interval"][1]
        assert (row["n"], row["p90"]) == (10, None)
        assert row["compile_seconds"] == 0.0 or row["framework"] != "pytorch"
        assert row["trace_seconds"] > 0.0 if row["framework"] != "pytorch" else row["trace_seconds"] == row["backend_seconds"] == 0.0
        assert (row["backend_seconds"] or 0.0) > 0.0 or row["framework"] != "jax"
        assert row["joules_per_image"] is None or row["joules_per_image"] > 0.0
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] > 2**20
    pairs = len(FRAMEWORKS) * (len(FRAMEWORKS) - 1) // 2
    assert len(made["groups"][0]["comparisons"]) == pairs
    assert made["groups"][0]["a_a"]["smallest_difference"] > 0.0


@pytest.mark.parametrize("mode", ["inference", "training_step"])
def test_a_model_without_images_is_timed_as_any_other(lab: Any, mode: str, tmp_path: Any) -> None:
    options = {"tokens": 4, "width": 8, "heads": 2, "mlp_width": 12}
    weights = tmp_path / "weights.safetensors"
    save_file(initialize.parity_weights(catalog.get_spec("transformer_block", **options), 0, "float32"), weights)
    models = [{"name": "transformer_block", "options": options}]
    suite = lab.suite(models=models, modes=[mode], frameworks=FRAMEWORKS, lanes=["default", "compiled"], rounds=2, check_every=1)
    group = lab.group(suite, {name: lab.Local(name) for name in FRAMEWORKS}, Proof(lab.certificate, weights))
    assert [entry.failure for entry in group.entries] == [None] * (2 * len(FRAMEWORKS) - ("jax" in FRAMEWORKS))
    tuned = Case("pytorch", "transformer_block", options, "tuned", mode, 4)
    assert tuned.unavailable() == "what is tuned are convolutions, and transformer_block has none"
    fed = Case("pytorch", "transformer_block", options, "default", "training_step_with_data", 4).unavailable()
    assert fed is not None
    assert fed.startswith("input pipelines make images, and transformer_block takes features")


def test_the_same_inputs_reach_every_framework_and_no_two_steps_get_the_same(lab: Any) -> None:
    worker = lab.Local("pytorch")
    suite = lab.suite(frameworks=["pytorch"])
    lab.group(suite, {"pytorch": worker})
    case = suite.groups()[0][0]
    worker.ask("build", key="x", case=case.to_json(), given=str(lab.proof.weights), seed=0)
    seen = [worker.ask("turn", key="x", number=number, seed=0, check=True)["outputs"] for number in (1, 2, 1)]
    assert seen[0] == seen[2]
    assert seen[0] != seen[1]


def test_steps_that_warm_up_are_run_and_not_timed(lab: Any) -> None:
    runs = []

    def counts(contender: Any) -> Any:
        return dataclasses.replace(contender, run=lambda batch: runs.append(batch) or contender.run(batch))

    suite = lab.suite(frameworks=["pytorch"], rounds=2, steps=3, warm_up=2, check_every=5)
    (entry,) = lab.group(suite, {"pytorch": lab.Local("pytorch", counts)}).entries
    assert np.shape(entry.turns) == (2, 3)
    assert len(runs) == (1 + 2 * 2) * 5, "five a turn: before the first round, and in each round the lane and its twin"


def strays_after(calls: int) -> Any:
    """A contender whose logits are a little off from some call on: what a check at the start alone would miss."""

    def spoil(contender: Any) -> Any:
        count = iter(range(10**6))
        return dataclasses.replace(contender, run=lambda batch: contender.run(batch) * (1.0 if next(count) < calls else 1.001))

    return spoil


@pytest.mark.parametrize("seed", range(4))  # whoever has the first turn of the round
def test_outputs_that_stray_while_being_timed_cost_the_lane_its_row(lab: Any, tmp_path: Any, seed: int) -> None:
    suite = lab.suite(frameworks=["pytorch", "tensorflow"], rounds=6, check_every=2, seed=seed)
    workers = {"pytorch": lab.Local("pytorch"), "tensorflow": lab.Local("pytorch", strays_after(4))}
    group = lab.group(suite, workers)
    made = lab.record(tmp_path / "tiny.json", suite, [group])
    good, bad = made["rows"]
    assert "failure" not in good
    assert bad["failure"].startswith("its outputs are 1.0e-03 from pytorch/default's, more than 1.0e-05")
    assert (bad["median"], bad["certificate"]["kind"]) == (None, "none")
    with pytest.raises(ParityFailed, match="1 case"):
        raise session.outcome(made)  # type: ignore[misc]


def test_an_update_that_is_lost_shows_in_the_next_loss(lab: Any) -> None:
    def loses(contender: Any) -> Any:
        weights = load_file(lab.proof.weights)

        def run(batch: Any) -> np.ndarray:
            loss: np.ndarray = contender.run(batch)
            contender.start_from(weights)
            return loss

        return dataclasses.replace(contender, run=run)

    suite = lab.suite(modes=["training_step"], frameworks=["pytorch", "tensorflow"])
    good, bad = lab.group(suite, {"pytorch": lab.Local("pytorch"), "tensorflow": lab.Local("pytorch", loses)}).entries
    assert good.alive
    assert bad.failure is not None
    assert bad.failure.startswith("its loss after the update is ")


class Sensitive:
    """A lane of one weight, whose loss is 7, and after an update 1 + `gain` for each unit in the last place that the weight moved."""

    def __init__(self, gain: float, off: float) -> None:
        self.gain, self.off, self.first, self.moved, self.updated = gain, off, None, 0.0, False

    def start_from(self, weights: Any) -> None:
        """From the first weights, or from some that were moved."""
        weight = weights["fc.bias"].flat[0]
        self.first = weight if self.first is None else self.first
        self.moved, self.updated = float((weight - self.first) / np.spacing(self.first)), False

    def run(self, batch: Any) -> np.ndarray:
        """A loss."""
        self.updated = not self.updated
        return np.asarray(7.0 if self.updated else 1.0 + self.gain * self.moved + self.off)


@pytest.mark.parametrize(
    ("gain", "off", "why"),
    [
        (0.0, 6e-5, None),
        (0.0, 8e-5, "its loss after the update is 1.1e-05 from pytorch/default's, more than 1.0e-05"),
        (1e-4, 4.9e-4, None),
        (1e-4, 5.1e-4, "its loss after the update is 7.3e-05 from pytorch/default's, more than 7.1e-05"),
        (1.0, 3.6e-2, "its loss after the update is 5.1e-03 from pytorch/default's, more than 5.0e-03"),
    ],
)
def test_after_an_update_a_lane_may_stray_as_rounding_lets_the_reference_stray(lab: Any, gain: float, off: float, why: str | None) -> None:
    def worker(off: float) -> Any:
        lane = Sensitive(gain, off)
        return lab.Local("pytorch", lambda contender: dataclasses.replace(contender, run=lane.run, start_from=lane.start_from))

    suite = lab.suite(modes=["training_step"], frameworks=["pytorch", "tensorflow"], steps=2)
    good, other = lab.group(suite, {"pytorch": worker(0.0), "tensorflow": worker(off)}).entries
    assert (good.failure, other.failure) == (None, why)


def test_who_ends_while_its_rounding_is_measured_takes_nobody_with_it(lab: Any) -> None:
    class Ends:
        """A worker that ends when it is asked how far it strays."""

        inner = lab.Local("pytorch")

        def ask(self, do: str, **given: Any) -> dict[str, Any]:
            """Everything else is answered."""
            if do == "stray":
                raise Failed("ProcessEnded", "the process was killed")
            return dict(self.inner.ask(do, **given))

    suite = lab.suite(modes=["training_step"], frameworks=["pytorch", "tensorflow"])
    other = Sensitive(1e-4, 0.0)
    sensitive = lab.Local("pytorch", lambda contender: dataclasses.replace(contender, run=other.run, start_from=other.start_from))
    dead, alive = lab.group(suite, {"pytorch": Ends(), "tensorflow": sensitive}).entries
    assert dead.failure == "ProcessEnded: the process was killed"
    assert alive.failure is None
    assert alive.checks.against == "tensorflow/default"
    assert alive.checks.tolerances[1] == pytest.approx(5 * 1e-4 / 7)


def test_outputs_that_are_no_numbers_cost_the_lane_its_row(lab: Any) -> None:
    suite = lab.suite(frameworks=["pytorch"])
    nan = lab.Local("pytorch", lambda contender: dataclasses.replace(contender, run=lambda batch: contender.run(batch) * np.nan))
    (entry,) = lab.group(suite, {"pytorch": nan}).entries
    assert (entry.failure, entry.turns) == ("its outputs are not finite", [])


def test_without_a_proof_none_of_ours_is_built(lab: Any) -> None:
    suite, worker = lab.suite(frameworks=["pytorch"]), lab.Local("pytorch")
    refuted = Proof({**lab.certificate, "verdict": "fail"}, lab.proof.weights)
    (entry,) = lab.group(suite, {"pytorch": worker}, refuted).entries
    assert entry.failure is not None
    assert entry.failure.startswith("not proven")
    assert worker.asked == ["release"]


class Dying:
    """A worker that ends in the middle of the third round."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.turns = inner, 0

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """As long as it lives."""
        self.turns += do == "turn"
        if self.turns > 3:
            raise Failed("ProcessEnded", "the process was killed")
        return dict(self.inner.ask(do, **given))


def test_a_process_that_ends_is_a_row_with_a_reason_and_the_others_go_on(lab: Any, tmp_path: Any) -> None:
    suite = lab.suite(frameworks=["pytorch", "tensorflow"], rounds=6)
    group = lab.group(suite, {"pytorch": Dying(lab.Local("pytorch")), "tensorflow": lab.Local("pytorch")})
    made = lab.record(tmp_path / "tiny.json", suite, [group])
    dead, alive = made["rows"]
    assert dead["failure"] == "ProcessEnded: the process was killed"
    assert alive["n"] == 6
    assert made["groups"][0]["a_a"] is None, "whom nobody can be compared with: the twin died"
    assert session.outcome(made).exit_code == 1  # type: ignore[union-attr]


def test_threads_of_the_turn_before_have_come_to_rest(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SETTLE_SECONDS", 0.05)
    ended, rests = [time.monotonic()], []
    local, calibrator = lab.Local("pytorch"), lab.Metronome

    def noting(ask: Any) -> Any:
        def noted(*given: Any, **named: Any) -> dict[str, Any]:
            rests.extend([time.monotonic() - ended[0]] * (given[-1] in ("turn", "kernel")))
            answer: dict[str, Any] = ask(*given, **named)
            ended[0] = time.monotonic()
            return answer

        return noted

    monkeypatch.setattr(local, "ask", noting(local.ask))
    monkeypatch.setattr(calibrator, "ask", noting(calibrator.ask))
    lab.group(lab.suite(frameworks=["pytorch"], rounds=3), {"pytorch": local})
    assert len(rests) == 1 + 3 * 3, "the first check, and each round's kernel, turn and twin"
    assert min(rests) >= 0.05


def test_what_a_machine_lacks_is_a_row_and_no_failure(lab: Any, tmp_path: Any) -> None:
    suite = lab.suite(frameworks=["pytorch"], lanes=["default", "tuned", "stock"])
    group = lab.group(suite, {"pytorch": lab.Local("pytorch")})
    made = lab.record(tmp_path / "tiny.json", suite, [group])
    reasons = {f"{row['framework']}/{row['lane']}": row["failure"] for row in made["rows"] if "failure" in row}
    assert reasons.keys() == {"pytorch/tuned", "pytorch/stock"}
    assert reasons["pytorch/stock"] == "torchvision has no mlp"
    assert session.outcome(made) is None


def test_the_record_is_read_back_and_has_every_sample(lab: Any, tmp_path: Any) -> None:
    suite = lab.suite(frameworks=["pytorch"], rounds=3)
    group = lab.group(suite, {"pytorch": lab.Local("pytorch")})
    lab.record(tmp_path / "tiny.json", suite, [group])
    made, lines = record.read(tmp_path / "tiny.json")
    assert lines[0]["turns"] == group.entries[0].turns
    assert [each["kernel_seconds"] for each in lines[1]["rounds"]] == [1e-3] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.json", "tiny.samples.jsonl"]
    assert made["rows"][0]["macs"] == 8 * 8 * 32 + 32 * 10


def test_what_is_shown_has_every_sample_s_fate_and_no_figure_that_is_not_known(lab: Any, tmp_path: Any) -> None:
    suite = lab.suite(frameworks=["pytorch"], rounds=4)
    group = lab.group(suite, {"pytorch": lab.Local("pytorch")})
    (entry,) = group.entries
    slower = dataclasses.replace(entry, case=dataclasses.replace(entry.case, lane="compiled"), built={**entry.built, "compiles": True})
    entry.turns = [[0.010 + 0.0001 * (number % 3)] for number in range(70)]
    slower.turns, slower.built["first_call_seconds"] = [[turn[0] / 2] for turn in entry.turns], 2.0
    entry.turns[5] = [9.0]
    slower.built |= {"unequal": "it has biases", "macs": 3 * 2368}
    group.rounds, group.twin = [dict(group.rounds[0]) for _ in range(70)], entry.turns
    shown = table(lab.record(tmp_path / "tiny.json", suite, [dataclasses.replace(group, entries=[entry, slower])]))
    assert "pytorch/default: 1 of 70 samples far out, the slowest 9000.000 ms; none is dropped" in shown
    assert "pytorch/compiled: has made up for its compilation after 396 steps" in shown
    assert "pytorch/compiled: another model, it has biases; 3.00 times the FLOPs" in shown
    assert "pytorch/compiled is faster" in shown
    (row,) = (line.split() for line in shown.splitlines() if line.startswith("  pytorch/default  "))
    assert row[7:10] == ["10.200", "n/a", "n/a"], "70 samples are enough for p90 and for no more"
    assert "compile cache: cold" in shown
