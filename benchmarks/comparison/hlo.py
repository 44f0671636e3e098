"""Counts in the text of an XLA program: how many operations there were, and how many kernels are left of them."""

from __future__ import annotations

import re
from collections import Counter

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?:\([^=]*?\)|\S+) ([\w\-]+)\(", re.M)
_COMPUTATION = re.compile(r"^(ENTRY )?%?[\w.\-]+ [^\n]*\{\n(.*?)^\}", re.M | re.S)
# Instructions that name, group or alias a buffer, and do no work.
IDLE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"})


def counts(text: str) -> dict[str, int]:
    """Of optimized HLO: `kernels`, the instructions of the entry computation that do work, and what kinds of them there are.

    Fusions are loops that XLA generated from several operations or from one. Calls of a library are custom calls and custom fusions, which
    on a CPU are matrix products handed to one, with what could be attached to them; products that XLA kept for itself are told apart.
    """
    entry = next((body for start, body in _COMPUTATION.findall(text) if start), "")
    kinds = Counter(_INSTRUCTION.findall(entry))
    custom = len(re.findall(r" fusion\(.*kind=kCustom", entry))
    return {
        "kernels": sum(number for kind, number in kinds.items() if kind not in IDLE),
        "fusions": kinds["fusion"] - custom,
        "products": kinds["dot"],
        "library_calls": kinds["custom-call"] + custom,
        "copies": kinds["copy"] + kinds["transpose"],
    }


def instructions(text: str) -> int:
    """Instructions of every computation that do work: of HLO before optimization, what was asked for."""
    return sum(kind not in IDLE for kind in _INSTRUCTION.findall(text))


def stablehlo_operations(text: str) -> int:
    """Operations of a StableHLO module, constants left out."""
    return len(re.findall(r"= \"?stablehlo\.(?!constant)", text))
