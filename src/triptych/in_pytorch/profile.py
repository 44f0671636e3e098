"""PyTorch's own profiler: a trace of what runs, and its operators by the kind of work they do.

An eager operator runs others inside it; the outermost one that says what it is gives the kind of work of all of them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from triptych.core.spec import Spec
from triptych.core.trace import DATA, OPTIMIZER, STEP, Event

# Names of ATen's operators and of autograd's functions; the first pattern that is found decides.
KINDS = tuple(
    (re.compile(pattern), category)
    for pattern, category in (
        (rf"^(Optimizer\.|{OPTIMIZER}$)", "optimizer"),
        (r"cross_entropy|nll_loss|log_softmax|NllLoss|LogSoftmax", "other"),
        (r"^aten::(_?conv\w*|mkldnn_convolution\w*|thnn_conv\w*)|^\w*Convolution\w*Backward", "convolution"),
        (r"^aten::(mm|bmm|addmm|baddbmm|matmul|linear|scaled_dot_product_attention|lstm)$", "matrix_product"),
        (r"^(Mm|Bmm|Addmm|Baddbmm|Linear|ScaledDotProduct\w*|MkldnnRnn\w*)Backward", "matrix_product"),
        (r"^aten::(native_)?\w*(batch|layer)_norm|^\w*(Batch|Layer)Norm\w*Backward", "normalization"),
        (r"^aten::(relu_?|gelu|clamp_min_?|max_pool2d|adaptive_avg_pool2d|mean|add_?|dropout|cat|slice|constant_pad_nd)$", "elementwise"),
        (r"^(Relu|Gelu|Clamp\w*|MaxPool\w*|AdaptiveAvgPool\w*|Mean|Add|Dropout|Cat|Slice|ConstantPadNd)Backward", "elementwise"),
        (r"^aten::(contiguous|clone|to|copy_)$", "data"),  # outside all others only the batch is copied
    )
)
AUTOGRAD = "autograd::engine::evaluate_function: "


@contextlib.contextmanager
def profile(directory: Path) -> Iterator[None]:
    """Trace what runs while open: a Chrome trace under `directory`, which TensorBoard's profiler and ui.perfetto.dev show."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    written = torch.profiler.tensorboard_trace_handler(str(directory), worker_name="pytorch")
    with torch.profiler.profile(activities=activities, on_trace_ready=written):
        yield


def annotate(name: str) -> contextlib.AbstractContextManager[Any]:
    """A region of this name in the trace."""
    return torch.profiler.record_function(name)


def operators(directory: Path, spec: Spec) -> list[Event]:
    """The operators and regions of the trace under `directory`. Eager operators know no layer."""
    (file,) = directory.glob("*.pt.trace.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return [_event(row) for row in rows if row.get("ph") == "X" and row.get("cat") in ("cpu_op", "user_annotation")]


def _event(row: dict[str, Any]) -> Event:
    name, start = row["name"], float(row["ts"])
    if name in (STEP, DATA):
        return Event(name, start, start + float(row["dur"]), str(row["tid"]), DATA if name == DATA else None, region=True)
    return Event(name.removeprefix(AUTOGRAD), start, start + float(row["dur"]), str(row["tid"]), category(name.removeprefix(AUTOGRAD)))


def category(operation: str) -> str | None:
    """The kind of work of an operator of this name; None when the name does not tell."""
    return next((kind for pattern, kind in KINDS if pattern.search(operation)), None)
