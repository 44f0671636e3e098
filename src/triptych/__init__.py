"""Triptych: one model, three frameworks, provably the same.

Importing this package imports nothing else: what is named here is loaded on first use, no framework before a model is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triptych.api import ZooModel, assert_equal, create_model
    from triptych.core.catalog import list_models

__version__ = "0.1.0"
__all__ = ["ZooModel", "__version__", "assert_equal", "create_model", "list_models"]

_HOMES = {
    "ZooModel": "triptych.api",
    "assert_equal": "triptych.api",
    "create_model": "triptych.api",
    "list_models": "triptych.core.catalog",
}


def __getattr__(name: str) -> Any:
    """The public names, loaded from their homes on first use: the command line starts in half the time without them."""
    if name not in _HOMES:
        raise AttributeError(f"module 'triptych' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
