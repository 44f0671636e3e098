"""The canonical checkpoint: one directory that every framework writes and reads, and that torchvision and timm load unchanged.

`model.safetensors` holds torchvision's names in PyTorch's layouts; `config.json` says what the model is; `manifest.json` vouches
for every byte. Training adds `optimizer.safetensors`, `ema.safetensors` and `trainer.json`. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import triptych
from triptych.core import catalog, storage, tensor_file
from triptych.core.architecture import ImageArchitecture
from triptych.core.contract import PRECISIONS, TrainingState, check_precision
from triptych.core.errors import InputRefused
from triptych.core.spec import ImageSpec, ResNetSpec, Spec, TensorSpec, ViTSpec, from_dict, to_dict

SCHEMA_VERSION = 1
MODEL, CONFIG, OPTIMIZER, EMA, TRAINER = "model.safetensors", "config.json", "optimizer.safetensors", "ema.safetensors", "trainer.json"
FILES = frozenset({MODEL, CONFIG, OPTIMIZER, EMA, TRAINER, storage.MANIFEST})

Weights = dict[str, np.ndarray]
Tensors = Mapping[str, "np.ndarray | tensor_file.Widened"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint. `config` is the whole of config.json; `training` and `trainer` are there when a run saved them."""

    spec: Spec
    weights: Weights
    precision: str
    labels: tuple[str, ...] | None
    provenance: dict[str, Any]
    config: dict[str, Any] = field(repr=False)
    training: TrainingState | None = field(default=None, repr=False)
    trainer: dict[str, Any] | None = field(default=None, repr=False)


