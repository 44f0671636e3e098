"""Every planting changes what it should, and nothing is left of it afterwards."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.core.preprocess import ColorJitter, Geometry, Transforms
from triptych.core.recipe import SGD, AdamW, Clip, LossScaling, Recipe, Schedule
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source

Observed = dict[str, np.ndarray]
Probe = Callable[[Any], Observed]


def evaluated(made: Any) -> Observed:
    """Intermediates in eval mode."""
    return made.model.forward(made.batch()[0]).intermediates


def trained(made: Any) -> Observed:
    """Intermediates in train mode and the statistics after it."""
    forward = made.model.forward(made.batch()[0], training=True)
    return {**forward.intermediates, **forward.state}


def far_from_zero(made: Any) -> Observed:
    """Statistics of a BatchNorm whose input has a mean far above its deviation."""
    far = np.random.default_rng(3).normal(1e5, 1.0, (4, *evaluated(made)["bn1"].shape[1:]))
    return made.model.forward(made.batch()[0], training=True, layer_inputs={"bn1": far}).state


def tokens_far_from_zero(made: Any) -> Observed:
    """A LayerNorm of an input whose mean is far above its deviation."""
    far = np.random.default_rng(3).normal(1e4, 1.0, (4, *evaluated(made)["norm"].shape[1:]))
    return {"norm": made.model.forward(made.batch()[0], layer_inputs={"norm": far}).intermediates["norm"]}


def differentiated(made: Any) -> Observed:
    """Loss and gradients."""
    found = made.trainer.gradients(*made.batch())
    return {**found.gradients, "loss": np.array(found.loss)}


def stepped(made: Any) -> Observed:
    """The state after two applications of fixed gradients with a moving learning rate, from the start."""
    start = made.trainer.state()
    for rate in (0.1, 0.02):
        made.trainer.apply({tensor.name: np.full(tensor.shape, 1e-3) for tensor in made.spec.parameters()}, rate)
    state = made.trainer.state()
    made.trainer.load_state(start)
    slots = {f"{slot}.{key}": array for slot, arrays in state.slots.items() for key, array in arrays.items()}
    return {**state.weights, **slots, **{f"ema.{key}": array for key, array in state.ema.items()}}


def photograph() -> np.ndarray:
    """(64, 96, 3) noise."""
    return np.random.default_rng(5).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def decoded(made: Any) -> Observed:
    """A JPEG's pixels."""
    buffer = io.BytesIO()
    Image.fromarray(photograph()).save(buffer, "JPEG", quality=90)
    return {"pixels": made.room.decode(buffer.getvalue(), 3)}


def resized(made: Any) -> Observed:
    """A resized image."""
    return {"pixels": made.room.resize(photograph(), Geometry(20, 30, 2, 7, 16))}


def scaled_and_clipped(made: Any) -> Observed:
    """The state after a step whose scaled gradients are clipped, from the start."""
    recipe = dataclasses.replace(made.recipe, clip=Clip(norm=0.5), loss_scaling=LossScaling())
    trainer = made.room.create_trainer(made.model, recipe)
    start = trainer.state()
    trainer.step(*made.batch(), 0.1)
    after = trainer.state().weights
    trainer.load_state(start)
    return dict(after)


