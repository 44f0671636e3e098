"""Foreign weights: every dialect lands on the same canonical tensors, and everything else is refused with its reason."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, foreign_file, importers, initialize, tensor_file
from triptych.core.errors import InputRefused, UsageError
from triptych.core.spec import Spec

Weights = dict[str, np.ndarray]


@functools.cache
def _weights(spec: Spec) -> Weights:
    """Quick random weights; Philox would take seconds for a ResNet-18. Counters are 0."""
    rng = np.random.default_rng(3)
    drawn = {tensor.name: rng.standard_normal(tensor.shape, np.float32) for tensor in spec.tensors()}
    return {tensor.name: np.zeros((), np.int64) if tensor.kind == "batch_counter" else drawn[tensor.name] for tensor in spec.tensors()}


def canonical(name: str, **options: Any) -> Weights:
    """Canonical weights of a catalogued model, every tensor different."""
    return dict(_weights(catalog.get_spec(name, **options)))


def check_imported(imported: importers.Imported, expected: Weights) -> None:
    """The import gave exactly these tensors, in the order of the spec."""
    assert list(imported.weights) == [tensor.name for tensor in imported.spec.tensors()] == list(expected)
    for name, array in expected.items():
        assert imported.weights[name].dtype == array.dtype, name
        assert np.array_equal(imported.weights[name], array), name


def renamed(weights: Weights, *rules: tuple[str, str]) -> Weights:
    """The same tensors under other names."""
    out = {}
    for name, array in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = array
    return out


# Dialects


def test_canonical_names_pass_unchanged() -> None:
    imported = importers.to_canonical(canonical("resnet20"), "resnet20")
    check_imported(imported, canonical("resnet20"))
    assert all(row.source == row.canonical and row.note == "" for row in imported.report.rows)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module.", "backbone."]
)
@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_state_dict", "net"])
def test_wrappers_and_containers(prefix: str, container: str | None) -> None:
    state: dict[str, Any] = {prefix + name: array for name, array in canonical("resnet20").items()}
    if container:
        state = {"epoch": 3, "best_acc": np.float64(91.7), container: state, "optimizer": {"state": {0: np.zeros(3)}}}
    imported = importers.to_canonical(state, "resnet20")
    check_imported(imported, canonical("resnet20"))
    assert {row.note for row in imported.report.rows} == {"prefix stripped"}
    assert f"{len(imported.report.rows)} keys lost a wrapper's prefix" in imported.report.notes
    assert any("left out best_acc, epoch, optimizer" in note for note in imported.report.notes) == bool(container)


@pytest.mark.parametrize("head", ["linear", "classifier", "head", "head.fc", "last_linear", "fc.1", "classifier.1"])
def test_renamed_heads_are_found_and_reported(head: str) -> None:
    imported = importers.to_canonical(renamed(canonical("resnet20"), (r"^fc\.", f"{head}.")), "resnet20")
    check_imported(imported, canonical("resnet20"))
    assert [(row.source, row.canonical) for row in imported.report.renamed] == [
        (f"{head}.weight", "fc.weight"),
        (f"{head}.bias", "fc.bias"),
    ]


def test_akamaster_resnet20_with_option_a_shortcuts() -> None:
    state = {"state_dict": renamed(canonical("resnet20"), (r"^fc\.", "linear."), (r"^", "module.")), "best_prec1": 92.6}
    check_imported(importers.to_canonical(state, "resnet20"), canonical("resnet20"))


def test_kuangliu_resnet18() -> None:
    state = {"net": renamed(canonical("resnet18_cifar"), (r"\.downsample\.", ".shortcut."), (r"^fc\.", "linear."), (r"^", "module."))}
    imported = importers.to_canonical({**state, "acc": 95.4, "epoch": 199}, "resnet18_cifar")
    check_imported(imported, canonical("resnet18_cifar"))
    pairs = {row.source: row.canonical for row in imported.report.renamed}
    assert pairs["module.layer2.0.shortcut.1.bias"] == "layer2.0.downsample.1.bias"


def test_transformers_resnet() -> None:
    def stage(match: re.Match[str]) -> str:
        return f"resnet.encoder.stages.{int(match[1]) - 1}.layers.{match[2]}."

    state = {}
    for name, array in canonical("resnet18", num_classes=10).items():
        name = re.sub(r"^layer(\d)\.(\d+)\.", stage, name)
        name = re.sub(r"(layers\.\d+)\.conv(\d)\.", lambda m: f"{m[1]}.layer.{int(m[2]) - 1}.convolution.", name)
        name = re.sub(r"(layers\.\d+)\.bn(\d)\.", lambda m: f"{m[1]}.layer.{int(m[2]) - 1}.normalization.", name)
        name = name.replace("downsample.0.", "shortcut.convolution.").replace("downsample.1.", "shortcut.normalization.")
        name = re.sub(r"^conv1\.", "resnet.embedder.embedder.convolution.", name)
        name = re.sub(r"^bn1\.", "resnet.embedder.embedder.normalization.", name)
        state[re.sub(r"^fc\.", "classifier.1.", name)] = array
    check_imported(importers.to_canonical(state, "resnet18"), canonical("resnet18", num_classes=10))


def test_absent_counters_are_filled_with_zero_and_reported() -> None:
    state = {name: array for name, array in canonical("resnet20").items() if not name.endswith("num_batches_tracked")}
    imported = importers.to_canonical(state, "resnet20")
    check_imported(imported, canonical("resnet20"))
    assert any("19 absent num_batches_tracked counters filled with 0" in note for note in imported.report.notes)


def test_float_counters_of_one_element_become_int64_scalars() -> None:
    state = canonical("resnet20")
    state["bn1.num_batches_tracked"] = np.array([7.0], np.float32)
    counter = importers.to_canonical(state, "resnet20").weights["bn1.num_batches_tracked"]
    assert (counter.dtype, counter.shape, int(counter)) == (np.int64, (), 7)
    state["bn1.num_batches_tracked"] = np.array(7.5, np.float32)
    with pytest.raises(InputRefused, match=r"bn1\.num_batches_tracked is float32"):
        importers.to_canonical(state, "resnet20")


def test_half_precision_is_widened_and_reported() -> None:
    state: dict[str, Any] = {
        name: array.astype(np.float16) if array.dtype.kind == "f" else array for name, array in canonical("resnet20").items()
    }
    state["fc.bias"] = tensor_file.Widened(np.arange(10, dtype=np.float32), "bfloat16")
    imported = importers.to_canonical(state, "resnet20")
    assert {array.dtype.name for array in imported.weights.values()} == {"float32", "int64"}
    assert np.array_equal(imported.weights["conv1.weight"], state["conv1.weight"].astype(np.float32))
    assert {"1 tensor(s): bfloat16 converted to float32", "96 tensor(s): float16 converted to float32"} <= set(imported.report.notes)


def test_mixed_precision_loses_nothing() -> None:
    state = {**canonical("resnet20"), "fc.bias": np.full(10, 0.1)}
    imported = importers.to_canonical(state, "resnet20")
    assert {array.dtype.name for array in imported.weights.values()} == {"float64", "int64"}
    assert imported.weights["fc.bias"][0] == 0.1


def test_bookkeeping_of_averaged_models_is_left_out() -> None:
    state = {"n_averaged": np.array(5), **{f"module.{name}": array for name, array in canonical("resnet20").items()}}
    imported = importers.to_canonical(state, "resnet20")
    check_imported(imported, canonical("resnet20"))
    assert any("n_averaged" in note for note in imported.report.notes)


def test_ema_only_on_request_and_never_silently() -> None:
    averaged = {name: np.asarray(array + array.dtype.type(1)) for name, array in canonical("resnet20").items()}
    state = {"state_dict": canonical("resnet20"), "state_dict_ema": averaged, "arch": "resnet20"}
    plain = importers.to_canonical(state, "resnet20")
    check_imported(plain, canonical("resnet20"))
    assert any("--ema" in note for note in plain.report.notes)
    check_imported(importers.to_canonical(state, "resnet20", ema=True), averaged)
    check_imported(importers.to_canonical({"state_dict_ema": averaged}, "resnet20"), averaged)
    with pytest.raises(InputRefused, match="no averaged"):
        importers.to_canonical({"state_dict": averaged}, "resnet20", ema=True)


# Options


def test_resnet_options_are_inferred() -> None:
    imported = importers.to_canonical(canonical("resnet20", num_classes=100, in_channels=1), "resnet20", image_size=40)
    assert imported.spec == catalog.get_spec("resnet20", num_classes=100, in_channels=1, image_size=40)
    assert any("num_classes=100, in_channels=1" in note for note in imported.report.notes)


@pytest.mark.parametrize(
    "names", [("0", "2", "4"), ("fc1", "fc2", "fc3"), ("layers.0", "layers.1", "out"), ("fc1", "fc2", "fc"), ("input", "middle", "output")]
)
@pytest.mark.parametrize("options", [{"hidden": (9, 7)}, {"hidden": (8, 8), "in_channels": 3, "image_size": 6, "num_classes": 8}])
def test_mlps_of_any_names_and_widths(names: tuple[str, ...], options: dict[str, Any]) -> None:
    expected = canonical("mlp", **options)
    ours = dict(zip(("fc1", "fc2", "fc"), names, strict=True))
    state = {f"net.{ours[name.partition('.')[0]]}.{name.partition('.')[2]}": array for name, array in expected.items()}
    imported = importers.to_canonical(state, "mlp")
    check_imported(imported, expected)
    assert imported.spec == catalog.get_spec("mlp", **options)


def test_mlp_layers_are_ordered_by_number_not_by_the_alphabet() -> None:
    expected = canonical("mlp", hidden=(16,) * 11, image_size=4, num_classes=16)
    layers = [name.removesuffix(".weight") for name in expected if name.endswith(".weight")]
    state = {f"{2 * layers.index(name.rpartition('.')[0])}.{name.rpartition('.')[2]}": array for name, array in expected.items()}
    check_imported(importers.to_canonical(dict(sorted(state.items())), "mlp"), expected)
    check_imported(importers.to_canonical(dict(sorted(expected.items())), "mlp"), expected)


# Refusals


def test_a_wrong_model_lists_everything_and_names_the_right_one() -> None:
    with pytest.raises(InputRefused) as caught:
        importers.to_canonical({f"module.{name}": array for name, array in canonical("resnet32").items()}, "resnet20", source="w.pth")
    message = str(caught.value)
    assert "w.pth does not hold the weights of resnet20" in message
    assert message.count("unexpected: module.layer") == 72
    assert "unexpected: module.layer3.4.bn2.running_var (as layer3.4.bn2.running_var) (64,)" in message
    assert "The tensors are those of resnet32: try --model resnet32" in message


def test_all_kinds_of_mismatch_in_one_error() -> None:
    state = canonical("resnet20")
    state["layer9.0.conv1.weight"] = state.pop("layer2.0.conv1.weight")
    state["layer1.0.bn1.weight"] = np.zeros(5, np.float32)
    state["bn1.bias"] = np.zeros(16, np.int8)
    with pytest.raises(InputRefused) as caught:
        importers.to_canonical(state, "resnet20", num_classes=7)
    message = str(caught.value)
    for part in (
        "missing: layer2.0.conv1.weight", "unexpected: layer9.0.conv1.weight", "layer1.0.bn1.weight is (5,), expected (16,)",
        "fc.weight is (10, 64), expected (7, 64)", "fc.bias is (10,), expected (7,)", "bn1.bias is int8, expected float32",
    ):  # fmt: skip
        assert part in message


def test_two_keys_for_one_tensor_are_refused() -> None:
    state = canonical("resnet20")
    state["module.fc.bias"] = state["fc.bias"]
    with pytest.raises(InputRefused, match=r"fc\.bias and module\.fc\.bias both map to fc\.bias"):
        importers.to_canonical(state, "resnet20")


@pytest.mark.parametrize("state", [{}, {"epoch": 1}, [1, 2], "text", {"model": {"a": 1}}, {"state_dict": {}}])
def test_no_tensors_at_all(state: Any) -> None:
    with pytest.raises(InputRefused, match="holds no state dict"):
        importers.to_canonical(state, "resnet20", source="w.pth")


def test_unknown_models_and_options() -> None:
    with pytest.raises(UsageError, match="did you mean"):
        importers.to_canonical(canonical("resnet20"), "resnet21")
    with pytest.raises(UsageError, match="no option 'hidden'"):
        importers.to_canonical(canonical("resnet20"), "resnet20", hidden=(3,))


# Real models


@pytest.fixture(scope="module")
def torch() -> Any:
    """PyTorch, imported in the safe order; skipped where it is not installed."""
    if "pytorch" not in contract.installed():
        pytest.skip("pytorch is not installed")
    contract.load("pytorch")
    return pytest.importorskip("torch")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_torchvision_resnet18(torch: Any, tmp_path: Path, prefix: str) -> None:
    from torchvision.models import resnet18

    state = resnet18(weights=None, num_classes=5).state_dict()
    torch.save({"model": {prefix + name: tensor for name, tensor in state.items()}, "epoch": 1}, tmp_path / "c.pth")
    imported = importers.to_canonical(foreign_file.read(tmp_path / "c.pth"), "resnet18")
    assert imported.spec == catalog.get_spec("resnet18", num_classes=5)
    check_imported(imported, {name: tensor.numpy() for name, tensor in state.items()})


def test_torchvision_resnet50(torch: Any) -> None:
    from torchvision.models import resnet50

    with torch.device("meta"):  # names and shapes only: the values of the small models are enough
        state = {name: tuple(tensor.shape) for name, tensor in resnet50(weights=None).state_dict().items()}
    assert state == {tensor.name: tensor.shape for tensor in catalog.get_spec("resnet50").tensors()}


def test_timm_resnet18(torch: Any, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm, a peer whose files we import, is not installed")
    from safetensors.torch import save_file

    state = timm.create_model("resnet18", num_classes=3, in_chans=1).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    imported = importers.to_canonical(foreign_file.read(tmp_path / "model.safetensors"), "resnet18")
    assert imported.spec == catalog.get_spec("resnet18", num_classes=3, in_channels=1)
    check_imported(imported, {name: tensor.numpy() for name, tensor in state.items()})


@pytest.mark.parametrize("name", list(catalog.VIT_SIZES))
def test_a_timm_vit_of_other_classes_channels_and_size(torch: Any, tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm, a peer whose files we import, is not installed")
    from safetensors.torch import save_file

    state = timm.create_model(name, num_classes=3, in_chans=1, img_size=64).state_dict()
    save_file(state, tmp_path / "model.safetensors")
    imported = importers.to_canonical(foreign_file.read(tmp_path / "model.safetensors"), name)
    assert imported.spec == catalog.get_spec(name, num_classes=3, in_channels=1, image_size=64)
    check_imported(imported, {name: tensor.numpy() for name, tensor in state.items()})


@pytest.mark.parametrize("name", list(catalog.VIT_SIZES))
def test_timm_s_names_and_shapes_are_ours(torch: Any, name: str) -> None:
    timm = pytest.importorskip("timm", reason="timm, a peer whose files we import, is not installed")
    with torch.device("meta"):
        state = [(key, tuple(tensor.shape)) for key, tensor in timm.create_model(name).state_dict().items()]
    assert state == [(tensor.name, tensor.shape) for tensor in catalog.get_spec(name).tensors()]


def test_a_vit_s_sizes_are_read_off_its_tensors_and_one_too_many_positions_are_refused() -> None:
    spec = catalog.get_spec("vit_tiny_patch16_224", num_classes=3, in_channels=1, image_size=32)
    state = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in spec.tensors()}
    assert importers.to_canonical({"state_dict": state}, "vit_tiny_patch16_224").spec == spec
    state["pos_embed"] = np.zeros((1, 6, 192), np.float32)
    with pytest.raises(InputRefused, match="pos_embed"):
        importers.to_canonical(state, "vit_tiny_patch16_224")


def test_a_block_of_a_vit_is_imported_with_its_widths() -> None:
    spec = catalog.get_spec("transformer_block", width=12, mlp_width=20)
    state = initialize.initial_weights(spec, 0)
    imported = importers.to_canonical({f"module.{name}": value for name, value in state.items()}, "transformer_block", tokens=7)
    assert imported.spec == catalog.get_spec("transformer_block", width=12, mlp_width=20, tokens=7)
    assert all(np.array_equal(imported.weights[name], value) for name, value in state.items())
    assert "heads=3 and tokens=7 are not visible in the tensors" in imported.report.notes
    with pytest.raises(InputRefused, match=r"mlp\.fc2\.weight"):
        importers.to_canonical({name: value for name, value in state.items() if name != "mlp.fc2.weight"}, "transformer_block")
