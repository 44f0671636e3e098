"""How numbers, names and durations are written in the report: one place, so that figures, HTML and Markdown agree."""

from __future__ import annotations

from triptych.core.contract import FRAMEWORKS


def short(value: float) -> str:
    """Two significant digits: 1.5e-13, 0.42, 2.4, 31."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.2g}"


def number(value: float | int | None, absent: str = "–") -> str:
    """An integer with thousands separators, a float by `short`; `absent` for None."""
    if value is None:
        return absent
    return f"{value:,}" if isinstance(value, int) else short(value)


def times(ratio: float | None, digits: int = 2) -> str:
    """1.03×; a dash for None."""
    return "–" if ratio is None else f"{ratio:.{digits}f}×"


def points(difference: float) -> str:
    """A difference of two shares in percentage points: 0.004 -> 0.40 points."""
    return f"{100 * difference:.2f} points"


def framework_title(name: str) -> str:
    """`jax` -> `JAX/Flax`; an unknown name stays as it is."""
    return FRAMEWORKS[name].title if name in FRAMEWORKS else name


def pair_title(pair: str) -> str:
    """`pytorch-jax`, `pytorch,jax`, `pytorch/jax` or `pytorch vs jax` -> `PyTorch – JAX`; anything else stays as it is."""
    found = sorted((pair.index(name), row.title.partition("/")[0]) for name, row in FRAMEWORKS.items() if name in pair)
    return " – ".join(title for _, title in found) if len(found) == 2 else pair


def duration(seconds: float | None) -> str:
    """0.4 s, 12 s, 3 min 20 s, 1 h 4 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """1.23 G, 40.6 M, 25.6 k."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def listing(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
