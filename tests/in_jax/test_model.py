"""The models: names, shapes, counts, weights, passes, interception, and manners."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from triptych.core import catalog
from triptych.core.errors import InputRefused, UsageError

FAMILIES = ("resnet18", "resnet50", "resnet20", "resnet18_cifar", "mlp", "vit_tiny_patch16_224", "transformer_block")


@pytest.mark.parametrize("name", catalog.CATALOG)
def test_shapes_names_and_counts_of_the_full_models(lab: Any, name: str) -> None:
    import jax
    from flax.traverse_util import flatten_dict

    from triptych.in_jax import model, weights

    spec = catalog.get_spec(name)
    inputs = [jax.ShapeDtypeStruct((1, *each.shape), np.int32 if each.kind == "tokens" else np.float32) for each in spec.inputs()]
    shapes = {path: leaf.shape for path, leaf in flatten_dict(jax.eval_shape(model.build(spec).init, jax.random.key(0), *inputs)).items()}
    native = {weights.path(t): tuple(t.shape[axis] for axis in weights.NATIVE[t.kind][2]) for t in spec.tensors()}
    assert shapes == native
    assert sum(np.prod(shape, dtype=int) for path, shape in shapes.items() if path[0] == "params") == catalog.CATALOG[name].parameters


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_weights_round_trip_bit_for_bit(lab: Any, name: str, precision: str) -> None:
    spec = catalog.tiny(catalog.get_spec(name))
    given = lab.weights(spec, precision)
    model = lab.room.create_model(spec, given, precision=precision, device="cpu")
    back = model.weights()
    assert list(back) == [tensor.name for tensor in spec.tensors()]
    for tensor in spec.tensors():
        assert (back[tensor.name].dtype, back[tensor.name].shape) == (given[tensor.name].dtype, tensor.shape)
        assert back[tensor.name].tobytes() == given[tensor.name].tobytes()
    given[spec.parameters()[-1].name][:] = 99.0
    back[spec.parameters()[-2].name][:] = 99.0
    assert not any(np.any(values == 99.0) for values in model.weights().values()), "nothing is shared with the caller"


def test_every_misfit_of_weights_is_listed_and_nothing_is_changed(lab: Any) -> None:
    model = lab.model("resnet20")
    before = model.weights()
    wrong = {**before, "extra.weight": np.zeros(3), "fc.bias": np.zeros(11), "bn1.num_batches_tracked": np.array(2**31)}
    del wrong["conv1.weight"]
    with pytest.raises(InputRefused) as refusal:
        model.load_weights(wrong)
    for part in ("missing conv1.weight", "unknown extra.weight (3,)", "fc.bias: given (11,), expected (10,)", "does not fit int32"):
        assert part in str(refusal.value)
    assert all(np.array_equal(before[name], values) for name, values in model.weights().items())


@pytest.mark.parametrize("name", FAMILIES)
def test_intermediates_are_the_spec_s_in_order_and_shape(lab: Any, name: str) -> None:
    model = lab.shared(name)
    images, _ = lab.batch(model.spec)
    forward = model.forward(images)
    assert tuple(forward.intermediates) == model.spec.intermediates()
    assert forward.state == {}
    for layer in model.spec.layers():
        size = {4: (layer.size, layer.size), 3: (layer.tokens,), 2: ()}[forward.intermediates[layer.name].ndim]
        assert forward.intermediates[layer.name].shape == (len(images), *size, layer.out_channels)
    np.testing.assert_allclose(forward.intermediates[model.spec.intermediates()[-1]], model.predict(images), rtol=1e-12, atol=1e-13)


def test_predict_in_batches(lab: Any) -> None:
    model = lab.model("mlp", "float32")
    images, _ = lab.batch(model.spec)
    whole = model.predict(images)
    assert (whole.shape, whole.dtype) == ((6, 10), np.float32)
    np.testing.assert_allclose(model.predict(images, batch_size=4), whole, rtol=1e-5, atol=1e-6)
    assert model.predict(images[:0]).shape == (0, 10)
    assert model._predict._cache_size() == 2, "the uneven last batch was compiled for"


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (8, 8, 3), (2, 8, 9, 3)])
def test_images_of_another_shape_are_refused(lab: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"\(N, 8, 8, 3\)"):
        lab.shared("mlp").predict(np.zeros(shape))


def test_names_that_do_not_exist_are_refused(lab: Any) -> None:
    model = lab.shared("resnet20")
    spec, images = model.spec, lab.batch(model.spec)[0]
    with pytest.raises(UsageError, match=r"no layer 'layer9'.*layer1\.0\.conv1"), model.intercept("layer9", lambda *_: None):
        pass
    with pytest.raises(UsageError, match="no layer 'bn9'"):
        model.forward(images, layer_inputs={"bn9": images})
    with pytest.raises(UsageError, match=r"layer_inputs\['bn1'\] has shape \(1, 1\); the layer takes \(6, 8, 8, 8\)"):
        model.forward(images, layer_inputs={"bn1": np.zeros((1, 1))})
    with pytest.raises(UsageError, match=r"batch_size=0"):
        model.predict(images, batch_size=0)
    with pytest.raises(UsageError, match="float32, float64"):
        lab.room.create_model(spec, {}, precision="float16", device="cpu")
    with pytest.raises(UsageError, match="'mps' is not available to JAX here; choose from auto, cpu"):
        lab.room.create_model(spec, {}, precision="float32", device="mps")


def test_the_automatic_device_is_jax_s_own(lab: Any) -> None:
    import jax

    model = lab.room.create_model(lab.spec("mlp"), lab.weights(lab.spec("mlp")), precision="float32", device="auto")
    assert (model.device == "cpu") == (jax.default_backend() == "cpu")


def test_training_statistics_follow_the_unbiased_formula_and_the_model_stays(lab: Any) -> None:
    model = lab.shared("resnet50")
    before, (images, _) = model.weights(), lab.batch(model.spec)
    forward = model.forward(images, training=True)
    assert set(forward.state) == {t.name for t in model.spec.tensors() if not t.trainable}
    for layer in (layer for layer in model.spec.layers() if layer.op == "batch_norm"):
        convolution = layer.name.replace("bn", "conv").replace("downsample.1", "downsample.0")
        x = forward.intermediates[convolution].reshape(-1, layer.out_channels)
        for statistic, value in (("running_mean", x.mean(0)), ("running_var", x.var(0, ddof=1))):
            name = f"{layer.name}.{statistic}"
            np.testing.assert_allclose(forward.state[name], 0.9 * before[name] + 0.1 * value, rtol=1e-12, atol=1e-14)
        normal = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * before[f"{layer.name}.weight"] + before[f"{layer.name}.bias"]
        np.testing.assert_allclose(forward.intermediates[layer.name].reshape(x.shape), normal, rtol=1e-11, atol=1e-12)
        assert forward.state[f"{layer.name}.num_batches_tracked"] == 8
        assert forward.state[f"{layer.name}.num_batches_tracked"].dtype == np.int64
    assert all(np.array_equal(before[name], values) for name, values in model.weights().items())


def test_one_value_per_channel_has_no_variance(lab: Any) -> None:
    import jax

    from triptych.in_jax.layers import BatchNorm

    x = jax.numpy.ones((1, 3))
    variables = BatchNorm().init(jax.random.key(0), x, use_running_average=True)
    with pytest.raises(UsageError, match="more than 1 value per channel"):
        BatchNorm().apply(variables, x, use_running_average=False, mutable=["batch_stats"])


def test_layer_inputs_show_a_layer_what_we_choose(lab: Any) -> None:
    model = lab.shared("resnet20")
    images, _ = lab.batch(model.spec)
    plain = model.forward(images).intermediates
    probe = plain["layer2.0.conv1"] + 1.0
    probed = model.forward(images, layer_inputs={"layer2.0.bn1": probe}).intermediates
    weights = model.weights()
    mean, var, gamma, beta = (weights[f"layer2.0.bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    np.testing.assert_allclose(probed["layer2.0.bn1"], (probe - mean) / np.sqrt(var + 1e-5) * gamma + beta, rtol=1e-12, atol=1e-13)
    assert np.array_equal(probed["layer2.0.conv1"], plain["layer2.0.conv1"])


def test_intercept_holds_everywhere_nests_and_is_taken_out(lab: Any) -> None:
    model = lab.model("mlp")
    early = lab.room.create_trainer(model, lab.recipe())
    images, labels = lab.batch(model.spec)

    def outcomes() -> list[Any]:
        late = lab.room.create_trainer(model, lab.recipe())
        losses = [trainer.gradients(images, labels).loss for trainer in (early, late)]
        return [model.predict(images)[0, 0], model.forward(images).intermediates["fc"][0, 0], *losses]

    before = outcomes()
    with model.intercept("fc", lambda module, call, x: call(x) + module.features):
        inside = outcomes()
        assert inside[0] == pytest.approx(before[0] + 10.0)
        assert inside[1] == pytest.approx(before[1] + 10.0)
        with model.intercept("fc", lambda module, call, x: 2.0 * call(x)):
            nested = outcomes()
            assert nested[0] == pytest.approx(2.0 * inside[0])
            assert nested[2] == pytest.approx(nested[3]) != inside[2]
        assert outcomes() == inside
    assert outcomes() == before


def test_a_replaced_native_model_is_used(lab: Any) -> None:
    model = lab.model("mlp")
    images, _ = lab.batch(model.spec)
    before = model.predict(images)
    module, variables = model.native
    params = variables["params"]
    model.native = module, {"params": {**params, "fc": {**params["fc"], "bias": np.asarray(params["fc"]["bias"]) + 1.0}}}
    np.testing.assert_allclose(model.predict(images), before + 1.0, rtol=1e-12)


def test_native_is_an_ordinary_flax_model(lab: Any) -> None:
    model = lab.model("resnet20", "float32")
    images, _ = lab.batch(model.spec)
    module, variables = model.native
    np.testing.assert_allclose(module.apply(variables, images.astype(np.float32)), model.predict(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("callers", [False, True])
def test_no_global_of_the_caller_matters_or_is_changed(lab: Any, callers: bool) -> None:
    import jax

    spec = lab.spec("mlp")
    images, labels = lab.batch(spec)
    with jax.enable_x64(callers), jax.default_matmul_precision("bfloat16"):
        before = {name: getattr(jax.config, name) for name in ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_device")}
        for precision in ("float32", "float64"):
            model = lab.room.create_model(spec, lab.weights(spec, precision), precision=precision, device="cpu")
            trainer = lab.room.create_trainer(model, lab.recipe())
            trainer.step(images, labels, 0.1)
            trainer.load_state(trainer.state())
            assert model.predict(images).dtype == precision
            assert {v.dtype for v in model.forward(images, training=True).intermediates.values()} == {np.dtype(precision)}
            assert trainer.state().slots["momentum"]["fc.weight"].dtype == precision
        pixels = np.zeros((8, 8, 3), np.uint8)
        assert lab.room.preprocess(pixels, spec.preprocessing).dtype == np.float32
        assert {name: getattr(jax.config, name) for name in before} == before


def test_flatten_is_in_channel_height_width_order(lab: Any) -> None:
    model = lab.shared("mlp")
    images, _ = lab.batch(model.spec)
    assert np.array_equal(model.forward(images).intermediates["flatten"], images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def test_pad_shortcut_subsamples_and_pads_both_sides(lab: Any) -> None:
    model = lab.shared("resnet20")
    images, _ = lab.batch(model.spec)
    seen = model.forward(images).intermediates
    x, y = seen["layer1.0.relu2"], seen["layer2.0.downsample"]
    assert np.array_equal(y[..., 4:12], x[:, ::2, ::2])
    assert not y[..., :4].any()
    assert not y[..., 12:].any()


def test_versions(lab: Any) -> None:
    import jax

    versions = lab.room.versions()
    assert versions["jax"] == jax.__version__
    assert {"flax", "optax", "jaxlib"} <= set(versions)
