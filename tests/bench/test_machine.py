"""Energy from the counters of the processor packages, where there are any; and what cores do for others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from triptych.bench import machine, session
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


def test_the_peak_is_the_highest_of_those_measured_between_the_groups(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([1.6e11, 2.0e11, 1.9e11])  # something else ran beside the first
    local = lab.Local("pytorch")

    class Calibrator(lab.Metronome):
        def ask(self, do: str, **given: Any) -> dict[str, Any]:
            return {"flops": next(peaks)} if do == "peak" else super().ask(do, **given)

    monkeypatch.setattr(session, "prove", lambda *given: lab.proof)
    monkeypatch.setattr(session.Processes, "start", lambda held, name: Calibrator() if name == session.CALIBRATOR else local)
    suite = lab.suite(frameworks=["pytorch"], batch_sizes=[1, 4], rounds=2)
    made = session.run(suite, "triptych bench tiny", tmp_path / "work", tmp_path / "tiny.json", lambda text: None)
    assert made["machine"]["peak_flops"] == 2.0e11
    assert next(peaks, None) is None, "before the first group, and after each"
    assert [row["peak_share"] for row in made["rows"]] == [
        pytest.approx(2.0 * row["macs"] * row["batch_size"] / row["median"] / 2.0e11) for row in made["rows"]
    ]


def process(folder: Path, pid: int, parent: int, ticks: tuple[int, int, int, int]) -> None:
    """A process as Linux shows it: user, system, and those of its children that have ended."""
    (folder / str(pid)).mkdir()
    (folder / str(pid) / "stat").write_text(f"{pid} (a name) of 2) S {parent} {'0 ' * 9}{' '.join(map(str, ticks))} 20 0\n")


def test_what_cores_do_for_others_is_what_no_process_of_ours_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path)
    ours = os.getpid()
    (tmp_path / "stat").write_text("cpu  1000 20 300 99999 88 7 5 66 0 0\ncpu0 1 2 3 4\n")
    process(tmp_path, ours, 1, (400, 30, 20, 10))
    process(tmp_path, 10**7, ours, (100, 5, 0, 0))
    process(tmp_path, 10**7 + 1, 10**7, (7, 0, 0, 0))
    process(tmp_path, 10**7 + 2, 1, (500, 500, 0, 0))
    (tmp_path / str(10**7 + 3)).mkdir()
    told = machine.counters()
    assert told["others"] == pytest.approx((1000 + 20 + 300 + 7 + 5 - 460 - 105 - 7) / os.sysconf("SC_CLK_TCK"))
    assert told["steal"] == pytest.approx(66 / os.sysconf("SC_CLK_TCK"))
    assert told["pressure"] is None
    monkeypatch.setattr(machine, "PROC", tmp_path / "absent")
    assert machine.counters()["others"] is None


@pytest.mark.skipif(machine.counters()["others"] is None, reason="the system does not tell")
def test_another_program_is_seen_and_marks_a_round() -> None:
    before = machine.counters()
    burner = "import os, time; os.fork() and os._exit(0); end = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    subprocess.run([sys.executable, "-c", burner], check=True)  # its child is nobody's: its parent has ended
    time.sleep(1.0)
    told = machine.weather(before, machine.counters())
    assert told["others"] is not None
    assert told["others"] > 0.3 / (os.cpu_count() or 1)
    calm: dict[str, Any] = {"kernel_seconds": 1.0, "steal": 0.0, "pressure": 0.9, "others": 0.0}
    assert machine.reasons(calm, 1.0) == [], "a lane's own threads wait for a core, too"
    (reason,) = machine.reasons({**calm, "others": max(told["others"], 0.06)}, 1.0)
    assert reason.startswith("other programs took")


def test_a_rest_does_not_thin_out_how_long_tasks_waited() -> None:
    before: dict[str, float | None] = {"now": 10.0, "steal": 1.0, "others": None, "pressure": 2.0}
    told = machine.weather(before, {"now": 12.0, "steal": 1.0, "others": None, "pressure": 2.15}, rested=1.0)
    assert (told["seconds"], told["pressure"], told["others"]) == (2.0, 0.15, None)
