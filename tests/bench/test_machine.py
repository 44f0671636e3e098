"""Energy from the counters of the processor packages, where there are any."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from triptych.bench import machine
from triptych.core import conversation, workers


def zone(folder: Path, name: str, microjoules: int, end: int = 10_000_000) -> None:
    """A zone as Linux shows it."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "energy_uj").write_text(f"{microjoules}\n")
    (place / "max_energy_range_uj").write_text(f"{end}\n")


def test_energy_is_what_all_packages_used_and_a_part_of_one_is_not_counted_twice(tmp_path: Path) -> None:
    for package, microjoules in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 5_000_000), ("intel-rapl:0:0", 700_000)):
        zone(tmp_path, package, microjoules)
    before = machine.energy(tmp_path)
    for package, microjoules in (("intel-rapl:0", 1_500_000), ("intel-rapl:1", 5_250_000), ("intel-rapl:0:0", 900_000)):
        zone(tmp_path, package, microjoules)
    assert machine.joules(before, machine.energy(tmp_path)) == pytest.approx(0.75)
    assert machine.energy_source(tmp_path).startswith("RAPL")


def test_a_counter_that_began_anew_is_no_negative_energy(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", 9_900_000, end=9_999_999)
    before = machine.energy(tmp_path)
    zone(tmp_path, "intel-rapl:0", 100_000, end=9_999_999)
    assert machine.joules(before, machine.energy(tmp_path)) == pytest.approx(0.2)


def test_without_counters_the_reason_is_told(tmp_path: Path) -> None:
    assert machine.energy(tmp_path / "absent") is None
    assert machine.joules(None, None) is None
    assert "does not exist" in machine.energy_source(tmp_path / "absent")
    (tmp_path / "intel-rapl:0").mkdir()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("")
    assert "only root" in machine.energy_source(tmp_path)


def test_no_worker_computes_with_another_processors_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    told: dict[str, str] = {}
    monkeypatch.setattr(workers.subprocess, "Popen", lambda command, env, **options: told.update(env))
    conversation.Process("calibrator", tmp_path / "log", {"OMP_NUM_THREADS": "1"}, [], 1.0)
    assert "OPENBLAS_CORETYPE" not in told
    assert (told["OMP_NUM_THREADS"], told["PATH"]) == ("1", os.environ["PATH"])


def test_a_rest_does_not_thin_out_what_disturbed_the_turns() -> None:
    before = {"now": 10.0, "steal": 1.0, "pressure": 2.0}
    after = {"now": 12.0, "steal": 1.0, "pressure": 2.15}
    told = machine.weather(before, after, rested=1.0)
    assert (told["seconds"], told["pressure"]) == (1.0, 0.15)
    assert machine.reasons({"kernel_seconds": 1.0, **told}, 1.0) == ["tasks waited for a core 15% of the time"]
    assert machine.reasons({"kernel_seconds": 1.0, **machine.weather(before, after)}, 1.0) == []
