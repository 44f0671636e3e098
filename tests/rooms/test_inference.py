"""What makes inference faster in a room computes what the plain way does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from triptych.core import catalog, contract, initialize, philox
from triptych.core.batch import Named
from triptych.core.contender import LANES
from triptych.core.difference import scaled_error
from triptych.core.folding import fold
from triptych.core.threads import shared_out
from triptych.core.tolerance import LOGITS_FLOAT32
from triptych.core.winograd import transformed

pytest.importorskip("jax")
CHUNKS = [(8, 1, {1}), (8, 5, {4}), (7, 2, {2, 1}), (7, 3, {3, 1}), (4, 9, {4}), (0, 3, {0})]


@pytest.mark.parametrize("size", [(1, 1), (7, 7), (8, 5), (2, 9)], ids=str)
def test_winograds_algorithm_is_the_convolution(size: tuple[int, int]) -> None:
    contract.load("jax")
    import jax
    from jax import lax

    from triptych.in_jax.inference import winograd

    x, kernel = philox.normal("x", (3, *size, 5)), philox.normal("kernel", (4, 5, 3, 3))
    with jax.enable_x64(True):
        expected = lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "OIHW", "NHWC"))
        found = winograd(x, transformed(kernel))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(8, 1, {1}), (8, 5, {4}), (7, 2, {2, 1}), (7, 3, {3, 1}), (4, 9, {4}), (0, 3, {0})], ids=str
)
def test_chunks_cover_everything_once_in_order(count: int, most: int, sizes: set[int]) -> None:
    contract.load("jax")
    import jax.numpy as jnp

    from triptych.in_jax.inference import by_chunks

    seen: set[int] = set()

    def run(chunk: Any) -> Any:
        seen.add(len(chunk))
        return 2 * chunk

    x = jnp.arange(float(3 * count)).reshape(count, 3)
    np.testing.assert_array_equal(by_chunks(run, x, most), 2 * x)
    assert seen == sizes


def test_a_stage_takes_as_many_images_as_stay_in_the_caches() -> None:
    contract.load("jax")
    from triptych.in_jax.inference import CACHED, largest_activations

    spec = catalog.get_spec("resnet50")
    largest = largest_activations(spec)  # type: ignore[arg-type]
    assert list(largest) == ["stem", "layer1", "layer2", "layer3", "layer4", "head"]
    assert largest["stem"] == 4 * 64 * 112**2
    assert [CACHED // largest[f"layer{stage}"] for stage in range(1, 5)] == [1, 2, 5, 10]


def test_a_batch_is_shared_out_in_order_and_one_sample_is_not_shared() -> None:
    x, main = np.arange(14.0).reshape(7, 2), threading.get_ident()
    seen: list[tuple[int, bool]] = []

    def run(named: Named) -> np.ndarray:
        seen.append((len(named["x"]), threading.get_ident() == main))
        return named["y"] - named["x"]

    shared = shared_out(run, run, 3)
    np.testing.assert_array_equal(shared({"x": x, "y": 3 * x}), 2 * x)
    assert sorted(seen) == [(2, False), (2, False), (3, False)]
    np.testing.assert_array_equal(shared({"x": x[:1], "y": x[:1]}), 0 * x[:1])
    assert seen[3:] == [(1, True)]
    with pytest.raises(ZeroDivisionError):
        shared_out(lambda named: named["x"] / (1 // 0), run, 2)({"x": x})


@pytest.mark.parametrize("framework", contract.installed())
def test_a_program_takes_every_batch_size_and_goes_back_to_an_earlier_one(framework: str) -> None:
    whole = catalog.tiny(catalog.get_spec("resnet50"))
    room, weights = contract.load(framework), initialize.parity_weights(whole, 0, "float32")
    run = room.contender(whole, weights, "tuned", "inference").run
    images = philox.normal("images", (5, *whole.input_shape)).astype(np.float32)
    expected = room.create_model(whole, weights, precision="float64", device="cpu").predict(images.astype(np.float64))
    for count in (5, 2, 5):
        assert scaled_error(run((images[:count], np.zeros(count, np.int64))), expected[:count]) <= LOGITS_FLOAT32


def test_pytorchs_program_is_one_of_onednn_graph_and_leaves_the_switch_alone() -> None:
    pytest.importorskip("torch")
    contract.load("pytorch")
    import torch

    from triptych.in_pytorch import create_model
    from triptych.in_pytorch.inference import Programs, by_onednn_graph

    whole = catalog.tiny(catalog.get_spec("resnet50"))
    folded, weights = fold(whole, initialize.parity_weights(whole, 0, "float32"))
    native = create_model(folded, weights, precision="float32", device="cpu").native.to(memory_format=torch.channels_last)
    graph = Programs(native, by_onednn_graph)
    x = torch.zeros(2, 3, *whole.input_shape[:2]).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        graph(x)
        (program,) = graph.made.values()
        program(x)
        ran = str(torch.jit.last_executed_optimized_graph())
    assert "oneDNNFusionGroup" in ran
    assert "aten::conv2d" not in ran.partition("oneDNNFusionGroup")[0]
    assert not torch.jit.onednn_fusion_enabled()


def test_pytorchs_compiled_program_has_its_weights_as_constants_packed_for_onednn() -> None:
    pytest.importorskip("torch")
    contract.load("pytorch")
    import torch

    from triptych.in_pytorch import create_model
    from triptych.in_pytorch.inference import Programs, by_inductor

    whole = catalog.tiny(catalog.get_spec("resnet20"))
    folded, weights = fold(whole, initialize.parity_weights(whole, 0, "float32"))
    native = create_model(folded, weights, precision="float32", device="cpu").native.to(memory_format=torch.channels_last)
    program, x = Programs(native, by_inductor), torch.ones(2, 3, *whole.input_shape[:2]).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = native(x)
        program(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            found = program(x)
    assert scaled_error(found.numpy(), expected.numpy()) <= LOGITS_FLOAT32
    ran = {event.key for event in profile.key_averages()}
    assert "mkldnn::_convolution_pointwise" in ran
    assert "aten::convolution" not in ran, "inductor was not told that the weights are constants"


def test_threads_leave_the_precision_of_products_as_it_was() -> None:
    pytest.importorskip("torch")
    room = contract.load("pytorch")
    import torch

    whole = catalog.tiny(catalog.get_spec("resnet20"))
    run = room.contender(whole, initialize.parity_weights(whole, 0, "float32"), "tuned", "inference").run
    images = philox.normal("images", (8, *whole.input_shape)).astype(np.float32)
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for _ in range(50):
        run((images, np.zeros(8, np.int64)))
        assert [switch.fp32_precision for switch in switches] == before


def test_one_thread_is_set_for_this_thread_alone() -> None:
    pytest.importorskip("torch")
    contract.load("pytorch")
    import torch

    from triptych.in_pytorch.inference import one_thread

    def inside() -> int:
        with one_thread():
            return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(inside).result() == 1
            assert pool.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_tuned_lane_says_what_it_does() -> None:
    room = contract.load("jax")
    whole = catalog.tiny(catalog.get_spec("resnet20"))
    levers = room.contender(whole, initialize.parity_weights(whole, 0, "float32"), "tuned", "inference").levers
    assert LANES["tuned"].tuned
    assert "3x3 convolutions by Winograd's algorithm" in levers
