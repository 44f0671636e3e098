"""A Keras model behind the numpy boundary (`core.contract.Model`)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from triptych.core import batch as batches
from triptych.core.batch import Inputs, Named
from triptych.core.contract import Forward, check_device, check_precision
from triptych.core.errors import TriptychError, UsageError
from triptych.core.spec import EMBEDDING, ResNetSpec, Spec, ViTSpec
from triptych.in_tensorflow import weights as canonical
from triptych.in_tensorflow.mlp import mlp
from triptych.in_tensorflow.resnet import last_layer, resnet
from triptych.in_tensorflow.vit import bare_block, vit
from triptych.in_tensorflow.vit import last_layer as last_of_block

BUILDERS: dict[str, Callable[..., keras.Model]] = {"resnet": resnet, "mlp": mlp, "vit": vit, "transformer_block": bare_block}
# Our device names and TensorFlow's device types.
DEVICE_TYPES = {"cpu": "CPU", "cuda": "GPU", "tpu": "TPU"}

Arrays = dict[str, np.ndarray]
Tensors = dict[str, tf.Tensor]
Wrapper = Callable[[keras.layers.Layer, Callable[[Any], Any], Any], Any]


def create_model(spec: Spec, weights: Mapping[str, np.ndarray], *, precision: str, device: str) -> Model:
    """The Keras model of `spec` with these canonical weights.

    Raises UsageError for an unknown precision or an absent device, InputRefused for weights that do not fit, TriptychError when
    Keras runs on another backend.
    """
    check_precision(precision)
    _check_backend()
    device = resolve_device(device)
    with tf.device(DEVICE_TYPES[device]):
        native = BUILDERS[spec.family](spec, precision)
    model = Model(spec, native, precision, device)
    model.load_weights(weights)
    return model


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """float32 means float32 for a while: TensorFlow's default is TF32 where the GPU has it (numerics 28)."""
    tf32 = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(tf32)


def resolve_device(device: str) -> str:
    """`auto` becomes cuda when a GPU is visible, else cpu; UsageError for a device that is not there."""
    check_device(device)
    available = [name for name, kind in DEVICE_TYPES.items() if tf.config.list_physical_devices(kind)]
    if device == "auto":
        return "cuda" if "cuda" in available else "cpu"
    if device not in available:
        raise UsageError(f"TensorFlow sees no device {device!r} here; available: auto, {', '.join(available)}")
    return device


def _check_backend() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise TriptychError(
            f"Keras runs on its {backend!r} backend in this process, and this package needs 'tensorflow'. "
            "Set KERAS_BACKEND=tensorflow in the environment before anything imports keras."
        )


class Model:
    """A functional `keras.Model` (`native`) that takes and gives numpy. Fulfils `core.contract.Model`."""

    framework = "tensorflow"

    def __init__(self, spec: Spec, native: keras.Model, precision: str, device: str) -> None:
        self.spec = spec
        self.native = native
        self.precision = precision
        self.device = device
        self.bindings = canonical.bind(native, spec)
        self.generation = 0
        outputs = {name: native.get_layer(name).output for name in spec.intermediates()}
        self._with_intermediates = keras.Model(native.input, outputs, name=f"{spec.name}.intermediates")
        self._traces = Traces(self, reduce_retracing=True)

    def predict(self, inputs: Inputs, batch_size: int | None = None) -> np.ndarray:
        """A batch, images preprocessed -> logits (N, *spec.output_shape) in eval mode, `batch_size` (None: all) at a time."""
        named = self.check_inputs(inputs)
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size={batch_size!r} must be a positive integer, or None for all samples at once")
        count = max(1, batches.samples(named))
        size = batch_size or count
        with self.running():
            parts = (batches.part(named, slice(start, start + size)) for start in range(0, count, size))
            logits = [self._traces(self._predict)(self.native_inputs(part)).numpy() for part in parts]
        return np.concatenate(logits)

    def forward(self, inputs: Inputs, *, training: bool = False, layer_inputs: Mapping[str, np.ndarray] | None = None) -> Forward:
        """One pass with every intermediate of `spec.intermediates()`; dropout is off in both modes.

        With `training`, BatchNorm uses the batch and `state` holds the running state it would have left; the model keeps its own.
        `layer_inputs` replaces the input of the named layers.
        """
        named = self.check_inputs(inputs)
        shown = {self._layer(name).name: self.tensor(x) for name, x in (layer_inputs or {}).items()}
        with self.running():
            outputs, state = self._traces(self._forward)(self.native_inputs(named), shown, training)
        intermediates = {name: outputs[name].numpy() for name in self.spec.intermediates()}
        return Forward(intermediates, canonical.read(self._statistics(training), state))

    def weights(self) -> Arrays:
        """The canonical state, bit for bit."""
        return canonical.read(self.bindings)

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take a canonical state, bit for bit. InputRefused lists every key that does not fit."""
        canonical.load(self.bindings, weights)

    @contextlib.contextmanager
    def intercept(self, layer: str, wrapper: Wrapper) -> Iterator[None]:
        """While open, `layer` computes `wrapper(native_layer, call, x)` in place of `call(x)`, on tensors.

        Keras looks `call` up on the instance, so every model and trainer over this layer sees it. UsageError for an unknown name.
        """
        with traced_anew(self), _replaced_call(self._layer(layer), wrapper):
            yield

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """On the model's device and in full float32."""
        with full_precision(), tf.device(DEVICE_TYPES[self.device]):
            yield

    def tensor(self, array: np.ndarray) -> tf.Tensor:
        """A numpy array as a tensor in the model's precision."""
        return tf.constant(np.asarray(array), dtype=self.precision)

    def check_inputs(self, inputs: Inputs) -> Named:
        """The batch by name; UsageError unless these are inputs of the spec's kinds and shapes."""
        return batches.checked(self.spec, inputs)

    def native_inputs(self, named: Named) -> Any:
        """What the Keras model is called with: floats in its precision, ids as int32; a tensor, or tensors by name of several inputs."""
        found = {
            each.name: tf.constant(named[each.name], tf.int32) if each.kind == "tokens" else self.tensor(named[each.name])
            for each in self.spec.inputs()
        }
        return found if len(found) > 1 else found[self.spec.inputs()[0].name]

    def _layer(self, name: str) -> keras.layers.Layer:
        names = [layer.name for layer in self.spec.layers()]
        if name not in names:
            raise UsageError(f"{self.spec.name} has no layer {name!r}; it has {', '.join(names)}")
        return self.native.get_layer(name)

    def _statistics(self, training: bool) -> canonical.Bindings:
        return tuple(b for b in self.bindings if training and not b.tensor.trainable)

    def _predict(self, inputs: Any) -> tf.Tensor:
        return self.native(inputs, training=False)

    def _forward(self, inputs: Any, layer_inputs: Tensors, training: bool) -> tuple[Tensors, list[tf.Tensor]]:
        with contextlib.ExitStack() as stack:
            for name, x in layer_inputs.items():
                stack.enter_context(_replaced_call(self._layer(name), _given(x)))
            stack.enter_context(dropout_off(self.native))
            # Inside this scope Keras collects the assignments of the BatchNorms instead of making them.
            stack.enter_context(keras.StatelessScope())
            outputs = self._with_intermediates(inputs, training=training)
            state = [tf.convert_to_tensor(b.variable.value) for b in self._statistics(training)]
        return outputs, state


