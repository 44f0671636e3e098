"""`bench compare` finds a planted regression of 5 %, does not cry over none, and says so when it cannot tell."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.bench import compare, worker
from triptych.bench.turns import Entry, Group, run_group
from triptych.cli import main
from triptych.core.errors import InputRefused

BUILT = {
    "build_seconds": 0.1,
    "first_call_seconds": 1.0,
    "phases": {},
    "compiles": True,
    "levers": [],
    "unequal": None,
    "macs": None,
    "data": None,
}


def synthetic(
    lab: Any, path: Path, seed: int, *, factor: float = 1.0, noise: float = 0.05, weather: float = 1.0, rounds: int = 100
) -> Path:
    """The record of one case of about 10 ms."""
    random = np.random.default_rng(seed)

    def turns(scale: float) -> list[list[float]]:
        return [[float(each)] for each in scale * weather * np.exp(noise * random.normal(size=rounds))]

    suite = lab.suite(frameworks=["pytorch"])
    entry = Entry(suite.groups()[0][0], built=BUILT, turns=turns(0.01 * factor))
    kernels = weather * np.exp(0.02 * random.normal(size=rounds))
    weathers = [{"kernel_seconds": float(each), "noisy": []} for each in kernels]
    lab.record(path, suite, [Group(entry.case.group, [entry], "pytorch/default", turns(0.01 * factor), weathers)])
    return path


def verdict(lab: Any, folder: Path, seed: int, **new: Any) -> str:
    """Of a run against another one of the same machine."""
    old = synthetic(lab, folder / "old.json", 2 * seed, noise=0.03)
    (row,) = compare.compare(old, synthetic(lab, folder / "new.json", 2 * seed + 1, **new))["rows"]
    return str(row["verdict"])


def test_a_planted_regression_is_found(lab: Any, tmp_path: Path) -> None:
    verdicts = [verdict(lab, tmp_path, seed, factor=1.05, noise=0.03) for seed in range(5)]
    assert verdicts.count("slower") >= 4
    assert "faster" not in verdicts


def test_an_a_a_pair_raises_no_cry(lab: Any, tmp_path: Path) -> None:
    verdicts = [verdict(lab, tmp_path, seed, noise=0.03) for seed in range(10)]
    assert set(verdicts) <= {"same", "cannot tell"}
    assert verdicts.count("same") >= 9


def test_a_slower_machine_is_no_slower_code(lab: Any, tmp_path: Path) -> None:
    assert verdict(lab, tmp_path, 3, weather=1.25, noise=0.03) == "same"


def test_an_improvement_is_told(lab: Any, tmp_path: Path) -> None:
    assert verdict(lab, tmp_path, 4, factor=0.9) == "faster"


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"noise": 0.02}, 0, ""),
        ({"noise": 0.02, "factor": 1.10}, 6, "1 of 1 case(s) became slower"),
        ({"noise": 1.0, "rounds": 10}, 5, "1 of 1 case(s) cannot be told"),
    ],
)  # fmt: skip
def test_exit_codes(lab: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], code: int, says: str) -> None:
    old, new = synthetic(lab, tmp_path / "old.json", 1, noise=0.02), synthetic(lab, tmp_path / "new.json", 2, **change)
    with pytest.raises(SystemExit) as end:
        main(["bench", "compare", str(old), str(new), "--json"])
    shown = capsys.readouterr()
    assert end.value.code == code
    assert says in shown.err
    assert len(json.loads(shown.out)["rows"]) == 1


def test_records_without_a_common_case_and_files_that_are_none_are_refused(lab: Any, tmp_path: Path) -> None:
    old, other = synthetic(lab, tmp_path / "old.json", 1), synthetic(lab, tmp_path / "other.json", 2)
    samples = tmp_path / "other.samples.jsonl"
    samples.write_text(samples.read_text().replace('"default"', '"tuned"'))
    with pytest.raises(InputRefused, match="no case in common"):
        compare.compare(old, other)
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "list.samples.jsonl").write_text("")
    for name in ("absent.json", "old.samples.jsonl", "list.json"):
        with pytest.raises(InputRefused, match=name.partition(".")[0]):
            compare.compare(old, tmp_path / name)


def test_what_was_set_otherwise_is_told(lab: Any, tmp_path: Path) -> None:
    old, new = synthetic(lab, tmp_path / "old.json", 1), synthetic(lab, tmp_path / "new.json", 2)
    assert compare.compare(old, new)["unlike"] == {}
    new.write_text(new.read_text().replace('"threads": 1', '"threads": 8'))
    result = compare.compare(old, new)
    assert result["unlike"] == {"threads": [1, 8]}
    assert "set otherwise: threads, 1 in the old record, 8 in the new" in compare.table(result)


def test_seconds_of_another_kernel_correct_nothing(lab: Any, tmp_path: Path) -> None:
    old, new = synthetic(lab, tmp_path / "old.json", 1, noise=0.02), synthetic(lab, tmp_path / "new.json", 2, noise=0.02)
    samples = tmp_path / "old.samples.jsonl"
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for each in lines[1]["rounds"]:
        each["kernel_seconds"] *= 7.0
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare.compare(old, new)["rows"][0]["verdict"] == "slower"
    made = json.loads(old.read_text())
    del made["machine"]["kernel"]  # as in a record of an earlier version
    old.write_text(json.dumps(made))
    result = compare.compare(old, new)
    assert result["unlike"] == {"kernel": [None, [16, 64, 64]]}
    assert result["rows"][0]["verdict"] == "same"


def slowed(factor: float) -> Any:
    """What makes a contender take `factor` times as long."""

    def spoil(contender: Any) -> Any:
        def run(batch: Any) -> Any:
            started = time.process_time()
            output = contender.run(batch)
            end = started + factor * (time.process_time() - started)
            while time.process_time() < end:
                pass
            return output

        return dataclasses.replace(contender, run=run)

    return spoil


def test_with_a_real_model_what_is_planted_is_found_and_an_a_a_pair_is_not(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old code, the same code again, and code made 5 % and three times slower take turns, timed by the processor time they use.

    A machine that is busy with something else may be unable to tell 5 %: then it must say so. Whether it is able, A/A shows.
    """
    monkeypatch.setattr(worker, "perf_counter", time.process_time)
    suite = lab.suite(
        lanes=["default", "stock"], frameworks=["pytorch", "tensorflow"], rounds=60, steps=2, check_every=30, batch_sizes=[64]
    )
    (cases,) = suite.groups()
    cases = [dataclasses.replace(case, lane="default", framework=name) for case, name in zip(cases, "abcd", strict=True)]
    monkeypatch.setattr(type(cases[0]), "unavailable", lambda case: None)
    workers = {name: lab.Local("pytorch", slowed(factor)) for name, factor in zip("abcd", (1.0, 1.0, 1.05, 3.0), strict=True)}
    group = run_group(cases, workers, lab.Metronome(), suite, lab.proof)
    assert [entry.failure for entry in group.entries] == [None] * 4
    paths = [tmp_path / f"{name}.json" for name in ("old", "same", "slower", "slow")]
    for path, entry in zip(paths, group.entries, strict=True):
        alone = dataclasses.replace(entry, case=dataclasses.replace(entry.case, framework="pytorch"))
        lab.record(path, suite, [dataclasses.replace(group, entries=[alone], twin_of=None)])
    same, slower, slow = (compare.compare(paths[0], path)["rows"][0] for path in paths[1:])
    assert same["verdict"] in ("same", "cannot tell")
    assert slow["verdict"] == "slower"
    able = max(np.log(same["interval"][1]), -np.log(same["interval"][0])) < 0.015
    assert slower["verdict"] == "slower" if able else slower["verdict"] in ("slower", "cannot tell")
