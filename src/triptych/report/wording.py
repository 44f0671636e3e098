"""How numbers, names and durations are written in the report: one place, so that figures, HTML and Markdown agree."""

from __future__ import annotations

from collections.abc import Sequence

from triptych.core.contract import FRAMEWORKS
from triptych.export.runtimes import RUNTIMES


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


def brief(name: str) -> str:
    """`jax` -> `JAX`."""
    return framework_title(name).partition("/")[0]


def pair_title(pair: str) -> str:
    """`pytorch-jax`, `pytorch,jax`, `pytorch/jax` or `pytorch vs jax` -> `PyTorch – JAX`; anything else stays as it is."""
    found = sorted((pair.index(name), row.title.partition("/")[0]) for name, row in FRAMEWORKS.items() if name in pair)
    return " – ".join(title for _, title in found) if len(found) == 2 else pair


def duration(seconds: float | None) -> str:
    """0.04 s, 2.4 s, 12 s, 3 min 20 s, 1 h 4 min."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.{1 if seconds >= 1 else 2}f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def milliseconds(seconds: float | None) -> str:
    """Three digits: 0.412 ms, 38.1 ms, 1,281 ms; n/a for None."""
    if seconds is None:
        return "n/a"
    value = 1e3 * seconds
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def size(count: int) -> str:
    """1.23 G, 40.6 M, 25.6 k."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def listing(names: list[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {last} {names[-1]}" if names else ""


def bounds(interval: Sequence[float] | None, digits: int = 2) -> str:
    """An interval: `1.10 to 1.30`; a dash for None."""
    return "–" if not interval else " to ".join(f"{end:.{digits}f}" for end in interval)


def mode_title(mode: str) -> str:
    """`training_step` -> `training step`."""
    return mode.replace("_", " ")


def contestant(framework: str, lane: str) -> str:
    """Who takes turns in a benchmark: `PyTorch tuned`; a runtime has one lane, which needs no name."""
    return RUNTIMES[framework].title if framework in RUNTIMES else f"{brief(framework)} {lane.replace('_', ' and ')}"


def rate(value: float | None) -> str:
    """Images a second to three digits: 6.24, 96.5, 610, 1,281."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def memory(count: int | None) -> str:
    """Bytes in GiB, small ones in MiB."""
    if count is None:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
