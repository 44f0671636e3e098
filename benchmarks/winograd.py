"""3x3 convolutions of a network by Winograd's algorithm against oneDNN's direct ones, each with its ReLU: speed, and what they round.

    .venv/bin/python benchmarks/winograd.py [MODEL] [--batch 1 8] [--rounds 60] [--out FILE]

Both compute the same layer on the same input in turns, in random order, with one thread and with all; a ratio is of the same round. Kernels
and images are in the caches, as each call follows the last: in a network, whose other layers come between, kernels are not, and those of
Winograd's algorithm are larger.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, head, write_json
from torch import Tensor, nn

from triptych.bench.statistics import paired_interval
from triptych.core import catalog, philox
from triptych.core.difference import scaled_error
from triptych.core.errors import UsageError
from triptych.core.winograd import applies
from triptych.in_pytorch.inference import Winograd, by_onednn_graph, library, takes_winograd


def tensor(name: str, *shape: int) -> Tensor:
    """Normal float32 values, channels last."""
    return torch.from_numpy(philox.normal(name, shape).astype(np.float32)).contiguous(memory_format=torch.channels_last)


def measure(size: int, channels: int, filters: int, batch: int, threads: int, rounds: int) -> dict[str, Any] | None:
    """One layer's row; None for one that is not Winograd's."""
    torch.set_num_threads(threads)
    plain = nn.Conv2d(channels, filters, 3, padding=1).to(memory_format=torch.channels_last).eval()
    if not takes_winograd(plain):
        return None
    plain.weight.copy_(tensor("kernel", filters, channels, 3, 3) / (9 * channels) ** 0.5)
    plain.bias.copy_(tensor("bias", filters, 1, 1, 1).flatten())
    x = tensor("x", batch, channels, size, size).relu()
    ours = Winograd(plain, library(), relu=True)
    direct = by_onednn_graph(nn.Sequential(plain, nn.ReLU()).eval(), (x,))
    exact = nn.functional.conv2d(x.double(), plain.weight.double(), plain.bias.double(), padding=1).relu().numpy()
    ways: dict[str, Callable[[Tensor], Tensor]] = {"direct": direct, "winograd": ours}
    errors = {name: scaled_error(way(x).numpy(), exact) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name in random.sample(list(ways), len(ways)):
            ways[name](x)  # the other's data leave the caches
            started = time.perf_counter()
            ways[name](x)
            seconds[name].append(time.perf_counter() - started)
    ratio, interval = paired_interval(seconds["direct"], seconds["winograd"])
    medians = {f"{name}_seconds": float(np.median(each)) for name, each in seconds.items()}
    layer = {"size": size, "channels": channels, "filters": filters, "batch_size": batch, "threads": threads}
    return {**layer, **medians, "times_as_fast": ratio, "interval": list(interval), "errors": errors}


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    layer = "{size}x{size}, {channels} -> {filters}, batch {batch_size}, {threads} threads".format(**row)
    return f"{layer}: {row['times_as_fast']:.2f} times as fast ({row['interval'][0]:.2f} to {row['interval'][1]:.2f})\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="resnet50")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed" / "winograd.json")
    given = parser.parse_args()
    if min(given.rounds, *given.batch) < 1:
        parser.error("--rounds and --batch must be positive integers")
    try:
        layers = [layer for layer in catalog.get_spec(given.model).layers() if applies(layer)]
    except UsageError as error:
        parser.error(str(error))
    shapes = dict.fromkeys((layer.size, layer.in_channels, layer.out_channels) for layer in layers)
    rows = []
    with torch.no_grad():
        for threads in sorted({1, torch.get_num_threads()}):
            for batch in given.batch:
                for shape in shapes:
                    row = measure(*shape, batch, threads, given.rounds)
                    if row is not None:
                        rows.append(row)
                        sys.stdout.write(line(row))
                        sys.stdout.flush()
    if not rows:
        parser.error(f"{given.model} has no 3x3 convolution of stride 1 between multiples of 32 channels, or there is no C++ compiler here")
    write_json(given.out, {**head(f"benchmarks/winograd.py {given.model}"), "model": given.model, "rounds": given.rounds, "rows": rows})


if __name__ == "__main__":
    main()
