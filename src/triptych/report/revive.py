"""Frozen dataclasses from plain data: what JSON held becomes what a field declares, or is refused by its name. Standard library only."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, TypeVar

from triptych.core.errors import InputRefused

T = TypeVar("T")


def build(cls: type[T], data: dict[str, Any]) -> T:
    """A frozen dataclass from plain data, nested ones included.

    Unknown keys are ignored (a newer writer may add some); a missing one without a default, or a value of another type than the field
    declares, is an InputRefused that names it.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    absent = [name for name in required if name not in data]
    if absent:
        raise InputRefused(f"{cls.__name__} lacks {', '.join(absent)}; it has {', '.join(map(str, data)) or 'nothing'}")
    return cls(**{f.name: _revive(hints[f.name], data[f.name], f"{cls.__name__}.{f.name}") for f in fields if f.name in data})


# What JSON may hold where a field declares a type; JSON writes 1.0 as 1.
_HELD: dict[Any, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,), bool: (bool,), tuple: (list, tuple), dict: (dict,)}


def _revive(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type that the field called `name` declares: dicts become dataclasses, lists become tuples."""
    if isinstance(hint, types.UnionType):
        options = typing.get_args(hint)
        fitting = [option for option in options if _fits(option, value)]
        return _revive((fitting or options)[0], value, name)
    if hint is typing.Any or hint is types.NoneType:
        return value
    if not _fits(hint, value):
        raise InputRefused(f"{name} is {value!r}, where {getattr(hint, '__name__', hint)} belongs")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value)
    if typing.get_origin(hint) is tuple:
        return tuple(_revive(typing.get_args(hint)[0], item, name) for item in value)
    if typing.get_origin(hint) is dict:
        return {key: _revive(typing.get_args(hint)[1], item, name) for key, item in value.items()}
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of the kind that a hint declares; what it holds is not looked at."""
    if hint is types.NoneType:
        return value is None
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return isinstance(value, (hint, dict))
    kind = typing.get_origin(hint) or hint
    return isinstance(value, _HELD[kind]) and (kind is bool or not isinstance(value, bool))
