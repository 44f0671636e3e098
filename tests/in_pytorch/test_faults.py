"""Every planted fault changes something, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.preprocess import ColorJitter, Geometry, Transforms
from triptych.core.recipe import AdamW, Clip, LossScaling
from triptych.core.sampling import SamplingPlan
from triptych.data import Source

# fault -> (model, layer, what it must change). Statistics and weights are those after three training steps.
EXPECTED = {
    "batch_norm_epsilon": ("resnet20", "layer2.0.bn1", {"eval", "train", "gradients", "steps"}),
    "batch_norm_momentum": ("resnet20", "layer2.0.bn1", {"statistics", "steps"}),
    "batch_norm_biased_variance": ("resnet20", "layer2.0.bn1", {"statistics", "steps"}),
    "batch_norm_fast_variance": ("resnet20", "layer2.0.bn1", {"probe", "statistics", "train", "gradients", "steps"}),
    "batch_norm_frozen_in_training": ("resnet20", "layer2.0.bn1", {"statistics", "train", "probe", "gradients", "steps"}),
    "batch_norm_batch_statistics_in_eval": ("resnet20", "layer2.0.bn1", {"eval"}),
    "layer_norm_epsilon": ("vit_tiny_patch16_224", "blocks.1.norm1", {"eval", "train", "gradients", "steps"}),
    "gelu_tanh": ("vit_tiny_patch16_224", "blocks.0.mlp.act", {"eval", "train", "gradients", "steps"}),
    "attention_unscaled": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", {"eval", "train", "gradients", "steps"}),
    "attention_float32": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", {"eval", "train", "gradients", "steps"}),
    "attention_heads_first": ("vit_tiny_patch16_224", "blocks.1.attn.sdpa", {"eval", "train", "gradients", "steps"}),
    "layer_norm_fast_variance": ("vit_tiny_patch16_224", "norm", {"eval", "train", "probe"}),
    "conv_same_padding": ("resnet20", "layer2.0.conv1", {"eval", "train", "gradients", "steps"}),
    "max_pool_same_padding": ("resnet18", "maxpool", {"eval", "train", "gradients", "steps"}),
    "stride_on_first_convolution": ("resnet50", "layer2.0", {"eval", "train", "gradients", "steps"}),
    "flatten_native_order": ("mlp", "flatten", {"eval", "train", "gradients", "steps"}),
    "low_precision_layer": ("resnet20", "layer1.0.conv2", {"eval", "train", "gradients", "steps"}),
    "pad_shortcut_one_side": ("resnet20", "layer2.0.downsample", {"eval", "train", "gradients", "steps"}),
    "pad_shortcut_average_pool": ("resnet20", "layer2.0.downsample", {"eval", "train", "gradients", "steps"}),
    "dropout_in_eval": ("mlp", "fc2", {"eval", "train", "gradients", "steps"}),
    "gradient_stopped_shortcut": ("resnet20", "layer2.0.downsample", {"gradients", "steps"}),
    "lstm_gate_order": ("text_image", "lstm", {"eval", "train", "gradients", "steps"}),
    "lstm_bias_lost": ("text_image", "lstm", {"eval", "train", "gradients", "steps"}),
    "lstm_unit_forget_bias": ("text_image", "lstm", {"eval", "train", "gradients", "steps"}),
    "lstm_mask_ignored": ("text_image", "lstm", {"eval", "train", "gradients", "steps"}),
    "lstm_reversed": ("text_image", "lstm", {"eval", "train", "gradients", "steps"}),
    "global_max_pool_mean": ("text_image", "maxpool", {"eval", "train", "gradients", "steps"}),
    "momentum_convention": ("resnet20", "", {"slots", "steps"}),
    "nesterov_formula": ("resnet20", "", {"steps"}),
    "weight_decay_decoupled": ("resnet20", "", {"slots", "steps"}),
    "adam_epsilon_hat": ("mlp", "", {"steps"}),
    "ema_before_step": ("resnet20", "", {"ema"}),
    "label_smoothing_other_classes": ("resnet20", "", {"loss", "gradients", "steps"}),
    "loss_float32": ("resnet20", "", {"loss", "gradients", "steps"}),
    "loss_sum": ("resnet20", "", {"loss", "gradients", "steps"}),
    "sigmoid_twice": ("text_image", "", {"loss", "gradients", "steps"}),
    "clip_before_unscale": ("resnet20", "", {"clipped"}),
    "clip_no_epsilon": ("resnet20", "", {"clipped"}),
    "clip_per_tensor": ("resnet20", "", {"clipped"}),
    "jitter_brightness_adds": ("resnet20", "", {"jitter"}),
    "jitter_native_contrast": ("resnet20", "", {"jitter"}),
    "resize_no_antialias": ("resnet20", "", {"resize"}),
    "resize_uint8": ("resnet20", "", {"resize"}),
}


class Subject:
    """What a planting is given (`parity.subject.Subject`), small."""

    def __init__(self, lab: Any, name: str, adam: bool) -> None:
        self.lab = lab
        self.model = lab.model(name)
        self.spec, self.recipe = self.model.spec, lab.recipe(AdamW() if adam else None)
        self.trainer = lab.room.create_trainer(self.model, self.recipe)
        self.initial = self.trainer.state()

    def intercept(self, layer: str, wrapper: Any) -> contextlib.AbstractContextManager[None]:
        return self.model.intercept(layer, wrapper)

    def observe(self, layer: str) -> dict[str, Any]:
        """Everything a fault could change, from the same start each time."""
        self.trainer.load_state(self.initial)
        images, labels = self.lab.batch(self.spec)
        passed = self.model.forward(images, training=True)
        probe = {layer: 1000.0 + passed.intermediates[layer]} if layer.rpartition(".")[2].startswith(("bn", "norm")) else {}
        gradients = self.trainer.gradients(images, labels)
        seen = {
            "eval": self.model.predict(images),
            "train": passed.intermediates[self.spec.head],
            "statistics": list(passed.state.values()),
            "probe": self.model.forward(images, training=True, layer_inputs=probe).intermediates[self.spec.head] if probe else 0.0,
            "loss": gradients.loss,
            "gradients": list(gradients.gradients.values()),
            "resize": self.lab.room.resize(np.arange(60 * 48 * 3, dtype=np.uint8).reshape(60, 48, 3), Geometry(40, 32, 4, 0, 32)),
        }
        for rate in (0.1, 0.03, 0.07):
            self.trainer.step(images, labels, rate)
        state = self.trainer.state()
        seen |= {"clipped": self._scaled_and_clipped(), "jitter": self._jittered()}
        return {**seen, "steps": list(state.weights.values()), "slots": list(state.slots.values()), "ema": list(state.ema.values())}

    def _scaled_and_clipped(self) -> dict[str, np.ndarray]:
        """The slots after a step from the start whose gradients are scaled, and clipped by their norm."""
        model = self.lab.room.create_model(self.spec, self.initial.weights, precision="float64", device="cpu")
        recipe = dataclasses.replace(self.recipe, clip=Clip(norm=0.5), loss_scaling=LossScaling())
        trainer = self.lab.room.create_trainer(model, recipe)
        trainer.step(*self.lab.batch(self.spec), 0.1)
        return dict(next(iter(trainer.state().slots.values())))

    def _jittered(self) -> np.ndarray:
        """A batch out of the pipeline."""
        transforms = Transforms(jitter=ColorJitter(0.4, 0.4))
        images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        source = Source("noise", "train", ("0", "1"), np.arange(4) % 2, images, list("abcd"))
        plan = SamplingPlan(source.labels, 2, 4, 1, transforms, 32)
        ((pixels, _),) = self.lab.room.batches(source, plan.batches(0, 1), catalog.get_spec("resnet20").preprocessing, transforms)
        return pixels


def changed(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """The observations whose bits differ."""
    import pickle

    return {name for name in a if pickle.dumps(a[name]) != pickle.dumps(b[name])}


def test_the_table_is_complete(lab: Any) -> None:
    assert set(lab.room.PLANTINGS) == set(EXPECTED)


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_changes_what_it_should_and_is_taken_out(lab: Any, fault: str) -> None:
    name, layer, expected = EXPECTED[fault]
    subject = Subject(lab, name, adam=fault.startswith("adam"))
    clean = subject.observe(layer)
    with lab.room.PLANTINGS[fault](subject, layer):
        faulty = subject.observe(layer)
    assert expected <= changed(clean, faulty)
    # A mode's fault must not leak into the other mode.
    silent = {"eval", "resize", "loss", "train", "jitter"} - expected - ({"loss"} if "train" in expected else set())
    assert not silent & changed(clean, faulty)
    assert changed(clean, subject.observe(layer)) == set()


def test_a_wrong_optimizer_leaves_the_other_kind_alone(lab: Any) -> None:
    subject = Subject(lab, "mlp", adam=True)
    clean = subject.observe("")
    with lab.room.PLANTINGS["momentum_convention"](subject, ""):
        assert changed(clean, subject.observe("")) == set()


def test_the_fast_variance_of_a_plain_input_is_only_rounding_and_of_a_shifted_one_is_not(lab: Any) -> None:
    subject = Subject(lab, "resnet20", adam=False)
    layer, images = "layer2.0.bn1", lab.batch(subject.spec)[0]
    x = subject.model.forward(images, training=True).intermediates["layer2.0.conv1"]
    errors = []
    for shift in (0.0, 1000.0):
        probe = {layer: x + shift}
        right = subject.model.forward(images, training=True, layer_inputs=probe).intermediates[layer]
        with lab.room.PLANTINGS["batch_norm_fast_variance"](subject, layer):
            wrong = subject.model.forward(images, training=True, layer_inputs=probe).intermediates[layer]
        errors.append(np.abs(wrong - right).max())
    assert errors[0] < 1e-12
    assert errors[1] > 1e-11
