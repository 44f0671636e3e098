"""Triptych: one model, three frameworks, provably the same.

Importing this package imports no framework and not even numpy; the functions do, when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triptych.core.catalog import list_models

if TYPE_CHECKING:
    from triptych.api import ZooModel, assert_equal, create_model

__version__ = "0.1.0"
__all__ = ["ZooModel", "__version__", "assert_equal", "create_model", "list_models"]


def __getattr__(name: str) -> Any:
    """`create_model`, `assert_equal` and `ZooModel`, loaded on first use."""
    if name in ("ZooModel", "assert_equal", "create_model"):
        import importlib

        return getattr(importlib.import_module("triptych.api"), name)
    raise AttributeError(f"module 'triptych' has no attribute {name!r}")
