"""Every planted fault changes what it should, nothing before it, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from triptych.core.errors import UsageError
from triptych.core.preprocess import ColorJitter, Geometry, Transforms
from triptych.core.recipe import AdamW, Clip, LossScaling
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source


def evaluated(subject: Subject) -> Any:
    """Logits in eval mode."""
    return subject.model.predict(subject.images)


def statistics(subject: Subject) -> Any:
    """The running state after a train-mode pass."""
    return np.concatenate([np.ravel(x) for x in subject.model.forward(subject.images, training=True).state.values()])


def far_from_zero(subject: Subject) -> Any:
    """What BatchNorm makes of an input whose mean is far from zero."""
    x = 1e4 + subject.model.forward(subject.images, training=True).intermediates["layer2.0.conv1"]
    return subject.model.forward(subject.images, training=True, layer_inputs={"layer2.0.bn1": x}).intermediates["layer2.0.bn1"]


def tokens_far_from_zero(subject: Subject) -> Any:
    """What a LayerNorm makes of an input whose mean is far from zero."""
    x = 1e4 + subject.model.forward(subject.images).intermediates["norm"]
    return subject.model.forward(subject.images, layer_inputs={"norm": x}).intermediates["norm"]


def loss(subject: Subject) -> Any:
    """The training loss."""
    return np.array(subject.trainer.gradients(subject.images, subject.labels).loss)


def differentiated(subject: Subject) -> Any:
    """Gradients of all parameters."""
    found = subject.trainer.gradients(subject.images, subject.labels).gradients
    return np.concatenate([np.ravel(x) for x in found.values()])


def optimized(subject: Subject) -> Any:
    """Weights after three updates by given gradients at a moving rate."""
    gradients = {t.name: np.full(t.shape, 0.01) for t in subject.spec.parameters()}
    for rate in (0.1, 0.03, 0.07):
        subject.trainer.apply(gradients, rate)
    return np.concatenate([np.ravel(x) for x in subject.model.weights().values()])


def averaged(subject: Subject) -> Any:
    """The EMA after one update; the weights are checked to be right."""
    before = subject.model.weights()["fc.bias"]
    subject.trainer.apply({t.name: np.full(t.shape, 0.01) for t in subject.spec.parameters()}, 0.1)
    assert not np.array_equal(before, subject.model.weights()["fc.bias"])
    return subject.trainer.state().ema["fc.bias"]


def resized(subject: Subject) -> Any:
    """A picture, made smaller."""
    image = (np.arange(60 * 48 * 3) * 37 % 251).astype(np.uint8).reshape(60, 48, 3)
    return subject.room.resize(image, Geometry(40, 32, 4, 0, 32))


def stepped(subject: Subject) -> Any:
    """A weight after a step whose scaled gradients are clipped."""
    recipe = dataclasses.replace(subject.recipe, clip=Clip(norm=0.5), loss_scaling=LossScaling())
    trainer = subject.room.create_trainer(subject.model, recipe)
    trainer.step(subject.images, subject.labels, 0.1)
    return subject.model.weights()["fc.weight"]


def jittered(subject: Subject) -> Any:
    """A batch out of the pipeline."""
    transforms = Transforms(jitter=ColorJitter(0.4, 0.4))
    images = (np.arange(2 * 16 * 16 * 3) * 37 % 251).astype(np.uint8).reshape(2, 16, 16, 3)
    source = Source("noise", "train", ("0", "1"), np.arange(2), images, ["a", "b"])
    plan = SamplingPlan(source.labels, 2, 2, 1, transforms, 16)
    preprocessing = Preprocessing(None, 16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    ((pixels, _),) = subject.room.batches(source, plan.batches(0, 1), preprocessing, transforms)
    return pixels


# fault -> (model, layer, what it changes, what it leaves alone)
Observe = Callable[["Subject"], Any]
EXPECTED: dict[str, tuple[str, str, Observe, Observe | None]] = {
    "batch_norm_epsilon": ("resnet20", "layer2.0.bn1", evaluated, None),
    "batch_norm_momentum": ("resnet20", "layer2.0.bn1", statistics, evaluated),
    "batch_norm_biased_variance": ("resnet20", "layer2.0.bn1", statistics, evaluated),
    "batch_norm_fast_variance": ("resnet20", "layer2.0.bn1", far_from_zero, evaluated),
    "batch_norm_frozen_in_training": ("resnet20", "layer2.0.bn1", statistics, evaluated),
    "batch_norm_batch_statistics_in_eval": ("resnet20", "layer2.0.bn1", evaluated, statistics),
    "layer_norm_epsilon": ("vit_tiny_patch16_224", "blocks.1.norm1", evaluated, None),
    "gelu_tanh": ("vit_tiny_patch16_224", "blocks.0.mlp.act", evaluated, None),
    "attention_unscaled": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", evaluated, None),
    "attention_float32": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", evaluated, None),
    "attention_heads_first": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", evaluated, None),
    "layer_norm_fast_variance": ("vit_tiny_patch16_224", "norm", tokens_far_from_zero, None),
    "conv_same_padding": ("resnet20", "layer2.0.conv1", evaluated, None),
    "max_pool_same_padding": ("resnet18", "maxpool", evaluated, None),
    "stride_on_first_convolution": ("resnet50", "layer2.0", evaluated, None),
    "flatten_native_order": ("mlp", "flatten", evaluated, None),
    "low_precision_layer": ("resnet20", "layer1.0.conv2", evaluated, None),
    "pad_shortcut_one_side": ("resnet20", "layer2.0.downsample", evaluated, None),
    "pad_shortcut_average_pool": ("resnet20", "layer2.0.downsample", evaluated, None),
    "dropout_in_eval": ("mlp", "fc2", evaluated, None),
    "gradient_stopped_shortcut": ("resnet20", "layer2.0.downsample", differentiated, evaluated),
    "lstm_gate_order": ("text_image", "lstm", evaluated, None),
    "lstm_bias_lost": ("text_image", "lstm", evaluated, None),
    "lstm_unit_forget_bias": ("text_image", "lstm", evaluated, None),
    "lstm_mask_ignored": ("text_image", "lstm", evaluated, None),
    "lstm_reversed": ("text_image", "lstm", evaluated, None),
    "global_max_pool_mean": ("text_image", "maxpool", evaluated, None),
    "momentum_convention": ("mlp", "", optimized, loss),
    "nesterov_formula": ("mlp", "", optimized, loss),
    "weight_decay_decoupled": ("mlp", "", optimized, loss),
    "adam_epsilon_hat": ("mlp", "", optimized, loss),
    "ema_before_step": ("mlp", "", averaged, optimized),
    "label_smoothing_other_classes": ("mlp", "", loss, evaluated),
    "loss_float32": ("mlp", "", loss, evaluated),
    "loss_sum": ("mlp", "", loss, evaluated),
    "sigmoid_twice": ("text_image", "", loss, evaluated),
    "clip_before_unscale": ("mlp", "", stepped, loss),
    "clip_no_epsilon": ("mlp", "", stepped, loss),
    "clip_per_tensor": ("mlp", "", stepped, loss),
    "jitter_brightness_adds": ("mlp", "", jittered, loss),
    "jitter_native_contrast": ("mlp", "", jittered, loss),
    "resize_no_antialias": ("mlp", "", resized, loss),
    "resize_uint8": ("mlp", "", resized, loss),
}


class Subject:
    """What a planting is given (`parity.subject.Subject`), small. The trainer is made when it is first asked for."""

    def __init__(self, lab: Any, fault: str) -> None:
        name = EXPECTED[fault][0]
        self.room, self.model = lab.room, lab.shared(name)
        self.spec, self.recipe = self.model.spec, lab.recipe(AdamW() if fault.startswith("adam") else None)
        self.images, self.labels = lab.batch(self.spec)
        self.trainer_made: Any = None

    @property
    def trainer(self) -> Any:
        """The trainer, at step 0 when it is first asked for."""
        if self.trainer_made is None:
            self.trainer_made = self.room.create_trainer(self.model, self.recipe)
        return self.trainer_made

    def intercept(self, layer: str, wrapper: Any) -> contextlib.AbstractContextManager[None]:
        """`Model.intercept` on the one model."""
        return self.model.intercept(layer, wrapper)

    def see(self, observation: Observe) -> np.ndarray:
        """An observation by a new trainer; the model's weights are put back."""
        start, self.trainer_made = self.model.weights(), None
        try:
            return observation(self)
        finally:
            self.model.load_weights(start)


