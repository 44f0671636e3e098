"""What machine, what versions, what threads: recorded beside every result, printed by `triptych doctor`.

Standard library only, and no framework is imported: versions come from the installed packages' metadata. Nothing here names a
host, a user or a path, so that a record can be committed and pasted into a bug report.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from triptych.core import hosts

PACKAGE = Path(__file__).resolve().parents[1]

# title -> distributions that may provide it, in order of preference.
DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "triton": ("triton",),
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "keras": ("keras",),
    "jax": ("jax",),
    "jaxlib": ("jaxlib",),
    "flax": ("flax",),
    "optax": ("optax",),
    "timm": ("timm",),
    "pillow": ("pillow",),
    "pyarrow": ("pyarrow",),
    "safetensors": ("safetensors",),
    "matplotlib": ("matplotlib",),
    "jinja2": ("jinja2",),
    "rich": ("rich",),
    "click": ("click",),
}

# What changes speed or the last bits of a result without a line of code changing (numerics 28, 35).
VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS",
    "TF_ENABLE_ONEDNN_OPTS", "XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "KERAS_BACKEND", "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE", "PYTORCH_JIT", "ONEDNN_DEFAULT_FPMATH_MODE", "TF_XLA_FLAGS",
)  # fmt: skip

# The instruction sets that matter to these frameworks, under the names a person searches for -> the kernel's flags.
SIMD = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx512_vnni": ("avx512_vnni",),
    "bf16": ("avx512_bf16", "amx_bf16", "bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "asimdhp"),
    "amx": ("amx_tile",),
    "neon": ("asimd",),
}

# Measured tables (`.json`) are not code: what depends on one names it.
SOURCE_SUFFIXES = (".py", ".npz", ".j2", ".css")

NOT_INHERITED = frozenset({"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"})
"""What no worker inherits: with another processor's kernels numpy's products, the measured peak, were a quarter of a machine's."""


def inherited() -> dict[str, str]:
    """The environment variables that a worker process starts from."""
    return {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}


def environment() -> dict[str, Any]:
    """The environment as plain data for JSON."""
    return {
        "schema": 1,
        "system": _system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": cpu(),
        "accelerators": accelerators(),
        "memory_bytes": memory_bytes(),
        "variables": variables(),
        "versions": versions(),
        "triptych": triptych(),
    }


def variables() -> dict[str, str]:
    """Those environment variables that are set and change speed or the last bits of a result; paths in them are left out."""
    return {name: _without_paths(os.environ[name]) for name in VARIABLES if name in os.environ}


def versions() -> dict[str, str]:
    """Versions of the libraries that results depend on: those installed, and those of the hosts of our workers; others have no entry."""
    found = {title: _version(names) for title, names in DISTRIBUTIONS.items()}
    return {**hosts.versions(), **{title: version for title, version in found.items() if version is not None}}


def _version(names: tuple[str, ...]) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _system() -> str:
    """For instance `Debian GNU/Linux 12 (bookworm), Linux 6.1.0, x86_64`; a kernel's local suffix is left out."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = platform.mac_ver()[0] and f"macOS {platform.mac_ver()[0]}"
    release = re.match(r"[\d.]*", platform.release())
    kernel = f"{platform.system()} {release.group() if release else ''}".strip()
    return ", ".join(part for part in (distribution, kernel, platform.machine()) if part)


def cpu() -> dict[str, Any]:
    """Model, logical cores, the cores this process may use (affinity and container quota), and its SIMD extensions ({}: not told)."""
    info = _read("/proc/cpuinfo")
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", info, re.M)[:1]).split())
    return {
        "model": _cpu_model(info),
        "cores": os.cpu_count(),
        "affinity": _affinity(),
        "quota": _quota(),
        "simd": {name: bool(flags.intersection(names)) for name, names in SIMD.items()} if flags else {},
    }


def _cpu_model(info: str) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", info, re.M)
    if found:
        return " ".join(found.group(1).split())
    return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.processor() or platform.machine()


def usable_cores() -> int:
    """The processor cores that this process may use."""
    return _affinity() or os.cpu_count() or 1


def _affinity() -> int | None:
    """How many cores this process may run on; None where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _quota() -> float | None:
    """Cores that the container's CPU quota (cgroup v2) amounts to; None without one."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def memory_bytes() -> dict[str, int | None]:
    """Memory of the machine, what of it is available now, and the container's limit; None where the system does not say."""
    info = dict(re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.M))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return {
        "total": int(info["MemTotal"]) * 1024 if "MemTotal" in info else None,
        "available": int(info["MemAvailable"]) * 1024 if "MemAvailable" in info else None,
        "limit": int(limit) if limit.isdigit() else None,
    }


def accelerators() -> list[str]:
    """Name, memory and driver of every NVIDIA GPU that `nvidia-smi` sees; no framework is asked."""
    return _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]).splitlines()


def triptych() -> dict[str, Any]:
    """Version, hash of the source, and the commit when the package runs from a checkout (`modified`: with uncommitted changes)."""
    from triptych import __version__

    return {"version": __version__, "code_sha256": code_hash(), **_checkout()}


def code_hash(*parts: str) -> str:
    """SHA-256 over names and contents of the package's source files: of all of them, or of some parts (`core`, `in_jax`).

    Results are reused only while the hash of what produced them stands.
    """
    roots = [PACKAGE / part for part in parts] or [PACKAGE]
    files = sorted({path.relative_to(PACKAGE).as_posix() for root in roots for path in root.rglob("*") if path.suffix in SOURCE_SUFFIXES})
    digest = hashlib.sha256()
    for name in files:
        content = (PACKAGE / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _checkout() -> dict[str, Any]:
    root = PACKAGE.parents[1]
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"]) if (root / ".git").exists() else ""
    if not commit:
        return {"commit": None, "modified": None}
    return {"commit": commit, "modified": bool(_output(["git", "-C", str(root), "status", "--porcelain", "--", "src"]))}


def _output(command: list[str]) -> str:
    """What a system tool prints; empty when it is absent, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _without_paths(value: str) -> str:
    """`--xla_dump_to=/home/me/x` -> `--xla_dump_to=(path)`."""
    return re.sub(r"[^\s=:,;]*[/\\][^\s=,;]*", "(path)", value)
