"""Foreign state dicts (torchvision, timm, transformers, CIFAR repositories, training checkpoints) -> canonical weights.

Three steps, each a table: find the weights among what a training script saved; translate the names; read the options off the
shapes. Then the strict check of `checkpoint.validate`: every key left over, missing or mis-shaped is an error that lists it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from triptych.core import catalog, checkpoint
from triptych.core.errors import InputRefused
from triptych.core.spec import MLPSpec, Spec, TransformerBlockSpec, ViTSpec
from triptych.core.tensor_file import Widened

# Where training scripts keep the weights, the first that holds tensors wins; EMA copies only on request or when alone.
_CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_EMA_CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_DEEPEST = 4
# Wrappers that leave a component in every name: DataParallel and DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Attributes under which people keep the network; stripped only at the front.
_PREFIXES = ("model.", "net.", "network.", "backbone.", "resnet.")
# Bookkeeping of wrappers around a model, no part of it: torch.optim.swa_utils.AveragedModel.
_BOOKKEEPING = frozenset({"n_averaged"})
# Names of the classifier in other code; "fc.1" and "classifier.1" stand behind a dropout or a flatten.
_HEADS = ("linear", "classifier", "head", "head.fc", "last_linear", "fc.0", "fc.1", "classifier.1")

_BLOCK = r"(layer\d+\.\d+)"
_HF_STAGE = r"encoder\.stages\.(\d+)\.layers\.(\d+)"
_RENAMES: tuple[tuple[re.Pattern[str], Any], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (rf"^{_BLOCK}\.shortcut\.", r"\1.downsample."),  # kuangliu/pytorch-cifar
        # transformers' ResNetForImageClassification
        (r"^embedder\.embedder\.convolution\.", "conv1."),
        (r"^embedder\.embedder\.normalization\.", "bn1."),
        (rf"^{_HF_STAGE}\.shortcut\.convolution\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.0."),
        (rf"^{_HF_STAGE}\.shortcut\.normalization\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.1."),
        (rf"^{_HF_STAGE}\.layer\.(\d+)\.convolution\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.conv{int(m[3]) + 1}."),
        (rf"^{_HF_STAGE}\.layer\.(\d+)\.normalization\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}.bn{int(m[3]) + 1}."),
    )
)

Tensor = np.ndarray | Widened


@dataclass(frozen=True, slots=True)
class Mapped:
    """One line of the report: the key in the source, the canonical key, and what was done on the way ("" for nothing)."""

    source: str
    canonical: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What mapped to what, and everything else a user should know: what was chosen, filled in, converted or left out."""

    rows: tuple[Mapped, ...]
    notes: tuple[str, ...]

    @property
    def renamed(self) -> tuple[Mapped, ...]:
        """The rows whose key changed by more than a wrapper's prefix."""
        return tuple(row for row in self.rows if row.note.startswith("renamed"))


@dataclass(frozen=True, slots=True)
class Imported:
    """Canonical weights of a spec whose options were read off the tensors, and the report."""

    spec: Spec
    weights: checkpoint.Weights
    report: Report


def to_canonical(state: Mapping[str, Any], spec_name: str, *, source: str = "the file", ema: bool = False, **options: Any) -> Imported:
    """The canonical weights of the catalogued model `spec_name` out of whatever `foreign_file.read` gave.

    Options (`num_classes`, `in_channels`, `image_size`, `hidden`) are inferred from the tensors where these decide them; one given here
    is held against the tensors. `ema` takes the averaged weights of a checkpoint that has both. Raises InputRefused listing all
    unmatched, missing and mis-shaped keys and naming `source`, UsageError for an unknown model or option.
    """
    base = catalog.get_spec(spec_name)
    notes: list[str] = []
    tensors = _tensors(_unwrapped(state, source, ema, notes), notes)
    names = {key: _canonical_name(key) for key in tensors}
    names = _head_renamed(names, base)
    if isinstance(base, MLPSpec):
        names = _linear_chain_renamed(names, tensors)
    origin = _inverted(names, source)
    found = {canonical: tensors[key] for canonical, key in origin.items()}
    inferred = _inferred_options(base, found, options)
    spec = catalog.get_spec(spec_name, **{**inferred, **options})
    filled = _fill_counters(spec, found)
    converted = _uniform(found)
    _check(spec, converted, source, origin)
    rows = [Mapped(key, canonical, _note(key, canonical, found[canonical], converted[canonical])) for canonical, key in origin.items()]
    notes += _summaries(rows, filled, inferred, spec)
    weights = {tensor.name: converted[tensor.name] for tensor in spec.tensors()}
    return Imported(spec, weights, Report(tuple(rows), tuple(notes)))


