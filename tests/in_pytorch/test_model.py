"""The native models: names, counts, intermediates, statistics, and manners towards the caller."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.contract import Loader
from triptych.core.errors import InputRefused, UsageError
from triptych.core.preprocess import RandomResizedCrop, Transforms
from triptych.core.recipe import LossScaling
from triptych.core.sampling import SamplingPlan
from triptych.core.spec import Preprocessing
from triptych.data import Source

each_model = pytest.mark.parametrize("name", catalog.list_models())


@each_model
def test_parameter_counts_and_state_of_the_real_models(lab: Any, name: str) -> None:
    import torch

    spec = catalog.get_spec(name)
    native = lab.room.model.empty_module(spec, torch.float32, torch.device("meta"))
    assert sum(parameter.numel() for parameter in native.parameters()) == catalog.CATALOG[name].parameters
    assert [(name, tuple(t.shape)) for name, t in native.state_dict().items()] == [(t.name, t.shape) for t in spec.tensors()]


@each_model
def test_intermediates_are_the_spec_s_in_order_and_shape(lab: Any, name: str) -> None:
    model = lab.model(name, "float32")
    seen = model.forward(lab.batch(model.spec, 2)[0]).intermediates
    assert tuple(seen) == model.spec.intermediates()
    for layer, value in seen.items():
        row = model.spec.layer(layer)
        spatial = {4: (row.size, row.size), 3: (row.tokens,), 2: ()}[value.ndim]
        assert value.shape == (2, *spatial, row.out_channels)
        assert value.dtype == np.float32


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", ["resnet20", "resnet50", "mlp", "vit_tiny_patch16_224", "transformer_block", "text_image"])
def test_weights_round_trip_bit_for_bit(lab: Any, name: str, precision: str) -> None:
    spec = lab.spec(name)
    given = lab.weights(spec, precision)
    given[spec.parameters()[0].name].flat[:4] = [-0.0, np.nan, np.inf, np.nextafter(np.float64(0), 1).astype(precision)]
    returned = lab.room.create_model(spec, given, precision=precision, device="cpu").weights()
    assert list(returned) == [tensor.name for tensor in spec.tensors()]
    for tensor, value in given.items():
        assert returned[tensor].dtype == value.dtype
        assert returned[tensor].tobytes() == value.tobytes()


def test_weights_of_any_numpy_layout_are_taken_and_nothing_is_shared(lab: Any) -> None:
    spec = lab.spec("resnet20")
    given = lab.weights(spec)
    odd = {name: np.asfortranarray(value) if value.ndim else value for name, value in given.items()}
    odd["fc.weight"] = given["fc.weight"][::-1].copy()[::-1]
    odd["fc.bias"].setflags(write=False)
    model = lab.room.create_model(spec, odd, precision="float64", device="cpu")
    model.weights()["fc.weight"][:] = 0.0
    assert np.array_equal(model.weights()["fc.weight"], given["fc.weight"])


def test_every_misfit_of_weights_is_listed_and_nothing_is_changed(lab: Any) -> None:
    model = lab.model("mlp")
    before = model.weights()
    wrong = {**{name: value + 1 for name, value in before.items()}, "fc2.bias": np.zeros(3), "head.weight": np.zeros((2, 2))}
    del wrong["fc1.weight"]
    with pytest.raises(InputRefused) as refused:
        model.load_weights(wrong)
    assert all(name in str(refused.value) for name in ("missing: fc1.weight", "unknown: head.weight", "shape: fc2.bias is (3,)"))
    assert all(np.array_equal(value, model.weights()[name]) for name, value in before.items())


def test_the_state_dict_is_torchvision_s_and_so_are_the_logits(lab: Any) -> None:
    import torch
    import torchvision

    spec = catalog.get_spec("resnet50", image_size=64)
    model = lab.room.create_model(spec, lab.weights(spec), precision="float64", device="cpu")
    peer = torchvision.models.resnet50().double().eval()
    peer.load_state_dict(model.native.state_dict(), strict=True)
    images = lab.batch(spec, 2)[0]
    with torch.no_grad():
        expected = peer(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()
    assert np.array_equal(model.predict(images), expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mlp", "vit_tiny_patch16_224", "transformer_block"])
def test_predict_in_batches_and_the_last_intermediate_agree(lab: Any, name: str) -> None:
    model = lab.model(name)
    images = lab.batch(model.spec, 5)[0]
    logits = model.predict(images)
    assert logits.shape == (5, *model.spec.output_shape)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(model.predict(images, batch_size=2), logits, rtol=1e-12)
    np.testing.assert_array_equal(model.forward(images).intermediates[model.spec.intermediates()[-1]], logits)
    assert model.predict(images[:0]).shape == (0, *model.spec.output_shape)


def test_flatten_is_in_channel_height_width_order(lab: Any) -> None:
    model = lab.model("mlp")
    images = lab.batch(model.spec)[0]
    np.testing.assert_array_equal(model.forward(images).intermediates["flatten"], images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def test_pad_shortcut_subsamples_and_pads_both_sides(lab: Any) -> None:
    model = lab.model("resnet20")
    seen = model.forward(lab.batch(model.spec)[0]).intermediates
    x, out = seen["layer1.1.relu2"], seen["layer2.0.downsample"]
    np.testing.assert_array_equal(out[..., 4:12], x[:, ::2, ::2])
    assert not out[..., :4].any()
    assert not out[..., 12:].any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 3, 16, 16)), r"given \(2, 3, 16, 16\)"),
        (np.zeros((16, 16, 3)), r"\(N, 16, 16, 3\)"),
        (np.zeros((2, 16, 16, 3), np.uint8), "uint8"),
    ],
)
def test_images_of_another_shape_or_type_are_refused(lab: Any, images: np.ndarray, message: str) -> None:
    model = lab.model("resnet20")
    with pytest.raises(UsageError, match=message):
        model.predict(images)


def test_names_that_do_not_exist_are_refused(lab: Any) -> None:
    model = lab.model("resnet20")
    with pytest.raises(UsageError, match=r"did you mean 'layer2\.0\.conv1'"), model.intercept("layer2.0.conv11", lambda layer, call, x: x):
        pass
    with pytest.raises(UsageError, match="batch_size=0"):
        model.predict(lab.batch(model.spec)[0], batch_size=0)
    with pytest.raises(UsageError, match=r"available: .*cpu"):
        lab.room.create_model(model.spec, model.weights(), precision="float64", device="tpu")
    with pytest.raises(UsageError, match="float16"):
        lab.room.create_model(model.spec, model.weights(), precision="float16", device="cpu")


def test_automatic_device_is_one_of_this_machine(lab: Any) -> None:
    spec = lab.spec("mlp")
    model = lab.room.create_model(spec, lab.weights(spec), precision="float64", device="auto")
    assert model.device in ("cuda", "cpu")
    assert lab.room.create_model(spec, lab.weights(spec), precision="float64", device="cpu").device == "cpu"


def test_training_statistics_follow_the_unbiased_formula_and_the_model_stays(lab: Any) -> None:
    model = lab.model("resnet20")
    images, before = lab.batch(model.spec)[0], model.weights()
    passed = model.forward(images, training=True)
    assert set(passed.state) == {tensor.name for tensor in model.spec.tensors() if not tensor.trainable}
    x = passed.intermediates["conv1"].reshape(-1, 8)
    mean, variance = 0.9 * before["bn1.running_mean"] + 0.1 * x.mean(0), 0.9 * before["bn1.running_var"] + 0.1 * x.var(0, ddof=1)
    np.testing.assert_allclose(passed.state["bn1.running_mean"], mean, rtol=1e-13)
    np.testing.assert_allclose(passed.state["bn1.running_var"], variance, rtol=1e-13)
    assert passed.state["bn1.num_batches_tracked"] == 8
    normalized = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * before["bn1.weight"] + before["bn1.bias"]
    np.testing.assert_allclose(passed.intermediates["bn1"].reshape(-1, 8), normalized, rtol=0, atol=1e-13)
    assert all(np.array_equal(value, model.weights()[name]) for name, value in before.items())
    assert model.forward(images).state == {}


def test_layer_inputs_show_a_layer_what_we_choose(lab: Any) -> None:
    model = lab.model("resnet20")
    images = lab.batch(model.spec)[0]
    plain = model.forward(images).intermediates
    probed = model.forward(images, layer_inputs={"layer2.0.bn1": plain["layer2.0.conv1"] + 1.0}).intermediates
    assert np.array_equal(probed["layer2.0.conv1"], plain["layer2.0.conv1"])
    slope = model.weights()["layer2.0.bn1.weight"] / np.sqrt(model.weights()["layer2.0.bn1.running_var"] + 1e-5)
    shift = probed["layer2.0.bn1"] - plain["layer2.0.bn1"]
    np.testing.assert_allclose(shift, np.broadcast_to(slope, shift.shape), rtol=1e-11)


def test_intercept_holds_everywhere_nests_and_is_taken_out(lab: Any) -> None:
    model = lab.model("resnet20")
    images, labels = lab.batch(model.spec)
    trainer = lab.room.create_trainer(model, lab.recipe())

    def outcomes() -> list[Any]:
        return [
            model.predict(images),
            model.forward(images).intermediates["layer1.0.conv1"],
            np.float64(trainer.gradients(images, labels).loss),
        ]

    clean = outcomes()
    with model.intercept("layer1.0.conv1", lambda layer, call, x: call(x).abs() + layer.weight.mean()):
        once = outcomes()
        with model.intercept("layer1.0.conv1", lambda layer, call, x: 2 * call(x)):
            twice = outcomes()
        np.testing.assert_array_equal(twice[1], 2 * once[1])
        again = outcomes()
    for a, b, c, d in zip(clean, once, again, outcomes(), strict=True):
        assert not np.array_equal(a, b)
        np.testing.assert_array_equal(b, c)
        np.testing.assert_array_equal(a, d)


def test_no_global_and_no_flag_of_the_caller_is_left_changed(lab: Any) -> None:
    import torch

    def everything() -> list[Any]:
        backends: Any = torch.backends
        return [
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.get_num_threads(),
            torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32,
            backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision,
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(), torch.is_autocast_enabled("cpu"),
        ]  # fmt: skip

    before = everything()
    spec = lab.spec("mlp", dropout=0.5)
    images, labels = lab.batch(spec)
    model = lab.room.create_model(spec, lab.weights(spec), precision="float32", device="auto")
    everything_on: dict[str, Any] = {"mixed_precision": "float16", "loss_scaling": LossScaling(), "frozen": ("fc1",), "remat": True}
    trainer = lab.room.create_trainer(model, lab.recipe(**everything_on))
    model.native[1].train()
    trainer.step(images, labels, 0.1)
    trainer.gradients(images, labels)
    model.predict(images)
    model.forward(images, training=True)
    transforms = Transforms(RandomResizedCrop(), flip=0.5, mixup=0.5)
    source = Source("zeros", "train", ("0", "1"), np.zeros(4, np.int64), np.zeros((4, 32, 32, 1), np.uint8), list("abcd"))
    plan = SamplingPlan(source.labels, 2, 2, 0, transforms, 32)
    for workers in (0, 1):
        list(lab.room.batches(source, plan.batches(0, 2), Preprocessing(None, 32, (0.5,), (0.5,)), transforms, Loader(workers)))
    assert everything() == before
    assert [module.training for module in model.native] == [name == "fc1" for name, _ in model.native.named_children()]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.native.parameters())


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_a_caller_s_low_precision_changes_no_number_and_is_given_back(lab: Any, setting: str) -> None:
    import torch

    model = lab.model("resnet20", "float32")
    images = lab.batch(model.spec)[0]
    expected, before = model.predict(images), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        np.testing.assert_array_equal(model.predict(images), expected)
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_module_is_an_ordinary_one(lab: Any) -> None:
    import torch

    model = lab.model("resnet20", "float32")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.native(x)
    assert not model.native.training
    np.testing.assert_allclose(out.numpy(), model.predict(x.permute(0, 2, 3, 1).numpy()), rtol=1e-5, atol=1e-5)
    assert "PadShortcut(8, 16, stride=2)" in repr(model.native)
    assert set(lab.room.versions()) == {"torch", "torchvision"}
