"""A training step of ours against the stock one of the same framework: same batch, one process a framework, turns in random order.

    .venv/bin/python benchmarks/step_speed.py [--framework F] [--model resnet50] [--batch-size 32] [--image-size 224] [--rounds 20]

Stock is what a user of the framework writes: torchvision's model and the plain loop, keras.applications and `train_on_batch`, the
ResNet and the jitted step of Flax's example (each room's stock.py). It is given tensors that are ready; ours takes numpy arrays and checks
them. A round lets each take one step; ratios are stock's seconds over ours in the same round (above 1: ours is faster).
`outside` is the share of our step that its own native step function, on ready tensors, does not need.
Rows of frameworks, models and sizes that are not measured now are kept from the file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measuring import RESULTS, head, write_json

from triptych.bench.script import at_least
from triptych.bench.statistics import paired_interval
from triptych.core import catalog, contract, initialize
from triptych.core.contender import LANES, RATE, RECIPE, STOCK, Contender
from triptych.core.cost import cost
from triptych.core.environment import code_hash
from triptych.core.errors import LaneMissing
from triptych.core.spec import Spec

Turn = Callable[[], Any]
MODELS = {"pytorch": ("resnet50", "resnet18"), "tensorflow": ("resnet50",), "jax": ("resnet50",)}
AGAINST = {
    "pytorch": "torchvision.models.{model}, eager, SGD in a plain loop",
    "tensorflow": "keras.applications.ResNet50, compile and train_on_batch",
    "jax": "a ResNet as in Flax's ImageNet example, one jitted and donated optax step",
}
WARM_UP = 2
BARE_LANE = "bare"


def bare_pytorch(trainer: Any, images: np.ndarray, labels: np.ndarray) -> Turn:
    """The plain loop on our model."""
    from triptych.in_pytorch import stock

    return functools.partial(stock.step, trainer.model.native, trainer.optimizer, *stock.stage(images, labels))


def bare_tensorflow(trainer: Any, images: np.ndarray, labels: np.ndarray) -> Turn:
    """Our training step as one function of the framework."""
    import tensorflow as tf

    function = tf.function(trainer.training_step)
    batch = tf.constant(images), tf.constant(labels), tf.constant(RATE, tf.float32)
    return lambda: float(function(*batch))


def bare_jax(trainer: Any, images: np.ndarray, labels: np.ndarray) -> Turn:
    """Our two compiled functions, gradients and update, one after the other."""
    import jax

    from triptych.in_jax import optim, train

    model = trainer.model
    moves, decayed = train.masks(RECIPE, model.spec)
    gradients = jax.jit(functools.partial(train.loss_and_gradients, train.executed(model.module, RECIPE), RECIPE, moves))
    update = jax.jit(lambda *given: train.update(RECIPE, decayed, *given), donate_argnums=0)
    scalars = {name: model.put(np.asarray(value)) for name, value in optim.scalars(RECIPE, 0, RATE).items()}
    batch = (model.put(images),), jax.device_put(labels.astype(np.int32), model.jax_device)
    opt_state = optim.optimizer(RECIPE, decayed, optim.scalars(RECIPE, 0, 0.0)).init(model.variables["params"])
    held = [(train.TrainState(model.variables["params"], opt_state, {}), {k: v for k, v in model.variables.items() if k != "params"})]

    def step() -> None:
        state, statistics = held[0]
        (_, found), statistics = gradients({**statistics, "params": state.params}, *batch)
        held[0] = jax.block_until_ready((update(state, found, statistics, scalars), statistics))

    return step


BARE = {"pytorch": bare_pytorch, "tensorflow": bare_tensorflow, "jax": bare_jax}


def contender(framework: str, spec: Spec, lane: str) -> Contender:
    """A lane of the room, ours or stock, with initial weights."""
    made: Contender = contract.load(framework).contender(spec, initialize.initial_weights(spec, 0), lane, "training_step")
    return made


def bare(framework: str, spec: Spec, images: np.ndarray, labels: np.ndarray) -> Turn:
    """Our training step by its native function, on tensors that are ready."""
    room = contract.load(framework)
    model = room.create_model(spec, initialize.initial_weights(spec, 0), precision="float32", device="cpu")
    return BARE[framework](room.create_trainer(model, RECIPE), images, labels)


def measure(framework: str, model: str, batch_size: int, image_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of every turn by lane, the levers of a lane, and why one could not run. One framework, in this process."""
    spec = catalog.get_spec(model, image_size=image_size)
    numbers = np.random.default_rng(0)
    images = numbers.normal(size=(batch_size, image_size, image_size, 3)).astype(np.float32)
    labels = numbers.integers(1000, size=batch_size)
    turns: dict[str, Turn] = {BARE_LANE: bare(framework, spec, images, labels)}
    levers: dict[str, tuple[str, ...]] = {}
    failed: dict[str, str] = {}
    stock_macs = None
    for lane in (STOCK, *LANES):
        try:
            made = contender(framework, spec, lane)
            turn = functools.partial(made.run, made.stage(images, labels))
            for _ in range(WARM_UP):
                turn()
        except LaneMissing:
            if lane == STOCK:
                raise
        except Exception as error:  # a lever that does not work on this machine is a row of the table, too
            if lane in (STOCK, "default"):
                raise
            failed[lane] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            turns[lane], levers[lane] = turn, made.levers
            stock_macs = made.macs if lane == STOCK else stock_macs
    for _ in range(WARM_UP):
        turns[BARE_LANE]()
    seconds = interleaved(turns, rounds)
    return {"seconds": seconds, "levers": levers, "failed": failed, "stock_macs": stock_macs or cost(spec).macs}


