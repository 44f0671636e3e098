"""Run the workers of a plan, compare their streams, and write the certificate."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from triptych.core import environment, initialize, workers
from triptych.core.errors import TriptychError, UsageError
from triptych.core.initialize import Weights
from triptych.parity import plan as plans
from triptych.parity.compare import Comparer, Comparison, divergence, free_run_row, rung_rows
from triptych.parity.observation import ShardReader, bytes_in, write_json, write_tensors
from triptych.parity.plan import Plan
from triptych.parity.rungs import RUNGS

Progress = Callable[[str], None]
PUBLISHED_ALGOPERF_DIFFERENCE = 2.68e-7
"""AlgoPerf's published largest logit difference, ResNet-50, PyTorch against JAX, random initialization."""


@dataclass(slots=True)
class Proof:
    """What comparing one plan gave."""

    plan: Plan
    comparer: Comparer
    summaries: dict[str, dict[str, Any]]
    weights: Weights
    peak_disk_bytes: int
    seconds: float

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The certificate's rungs in this precision."""
        pairs = len(self.plan.frameworks) * (len(self.plan.frameworks) - 1) // 2
        rows = rung_rows(self.plan, self.comparer.comparisons, pairs)
        if 8 in self.plan.rungs and self.comparer.free:
            curves = self.summaries[self.plan.frameworks[0]]["self_divergence"]
            rows += [free_run_row(self.plan, kind, free, curves[kind]) for kind, free in self.comparer.free.items()]
        return rows

    @property
    def passed(self) -> bool:
        """Whether every rung asked for was climbed and passed."""
        rows = self.rows
        climbed = set(self.plan.rungs) - set(self.plan.not_applicable)
        return bool(climbed) and {row["number"] for row in rows} == climbed and all(row["passed"] for row in rows)


def prove(plan: Plan, weights: Weights | None, run: Path, progress: Progress = lambda text: None, *, keep: bool = False) -> Proof:
    """Start the workers, compare while they climb, and return the proof. `run` must be a new directory.

    Raises TriptychError when a worker fails, with the end of its log; the other workers are stopped.
    """
    if len(plan.frameworks) < 2:
        raise UsageError("a proof needs two frameworks or more; name them with --frameworks pytorch,jax")
    started = time.perf_counter()
    run.mkdir(parents=True)
    write_json(run / "plan.json", plan.to_json())
    given = weights if weights is not None else initialize.parity_weights(plan.spec, plan.seed, plan.precision)
    write_tensors(run / "inputs.safetensors", given)
    comparer = Comparer(plan, keep=keep)
    with worker_processes(plan, run) as processes:
        readers = {name: ShardReader(run / name, alive(process)) for name, process in processes.items()}
        peak = _watch(comparer.consume(readers), plan, run, progress)
    used = plans.load(run)[1] if not plan.calibrates else _load(run / "weights.safetensors")
    summaries = {name: reader.summary for name, reader in readers.items()}
    proof = Proof(plan, comparer, summaries, used, peak, time.perf_counter() - started)
    write_json(run / "comparison.json", {"schema": 1, "tensors": [asdict(c) for c in comparer.comparisons]})
    if comparer.first_tensors:
        write_tensors(run / "first_divergence.safetensors", comparer.first_tensors)
    return proof


def _load(path: Path) -> Weights:
    from safetensors.numpy import load_file

    return load_file(path)


def _watch(comparisons: Iterator[Comparison], plan: Plan, run: Path, progress: Progress) -> int:
    """Drive the comparison to its end; the most bytes that the run directory held at a glance."""
    peak = 0
    for count, comparison in enumerate(comparisons, start=1):
        if count % 20 == 1:
            peak = max(peak, bytes_in(run, "**/*"))
            progress(f"{plan.spec.name} {plan.precision}: rung {comparison.rung}, step {comparison.step}, {count} tensors compared")
    return peak


