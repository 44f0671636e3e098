"""Where the time of a step went, from events made by hand; and the file that shows them."""

from __future__ import annotations

import pytest

from triptych.bench import perfetto
from triptych.bench.attribution import attribute
from triptych.core.errors import StorageError, TriptychError
from triptych.core.trace import CATEGORIES, DATA, STEP, Event

S = 1e6  # events are in microseconds


def step(start: float = 0.0, stop: float = 10.0) -> Event:
    return Event(STEP, start * S, stop * S, "python", region=True)


def ran(operation: str, start: float, stop: float, category: str | None = None, track: str = "a", also: tuple[str, ...] = ()) -> Event:
    return Event(operation, start * S, stop * S, track, category, "", also)


def seconds(events: list[Event]) -> dict[str, float]:
    """Of the kinds of work that took any time, and in which nothing ran."""
    found = attribute(events)
    return {**{name: value for name, value in found.categories.items() if value}, "nothing": found.unattributed}


def test_what_runs_alone_has_its_time_and_the_rest_is_nobodys() -> None:
    found = attribute([step(), ran("conv", 1.0, 4.0, "convolution"), ran("conv", 5.0, 6.0, "convolution"), ran("loss", 7.0, 8.0)])
    assert found.categories == {**dict.fromkeys(CATEGORIES, 0.0), "convolution": 4.0, "other": 1.0}
    assert found.unattributed == pytest.approx(5.0)
    told = found.to_json()
    assert told["unattributed_share"] == pytest.approx(0.5)
    assert told["top"][0] == {"operation": "conv", "category": "convolution", "seconds": 4.0, "share": pytest.approx(0.4), "calls": 2}


def test_what_runs_at_the_same_time_shares_it_and_the_sum_is_the_step() -> None:
    events = [
        step(),
        ran("conv", 0.0, 8.0, "convolution"),
        ran("bn", 4.0, 10.0, "normalization", "b"),
        ran("relu", 4.0, 8.0, "elementwise", "c"),
    ]
    found = seconds(events)
    assert found == {
        "convolution": pytest.approx(4 + 4 / 3),
        "normalization": pytest.approx(2 + 4 / 3),
        "elementwise": pytest.approx(4 / 3),
        "nothing": 0.0,
    }
    assert sum(found.values()) == pytest.approx(10.0)


def test_the_outermost_that_tells_its_kind_gives_it_and_the_innermost_is_named() -> None:
    events = [
        step(), ran("engine", 1.0, 9.0), ran("ConvolutionBackward0", 2.0, 8.0, "convolution"),
        ran("copy", 3.0, 5.0, "data"), ran("fill", 5.0, 6.0),
    ]  # fmt: skip
    found = attribute(events)
    assert seconds(events) == {"convolution": 6.0, "other": 2.0, "nothing": 2.0}
    assert found.operators == {
        ("engine", "other"): 2.0, ("ConvolutionBackward0", "convolution"): 3.0, ("copy", "convolution"): 2.0, ("fill", "convolution"): 1.0,
    }  # fmt: skip
    assert set(found.calls.values()) == {1}


def test_only_the_step_counts() -> None:
    events = [
        step(2.0, 4.0),
        ran("early", 0.0, 1.0, "data"),
        ran("into", 1.0, 3.0, "data"),
        ran("out", 3.5, 9.0, "optimizer", "b"),
        ran("late", 5.0, 6.0),
    ]
    assert seconds(events) == {"data": 1.0, "optimizer": 0.5, "nothing": 0.5}


def test_while_the_batch_is_made_the_time_is_the_datas_whoever_works() -> None:
    region = Event(DATA, 0.0, 4.0 * S, "python", DATA, region=True)
    events = [
        step(),
        region,
        ran("decode", 1.0, 2.0, None, "python"),
        ran("resize", 1.0, 3.0, "elementwise", "b"),
        ran("conv", 4.0, 6.0, "convolution"),
    ]
    assert seconds(events) == {"data": 4.0, "convolution": 2.0, "nothing": 4.0}


def test_what_a_compiler_fused_is_told() -> None:
    events = [step(), ran("fusion", 0.0, 4.0, "convolution", also=("normalization",)), ran("conv", 4.0, 8.0, "convolution")]
    assert attribute(events).to_json()["mixed_share"] == pytest.approx(0.4)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_trace_has_one_step(steps: int) -> None:
    with pytest.raises(TriptychError, match=f"has {steps}"):
        attribute([step()] * steps)


def test_the_file_is_a_gzipped_chrome_trace(tmp_path) -> None:
    events = [step(2.0, 8.0), ran("conv", 3.0, 5.0, "convolution", "b", ("normalization",)), ran("gone", 0.0, 1.0)]
    perfetto.write(tmp_path / "trace.json.gz", perfetto.trace_events("PyTorch", events))
    assert (tmp_path / "trace.json.gz").read_bytes()[:2] == b"\x1f\x8b"
    rows = perfetto.read(tmp_path / "trace.json.gz")
    names = {(row["name"], row["args"]["name"]) for row in rows if row["ph"] == "M"}
    assert names == {("process_name", "PyTorch"), ("thread_name", "python"), ("thread_name", "b")}
    region, conv = [row for row in rows if row["ph"] == "X"]
    assert (region["name"], region["ts"], region["dur"]) == (STEP, 0.0, 6.0 * S)
    assert (conv["ts"], conv["dur"], conv["cat"], conv["args"]) == (1.0 * S, 2.0 * S, "convolution", {"fused with": "normalization"})
    assert conv["pid"] == region["pid"]
    assert conv["tid"] != region["tid"]


def test_a_trace_that_cannot_be_written_is_a_storage_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="--out"):
        perfetto.write(tmp_path / "file" / "trace.json.gz", [])
