"""Images a second of each room's in-memory pipeline against a stock torch DataLoader, on CIFAR-10: pad-crop, flip, normalize.

    TRIPTYCH_DATA=DIR .venv/bin/python benchmarks/data_speed.py [--data DIR/cifar10] [--rounds 7] [--batches 390]

Stock is a map-style dataset over uint8 tensors with torchvision's v2 transforms for each image (RandomCrop(32, 4, reflect), flip,
ToDtype, Normalize), measured without workers and with one a core; ratios are against the faster of the two. Each contestant is a process
that waits for its turn; in a round each, in random order, makes `--batches` batches, the first of a pass, which starts it, not counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, head, write_json

from triptych.bench.statistics import paired_interval
from triptych.core import catalog, contract
from triptych.core.preprocess import Transforms
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source, open_source

TRANSFORMS = Transforms(pad_crop=4, flip=0.5)
COMMAND = "benchmarks/data_speed.py"
Passes = Callable[[int], Iterator[Any]]
"""Number of a pass -> its batches, at least as many as a turn takes."""


def stock(images: np.ndarray, labels: np.ndarray, preprocessing: Preprocessing, batch_size: int, workers: int) -> Passes:
    """A DataLoader as torchvision's documentation sets it up. (N, H, W, C) uint8 and (N,) labels."""
    import torch
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    class CIFAR10(Dataset[Any]):
        """One image at a time."""

        def __init__(self) -> None:
            self.images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
            self.transform = v2.Compose([
                v2.RandomCrop(32, padding=4, padding_mode="reflect"), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(preprocessing.mean), list(preprocessing.std)),
            ])  # fmt: skip

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            return self.transform(self.images[index]), int(labels[index])

    loader = DataLoader(
        CIFAR10(), batch_size=batch_size, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )  # fmt: skip
    return lambda number: itertools.chain.from_iterable(iter(loader) for _ in itertools.count())


def ours(framework: str, images: np.ndarray, labels: np.ndarray, preprocessing: Preprocessing, batch_size: int) -> Passes:
    """A room's pipeline with its default loader, over the sampling plan of training."""
    room = contract.load(framework)
    classes = tuple(map(str, range(10)))
    source = Source("cifar10", "train", classes, labels, images, range(len(images)))
    plan = SamplingPlan(labels, len(classes), batch_size, 0, TRANSFORMS, preprocessing.crop)

    def passes(number: int) -> Iterator[Any]:
        start = number * plan.steps_per_epoch
        made: Iterator[Any] = room.batches(source, plan.batches(start, 2**31), preprocessing, TRANSFORMS)
        return made

    return passes


def work(name: str, arrays: Path, batch_size: int, batches: int) -> None:
    """A contestant: for each line of standard input one turn, answered by its seconds."""
    held = np.load(arrays)
    images, labels = held["images"], held["labels"]
    preprocessing = catalog.get_spec("resnet20").preprocessing
    kind, _, workers = name.partition(":")
    common = images, labels, preprocessing, batch_size
    passes = stock(*common, int(workers)) if kind == "stock" else ours(kind, *common)
    for number, _ in enumerate(sys.stdin):
        made = passes(number)
        next(made)
        started = time.perf_counter()
        for _ in range(batches):
            next(made)
        seconds = time.perf_counter() - started
        del made  # and with it what it has prepared ahead
        sys.stdout.write(f"{seconds!r}\n")
        sys.stdout.flush()


class Contestant:
    """A worker process that waits for its turns."""

    def __init__(self, name: str, arrays: Path, batch_size: int, batches: int) -> None:
        command = [sys.executable, __file__, "--worker", name, str(arrays), "--batch-size", str(batch_size), "--batches", str(batches)]
        quiet = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.name, self.seconds = name, list[float]()
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)

    def turn(self) -> float:
        """Seconds of one turn. SystemExit when the worker has died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with code {self.process.wait()}; its message is above")
        return float(answer)


def measure(names: list[str], arrays: Path, batch_size: int, batches: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn, by contestant; a first turn of each is thrown away."""
    contestants = [Contestant(name, arrays, batch_size, batches) for name in names]
    try:
        for each in contestants:
            each.turn()
        order, shuffle = list(contestants), random.Random(0)
        for _ in range(rounds):
            shuffle.shuffle(order)
            for each in order:
                each.seconds.append(each.turn())
    finally:
        for each in contestants:
            each.process.kill()
            each.process.wait()
    return {each.name: each.seconds for each in contestants}


def record(seconds: dict[str, list[float]], images: int, command: str) -> dict[str, Any]:
    """The JSON record: images a second of everything, ratios of rooms against the faster stock loader, raw samples."""
    speed = {name: images / float(np.median(turns)) for name, turns in seconds.items()}
    best = max((name for name in seconds if name.startswith("stock:")), key=lambda name: speed[name])
    rows = []
    for name in [name for name in seconds if not name.startswith("stock:")]:
        ratio, interval = paired_interval(seconds[best], seconds[name])
        common = {"framework": name, "images_per_second": speed[name], "stock_images_per_second": speed[best]}
        against = f"torch DataLoader, {best.partition(':')[2]} workers, torchvision v2 transforms image by image"
        rows.append({**common, "against": against, "ratio": ratio, "interval": interval, "n": len(seconds[name])})
    stocks = [{"workers": int(name.partition(":")[2]), "images_per_second": speed[name]} for name in seconds if name.startswith("stock:")]
    return {**head(command), "images_a_turn": images, "rows": rows, "stock": stocks, "seconds": seconds}


def arguments() -> argparse.Namespace:
    """The command line."""
    folder = os.environ.get("TRIPTYCH_DATA")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default=f"{folder}/cifar10" if folder else None, help="CIFAR-10, in any form that Triptych reads.")
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="All that are installed, without it.")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=390)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed" / "data.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.data is None and given.worker is None:
        parser.error("name the data: --data PATH/TO/cifar10, or TRIPTYCH_DATA, the folder that holds cifar10/")
    return given


def main() -> None:
    """Decode once, measure every contestant, write the record."""
    given = arguments()
    if given.worker:
        work(given.worker[0], Path(given.worker[1]), given.batch_size, given.batches)
        return
    images, labels = open_source(given.data, "train").arrays(3)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    names = ["stock:0", f"stock:{cores}", *(given.framework or contract.installed())]
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "arrays.npz"
        np.savez(arrays, images=images, labels=labels)
        seconds = measure(names, arrays, given.batch_size, given.batches, given.rounds)
    made = record(
        seconds,
        given.batch_size * given.batches,
        f"{COMMAND} --batch-size {given.batch_size} --batches {given.batches} --rounds {given.rounds}",
    )
    write_json(given.out, made)
    sys.stderr.write(json.dumps(made["rows"], indent=1) + "\n")


if __name__ == "__main__":
    main()
