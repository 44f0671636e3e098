"""The ladder: what a framework computes at each rung, as a stream of observations in execution order.

Rung code knows no architecture: it asks the spec for names and the subject for numbers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from triptych.core import initialize, philox
from triptych.core.batch import Inputs
from triptych.core.contract import Converted, TrainingState
from triptych.core.difference import scaled_error, sketch
from triptych.core.initialize import Weights
from triptych.core.recipe import initial_state
from triptych.core.spec import Spec
from triptych.parity import pipeline
from triptych.parity import plan as plans
from triptych.parity.observation import Observation
from triptych.parity.subject import Subject, as_precision, give_back
from triptych.parity.trajectory import Trajectory

# A probe shows a normalization layer data whose mean is this many standard deviations: E[x²] - E[x]² loses the square of it in
# units of the last place, a two-pass variance only itself (numerics 7). In float32 less, so that something is left to compare.
PROBE_OFFSET = {"float64": 400.0, "float32": 30.0}
# The step at which rung 6 looks: after warmup, where AdamW's bias corrections are far from 1 and from each other.
MIDDLE = 5
NOISE_PERIOD = 2**16
# A free run can be compared only while one framework stays near itself. In float32 a ReLU input within rounding of zero moves a
# gradient of a deep network by tenths, so that the runs part after one step unless the steps are small.
FREE_RATE = {"float64": 1.0, "float32": 0.003}


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung: its number and its name in the field's terms."""

    number: int
    name: str


RUNGS = (
    Rung(1, "names, shapes, weights"),
    Rung(2, "preprocessing"),
    Rung(3, "forward, eval mode"),
    Rung(4, "forward, train mode"),
    Rung(5, "loss and gradients"),
    Rung(6, "optimizer alone"),
    Rung(7, "synchronised steps"),
    Rung(8, "free run"),
)


def climb(subject: Subject, trajectory: Trajectory, rungs: tuple[int, ...]) -> Iterator[Observation]:
    """Every observation of the given rungs but the eighth, in order."""
    for number in rungs:
        if number == 7:
            yield from synchronised_steps(subject, trajectory)
        elif number in _CLIMBERS:
            yield from _CLIMBERS[number](subject)
        if number >= 3:
            subject.release()
        give_back()


def names_and_weights(subject: Subject) -> Iterator[Observation]:
    """Rung 1: the declared names and every tensor of the state, bit for bit as the framework holds it."""
    held = subject.model.weights()
    declared = json.dumps([[name, list(value.shape), str(value.dtype)] for name, value in held.items()])
    yield Observation(1, "names", "names and shapes", np.frombuffer(declared.encode(), np.uint8))
    for tensor in subject.plan.spec.tensors():
        yield Observation(1, "weights", tensor.name, _get(held, tensor.name))


def preprocessing(subject: Subject) -> Iterator[Observation]:
    """Rung 2: files decoded, resized and normalized natively, stage by stage; then training batches, transform by transform."""
    recipe = subject.preprocessing
    if recipe is None:
        return  # `Plan.not_applicable` says why, and so does the certificate
    if recipe.channels not in (1, 3):
        images = plans.pictures(recipe)
    else:
        images = {}
        for name, data in plans.encoded_images(recipe).items():
            images[name] = subject.decode(data, recipe.channels)
            yield Observation(2, "decoded", name, images[name])
    for name, image in images.items():
        box = subject.geometry(recipe, *image.shape[:2])
        yield Observation(2, "resized", f"{name} resized", subject.resize(image, box))
        yield Observation(2, "normalized", f"{name} normalized", subject.preprocess(image, recipe))
    kept = dataclasses.replace(recipe, resize_short_side=None)
    whole = plans.pictures(kept)["array"][: recipe.crop, : recipe.crop]
    yield Observation(2, "unresized", "array normalized", subject.preprocess(whole, kept))
    yield from pipeline.observe(subject)


def forward_eval(subject: Subject) -> Iterator[Observation]:
    """Rung 3: every intermediate in eval mode; the last is the logits."""
    inputs = subject.as_inputs(plans.forward_inputs(subject.plan))
    yield from _intermediates(3, subject.plan.spec, subject.model.forward(inputs).intermediates)


def forward_train(subject: Subject) -> Iterator[Observation]:
    """Rung 4: every intermediate in train mode, the probes of the normalization layers, and the state after the pass."""
    spec = subject.plan.training_spec
    inputs = _training_batch(subject, 0)[0]
    passed = subject.training_model.forward(inputs, training=True)
    yield from _intermediates(4, spec, passed.intermediates)
    probes = _probes(subject)
    if probes:
        seen = subject.training_model.forward(inputs, training=True, layer_inputs=probes).intermediates
        for name in probes:
            yield Observation(4, "probe", f"{name} (probe)", _get(seen, name))
    for tensor in spec.tensors():
        if not tensor.trainable:
            group = "counter" if tensor.kind == "batch_counter" else "statistics"
            yield Observation(4, group, tensor.name, _get(passed.state, tensor.name))


