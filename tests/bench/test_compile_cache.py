"""Cold and warm compile caches, as processes of their own find them; and what a compiler must not remember from one group to the next."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from triptych.bench import session
from triptych.bench.suite import Case, Suite
from triptych.bench.turns import Entry, build
from triptych.core import contract, conversation

LANES = {"pytorch": "compiled", "tensorflow": "compiled", "jax": "default"}


def built(suite: Suite, work: Path, lab: Any, *, warm: bool = False) -> tuple[dict[str, Any], set[str]]:
    """What building the suite's only case in a new process gave, and the files that this added to the caches; after a warm-up, if asked."""
    ((case,),) = suite.groups()
    with session.processes(suite, work) as held:
        if warm:
            session.warm_up([case], held, suite, lab.proof, lambda text: None)
        before = cached(work)
        entry = Entry(case)
        build(entry, {case.framework: held.start(case.framework)}, suite, lab.proof)
    assert entry.failure is None
    return entry.built, cached(work) - before


def cached(work: Path) -> set[str]:
    """Files in the caches of compiled programs."""
    return {path.name for path in work.glob("compile-cache-*/**/*") if path.is_file() and not path.name.endswith(("-atime", ".lock"))}


@pytest.mark.parametrize("framework", contract.installed())
def test_a_warm_cache_was_filled_by_a_process_before(framework: str, lab: Any, tmp_path: Path) -> None:
    suite = lab.suite(frameworks=[framework], lanes=[LANES[framework]], compile_cache="warm", threads=1)
    told, added = built(suite, tmp_path, lab, warm=True)
    assert cached(tmp_path)
    assert not added, "everything was found compiled"
    if framework != "tensorflow":  # which does not count
        assert told["phases"]["cache_hits"] >= 1
        assert told["phases"]["cache_misses"] == 0


def test_a_cold_cache_is_empty_whatever_was_compiled_before(lab: Any, tmp_path: Path) -> None:
    if "jax" not in contract.installed():
        pytest.skip("JAX, whose compiler is fast enough to be asked three times, is not installed")
    suite = lab.suite(frameworks=["jax"], compile_cache="cold", threads=1)
    for _ in range(2):
        told, added = built(suite, tmp_path, lab)
        assert (told["phases"]["cache_hits"], len(added) > 0) == (0, True)
        assert told["phases"]["cache_misses"] >= 1


def test_what_fails_while_a_cache_is_warmed_is_left_to_the_build(lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Failing:
        def ask(self, do: str, **given: Any) -> dict[str, Any]:
            asked.append(do)
            raise conversation.Failed("ValueError", "no")

        def stop(self) -> None:
            asked.append("stop")

    suite = lab.suite(frameworks=["pytorch"], compile_cache="warm")
    held = session.Processes(1.0, tmp_path, {}, [], {}, {})
    monkeypatch.setattr(session.Processes, "new", lambda self, framework, log: Failing())
    session.warm_up(suite.groups()[0], held, suite, lab.proof, lambda text: None)
    assert asked == ["build", "stop"]


def test_a_compiler_starts_every_group_without_what_it_learned_in_the_last(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile makes a size dynamic that was another in a model before: slower code for whatever batch size comes second."""
    if "pytorch" not in contract.installed():
        pytest.skip("PyTorch is not installed")
    import torch

    shapes: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        values = (node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder")
        shapes.extend(str(tuple(value.shape)) for value in values if getattr(value, "ndim", 0) == 4)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    worker = lab.Local("pytorch")
    for size in (2, 5, 7):
        case = Case("pytorch", "mlp", lab.options, "compiled", "inference", size)
        worker.ask("build", key="x", case=case.to_json(), given=str(lab.proof.weights), seed=0)
        worker.ask("release")
    assert shapes == ["(2, 1, 8, 8)", "(5, 1, 8, 8)", "(7, 1, 8, 8)"]


def test_the_caller_s_flags_stay_and_float32_stays_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_XLA_FLAGS", "--tf_xla_max_cluster_size=7")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    found = conversation.settings(3, tmp_path)
    assert found["TF_XLA_FLAGS"] == f"--tf_xla_max_cluster_size=7 --tf_xla_persistent_cache_directory={tmp_path / 'xla'}"
    assert found["ONEDNN_DEFAULT_FPMATH_MODE"] == "STRICT"
    assert {found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"], found["TF_NUM_INTRAOP_THREADS"]} == {"3"}
