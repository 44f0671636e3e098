"""What the worker processes of a benchmark compute with: the same cores, threads and numerics."""

from __future__ import annotations

import os

from triptych.bench import machine

NUMERICS = {
    "precision": "float32",
    "our lanes": "full float32 products: torch fp32_precision ieee, TensorFlow without TF32, jax_default_matmul_precision highest",
    "runtimes": "float32 as the exported file has it; OpenVINO with INFERENCE_PRECISION_HINT f32",
    "stock lanes": "the framework's defaults for float32 on a CPU",
    "fast math": "none switched on",
}


def chosen_cores(threads: int | None) -> tuple[int, list[int]]:
    """The number of threads, and the cores they are bound to ([]: unbound)."""
    bound = machine.cores(threads)
    return threads or len(bound) or os.cpu_count() or 1, bound