def loss_and_gradients(subject: Subject) -> Iterator[Observation]:
    """Rung 5: the loss, and every parameter's gradient in the order of the backward pass, last layer first."""
    out = subject.trainer_from("sgd").gradients(*_training_batch(subject, 0))
    yield Observation(5, "loss", "loss", np.asarray(out.loss, np.float64))
    for tensor in reversed(subject.plan.training_spec.parameters()):
        yield Observation(5, "gradient", tensor.name, _get(out.gradients, tensor.name))


def optimizer_alone(subject: Subject) -> Iterator[Observation]:
    """Rung 6: given identical gradients and state in the middle of a run, the state after one update; for each recipe."""
    for kind in ("sgd", "adamw"):
        trainer = subject.trainer_from(kind, _arbitrary_state(subject, kind, MIDDLE))
        gradients = _computed(_parameters(subject), lambda name, like: _noise(subject, f"gradient/{name}", like, 1e-2))
        trainer.apply(gradients, subject.learning_rate(subject.plan.recipes[kind].schedule, MIDDLE))
        yield from _state(6, subject, kind, trainer.view(), MIDDLE)
        del trainer  # so that the next one finds its memory free


def synchronised_steps(subject: Subject, trajectory: Trajectory) -> Iterator[Observation]:
    """Rung 7: training steps with a moving learning rate, each from the recorded state of the reference.

    AdamW first, whose trainer rung 6 leaves behind: a change of trainers costs another tracing of the model.
    """
    plan = subject.plan
    for kind, steps in (("adamw", plan.adamw_steps), ("sgd", plan.steps)):
        trainer = subject.trainer_from(kind)
        for step in range(steps):
            if step > 0 and trajectory.replays:
                trainer.load_state(_cast(trajectory.read(kind, step - 1), subject))
            rate = subject.learning_rate(subject.recipes[kind].schedule, step)
            loss = trainer.step(*_training_batch(subject, step), rate)
            state = trainer.view()
            if not trajectory.replays:
                trajectory.write(kind, step, state)
            yield Observation(7, "loss", f"{kind} loss", np.asarray(loss, np.float64), step)
            yield from _state(7, subject, kind, state, step)
            del state  # a whole training state, which the next step must not find beside its own
        if trajectory.replays and steps:
            trajectory.read(kind, steps - 1)
        del trainer


