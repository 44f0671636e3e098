"""The operator of 3x3 convolutions by Winograd's algorithm is the convolution, and takes its place where it gains."""

from __future__ import annotations

import copy
import dataclasses
import platform
from typing import Any

import numpy as np
import pytest
import torch

from triptych.core import catalog, contract, initialize, philox
from triptych.core.difference import scaled_error
from triptych.core.folding import fold
from triptych.core.spec import ResNetSpec, StageSpec
from triptych.core.tolerance import LOGITS_FLOAT32
from triptych.in_pytorch import create_model, inference

LEVER = "3x3 convolutions by Winograd's algorithm"
pytestmark = pytest.mark.skipif(not inference.has_compiler(), reason="there is no C++ compiler here")


def tensor(name: str, *shape: int) -> Any:
    """Normal float32 values."""
    return torch.from_numpy(philox.normal(name, shape).astype(np.float32))


def convolution(channels: int, filters: int) -> Any:
    """A convolution with a bias."""
    made = torch.nn.Conv2d(channels, filters, 3, padding=1).requires_grad_(False)
    made.weight.copy_(tensor("kernel", filters, channels, 3, 3))
    made.bias.copy_(tensor("bias", filters))
    return made


def wide(name: str) -> ResNetSpec:
    """A small network whose second stage is wide enough for panels of output channels."""
    spec = catalog.tiny(catalog.get_spec(name))
    assert isinstance(spec, ResNetSpec)
    return dataclasses.replace(spec, stages=(StageSpec(2, 8, 1), StageSpec(2, 64, 2)))


def folded(spec: ResNetSpec) -> Any:
    """Its module, BatchNorm folded."""
    return create_model(*fold(spec, initialize.parity_weights(spec, 0, "float32")), precision="float32", device="cpu").native


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[(), ("triptych_without_avx512", "-mno-avx512f")], ids=["as here", "without AVX-512"])
def library(request: Any) -> Any:
    """`winograd.cpp`, compiled for this machine and for one with half the registers."""
    if request.param and platform.machine() != "x86_64":
        pytest.skip("flags of another processor")
    made = inference.library(*request.param)
    if request.param:
        assert made.panel == 16
    assert inference.PANEL % made.panel == 0
    return made


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    ("count", "size", "channels", "filters"),
    [(3, (1, 1), 32, 64), (1, (7, 7), 64, 96), (3, (8, 5), 96, 32), (2, (2, 9), 32, 32), (2, (31, 30), 32, 32), (0, (4, 4), 32, 32)],
    ids=str,
)
def test_it_is_the_convolution(
    library: Any, count: int, size: tuple[int, int], channels: int, filters: int, added: bool, relu: bool, threads: int
) -> None:
    plain, x, shortcut = convolution(channels, filters), tensor("x", count, channels, *size), tensor("shortcut", count, filters, *size)
    torch.set_num_threads(threads)
    ours = inference.Winograd(plain, library, relu=relu)

    def finished(y: Any) -> Any:
        y = y + shortcut.to(y.dtype) if added else y
        return y.relu() if relu else y

    given = (x, shortcut) if added else (x,)
    expected = finished(copy.deepcopy(plain).double()(x.double()))
    found = ours(*given)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, ours(*(each.contiguous(memory_format=torch.channels_last) for each in given)))
    if count:
        rounding = scaled_error(finished(plain(x)).numpy(), expected.numpy())
        assert scaled_error(found.numpy(), expected.numpy()) <= 4 * max(rounding, float(np.finfo(np.float32).eps))


def test_nan_stays_nan() -> None:
    x = torch.zeros(1, 32, 6, 6)
    x[0, 3, 2, 2] = torch.nan
    found = inference.Winograd(convolution(32, 32), inference.library(), relu=True)(x)
    assert found.isnan().any()


