"""What is compared: one part, workload, task and batch size, and how large it is. No framework is imported here.

Every framework's module (`in_jax`, `in_pytorch`, `in_tensorflow`) gives the lanes of a setting: the same computation in every mode of the
framework (eager, compiled, ...) and, where the part is about that, in several ways (a loop, `vmap`, a batch).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from triptych.core import catalog, initialize
from triptych.core.spec import ViTSpec

MODEL, BLOCK = "vit_tiny_patch16_224", "blocks.0"
MODES = {"jax": ("eager", "jit"), "pytorch": ("eager", "compiled"), "tensorflow": ("eager", "function", "xla")}
WAYS = {"vmap": ("loop", "vmap", "batched"), "per_sample": ("loop", "vmap", "batched"), "gradients": ("autodiff", "own")}
"""`batched`, of per-sample gradients, is the one gradient of the mean, which a batch gives for free: the price to compare with."""
VMAP_MATH = "vmap_math"
"""PyTorch's fused attention has no batching rule on the CPU, and `vmap` runs it once an example: this way avoids it, by plain products."""
LAYERS = {"layer_norm": "norm1", "linear": "attn.qkv", "attention": "attn.sdpa", "gelu": "mlp.act"}
TASKS = {
    "passes": ("forward", "gradient", "step"),
    "vmap": ("forward",),
    "per_sample": ("gradient",),
    "layers": tuple(LAYERS),
    "gradients": ("gelu", "attention"),
}
WORKLOADS = ("block", "vit")

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Setting:
    """One group of lanes that take turns. `block` is one transformer block of `vit`, the whole ViT-Tiny; `tiny` shrinks both, for tests."""

    part: str
    workload: str
    task: str
    batch_size: int
    tiny: bool = False

    @property
    def key(self) -> str:
        """For instance `passes/block/forward/8`."""
        return f"{self.part}/{self.workload}/{self.task}/{self.batch_size}"

    @property
    def spec(self) -> ViTSpec:
        """The network; the block is the only one of a network of depth 1."""
        spec = catalog.get_spec(MODEL)
        spec = catalog.tiny(spec) if self.tiny else spec
        assert isinstance(spec, ViTSpec)
        return spec if self.workload == "vit" else dataclasses.replace(spec, name=f"{spec.name}_block", depth=1)

    def weights(self, precision: str) -> Arrays:
        """Canonical parity weights: the same float64 numbers, rounded to the precision of the run."""
        weights = initialize.parity_weights(self.spec, 0, "float64")
        return {name: array.astype(precision) for name, array in weights.items()}

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 (N, tokens, width) and targets of that shape; images (N, H, W, C) and (N,) classes for a whole network.

        Of a layer, or a gradient of our own, the targets are cotangents in the shape of its output.
        """
        spec, numbers, n = self.spec, np.random.default_rng(0), self.batch_size
        if self.part in ("layers", "gradients"):
            wide = {"linear": (spec.width, 3 * spec.width), "attention": (3 * spec.width, spec.width)}
            ins, outs = wide.get(self.task, (spec.mlp_width if self.task == "gelu" else spec.width,) * 2)
            return numbers.normal(size=(n, spec.tokens, ins)), numbers.normal(size=(n, spec.tokens, outs))
        if self.workload == "vit":
            return numbers.normal(size=(n, *spec.input_shape)), numbers.integers(spec.num_classes, size=n)
        return numbers.normal(size=(n, spec.tokens, spec.width)), numbers.normal(size=(n, spec.tokens, spec.width))

    def lane_names(self, framework: str, modes: tuple[str, ...]) -> list[str]:
        """The lanes of a framework with these modes: `jit`, or `jit vmap` where there are several ways."""
        ways = WAYS.get(self.part, ("",))
        if framework == "pytorch" and "vmap" in ways:
            ways = (*ways, VMAP_MATH)
        return [f"{mode} {way}".strip() for mode in modes for way in ways]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `Setting(**data)` is its inverse."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Lane:
    """One lane of a setting. `run`, timed, returns native outputs when all of them are there; `read` makes canonical arrays of them."""

    run: Callable[[], Any]
    read: Callable[[Any], Arrays]


class Frame(Protocol):
    """What the module of a framework gives."""

    def running(self, precision: str) -> Any:
        """A context in which lanes are made and run."""
        ...

    def lane(self, setting: Setting, weights: Mapping[str, np.ndarray], precision: str, mode: str, way: str) -> Lane:
        """One lane, which compiles at its first run if at all."""
        ...

    def report(self, setting: Setting, weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """By mode: what the compiler made of a float32 forward or gradient pass, and what an eager one dispatches."""
        ...

    def release(self) -> None:
        """Forget what was compiled."""
        ...


def frame(framework: str) -> Frame:
    """The module of a framework, imported in an order that is safe."""
    from triptych.core import contract

    contract.load(framework)
    made: Frame = importlib.import_module(f"comparison.in_{framework}")
    return made
