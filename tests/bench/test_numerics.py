"""What float32 means is read off each framework while it would be timed, whatever the caller has set."""

from __future__ import annotations

from typing import Any

import pytest

from triptych.core import contract


def numerics(framework: str) -> dict[str, str]:
    if framework not in contract.installed():
        pytest.skip(f"{framework} is not installed")
    found: dict[str, str] = contract.load(framework).numerics()
    assert all(isinstance(value, str) for value in found.values())
    return found


def test_pytorch_computes_in_float32_and_tells_what_a_stock_lane_would() -> None:
    numerics("pytorch")
    import torch

    switch: Any = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        found = numerics("pytorch")
    finally:
        switch.fp32_precision = before
    assert {found[name] for name in ("matmul", "convolution", "CUDA matmul", "CUDA convolution")} == {"ieee"}
    assert found["matmul, stock"] == "bf16"
    assert found["threads"] == str(torch.get_num_threads())


def test_tensorflow_computes_without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/me/x")
    found = numerics("tensorflow")
    assert (found["TF32"], found["TF32, stock"], found["Keras dtype policy"]) == ("off", "on", "float32")
    assert found["XLA_FLAGS"] == "--xla_dump_to=(path)"


def test_jax_computes_full_products() -> None:
    numerics("jax")
    import jax

    with jax.default_matmul_precision("bfloat16"):
        found = numerics("jax")
    assert (found["matmul precision"], found["matmul precision, stock"]) == ("highest", "bfloat16")
    assert found["x64"] == "off"