@contextlib.contextmanager
def traced_anew(watched: Any) -> Iterator[None]:
    """What was traced from `watched` (a model, the class of trainers) before this context is not used inside it, nor the reverse."""
    watched.generation += 1
    try:
        yield
    finally:
        watched.generation += 1


class Traces:
    """The `tf.function`s of one owner, traced anew whenever the `generation` of something that they are traced from moves on.

    `options` are those of `tf.function`.
    """

    def __init__(self, *watched: Any, **options: Any) -> None:
        self._watched = watched
        self._options = options
        self._generations: list[int] = []
        self._functions: dict[str, Any] = {}

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The compiled form of a method of the owner."""
        generations = [each.generation for each in self._watched]
        if self._generations != generations:
            self._functions.clear()
            self._generations = generations
        if function.__name__ not in self._functions:
            self._functions[function.__name__] = tf.function(function, autograph=False, **self._options)
        return self._functions[function.__name__]


@contextlib.contextmanager
def changed(layers: Sequence[keras.layers.Layer], **attributes: Any) -> Iterator[None]:
    """While open, these attributes of the layers have these values: what is traced meanwhile keeps them, the layers do not."""
    before = [(layer, {name: getattr(layer, name) for name in attributes}) for layer in layers]
    try:
        for layer in layers:
            for name, value in attributes.items():
                setattr(layer, name, value)
        yield
    finally:
        for layer, values in before:
            for name, value in values.items():
                setattr(layer, name, value)


def layers_of(model: keras.Model, kind: type[keras.layers.Layer]) -> list[keras.layers.Layer]:
    """The layers of one class."""
    return [layer for layer in model.layers if isinstance(layer, kind)]


def dropout_off(model: keras.Model) -> contextlib.AbstractContextManager[None]:
    """Train mode for BatchNorm without dropout."""
    return changed(layers_of(model, keras.layers.Dropout), rate=0.0)


def segments(model: keras.Model, spec: Spec) -> list[keras.Model]:
    """The network cut at its blocks, in order, into models that share its layers; one without blocks is left whole."""
    if isinstance(spec, ResNetSpec):
        names = ["maxpool" if spec.stem.max_pool else "relu", *(last_layer(block) for block in spec.blocks())]
    elif isinstance(spec, ViTSpec):
        names = [EMBEDDING, *(last_of_block(f"blocks.{i}.") for i in range(spec.depth))]
    else:
        return [model]
    cuts = [model.input, *(model.get_layer(name).output for name in names), model.output]
    return [keras.Model(start, end) for start, end in itertools.pairwise(cuts)]


@contextlib.contextmanager
def _replaced_call(layer: keras.layers.Layer, wrapper: Wrapper) -> Iterator[None]:
    before = vars(layer).get("call")
    call = layer.call
    layer.call = lambda x, **options: wrapper(layer, lambda y: call(y, **options), x)
    try:
        yield
    finally:
        del layer.call
        if before is not None:
            layer.call = before


def _given(x: tf.Tensor) -> Wrapper:
    return lambda _layer, call, _x: call(x)
