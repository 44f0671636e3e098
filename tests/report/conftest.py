"""Synthetic evidence of every kind: the report's tests run no framework."""

from __future__ import annotations

import dataclasses
import math

import pytest

from triptych.report import evidence as ev
from triptych.report import gather

PAIRS = ("pytorch / tensorflow", "pytorch / jax", "tensorflow / jax")
NAMES = (
    "names, shapes, weights", "preprocessing", "forward, eval mode", "forward, train mode", "loss and gradients",
    "optimizer alone", "synchronised steps", "free run",
)  # fmt: skip
FLOAT64 = ((0.0, 0.0), (2.4e-5, 2e-4), (1.5e-13, 1e-12), (2.1e-13, 1e-12), (1.2e-12, 1e-11), (6.1e-16, 1e-14), (8.4e-12, 1e-10), (2.4, 5.0))
FLOAT32 = ((0.0, 0.0), (2.4e-5, 2e-4), (1.4e-6, 1e-5), (2.6e-6, 2e-5), (3.1e-5, 2e-4), (1.1e-7, 1e-6), (4.4e-4, 3e-3), (1.6, 5.0))
FAULTS = (
    ("batch_norm_epsilon", 3, 2.2e-4, 6.1e-5), ("batch_norm_momentum", 4, 0.81, 3e-7), ("batch_norm_biased_variance", 4, 1.3e-2, 3e-7),
    ("batch_norm_batch_statistics_in_eval", 3, 0.62, 0.62), ("conv_same_padding", 3, 0.9, 0.9), ("max_pool_same_padding", 3, 1.1, 1.1),
    ("flatten_native_order", 3, 1.4, 1.4), ("low_precision_layer", 3, 2.9e-3, 2.9e-3), ("dropout_in_eval", 3, 0.4, 0.4),
    ("momentum_convention", 7, 3.1e-3, 3e-7), ("nesterov_formula", 6, 8.8e-2, 3e-7), ("weight_decay_decoupled", 6, 5e-5, 3e-7),
    ("adam_epsilon_hat", 6, 4e-7, 3e-7), ("label_smoothing_other_classes", 5, 1.2e-2, 3e-7), ("loss_sum", 5, 63.0, 3e-7),
    ("resize_no_antialias", 2, 0.4, None), ("resize_uint8", 2, 3e-3, None), ("ema_before_step", 7, 2e-4, 3e-7),
)  # fmt: skip


def _rungs(precision: str, figures: tuple[tuple[float, float], ...]) -> list[dict]:
    return [
        {
            "number": i, "name": name, "precision": precision, "worst_error": error, "tolerance": tolerance, "passed": True,
            "tensor": "layer3.5.bn2", "pair": PAIRS[i % 3].split(" / "), "tensors": 161 + i, "pairs": 3, "steps": 10 if i > 6 else 1,
            "image_size": 64, "batch_size": 4,
        }
        for i, (name, (error, tolerance)) in enumerate(zip(NAMES, figures, strict=True), start=1)
    ]  # fmt: skip


def certificate() -> ev.Certificate:
    """A ResNet-50 that passes, in both precisions, with curves and context."""
    own = [1e-13 * 40**i for i in range(6)]
    rungs = _rungs("float64", FLOAT64) + _rungs("float32", FLOAT32)
    rungs[7]["curves"] = {
        "self_divergence": [[x * k for x in own] for k in (0.5, 1.0, 2.0)], "median_self_divergence": own, "counted_steps": [0, 1, 2, 3, 4],
        "pairs": {pair: [x * (1.1 + i) for x in own] for i, pair in enumerate(PAIRS)},
    }  # fmt: skip
    return gather.certificate({
        "verdict": "pass", "model": "resnet50", "spec_sha256": "ab" * 32, "weights_sha256": "cd" * 32, "first_divergence": None,
        "rungs": rungs,
        "context": {
            "max_absolute_logit_difference": 3.1e-7, "logit_scale": 1.9, "layout_noise": {"pytorch": 4.5e-7}, "image_size": 224,
            "published_algoperf_difference": 2.68e-7,
        },
    })  # fmt: skip


def _losses(steps: int, phase: float) -> tuple[float, ...]:
    return tuple(2.3 * math.exp(-i / 60) + 0.01 + 0.004 * abs(math.sin(i * 1.7 + phase)) for i in range(steps))