def save(
    directory: str | os.PathLike[str],
    spec: Spec,
    weights: Mapping[str, np.ndarray],
    *,
    provenance: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
    training: TrainingState | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint, bit-exact, atomically and durably; the same content gives the same bytes. Returns the directory.

    `training` adds optimizer slots, EMA and step; `trainer` what the run wants back (epoch, recipe, versions, ...), as plain data.
    Raises InputRefused when the weights are not those of `spec`, StorageError when the directory exists or cannot be written.
    """
    validate(spec, weights, MODEL)
    if labels is not None and len(labels) != spec.num_classes:
        raise InputRefused(f"{len(labels)} labels for {spec.num_classes} classes of {spec.name}; give one label a class")
    files = {MODEL: tensor_file.encode(_in_order(spec, weights)), CONFIG: storage.json_bytes(_config(spec, labels, provenance))}
    if training is not None:
        files |= _training_files(spec, training, trainer or {})
    with storage.new_directory(directory, overwrite=overwrite, replaceable=FILES) as partial:
        storage.write_with_manifest(partial, files)
    return Path(directory)


def load(directory: str | os.PathLike[str], *, precision: str | None = None) -> Checkpoint:
    """Read a checkpoint, every file of its manifest verified, the weights held to its own spec.

    `precision` converts the weights (not the training state); None keeps them bit for bit. Raises InputRefused naming the file,
    and for tensors every key that is missing, unexpected, mis-shaped or of a wrong dtype.
    """
    root = Path(directory)
    if not os.path.isdir(root):
        raise InputRefused(f"{root}: no such checkpoint directory; give the directory that holds {MODEL} and {CONFIG}")
    files = storage.verified_files(root)
    for name in (MODEL, CONFIG):
        if name not in files:
            raise InputRefused(f"{root / storage.MANIFEST} does not list {name}; {root} is not a complete checkpoint")
    config = storage.parse_json(files[CONFIG], root / CONFIG)
    spec = _spec(config, root / CONFIG)
    weights = _checked_weights(spec, files[MODEL], root / MODEL)
    training, trainer = _training_state(spec, weights, files, root)
    labels, provenance = _described(config, spec, root / CONFIG)
    converted = _converted(weights, precision)
    return Checkpoint(spec, converted, precision or precision_of(weights), labels, provenance, config, training, trainer)


def load_weights(path: str | os.PathLike[str], spec: Spec, *, precision: str | None = None) -> Weights:
    """The weights for `spec` from a checkpoint directory (verified) or a bare .safetensors file (nothing vouches for its bytes).

    Number of classes, channels and image size may differ from the checkpoint's config as long as every tensor fits; anything
    else that the config says differently (BatchNorm's epsilon, strides) is refused, because the tensors would compute something else.
    """
    path = directory_of(path)
    if os.path.isfile(path):
        return _converted(_checked_weights(spec, storage.read_regular(path), path), precision)
    checkpoint = load(path)
    validate(spec, checkpoint.weights, f"{path / MODEL} (a {checkpoint.spec.name})")
    _check_same_model(spec, checkpoint.spec, path / CONFIG)
    return _converted(checkpoint.weights, precision)


def directory_of(path: str | os.PathLike[str]) -> Path:
    """The checkpoint directory when `path` is the model file in it; any other path as it is."""
    path = Path(path)
    return path.parent if path.name == MODEL and os.path.exists(path.parent / storage.MANIFEST) else path


def save_training_state(
    directory: str | os.PathLike[str], spec: Spec, state: TrainingState, *, trainer: Mapping[str, Any] | None = None, **options: Any
) -> Path:
    """`save` with everything a run needs to resume: the weights of `state`, its slots, EMA and step. Options as in `save`."""
    return save(directory, spec, state.weights, training=state, trainer=trainer, **options)


def load_training_state(directory: str | os.PathLike[str]) -> tuple[TrainingState, dict[str, Any]]:
    """The training state and trainer data of a checkpoint, bit for bit; InputRefused when it holds weights only."""
    checkpoint = load(directory)
    if checkpoint.training is None:
        raise InputRefused(f"{directory} holds weights only; resuming needs {TRAINER} and {OPTIMIZER}, which a training run saves")
    return checkpoint.training, checkpoint.trainer or {}


# What the tensors must be


def validate(spec: Spec, weights: Tensors, source_name: object, *, origin: Mapping[str, str] | None = None) -> None:
    """InputRefused listing every missing, unexpected, mis-shaped and wrong-dtype tensor, and naming `source_name`.

    Floating-point tensors must share one dtype, float32 or float64; counters are int64. `origin` maps canonical names to the
    names the source used, for the message.
    """
    found = problems(spec.tensors(), weights, origin or {})
    if found:
        raise InputRefused(f"{source_name} does not hold the weights of {spec.name}; {len(found)} problem(s):\n  " + "\n  ".join(found))


def problems(expected: Sequence[TensorSpec], weights: Tensors, origin: Mapping[str, str]) -> list[str]:
    """One line for every tensor that is not as `expected`: missing, unexpected, mis-shaped, wrong dtype, in this order."""
    specs = {tensor.name: tensor for tensor in expected}
    present = {name: weights[name] for name in specs if name in weights}
    floats = _float_dtypes(value for name, value in present.items() if specs[name].kind != "batch_counter")
    lines = [f"missing: {name} {tensor.shape}" for name, tensor in specs.items() if name not in weights]
    lines += [f"unexpected: {_origin(name, origin)} {_array(weights[name]).shape}" for name in weights if name not in specs]
    for name, value in present.items():
        if _array(value).shape != specs[name].shape:
            lines.append(f"wrong shape: {_origin(name, origin)} is {_array(value).shape}, expected {specs[name].shape}")
    for name, value in present.items():
        allowed = ("int64",) if specs[name].kind == "batch_counter" else floats
        if _dtype_name(value) not in allowed:
            lines.append(f"wrong dtype: {_origin(name, origin)} is {_dtype_name(value)}, expected {' or '.join(allowed)}")
    return lines


def _float_dtypes(values: Iterable[np.ndarray | tensor_file.Widened]) -> tuple[str, ...]:
    """The dtypes allowed for floating-point tensors: the first float32 or float64 one decides for all."""
    first = next((dtype for dtype in map(_dtype_name, values) if dtype in PRECISIONS), None)
    return (first,) if first else PRECISIONS


def precision_of(weights: Mapping[str, np.ndarray]) -> str:
    """`float32` or `float64`: the dtype of a validated state's floating-point tensors."""
    return next(array.dtype.name for array in weights.values() if array.dtype.kind == "f")


def _array(value: np.ndarray | tensor_file.Widened) -> np.ndarray:
    return value.array if isinstance(value, tensor_file.Widened) else value


def _dtype_name(value: np.ndarray | tensor_file.Widened) -> str:
    if isinstance(value, tensor_file.Widened):
        return value.dtype
    return value.dtype.name if value.dtype.isnative else f"byte-swapped {value.dtype.name}"


def _origin(name: str, origin: Mapping[str, str]) -> str:
    source = origin.get(name, name)
    return name if source == name else f"{source} (as {name})"


def _in_order(spec: Spec, weights: Mapping[str, np.ndarray]) -> Weights:
    return {tensor.name: weights[tensor.name] for tensor in spec.tensors()}


def _checked_weights(spec: Spec, data: bytes, source: Path) -> Weights:
    tensors = tensor_file.decode(data, source)
    validate(spec, tensors, source)
    return _in_order(spec, {name: _array(value) for name, value in tensors.items()})


def _converted(weights: Weights, precision: str | None) -> Weights:
    if precision is None:
        return weights
    check_precision(precision)
    return {name: array.astype(precision, copy=False) if array.dtype.kind == "f" else array for name, array in weights.items()}


# config.json


def _config(spec: Spec, labels: Sequence[str] | None, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "architecture": spec.name,
        "num_classes": spec.num_classes,
        "spec": to_dict(spec),
        "preprocessing": dataclasses.asdict(spec.preprocessing) if spec.preprocessing else None,
        "labels": list(labels) if labels is not None else None,
        "provenance": {"triptych": triptych.__version__, **(provenance or {})},
        **_timm_fields(spec, labels),
    }


def _timm_fields(spec: Spec, labels: Sequence[str] | None) -> dict[str, Any]:
    """What `timm.create_model('local-dir:DIR', pretrained=True)` reads; nothing for a model that timm does not have.

    Without `pretrained_cfg` timm stops at the unknown architecture instead of building something else.
    """
    if not isinstance(spec, ImageArchitecture) or not _in_timm(spec):
        return {}
    preprocessing = spec.preprocessing
    size = [spec.in_channels, spec.image_size, spec.image_size]
    pretrained_cfg = {
        "architecture": spec.name,
        "input_size": size,
        "fixed_input_size": isinstance(spec, ViTSpec),
        "interpolation": "bilinear",
        "crop_pct": _crop_pct(preprocessing.crop, preprocessing.resize_short_side or preprocessing.crop),
        "crop_mode": "center",
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
        "num_classes": spec.num_classes,
        **({"pool_size": [spec.layer("avgpool").kernel] * 2} if isinstance(spec, ResNetSpec) else {}),
        "first_conv": spec.layers()[0].name,
        "classifier": spec.head,
        **({"label_names": list(labels)} if labels is not None else {}),
    }
    size_args = {"img_size": spec.image_size} if isinstance(spec, ViTSpec) else {}
    return {"pretrained_cfg": pretrained_cfg, "model_args": {"in_chans": spec.in_channels, **size_args}}


def _in_timm(spec: ImageSpec) -> bool:
    """Whether timm's model of the same name computes the same: our ImageNet ResNets and ViTs, whatever their options."""
    if spec.name not in (*catalog.IMAGENET_SIZES, *catalog.VIT_SIZES):
        return False
    ours = catalog.get_spec(spec.name, num_classes=spec.num_classes, in_channels=spec.in_channels, image_size=spec.image_size)
    return spec == dataclasses.replace(catalog.fed_by_images(ours), preprocessing=spec.preprocessing)


def _crop_pct(crop: int, resized: int) -> float:
    """timm resizes to floor(crop / crop_pct): the plain ratio, moved by half a pixel where rounding would miss `resized`."""
    ratio = crop / resized
    return ratio if math.floor(crop / ratio) == resized else crop / (resized + 0.5)


def _spec(config: Mapping[str, Any], source: Path) -> Spec:
    version = config.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputRefused(f"{source}: unknown schema_version {version!r}; this version of triptych reads {SCHEMA_VERSION}")
    data = config.get("spec")
    try:
        if not isinstance(data, dict):
            raise ValueError("'spec' is missing or not an object")
        _check_plain("spec", data)
        spec = from_dict(data)
        spec.tensors()
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputRefused(f"{source}: malformed spec ({error})") from None
    return spec


def _described(config: Mapping[str, Any], spec: Spec, source: Path) -> tuple[tuple[str, ...] | None, dict[str, Any]]:
    labels, provenance = config.get("labels"), config.get("provenance")
    strings = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if labels is not None and not (strings and len(labels) == spec.num_classes):
        raise InputRefused(f"{source}: 'labels' must be null or a list of {spec.num_classes} strings, one a class")
    if not isinstance(provenance, dict):
        raise InputRefused(f"{source}: 'provenance' is missing or not an object")
    return (tuple(labels) if labels is not None else None), provenance


_LARGEST = 2**24
_FRACTIONS = frozenset({"epsilon", "layer_norm_epsilon", "momentum", "dropout", "mean", "std"})


def _check_plain(key: str, value: Any) -> None:
    """ValueError for a number no spec holds: a damaged or hostile config must not ask for a billion layers."""
    if isinstance(value, (dict, list)):
        if key == "stages" and len(value) > 64:
            raise ValueError(f"{len(value)} stages, at most 64 are allowed")
        for name, item in value.items() if isinstance(value, dict) else ((key, item) for item in value):
            _check_plain(name, item)
    elif isinstance(value, bool) or (isinstance(value, float) and key not in _FRACTIONS):
        raise ValueError(f"{key}={value!r} must be an integer")
    elif isinstance(value, int) and not 0 <= value <= (1024 if key in ("blocks", "depth") else _LARGEST):
        raise ValueError(f"{key}={value!r} is out of range")


def _check_same_model(wanted: Spec, found: Spec, source: Path) -> None:
    free = ("name", "num_classes", "in_channels", "image_size", "preprocessing", "dropout")
    different = [
        f"{item.name}: {getattr(found, item.name)}, wanted {getattr(wanted, item.name)}"
        for item in dataclasses.fields(wanted)
        if item.name not in free and getattr(found, item.name, None) != getattr(wanted, item.name)
    ]
    if different:
        raise InputRefused(f"{source} describes a different model than {wanted.name}: " + "; ".join(different))


# Training


def _training_files(spec: Spec, state: TrainingState, trainer: Mapping[str, Any]) -> dict[str, bytes]:
    slots = {f"{slot}.{name}": array for slot, arrays in state.slots.items() for name, array in arrays.items()}
    _validate_slots(spec, slots, list(state.slots), OPTIMIZER)
    described = {**trainer, "schema_version": SCHEMA_VERSION, "step": state.step, "slots": list(state.slots)}
    if state.loss_scale is not None:
        described |= {"loss_scale": state.loss_scale, "good_steps": state.good_steps}
    files = {OPTIMIZER: tensor_file.encode(slots), TRAINER: storage.json_bytes(described)}
    if state.ema:
        validate(spec, state.ema, EMA)
        files[EMA] = tensor_file.encode(_in_order(spec, state.ema))
    return files


def _training_state(
    spec: Spec, weights: Weights, files: Mapping[str, bytes], root: Path
) -> tuple[TrainingState | None, dict[str, Any] | None]:
    if TRAINER not in files:
        return None, None
    trainer = storage.parse_json(files[TRAINER], root / TRAINER)
    step, slots = trainer.get("step"), trainer.get("slots")
    if trainer.get("schema_version") != SCHEMA_VERSION or not isinstance(step, int) or not isinstance(slots, list):
        raise InputRefused(f"{root / TRAINER}: not a trainer file of schema_version {SCHEMA_VERSION} with 'step' and 'slots'")
    if OPTIMIZER not in files:
        raise InputRefused(f"{root / storage.MANIFEST} lists {TRAINER} but not {OPTIMIZER}; the training state is incomplete")
    tensors = tensor_file.decode(files[OPTIMIZER], root / OPTIMIZER)
    slots = [str(slot) for slot in slots]
    _validate_slots(spec, tensors, slots, root / OPTIMIZER)
    by_slot = {slot: {tensor.name: _array(tensors[f"{slot}.{tensor.name}"]) for tensor in spec.parameters()} for slot in slots}
    ema = _checked_weights(spec, files[EMA], root / EMA) if EMA in files else {}
    return TrainingState(weights, by_slot, ema, step, trainer.get("loss_scale"), trainer.get("good_steps", 0)), trainer


def _validate_slots(spec: Spec, tensors: Tensors, slots: Sequence[str], source: object) -> None:
    expected = [dataclasses.replace(tensor, name=f"{slot}.{tensor.name}") for slot in slots for tensor in spec.parameters()]
    found = problems(expected, tensors, {})
    if found:
        raise InputRefused(f"{source} does not hold the optimizer state of {spec.name}; {len(found)} problem(s):\n  " + "\n  ".join(found))
