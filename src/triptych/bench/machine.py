"""What the machine does meanwhile: a fixed kernel, stolen time, waiting for a core, clock rate, memory of a phase. Linux tells all of it;
elsewhere what is not told is None."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

KERNEL, KERNEL_SECONDS = (16, 64, 64), 0.02
"""The calibration kernel: products of float32 matrices in a stack of this shape, the median of so long. So small that BLAS has one thread
compute each: with two, the scheduler may put both on one core for some milliseconds, and the kernel takes several times as long."""
PEAK, PEAK_SECONDS = (1024, 1024), 1.0
POWERCAP, PROC = Path("/sys/class/powercap"), Path("/proc")
KERNEL_LIMIT, STEAL_LIMIT, OTHERS_LIMIT = 1.25, 0.01, 0.05
"""A round is marked noisy when the kernel took so many times its median, or when such a share of all cores' time was withheld by the
machine or went to other programs. Waiting for a core is recorded and marks nothing: a lane's own threads wait for each other."""


def kernel_seconds() -> float:
    """Median time of the calibration kernel, now."""
    return float(np.median(_products(KERNEL, KERNEL_SECONDS)))


def peak_flops() -> float:
    """Floating-point operations a second of the fastest of a second's worth of large matrix products: this machine's measured peak."""
    return 2.0 * PEAK[0] ** 3 / min(_products(PEAK, PEAK_SECONDS))


def _products(shape: tuple[int, ...], seconds: float) -> list[float]:
    """Seconds of each product of a matrix, or of each in a stack of them, with itself, one after the other for so long."""
    a = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        started = time.perf_counter()
        a @ a
        taken.append(time.perf_counter() - started)
    return taken


def counters() -> dict[str, float | None]:
    """Running totals in seconds: now; over all cores, stolen from this virtual machine, and worked for others (`_others`); and in which
    some task waited for a core."""
    times = _read(PROC / "stat").partition("\n")[0].split()
    pressure = re.search(r"^some .*total=(\d+)", _read(PROC / "pressure/cpu"), re.M)
    return {
        "now": time.monotonic(),
        "steal": int(times[8]) / os.sysconf("SC_CLK_TCK") if len(times) > 8 else None,
        "others": _others(times) if len(times) > 7 else None,
        "pressure": int(pressure[1]) / 1e6 if pressure else None,
    }


def _others(times: list[str]) -> float:
    """Seconds that cores worked for others than this process and its descendants, alive or ended; what the kernel does for nobody in
    particular is others'. `times` is the line of all cores."""
    user, nice, system, _, _, interrupts, soft = map(int, times[1:8])
    children: dict[int, list[int]] = {}
    ticks = {}
    for stat in PROC.glob("[0-9]*/stat"):
        fields = _read(stat).rpartition(")")[2].split()  # the name before may have blanks; a process may have ended meanwhile
        if fields:
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
            ticks[int(stat.parent.name)] = sum(map(int, fields[11:15]))  # its own, and those of its children that have ended
    family = [os.getpid()]
    for process in family:
        family += children.get(process, ())
    ours = sum(ticks.get(process, 0) for process in family)
    return (user + nice + system + interrupts + soft - ours) / os.sysconf("SC_CLK_TCK")


def weather(before: dict[str, float | None], after: dict[str, float | None], rested: float = 0.0) -> dict[str, float | None]:
    """Between two `counters`: seconds; the shares of all cores' time that were stolen and that others took, and of the time in which a
    task waited for a core; and the clock rate now.

    The `rested` seconds, in which none of ours worked, are no part of the time in which a task may have waited: they would thin it out.
    """
    seconds = max(1e-9, (after["now"] or 0.0) - (before["now"] or 0.0))
    cores = os.cpu_count() or 1

    def share(name: str, of: float) -> float | None:
        a, b = before[name], after[name]
        return None if a is None or b is None else round(max(0.0, b - a) / of, 4)

    return {
        "seconds": seconds,
        "steal": share("steal", seconds * cores),
        "others": share("others", seconds * cores),
        "pressure": share("pressure", max(1e-9, seconds - rested)),
        "mhz": _mhz(),
    }


def reasons(round_: dict[str, Any], kernel_median: float) -> list[str]:
    """Why a round is noisy; nothing when it is not."""
    found = []
    if round_["kernel_seconds"] > KERNEL_LIMIT * kernel_median:
        found.append(f"the kernel took {round_['kernel_seconds'] / kernel_median:.2f} times its median")
    if (round_["steal"] or 0.0) > STEAL_LIMIT:
        found.append(f"{round_['steal']:.1%} of the time was stolen")
    if (round_["others"] or 0.0) > OTHERS_LIMIT:
        found.append(f"other programs took {round_['others']:.0%} of the cores' time")
    return found


def _mhz() -> float | None:
    """Mean clock rate of the cores: what cpufreq says, else /proc/cpuinfo (on a virtual machine often the nominal one)."""
    told = [
        float(text) / 1e3 for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq") if (text := _read(path))
    ]
    told = told or [float(text) for text in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", _read("/proc/cpuinfo"), re.M)]
    return round(float(np.mean(told)), 1) if told else None


def begin_memory_phase() -> int | None:
    """Set this process's peak resident memory back to what is resident now, and return that in bytes; None where it cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def peak_memory() -> int | None:
    """Peak resident bytes of this process since `begin_memory_phase` (VmHWM)."""
    return _status("VmHWM")


def _status(name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", _read("/proc/self/status"), re.M)
    return int(found[1]) * 1024 if found else None


def energy(folder: Path = POWERCAP) -> dict[str, tuple[int, int]] | None:
    """Running totals of the processor packages (RAPL): their counters in microjoules and where each begins anew; None without counters."""
    found = {}
    for zone in sorted(folder.glob("intel-rapl:[0-9]*")):
        counter, end = (_read(zone / name).strip() for name in ("energy_uj", "max_energy_range_uj"))
        if ":" not in zone.name.partition(":")[2] and counter.isdigit() and end.isdigit():  # a zone within a package counts twice
            found[zone.name] = int(counter), int(end)
    return found or None


def joules(before: dict[str, tuple[int, int]] | None, after: dict[str, tuple[int, int]] | None) -> float | None:
    """What all packages used between two `energy`, whoever used it; None without counters."""
    if before is None or after is None or before.keys() != after.keys():
        return None
    return sum((after[zone][0] - counter) % (end + 1) for zone, (counter, end) in before.items()) / 1e6


def energy_source(folder: Path = POWERCAP) -> str:
    """What tells the energy, or why nothing does."""
    if not folder.is_dir():
        return f"n/a: {folder} does not exist: no counters, or a virtual machine that shows none"
    if energy(folder) is None:
        return f"n/a: no counter of a processor package can be read in {folder}; Linux lets only root read energy_uj"
    return f"RAPL counters of the processor packages in {folder}, idle power and other processes included"


def cores(wanted: int | None) -> list[int]:
    """The first `wanted` cores that this process may use, all for None; [] where the system has no affinity."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return usable[: wanted or None]


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