def training() -> ev.Training:
    """Three float32 runs of ResNet-20."""
    runs = [
        ev.Run(name, _losses(420, phase), (correct, 887, 888), 898, seconds, 899)
        for name, phase, correct, seconds in (("pytorch", 0.0, 887, 61.2), ("tensorflow", 0.2, 886, 94.0), ("jax", 0.4, 889, 143.9))
    ]
    return ev.Training("resnet20", "the embedded digits", "float32", tuple(runs))


def short_training() -> ev.Training:
    """A float64 run of 30 steps with its differences and its yardstick."""
    drift = [3e-16 * 2.1**i for i in range(30)]
    runs = tuple(ev.Run(name, _losses(30, 0.0), (300,), 898, 9.0) for name in ("pytorch", "tensorflow", "jax"))
    pairs = {pair: tuple(x * (0.8 + 0.4 * i) if j else 0.0 for j, x in enumerate(drift)) for i, pair in enumerate(PAIRS)}
    weights = {pair: tuple(10 * x for x in series) for pair, series in pairs.items()}
    own = tuple(1.3 * x for x in drift)
    return ev.Training("resnet20", "the embedded digits", "float64", runs, {}, pairs, own, weights, tuple(10 * x for x in own))


def fault_table() -> ev.FaultTable:
    """Eighteen faults, each planted in three frameworks, all caught."""
    rows = [
        {
            "name": name, "framework": framework, "caught": True, "rung": rung, "tensor": "layer1.0.bn1", "error": error * (1 + 0.1 * i),
            "float32_forward_error": quiet, "cause": "Keras defaults to 1e-3, the others to 1e-5", "numerics": 4,
            "expected_rung": rung, "planted_layer": "layer1.0.bn1", "right_rung": True, "right_layer": True,
        }
        for name, rung, error, quiet in FAULTS
        for i, framework in enumerate(("pytorch", "tensorflow", "jax"))
    ]  # fmt: skip
    absent = {"numerics 9": "no catalogued model has a GELU", "dropout_in_eval": "resnets have no dropout"}
    return gather.fault_table({"model": "tiny_resnet50", "clean": "pass", "faults": rows, "not_expressible": absent})


def whole() -> ev.Evidence:
    """Evidence in which nothing is missing and everything holds."""
    commands = {
        "report": "make report", "parity": "triptych parity resnet50", "training": "triptych report --fresh",
        "short_training": "triptych report --fresh", "faults": "triptych parity resnet50 --fault all", **gather.COMMANDS,
    }  # fmt: skip
    code = tuple(
        ev.CodeCount(f, file, 90 + i, 140 + i)
        for i, f in enumerate(("pytorch", "tensorflow", "jax"))
        for file in ("layers.py", "resnet.py", "mlp.py")
    )
    return ev.Evidence(
        certificates=(certificate(),), training=training(), short_training=short_training(), faults=(fault_table(),),
        costs=gather.costs(("resnet50", "resnet20")), code=code, environment=gather.environment(), commands=commands,
        steps=(ev.Step("parity of resnet50", False, 402.5), ev.Step("training of resnet20", True)), created="2026-11-22",
    )  # fmt: skip


@pytest.fixture(scope="session")
def evidence() -> ev.Evidence:
    """The whole evidence; tests replace parts of it."""
    return whole()


@pytest.fixture(scope="session")
def hostile(evidence: ev.Evidence) -> ev.Evidence:
    """Evidence whose every name tries to break out of HTML, SVG, Markdown or a file name."""
    bad = '</td><script src="http://evil.example/x.js"></script>|`$x$`](javascript:1)'
    rung = dataclasses.replace(evidence.certificates[0].rungs[2], name=bad, tensor=bad, pair=bad)
    fault = dataclasses.replace(evidence.faults[0].faults[0], name=bad, tensor=bad, cause=bad)
    return dataclasses.replace(
        evidence,
        certificates=(dataclasses.replace(evidence.certificates[0], model=bad, rungs=(rung,), first_divergence=bad),),
        faults=(dataclasses.replace(evidence.faults[0], model="../" + bad, faults=(fault,)),),
        environment={bad: bad},
        commands=dict.fromkeys(evidence.commands, bad),
    )