@pytest.mark.parametrize("wrong", ["x", "kernels", "bias", "shortcut", "float64"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    ours = inference.Winograd(convolution(32, 64), inference.library(), relu=True)
    given = {"x": tensor("x", 2, 32, 5, 6), "kernels": ours.kernels.data, "bias": ours.bias.data, "shortcut": tensor("s", 2, 64, 5, 6)}
    changed = given["x"].double() if wrong == "float64" else given[wrong][:, :16] if given[wrong].ndim == 4 else given[wrong][:32]
    given["x" if wrong == "float64" else wrong] = changed
    with pytest.raises(RuntimeError):
        torch.ops.triptych.winograd(*given.values(), True)


def test_the_operator_keeps_pytorchs_rules() -> None:
    ours = inference.Winograd(convolution(32, 64), inference.library(), relu=True)
    for shortcut in (None, tensor("shortcut", 2, 64, 5, 6)):
        given = (tensor("x", 2, 32, 5, 6), ours.kernels.data, ours.bias.data, shortcut, True)
        assert set(torch.library.opcheck(torch.ops.triptych.winograd, given).values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "convolutions"), [("resnet50", ["conv2"]), ("resnet20", ["conv1", "conv2"])])
def test_it_takes_the_place_of_wide_convolutions_of_stride_1_and_of_what_alone_follows(name: str, convolutions: list[str]) -> None:
    native = folded(wide(name))
    before = {key: type(module) for key, module in native.named_modules()}
    x = tensor("images", 4, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        made, expected = inference.with_winograd(native, (x,)), copy.deepcopy(native).double()(x.double())
        assert scaled_error(made(x).numpy(), expected.numpy()) <= LOGITS_FLOAT32
    found = {
        node.target: len(node.args) for node in made.graph.nodes if isinstance(getattr(made, str(node.target), None), inference.Winograd)
    }
    first = ["layer2_0_conv2"] if name == "resnet20" else []  # the others of this block have stride 2
    # In a basic block the second convolution takes the shortcut, too.
    assert found == {
        key: 1 + (name == "resnet20" and key.endswith("conv2")) for key in [*first, *(f"layer2_1_{each}" for each in convolutions)]
    }
    assert all(getattr(made, key).relu for key in found)
    assert {key: type(module) for key, module in native.named_modules()} == before


class Branches(torch.nn.Module):
    """What may follow a convolution besides the block of a residual network."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.convolution, self.relu, self.kind = convolution(32, 32), torch.nn.ReLU(), kind

    def forward(self, x: Any) -> Any:
        y = self.convolution(x)
        match self.kind:
            case "seen by two":
                return self.relu(y) + y
            case "added to itself":
                return self.relu(y + y)
            case "a number":
                return self.relu(y + 1.0)
            case "broadcast":
                return self.relu(y + x.mean((2, 3), keepdim=True))
            case "sum seen by two":
                return self.relu(y + x) * (y + x)
            case "called twice":
                return self.relu(self.convolution(self.relu(y))) + self.convolution(x)
        raise ValueError(self.kind)


@pytest.mark.parametrize("kind", ["seen by two", "added to itself", "a number", "broadcast", "sum seen by two", "called twice"])
def test_what_does_not_follow_alone_stays(kind: str) -> None:
    native, x = Branches(kind), tensor("x", 2, 32, 9, 6)
    with torch.no_grad():
        made, expected = inference.with_winograd(native, (x,)), copy.deepcopy(native).double()(x.double())
        found = made(x)
    assert any(isinstance(module, inference.Winograd) for module in made.modules())
    assert scaled_error(found.numpy(), expected.numpy()) <= LOGITS_FLOAT32


@pytest.mark.parametrize("change", ["stride", "groups", "dilation", "padding", "no bias", "few channels", "float64"])
def test_it_takes_no_other_convolution(change: str) -> None:
    numbers = {"stride": 2, "groups": 2, "dilation": 2, "padding": 0}
    options: dict[str, Any] = {change: numbers[change]} if change in numbers else {"bias": change != "no bias"}
    channels = 48 if change == "few channels" else 64
    made = torch.nn.Conv2d(channels, 64, 3, **{"padding": 1} | options)
    assert not inference.takes_winograd(made.double() if change == "float64" else made)
    assert inference.takes_winograd(torch.nn.Conv2d(64, 64, 3, padding=1))


@pytest.mark.parametrize("lane", ["tuned", "tuned_compiled"])
@pytest.mark.parametrize("compiler", [True, False])
def test_the_lanes_say_whether_they_have_it_and_give_the_models_logits(monkeypatch: Any, lane: str, compiler: bool) -> None:
    if not compiler:
        monkeypatch.setattr(inference, "has_compiler", lambda: False)
    spec, room = wide("resnet50"), contract.load("pytorch")
    weights = initialize.parity_weights(spec, 0, "float32")
    images = philox.normal("images", (8, *spec.input_shape)).astype(np.float32)
    expected = room.create_model(spec, weights, precision="float64", device="cpu").predict(images.astype(np.float64))
    torch.set_num_threads(1)  # this thread alone: the profiler sees no other
    contender = room.contender(spec, weights, lane, "inference")
    assert (LEVER in contender.levers) == compiler
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for count in (8, 4):
            found = contender.run(contender.stage(images[:count], np.zeros(count, np.int64)))
            assert scaled_error(found, expected[:count]) <= LOGITS_FLOAT32
    assert ("triptych::winograd" in {event.key for event in profile.key_averages()}) == compiler
