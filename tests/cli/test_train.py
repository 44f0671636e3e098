"""What `triptych train` shows while it trains, and at the end."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from triptych.cli import main, progress
from triptych.cli.train import summary
from triptych.core import contract

TOLD = {"step": 3, "steps": 200, "loss": 1.25, "images_per_second": 312.4, "data_wait": 0.034, "seconds_left": 3725.0}


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_off_a_terminal_lines_are_ten_seconds_apart(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.training(["jax"]) as show:
        for step in range(1, 201):
            show("jax", {**TOLD, "step": step})
            now += 0.1
        show("jax", {"note": "it is late"})
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[:-1]] == [f"jax: step {step} of 200" for step in (1, 101, 200)]
    assert lines[0] == "jax: step 1 of 200, loss 1.2500, 312 images/s, data wait 3%, 1:02:05 left"
    assert lines[-1] == "jax: it is late"


def test_on_a_terminal_each_framework_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with progress.training(["pytorch", "jax"]) as show:
        show("pytorch", TOLD)
        show("jax", {"note": "[bold]said[/bold]"})
        show("jax", {**TOLD, "step": 200})
    drawn = terminal.getvalue()
    for text in ("pytorch", "3/200", "200/200", "312 images/s, data wait 3%, 1:02:05 left", "jax: [bold]said[/bold]"):
        assert text in drawn


def result(framework: str, **changes: Any) -> dict[str, Any]:
    """The end of a run."""
    return {
        "framework": framework, "test_accuracy": 0.9644, "test_loss": 0.26387, "seconds": 3725.4, "images_per_second": 151.6,
        "data_wait": 0.0226, "peak_memory_bytes": 3 * 2**29, "notes": [], "job": {"watch": {"tensorboard": True}}, **changes,
    }  # fmt: skip


def test_the_summary_is_a_table_and_says_where_things_lie() -> None:
    lines = summary([result("pytorch"), result("jax", notes=["memory grows"])], Path("runs/x")).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        [framework, "96.44%", "0.2639", "1:02:05", "152", "2.3%", "1.50", "GiB"] for framework in ("pytorch", "jax")
    ]
    assert lines[0].split() == ["framework", "test", "accuracy", "test", "loss", "time", "images/s", "data", "wait", "peak", "memory"]
    assert len({line.index(text) for line, text in zip(lines[:3], ("images/s", "152", "152"), strict=True)}) == 1
    assert lines[3:] == [
        "jax: memory grows",
        "pytorch: runs/x/pytorch/checkpoint, metrics.jsonl and result.json beside it",
        "jax: runs/x/jax/checkpoint, metrics.jsonl and result.json beside it",
        "curves: tensorboard --logdir runs/x",
    ]
    assert "tensorboard" not in summary([result("jax", job={"watch": {"tensorboard": False}})], Path("runs/x"))


def run(*arguments: Any) -> int:
    """The exit code of `triptych train`."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_results_go_to_stdout_and_progress_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    framework = contract.installed()[0]
    few = ("--set", "steps=2", "--set", "epochs=null", "--set", "options.hidden=[16]", "--device", "cpu")
    assert run("digits_mlp", "--framework", framework, "--out", tmp_path / "run", *few) == 0
    out, err = capsys.readouterr()
    assert f"{framework}: step 2 of 2, loss " in err
    assert out.splitlines()[1].split()[0] == framework
    assert json.loads((tmp_path / "run" / framework / "result.json").read_text())["images_per_second"] > 0


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert run("digits_mlp", "--out", tmp_path / "file" / "run") == 10
    assert "cannot write" in capsys.readouterr().err