@contextlib.contextmanager
def worker_processes(plan: Plan, run: Path) -> Iterator[dict[str, workers.Process]]:
    """One process a framework; all are stopped on the way out, whatever happened."""
    processes: dict[str, workers.Process] = {}
    try:
        settings = _environment(run, plan)
        for framework in plan.frameworks:
            with (run / f"{framework}.log").open("wb") as log:
                processes[framework] = workers.start("triptych.parity.worker", framework, [str(run), framework], settings=settings, log=log)
        yield processes
    except TriptychError as error:
        failed = next((name for name in processes if (run / name / "error.json").exists()), None)
        tail = (run / f"{failed}.log").read_text(errors="replace")[-2000:] if failed else ""
        raise TriptychError(f"{error}\n{failed} worker: {tail}" if failed else str(error)) from error
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def _environment(run: Path, plan: Plan) -> dict[str, str]:
    """Worker processes own their globals: no TF32, no chatter, a compilation cache of their own, and a fair share of the cores.

    OpenMP threads of several workers that spin for each other's cores cost ten times the work; the caller's own setting wins.
    """
    share = max(1, (os.cpu_count() or 1) // len(plan.frameworks))
    settings = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(share)),
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "NVIDIA_TF32_OVERRIDE": "0",
        "JAX_COMPILATION_CACHE_DIR": str(run / "jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PYTHONUNBUFFERED": "1",
        # glibc keeps freed tensors of up to 32 MB for itself unless the limit is fixed: gigabytes, with training states passing through.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    if plan.precision == "float64":
        # oneDNN has no float64 kernels, only an allocator that keeps what is freed: a third of the memory of a deep model.
        settings["TF_ENABLE_ONEDNN_OPTS"] = "0"
    return settings


def alive(process: workers.Process) -> Callable[[], bool]:
    """Whether a worker still runs, asked anew at each call."""
    return lambda: process.poll() is None


def certificate(model: str, proofs: list[Proof]) -> dict[str, Any]:
    """The certificate of one model: verdict, every rung in every precision, the first divergence, and hashes."""
    passed = bool(proofs) and all(proof.passed for proof in proofs)
    first = next((proof for proof in proofs if proof.comparer.first is not None), None)
    spec = proofs[0].plan.spec
    ordered = [(tensor.name, proofs[0].weights[tensor.name]) for tensor in spec.tensors()]
    return {
        "schema": 1,
        "verdict": "pass" if passed else "fail",
        "model": model,
        "frameworks": list(proofs[0].plan.frameworks),
        "spec_sha256": plans.spec_sha256(spec),
        "weights_sha256": plans.weights_sha256(ordered),
        "code_sha256": environment.code_hash(),
        "rungs": [row for proof in proofs for row in proof.rows],
        "not_applicable": _not_applicable(proofs),
        "first_divergence": divergence(first.plan, first.comparer.first) if first else None,
        "context": next((c for c in map(_context, proofs) if c), None),
        "resources": {proof.plan.precision: _resources(proof) for proof in proofs},
        "versions": {name: summary.get("versions", {}) for name, summary in proofs[0].summaries.items()},
        "environment": environment.environment(),
    }


def _not_applicable(proofs: list[Proof]) -> list[dict[str, Any]]:
    """The rungs that were asked for and say nothing about this model, in whatever precision, with the reason."""
    reasons = {number: reason for proof in proofs for number, reason in proof.plan.not_applicable.items()}
    return [{"number": rung.number, "name": rung.name, "reason": reasons[rung.number]} for rung in RUNGS if rung.number in reasons]


def _resources(proof: Proof) -> dict[str, Any]:
    memory = {name: summary.get("peak_memory_bytes") for name, summary in proof.summaries.items()}
    return {"seconds": round(proof.seconds, 1), "peak_disk_bytes": proof.peak_disk_bytes, "peak_memory_bytes": memory}


def _context(proof: Proof) -> dict[str, Any] | None:
    """AlgoPerf's setting (random initialization, float32): absolute logit difference and scale, beside one framework's own noise."""
    logits = proof.comparer.context.get("random initialization")
    if logits is None:
        return None
    worst = max(float(np.abs(a - b).max()) for a in logits.values() for b in logits.values())
    own = {name: float(value) for name, value in proof.comparer.context["layout noise"].items() if value >= 0}
    return {
        "setting": "random initialization, float32, eval mode",
        "image_size": proof.plan.spec.image_size,
        "max_absolute_logit_difference": worst,
        "logit_scale": max(float(np.abs(value).max()) for value in logits.values()),
        "layout_noise": own,
        "published_algoperf_difference": PUBLISHED_ALGOPERF_DIFFERENCE,
    }


def table(certificate_: Mapping[str, Any]) -> str:
    """The certificate as text."""
    head = f"{'rung':<28}{'precision':<10}{'worst error':>12}{'tolerance':>12}  {'tensor'}"
    lines = [f"{certificate_['model']}: {certificate_['verdict'].upper()} ({', '.join(certificate_['frameworks'])})", head]
    for row in certificate_["rungs"]:
        mark = "" if row["passed"] else "  <-- FAILED"
        name = f"{row['number']} {row['name']}"
        lines.append(f"{name:<28}{row['precision']:<10}{row['worst_error']:>12.2e}{row['tolerance']:>12.2e}  {row['tensor']}{mark}")
    lines += [f"{row['number']} {row['name']:<26}n/a: {row['reason']}" for row in certificate_.get("not_applicable", [])]
    first = certificate_["first_divergence"]
    if first:
        where = f"rung {first['rung']}, step {first['step']}, {first['tensor']} ({' against '.join(first['pair'])})"
        lines.append(f"first divergence: {where}: {first['error']:.2e} > {first['tolerance']:.2e}")
    context = certificate_.get("context")
    if context:
        lines.append(
            f"random initialization, float32: largest logit difference {context['max_absolute_logit_difference']:.2e} "
            f"at logit scale {context['logit_scale']:.2e} (AlgoPerf published {context['published_algoperf_difference']:.2e})"
        )
    return "\n".join(lines)