def interleaved(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn; in a round everybody takes one, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    order, shuffle = list(turns), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            started = time.perf_counter()
            turns[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def as_rows(
    framework: str, model: str, settings: dict[str, int], measured: dict[str, Any], command: str
) -> dict[str, list[dict[str, Any]]]:
    """The rows of the record: ratios of the lanes, time outside the kernels, and raw samples."""
    seconds = measured["seconds"]
    common = {"framework": framework, "model": model, **settings, "command": command, "code_sha256": code_hash()}
    rows = []
    for name in LANES:
        row = {**common, "lane": name, "against": AGAINST[framework].format(model=model), "levers": measured["levers"].get(name, ())}
        if name in seconds:
            ratio, interval = paired_interval(seconds[STOCK], seconds[name])
            speed = settings["batch_size"] / float(np.median(seconds[name]))
            rows.append({**row, "ratio": ratio, "interval": interval, "images_per_second": speed, "n": len(seconds[name])})
        elif name in measured["failed"]:
            reason = measured["failed"][name]
            rows.append({**row, "ratio": None, "interval": None, "images_per_second": None, "n": 0, "reason": reason})
    macs = {"macs": cost(catalog.get_spec(model, image_size=settings["image_size"])).macs, "stock_macs": measured["stock_macs"]}
    share, interval = paired_interval(seconds[BARE_LANE], seconds["default"])
    outside = {**common, "share": 1.0 - share, "interval": (1.0 - interval[1], 1.0 - interval[0]), "n": len(seconds[BARE_LANE])}
    return {"rows": [{**row, **macs} for row in rows], "outside": [outside], "raw": [{**common, "seconds": seconds}]}


def merged(path: Path, new: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """What the file holds of other frameworks, models and sizes, and the new rows."""
    held = json.loads(path.read_text()) if path.exists() else {}
    fresh = {_measured(row) for row in new["raw"]}
    return {part: [row for row in held.get(part, []) if _measured(row) not in fresh] + rows for part, rows in new.items()}


def _measured(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("framework", "model", "batch_size", "image_size"))


def in_process(framework: str, model: str, settings: dict[str, int]) -> dict[str, Any]:
    """`measure` in a fresh process of its own."""
    given = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, __file__, "--worker", "--framework", framework, "--model", model, *given]
    quiet = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=quiet)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--framework", action="append", choices=list(contract.FRAMEWORKS), help="All that are installed, without it.")
    parser.add_argument("--model", action="append", choices=["resnet18", "resnet50"])
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--image-size", type=at_least(1), default=224)
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed" / "step.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every framework and model asked for, one process after the other, and write the record."""
    given = arguments()
    settings = {"batch_size": given.batch_size, "image_size": given.image_size}
    if given.worker:
        sys.stdout.write(json.dumps(measure(given.framework[0], given.model[0], **settings, rounds=given.rounds)) + "\n")
        return
    for framework in given.framework or contract.installed():
        for model in given.model or MODELS[framework]:
            measured = in_process(framework, model, {**settings, "rounds": given.rounds})
            command = (
                f"benchmarks/step_speed.py --framework {framework} --model {model} --batch-size {given.batch_size} "
                f"--image-size {given.image_size} --rounds {given.rounds}"
            )
            new = as_rows(framework, model, settings, measured, command)
            write_json(given.out, {**head("benchmarks/step_speed.py"), **merged(given.out, new)})
            for row in new["rows"]:
                sys.stderr.write(f"{framework} {model} {row['lane']}: {row['ratio']} {row['interval']} {row.get('reason', '')}\n")
            sys.stderr.write(f"{framework} {model} outside the kernels: {new['outside'][0]['share']} {new['outside'][0]['interval']}\n")


if __name__ == "__main__":
    main()