def functions(lab: Any) -> list[dict[str, Any]]:
    """Everything a planting could have left replaced."""
    modules = (importlib.import_module(f"triptych.in_jax.{name}") for name in ("data", "layers", "lstm", "model", "optim", "train"))
    return [{name: value for name, value in vars(module).items() if callable(value)} for module in modules]


def test_every_planting_is_tested(lab: Any) -> None:
    assert set(lab.room.PLANTINGS) == set(EXPECTED)


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_changes_what_it_should_and_is_taken_out(lab: Any, fault: str) -> None:
    name, layer, *observations = EXPECTED[fault]
    subject, before = Subject(lab, fault), functions(lab)
    for observation, differs in zip(observations, (True, False), strict=True):
        if observation is None:
            continue
        key = (name, subject.recipe, observation)
        clean = lab.kept[key] = lab.kept[key] if key in lab.kept else subject.see(observation)
        with lab.room.PLANTINGS[fault](subject, layer):
            planted = subject.see(observation)
        assert np.array_equal(clean, planted) != differs, observation.__name__
    assert functions(lab) == before
    assert subject.model.interceptions == ()


def test_a_fault_is_taken_out_when_its_body_fails(lab: Any) -> None:
    subject = Subject(lab, "batch_norm_epsilon")
    before = evaluated(subject)
    with pytest.raises(UsageError), lab.room.PLANTINGS["batch_norm_epsilon"](subject, "bn1"):
        raise UsageError("stop")
    assert np.array_equal(evaluated(subject), before)