def jittered(made: Any) -> Observed:
    """A batch out of the pipeline."""
    transforms = Transforms(jitter=ColorJitter(0.4, 0.4))
    images = np.stack([photograph(), photograph()[::-1]])
    source = Source("noise", "train", ("0", "1"), np.arange(2), images, ["a", "b"])
    plan = SamplingPlan(source.labels, 2, 2, 1, transforms, 64)
    preprocessing = Preprocessing(None, 64, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    ((pixels, _),) = made.room.batches(source, plan.batches(0, 1), preprocessing, transforms)
    return {"pixels": pixels}


# planting -> model, layer, what shows it, and a tensor that must change (the layer's output where None).
SHOWN_BY: dict[str, tuple[str, str, Probe, str | None]] = {
    "batch_norm_epsilon": ("resnet20", "layer1.0.bn1", evaluated, None),
    "batch_norm_momentum": ("resnet20", "layer1.0.bn1", trained, "layer1.0.bn1.running_mean"),
    "batch_norm_biased_variance": ("resnet20", "layer1.0.bn1", trained, "layer1.0.bn1.running_var"),
    "batch_norm_fast_variance": ("resnet20", "bn1", far_from_zero, "bn1.running_var"),
    "batch_norm_frozen_in_training": ("resnet20", "layer1.0.bn1", trained, None),
    "batch_norm_batch_statistics_in_eval": ("resnet20", "layer1.0.bn1", evaluated, None),
    "layer_norm_epsilon": ("vit_tiny_patch16_224", "blocks.1.norm1", evaluated, None),
    "gelu_tanh": ("vit_tiny_patch16_224", "blocks.0.mlp.act", evaluated, None),
    "attention_unscaled": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", evaluated, None),
    "attention_float32": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", evaluated, None),
    "attention_heads_first": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", evaluated, None),
    "layer_norm_fast_variance": ("vit_tiny_patch16_224", "norm", tokens_far_from_zero, None),
    "conv_same_padding": ("resnet20", "layer2.0.conv1", evaluated, None),
    "max_pool_same_padding": ("resnet50", "maxpool", evaluated, None),
    "stride_on_first_convolution": ("resnet50", "layer2.0", evaluated, "layer2.0.conv2"),
    "flatten_native_order": ("mlp", "flatten", evaluated, None),
    "low_precision_layer": ("resnet20", "layer1.0.conv1", evaluated, None),
    "pad_shortcut_one_side": ("resnet20", "layer2.0.downsample", evaluated, None),
    "pad_shortcut_average_pool": ("resnet20", "layer2.0.downsample", evaluated, None),
    "dropout_in_eval": ("resnet20", "fc", evaluated, None),
    "gradient_stopped_shortcut": ("resnet20", "layer2.0.downsample", differentiated, "layer1.0.conv1.weight"),
    "lstm_gate_order": ("text_image", "lstm", evaluated, None),
    "lstm_bias_lost": ("text_image", "lstm", evaluated, None),
    "lstm_unit_forget_bias": ("text_image", "lstm", evaluated, None),
    "lstm_mask_ignored": ("text_image", "lstm", evaluated, None),
    "lstm_reversed": ("text_image", "lstm", evaluated, None),
    "global_max_pool_mean": ("text_image", "maxpool", evaluated, None),
    "momentum_convention": ("mlp", "", stepped, "fc.weight"),
    "nesterov_formula": ("mlp", "", stepped, "fc.weight"),
    "weight_decay_decoupled": ("mlp", "", stepped, "fc.weight"),
    "adam_epsilon_hat": ("adamw", "", stepped, "fc.weight"),
    "ema_before_step": ("mlp", "", stepped, "ema.fc.weight"),
    "clip_before_unscale": ("mlp", "", scaled_and_clipped, "fc.weight"),
    "clip_no_epsilon": ("mlp", "", scaled_and_clipped, "fc.weight"),
    "clip_per_tensor": ("mlp", "", scaled_and_clipped, "fc.weight"),
    "label_smoothing_other_classes": ("mlp", "", differentiated, "loss"),
    "loss_float32": ("mlp", "", differentiated, "loss"),
    "loss_sum": ("mlp", "", differentiated, "loss"),
    "sigmoid_twice": ("text_image", "", differentiated, "loss"),
    "jpeg_fast_dct": ("mlp", "", decoded, "pixels"),
    "resize_no_antialias": ("mlp", "", resized, "pixels"),
    "resize_uint8": ("mlp", "", resized, "pixels"),
    "jitter_brightness_adds": ("mlp", "", jittered, "pixels"),
    "jitter_native_contrast": ("mlp", "", jittered, "pixels"),
}


@pytest.fixture(scope="module")
def planted_in(subject: Any, room: Any) -> Callable[[str], Any]:
    """One subject a model; every planting must give it back as it was."""

    @functools.cache
    def make(name: str) -> Any:
        adamw = Recipe(AdamW(epsilon=1e-4), Schedule(0.1, 0, 10), 4)
        sgd = Recipe(SGD(weight_decay=0.1), Schedule(0.1, 0, 10), 4, label_smoothing=0.1, ema_decay=0.9)
        made = subject("mlp", adamw) if name == "adamw" else subject(name, sgd)
        made.room = room
        return made

    return make


def test_every_planting_is_tested(room: Any) -> None:
    assert set(room.PLANTINGS) == set(SHOWN_BY)


@pytest.mark.parametrize("name", SHOWN_BY)
def test_a_planting_shows_and_is_taken_back(name: str, room: Any, planted_in: Callable[[str], Any]) -> None:
    model, layer, probe, tensor = SHOWN_BY[name]
    made = planted_in(model)
    before = probe(made)
    with room.PLANTINGS[name](made, layer):
        inside = probe(made)
    after = probe(made)
    changed = tensor or layer
    if before[changed].shape == inside[changed].shape:
        assert np.abs(before[changed] - inside[changed]).max() > 1e-12 * np.abs(before[changed]).max()
    order = made.spec.intermediates()
    if probe in (evaluated, trained) and layer in order:
        assert all(np.array_equal(before[key], inside[key]) for key in order[: order.index(layer)])
    assert all(np.array_equal(array, after[key]) for key, array in before.items())


def test_a_planting_is_taken_back_when_its_body_fails(room: Any, planted_in: Callable[[str], Any]) -> None:
    made = planted_in("mlp")
    before = differentiated(made)["loss"]
    for name in ("loss_sum", "flatten_native_order"):
        with pytest.raises(RuntimeError, match="body"), room.PLANTINGS[name](made, "flatten"):
            raise RuntimeError("body")
    assert differentiated(made)["loss"] == before
