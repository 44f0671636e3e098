"""What a process that times PyTorch tells and forgets."""

from __future__ import annotations

from typing import Any

import torch

from triptych.core.environment import variables
from triptych.in_pytorch.model import full_precision


def numerics() -> dict[str, str]:
    """What float32 means here, as PyTorch tells it: in our lanes, and by its defaults in stock ones."""
    backends: Any = torch.backends  # its stubs know only some of these switches
    switches = {
        "matmul": backends.mkldnn.matmul, "convolution": backends.mkldnn.conv,
        "CUDA matmul": backends.cuda.matmul, "CUDA convolution": backends.cudnn.conv,
    }  # fmt: skip
    stock = {f"{name}, stock": switch.fp32_precision for name, switch in switches.items()}
    with full_precision():
        ours = {name: switch.fp32_precision for name, switch in switches.items()}
    return {
        **ours,
        **stock,
        "oneDNN": "on" if backends.mkldnn.enabled else "off",
        "ONEDNN_DEFAULT_FPMATH_MODE": variables().get("ONEDNN_DEFAULT_FPMATH_MODE", "not set"),
        "threads": str(torch.get_num_threads()),
    }


def forget() -> None:
    """Drop what the compiler remembers: it makes a size dynamic, and its code slower, once it has seen another model at another one."""
    torch.compiler.reset()