# Finding the weights


def _unwrapped(state: Any, source: str, ema: bool, notes: list[str]) -> Mapping[Any, Any]:
    path: list[str] = []
    while isinstance(state, Mapping) and len(path) < _DEEPEST and (key := _container(state, ema)):
        others = sorted(str(other) for other in state if other != key)
        if others:
            notes.append(f"took the weights under {key!r}, left out {', '.join(others)}")
        if not ema and any(_holds_tensors(state.get(other)) for other in _EMA_CONTAINERS if other != key):
            notes.append("the file also holds averaged (EMA) weights; ask for them with ema=True (--ema)")
        path.append(key)
        state = state[key]
    if ema and not set(path) & set(_EMA_CONTAINERS):
        raise InputRefused(f"{source} holds no averaged (EMA) weights under {', '.join(_EMA_CONTAINERS)}; leave ema (--ema) out")
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, list(state)[:20])) if isinstance(state, Mapping) else type(state).__name__
        raise InputRefused(f"{source} holds no state dict of tensors; found: {held or 'nothing'}. Save `model.state_dict()`")
    return state


def _container(state: Mapping[Any, Any], ema: bool) -> str | None:
    beside_tensors = any(isinstance(value, Tensor) for value in state.values())
    averaged = () if beside_tensors and not ema else _EMA_CONTAINERS  # tensors beside an EMA copy are the weights themselves
    order = (*averaged, *_CONTAINERS) if ema else (*_CONTAINERS, *averaged)
    return next((key for key in order if _holds_tensors(state.get(key))), None)


def _holds_tensors(value: Any, depth: int = _DEEPEST) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(item, Tensor) for item in value.values()) or any(
        _holds_tensors(value.get(key), depth - 1) for key in (*_CONTAINERS, *_EMA_CONTAINERS)
    )