def free_run(subject: Subject, kind: str, weights: Mapping[str, np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Rung 8: a sketch of all weights and statistics after each step of a run of this framework on its own, by recipe `kind`."""
    plan, spec, recipe = subject.plan, subject.training_spec, subject.recipes[kind]
    trainer = subject.trainer_from(kind, initial_state(recipe, weights, spec))
    for step in range(plan.free_steps):
        rate = FREE_RATE[subject.precision] * subject.learning_rate(recipe.schedule, step)
        trainer.step(*_training_batch(subject, step), rate)
        held = trainer.view().weights
        yield [sketch(held[tensor.name], plan.sketch) for tensor in spec.tensors() if tensor.kind != "batch_counter"]


def self_divergence(subject: Subject, kind: str, base: list[list[np.ndarray]]) -> list[list[float]]:
    """Curves, one a perturbation: how far `base`, a free run, strays from itself when its initial weights move by one unit in the last
    place."""
    curves = []
    for number in range(subject.plan.perturbations):
        run = free_run(subject, kind, initialize.one_ulp_away(subject.training_spec, subject.weights, number))
        curves.append([max(map(scaled_error, now, then)) for now, then in zip(run, base, strict=True)])
    return curves


def _intermediates(rung: int, spec: Spec, values: Weights) -> Iterator[Observation]:
    names = spec.intermediates()
    for name in names:
        yield Observation(rung, "logits" if name == names[-1] else "activation", name, _get(values, name))


def _probes(subject: Subject) -> Weights:
    """Ill-conditioned inputs, one a normalization layer: N(offset, 1), shaped as that layer's own input."""
    plan, out = subject.plan, {}
    for layer in plan.training_spec.layers():
        if layer.op in ("batch_norm", "layer_norm"):
            places = (layer.tokens,) if layer.tokens else (layer.size, layer.size)
            shape = (plan.training_batch, *places, layer.in_channels)
            noise = philox.normal(f"probe/{layer.name}", shape)
            out[layer.name] = subject.as_input(noise + PROBE_OFFSET[subject.input_precision])
    return out


def _state(rung: int, subject: Subject, kind: str, state: TrainingState, step: int) -> Iterator[Observation]:
    """Counts; then per tensor: slots, then the weight they lead to, then its average."""
    recipe = subject.plan.recipes[kind]
    counts: dict[str, int | float | None] = {"updates": state.step}
    if recipe.loss_scaling is not None:
        counts |= {"loss scale": state.loss_scale, "good steps": state.good_steps}
    for name, count in counts.items():
        yield Observation(rung, "counter", f"{kind} {name}", np.empty(0) if count is None else np.asarray(count), step)
    for tensor in subject.plan.training_spec.tensors():
        if tensor.trainable:
            for slot in recipe.optimizer.slots:
                yield Observation(rung, slot, f"{kind} {slot} {tensor.name}", _get(state.slots.get(slot, {}), tensor.name), step)
        group = {"running_mean": "statistics", "running_var": "statistics", "batch_counter": "counter"}.get(tensor.kind, f"{kind}_weight")
        yield Observation(rung, group, f"{kind} {tensor.name}", _get(state.weights, tensor.name), step)
        if recipe.ema_decay is not None and tensor.kind != "batch_counter":
            averaged = f"{kind}_ema" if tensor.trainable else "statistics_ema"
            yield Observation(rung, averaged, f"{kind} ema {tensor.name}", _get(state.ema, tensor.name), step)


def _arbitrary_state(subject: Subject, kind: str, step: int) -> TrainingState:
    """A state in which every term of the update counts: moments of mixed size, an average apart from the weights."""

    def moment(slot: str, name: str, like: np.ndarray) -> np.ndarray:
        noise = _noise(subject, f"{slot}/{name}", like, 1e-2)
        # Roots of second moments down to 1e-5, where the place of AdamW's epsilon shows (numerics 15).
        return subject.as_input((np.abs(noise) + 1e-5) ** 2) if slot == "exp_avg_sq" else noise

    def average(name: str, value: np.ndarray) -> np.ndarray:
        return value if value.dtype == np.int64 else value + _noise(subject, f"ema/{name}", value, 1e-2)

    recipe, weights, parameters = subject.recipes[kind], subject.weights, _parameters(subject)
    # Each tensor is made when it is read: all of them would double the memory of a large model's state.
    slots = {slot: _computed(parameters, functools.partial(moment, slot)) for slot in recipe.optimizer.slots}
    ema = {} if recipe.ema_decay is None else _computed(weights, average)
    start = initial_state(recipe, weights, subject.training_spec)
    return dataclasses.replace(start, slots=slots, ema=ema, step=step)


def _computed(tensors: Mapping[str, np.ndarray], compute: Callable[[str, np.ndarray], np.ndarray]) -> Converted:
    """`compute(name, tensor)` of each, when it is read."""
    return Converted({name: name for name in tensors}, lambda name: compute(name, tensors[name]))


def _noise(subject: Subject, stream: str, like: np.ndarray, scale: float) -> np.ndarray:
    """Uniform in ±scale; beyond `NOISE_PERIOD` values it repeats, which elementwise arithmetic does not notice."""
    values = philox.uniform(stream, (min(like.size, NOISE_PERIOD),))
    return np.resize(subject.as_input((values - 0.5) * (2.0 * scale)), like.shape)


def _parameters(subject: Subject) -> Weights:
    return {tensor.name: subject.weights[tensor.name] for tensor in subject.training_spec.parameters()}


def _training_batch(subject: Subject, step: int) -> tuple[Inputs, np.ndarray]:
    inputs, targets = subject.training_batch(step)
    return subject.as_inputs(inputs), targets


def _cast(state: TrainingState, subject: Subject) -> TrainingState:
    precision = subject.precision
    if precision == subject.plan.precision:
        return state  # as recorded, each tensor read when it is asked for
    slots = {slot: as_precision(values, precision) for slot, values in state.slots.items()}
    weights, ema = as_precision(state.weights, precision), as_precision(state.ema, precision)
    return dataclasses.replace(state, weights=weights, slots=slots, ema=ema)


def _get(values: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The tensor, or an empty one, which equals nothing, not even another: a missing name is a divergence, not a crash."""
    return values[name] if name in values else np.empty(0)


_CLIMBERS = {
    1: names_and_weights,
    2: preprocessing,
    3: forward_eval,
    4: forward_train,
    5: loss_and_gradients,
    6: optimizer_alone,
}