def _tensors(state: Mapping[Any, Any], notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a state dict; bookkeeping of wrappers and values that are no tensors are left out and noted."""
    left_out = [str(key) for key, value in state.items() if not isinstance(value, Tensor) or key in _BOOKKEEPING]
    if left_out:
        notes.append(f"left out, no part of a model: {', '.join(left_out)}")
    return {str(key): value for key, value in state.items() if str(key) not in left_out}


# Translating the names


def _canonical_name(key: str) -> str:
    name = _stripped(key)
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _stripped(key: str) -> str:
    name = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _head_renamed(names: dict[str, str], spec: Spec) -> dict[str, str]:
    """The classifier under the spec's own name, unless the spec has none, or one of that name is there already."""
    if spec.head is None or f"{spec.head}.weight" in names.values():
        return names
    head = next((head for head in _HEADS if f"{head}.weight" in names.values()), None)
    swap = {f"{head}.{part}": f"{spec.head}.{part}" for part in ("weight", "bias")}
    return {key: swap.get(name, name) for key, name in names.items()}


def _linear_chain_renamed(names: dict[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A stack of linear layers of any names (`0, 2, 4`, `fc1, fc2, fc3`, `layers.0, out`), told from how their widths chain."""
    shapes = {name.removesuffix(".weight"): _shape(tensors[key]) for key, name in names.items() if name.endswith(".weight")}
    if any(len(shape) != 2 for shape in shapes.values()):
        return names
    for layers in _orders(list(shapes)):
        if all(shapes[a][0] == shapes[b][1] for a, b in itertools.pairwise(layers)):
            ours = {layer: f"fc{i}" for i, layer in enumerate(layers[:-1], start=1)} | dict.fromkeys(layers[-1:], "fc")
            return {key: _moved(name, ours) for key, name in names.items()}
    return names


def _orders(layers: list[str]) -> tuple[list[str], list[str]]:
    """Numbered layers in the order of their numbers, then the file's order; the other way round where numbers say little.

    A .pth file lists layers as the module declares them, a safetensors file does not.
    """
    numbered = sorted(layers, key=_natural)
    return (numbered, layers) if sum(not re.search(r"\d", layer) for layer in layers) <= 1 else (layers, numbered)


def _natural(name: str) -> tuple[bool, list[tuple[int, int, str]]]:
    """Sort key in which `fc10` follows `fc9`, and a name without a number (`fc`, `out`) comes last."""
    parts = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"\d+|\D+", name)]
    return not re.search(r"\d", name), parts


def _moved(name: str, layers: Mapping[str, str]) -> str:
    layer, _, part = name.rpartition(".")
    return f"{layers.get(layer, layer)}.{part}"


def _inverted(names: Mapping[str, str], source: str) -> dict[str, str]:
    """canonical name -> source key; InputRefused when two keys claim one name."""
    origin: dict[str, str] = {}
    clashes = []
    for key, name in names.items():
        if name in origin:
            clashes.append(f"{origin[name]} and {key} both map to {name}")
        origin[name] = key
    if clashes:
        raise InputRefused(f"{source}: " + "; ".join(clashes))
    return origin


# Reading options off the shapes


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return ()
    return tensor.array.shape if isinstance(tensor, Widened) else tensor.shape


def _inferred_options(base: Spec, found: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the tensors decide; only shapes are read, and nonsense is left for the check that lists it."""
    if isinstance(base, TransformerBlockSpec):
        return _block_options(found, given)
    inferred: dict[str, Any] = {}
    head = _shape(found.get(f"{base.head}.weight"))
    if len(head) == 2 and head[0] > 0:
        inferred["num_classes"] = head[0]
    if isinstance(base, MLPSpec):
        inferred |= _mlp_options(base, found, given)
    else:
        stem = _shape(found.get("patch_embed.proj.weight" if isinstance(base, ViTSpec) else "conv1.weight"))
        if len(stem) == 4 and stem[1] > 0:
            inferred["in_channels"] = stem[1]
    if isinstance(base, ViTSpec):
        positions = _shape(found.get("pos_embed"))
        side = math.isqrt(positions[1] - 1) if len(positions) == 3 and positions[1] > 1 else 0
        if side and side**2 + 1 == positions[1]:
            inferred["image_size"] = side * base.patch_size
    return {option: value for option, value in inferred.items() if option not in given}


def _block_options(found: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Both widths from the MLP; the number of heads leaves no trace in any shape."""
    shape = _shape(found.get("mlp.fc1.weight"))
    inferred = {"mlp_width": shape[0], "width": shape[1]} if len(shape) == 2 and all(shape) else {}
    return {option: value for option, value in inferred.items() if option not in given}


def _mlp_options(base: MLPSpec, found: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Widths from the layers; channels and size from the first layer's inputs, when one of grey or RGB makes a square image."""
    widths: list[int] = []
    while len(shape := _shape(found.get(f"fc{len(widths) + 1}.weight"))) == 2 and shape[0] > 0:
        widths.append(shape[0])
    options: dict[str, Any] = {"hidden": tuple(widths)} if widths else {}
    first = _shape(found.get("fc1.weight"))
    for channels in (given["in_channels"],) if "in_channels" in given else (base.in_channels, 3):
        size = math.isqrt(first[1] // channels) if len(first) == 2 else 0
        if size and channels * size * size == first[1]:
            return {**options, "in_channels": channels, "image_size": size}
    return options


# Counters, dtypes, check and report


def _fill_counters(spec: Spec, found: dict[str, Tensor]) -> int:
    """Zero for every absent num_batches_tracked (PyTorch before 0.4.1 had none); how many were filled."""
    absent = [tensor.name for tensor in spec.tensors() if tensor.kind == "batch_counter" and tensor.name not in found]
    found |= {name: np.zeros((), np.int64) for name in absent}
    return len(absent)


def _uniform(found: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Every floating-point tensor in one dtype that loses nothing: float64 if any is, else float32; whole-number counters int64."""
    arrays = {name: tensor.array if isinstance(tensor, Widened) else tensor for name, tensor in found.items()}
    wide = np.float64 if any(array.dtype == np.float64 and not _is_counter(name) for name, array in arrays.items()) else np.float32
    return {name: _counter(array) if _is_counter(name) else _float(array, wide) for name, array in arrays.items()}


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _counter(array: np.ndarray) -> np.ndarray:
    if array.size != 1 or array.dtype.kind not in "iuf" or not np.isfinite(array).all() or array.reshape(()) != np.floor(array.reshape(())):
        return array
    return array.reshape(()).astype(np.int64)


def _float(array: np.ndarray, dtype: type[np.floating[Any]]) -> np.ndarray:
    return array.astype(dtype) if array.dtype.kind == "f" else array


def _check(spec: Spec, weights: Mapping[str, np.ndarray], source: str, origin: Mapping[str, str]) -> None:
    try:
        checkpoint.validate(spec, weights, source, origin=origin)
    except InputRefused as error:
        fits = [name for name in catalog.CATALOG if name != spec.name and _fits(name, weights)]
        hint = f"\nThe tensors are those of {' or '.join(fits)}: try --model {fits[0]}" if fits else ""
        raise InputRefused(f"{error}{hint}") from None


def _fits(name: str, weights: Mapping[str, np.ndarray]) -> bool:
    base = catalog.get_spec(name)
    spec = catalog.get_spec(name, **_inferred_options(base, weights, {}))
    wanted = {tensor.name: tensor.shape for tensor in spec.tensors() if tensor.kind != "batch_counter"}
    return wanted == {key: array.shape for key, array in weights.items() if not _is_counter(key)}


def _note(key: str, canonical: str, before: Tensor, after: np.ndarray) -> str:
    notes = []
    if key != canonical:
        notes.append("prefix stripped" if _stripped(key) == canonical else "renamed")
    dtype = before.dtype if isinstance(before, Widened) else before.dtype.name
    if dtype != after.dtype.name:
        notes.append(f"{dtype} converted to {after.dtype.name}")
    return "; ".join(notes)


def _summaries(rows: list[Mapped], filled: int, inferred: Mapping[str, Any], spec: Spec) -> list[str]:
    notes = [f"inferred from the tensors: {', '.join(f'{option}={value}' for option, value in inferred.items())}"] if inferred else []
    stripped = sum(row.note.startswith("prefix stripped") for row in rows)
    if stripped:
        notes.append(f"{stripped} keys lost a wrapper's prefix")
    conversions = [note for row in rows for note in row.note.split("; ") if " converted to " in note]
    notes += [f"{conversions.count(conversion)} tensor(s): {conversion}" for conversion in sorted(set(conversions))]
    if filled:
        notes.append(f"{filled} absent num_batches_tracked counters filled with 0")
    if isinstance(spec, TransformerBlockSpec):
        notes.append(f"heads={spec.heads} and tokens={spec.tokens} are not visible in the tensors")
    elif not isinstance(spec, MLPSpec) and "image_size" not in inferred:
        notes.append(f"image_size={spec.image_size} is not visible in the tensors")
    return notes
