"""The tables of docs/transformer.md, as Markdown, from the records. Every number is computed here from raw samples."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from comparison.setting import VMAP_MATH
from triptych.bench.statistics import break_even_steps, median_interval, paired_interval, smallest_difference, winner

Group = dict[str, Any]
TITLES = {
    "pytorch/eager": "PyTorch eager",
    "pytorch/compiled": "PyTorch compiled",
    "tensorflow/eager": "TensorFlow eager",
    "tensorflow/function": "TensorFlow `tf.function`",
    "tensorflow/xla": "TensorFlow XLA",
    "jax/eager": "JAX op by op",
    "jax/jit": "JAX `jit`",
}
EAGER = {
    "pytorch/compiled": "pytorch/eager",
    "tensorflow/function": "tensorflow/eager",
    "tensorflow/xla": "tensorflow/eager",
    "jax/jit": "jax/eager",
}
BASE = "pytorch/eager"
WORKLOAD = {"block": "the block", "vit": "ViT-Tiny"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a sentence when there is nothing to put into it."""
    rows = list(rows)
    if not rows:
        return "*Not on record yet.*"
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.1g}"


def ratio_of(group: Group, slower: str, faster: str) -> tuple[float, tuple[float, float]] | None:
    """Seconds of one lane over those of another in the same rounds, and the interval; None unless both were timed."""
    a, b = (group["lanes"].get(name, {}).get("seconds") or [] for name in (slower, faster))
    return paired_interval(a, b) if a and len(a) == len(b) else None


def floor(group: Group) -> float:
    """The smallest relative difference that this group can show: from the lane that took two turns a round."""
    twin = group["twin"]
    return smallest_difference(paired_interval(group["lanes"][twin["of"]]["seconds"], twin["seconds"])[1]) if twin["seconds"] else 0.0


def compared(group: Group, slower: str, faster: str) -> str:
    """`1.23 [1.20, 1.26]`, above 1 where `faster` is; with a `~` in front where the two cannot be told apart."""
    found = ratio_of(group, slower, faster)
    if found is None:
        return "n/a"
    ratio, (low, high) = found
    same = "" if slower == faster or winner((low, high), floor(group)) else "~ "
    return "1" if slower == faster else f"{same}{ratio:.2f} [{low:.2f}, {high:.2f}]"


def median(group: Group, lane: str) -> float | None:
    """Median seconds of a call; None when it was not timed."""
    seconds = group["lanes"].get(lane, {}).get("seconds")
    return median_interval(seconds)[0] if seconds else None


def chosen(groups: list[Group], **wanted: Any) -> list[Group]:
    """The groups whose settings have these values, by batch size."""
    found = [group for group in groups if all(group["setting"][name] == value for name, value in wanted.items())]
    return sorted(found, key=lambda group: group["setting"]["batch_size"])


def equality(parts: dict[str, list[Group]]) -> str:
    """What was proven before anything was timed, part by part."""
    rows = []
    for part, groups in parts.items():
        exact, single = ([group["proof"][precision] for group in groups] for precision in ("float64", "float32"))
        worst = max(exact, key=lambda proof: proof["worst_error"] / proof["tolerance"])
        nearest = max(max(proof["share_of_bound"].values()) for proof in single)
        lanes = sum(len(proof["errors"]) for proof in single)
        rows.append([
            part.replace("_", " "), str(len(groups)), f"{worst['worst_error']:.1e}", f"{worst['tolerance']:.0e}",
            " and ".join(worst["pair"]), str(lanes), f"{max(max(p['errors'].values()) for p in single):.1e}", f"{nearest:.2f}",
        ])  # fmt: skip
    header = ("part", "settings", "worst float64 error", "tolerance", "between", "float32 lanes", "worst float32 error", "of its bound")
    return table(header, rows)


def passes(groups: list[Group], workload: str) -> str:
    """Milliseconds of every pass, and how many times as fast as PyTorch eager."""
    tasks, rows = ("forward", "gradient", "step"), []
    mine = chosen(groups, workload=workload)
    sizes = sorted({group["setting"]["batch_size"] for group in mine})
    for size in sizes:
        by_task = {group["setting"]["task"]: group for group in chosen(mine, batch_size=size)}
        for lane, title in TITLES.items():
            cells = []
            for task in tasks:
                value = median(by_task[task], lane) if task in by_task else None
                cells.append("n/a" if value is None else f"{milliseconds(value)} ms, {compared(by_task[task], BASE, lane)}")
            rows.append([str(size), title, *cells])
    return table(("batch", "lane", "forward", "forward and backward", "whole step"), rows)


def compilation(groups: list[Group]) -> str:
    """What compiling gains over the same framework's eager mode, what it costs, and after how many calls it has paid."""
    rows = []
    for group in sorted(groups, key=lambda each: (each["setting"]["workload"], each["setting"]["batch_size"])):
        setting = group["setting"]
        for lane, eager in EAGER.items():
            value, other, told = median(group, lane), median(group, eager), group["lanes"].get(lane, {})
            if value is None or other is None:
                continue
            cost, other_cost = (max(0.0, group["lanes"][name]["first_call_seconds"] - s) for name, s in ((lane, value), (eager, other)))
            even = break_even_steps(cost, value, other_cost, other)
            rows.append([
                WORKLOAD[setting["workload"]], setting["task"], str(setting["batch_size"]), TITLES[lane], compared(group, eager, lane),
                f"{told['first_call_seconds']:.1f} s", "never" if even is None else f"{even:,}",
            ])  # fmt: skip
    return table(("workload", "pass", "batch", "lane", "times as fast as eager", "first call", "pays after calls"), rows)


def ways(groups: list[Group], workload: str) -> str:
    """Milliseconds an example of every way, and the ratios between them; a row more where PyTorch's attention is not the fused one."""
    rows = []
    for lane, title in TITLES.items():
        for vmap, name in (("vmap", title), (VMAP_MATH, f"{title}, attention by plain products")):
            for group in chosen(groups, workload=workload):
                if f"{lane} {vmap}" not in group["lanes"]:
                    continue
                size, cells = group["setting"]["batch_size"], []
                for way in ("loop", vmap, "batched"):
                    value = median(group, f"{lane} {way}")
                    cells.append("n/a" if value is None else milliseconds(value / size))
                cells += [compared(group, f"{lane} {slow}", f"{lane} {fast}") for slow, fast in (("loop", vmap), (vmap, "batched"))]
                rows.append([name, str(size), *cells])
    return table(("lane", "batch", "loop", "vmap", "batched", "loop / vmap", "vmap / batched"), rows)


def layers(groups: list[Group]) -> str:
    """One layer at a time, forward: milliseconds, and how many times as fast as PyTorch eager."""
    by_task = {group["setting"]["task"]: group for group in groups}
    rows = []
    for lane, title in TITLES.items():
        values = {task: median(group, lane) for task, group in by_task.items()}
        cells = ["n/a" if v is None else f"{milliseconds(v)} ms, {compared(by_task[t], BASE, lane)}" for t, v in values.items()]
        rows.append([title, *cells])
    return table(("lane", *(task.replace("_", " ") for task in by_task)), rows)


def own_gradients(groups: list[Group], reports: list[Group]) -> str:
    """Forward and backward of a layer: automatic differentiation and a gradient of our own."""
    memory = {group["setting"]["task"]: group["modes"] for group in reports if group["setting"]["part"] == "gradients"}
    rows = []
    for group in groups:
        task = group["setting"]["task"]
        for lane, title in TITLES.items():
            values = [median(group, f"{lane} {way}") for way in ("autodiff", "own")]
            cells = ["n/a" if value is None else f"{milliseconds(value)} ms" for value in values]
            told = [memory.get(task, {}).get(f"{lane} {way}", {}) for way in ("autodiff", "own")]
            held = [_bytes(each.get("kept_bytes")) for each in told]
            rows.append([task, title, *cells, compared(group, f"{lane} autodiff", f"{lane} own"), *held])
    header = ("layer", "lane", "autodiff", "own", "times as fast", "kept by autodiff", "kept by ours")
    return table(header, rows)


def programs(reports: list[Group]) -> str:
    """What compilers made of a pass: operations before, kernels after, and memory."""
    rows = []
    for group in sorted(reports, key=lambda each: (each["setting"]["part"] != "passes", each["setting"]["workload"])):
        setting = group["setting"]
        name = f"{setting['task']}, {WORKLOAD[setting['workload']]}" if setting["part"] == "passes" else f"gradient of {setting['task']}"
        for mode, found in group["modes"].items():
            lane, _, way = mode.partition(" ")
            counts = [str(found.get(key, "")) for key in ("operations", "kernels", "fusions", "products", "library_calls")]
            sizes = [_bytes(found.get(key), "") for key in ("temporary_bytes", "kept_bytes")]
            title = f"{TITLES.get(lane, lane)} {way}".strip()
            rows.append(
                [f"{name}, batch {setting['batch_size']}", title, *(counts if "failure" not in found else [found["failure"]]), *sizes]
            )
    header = (
        "pass",
        "lane",
        "operations",
        "kernels",
        "of them fusions",
        "products",
        "library calls",
        "temporary memory",
        "kept for backward",
    )
    return table(header, rows)


def weather(parts: dict[str, list[Group]]) -> str:
    """What the machine was like, part by part: the smallest difference it could show, and rounds that were noisy."""
    rows = []
    for part, groups in parts.items():
        floors = [floor(group) for group in groups]
        rounds = [each for group in groups for each in group["rounds"]]
        noisy = sum(bool(each["noisy"]) for each in rounds)
        failures = [
            f"{name} ({group['key']}): {told['failure']}" for group in groups for name, told in group["lanes"].items() if "failure" in told
        ]
        rows.append([
            part.replace("_", " "), ", ".join(sorted({each["processor"] for each in groups})),
            ", ".join(sorted({f"{each['cores']}, {each['clock']} seconds" for each in groups})),
            str(len(groups)), str(len(rounds)), str(noisy), f"{plain.median(floors):.1%}", f"{max(floors):.1%}",
            "; ".join(failures) or "none",
        ])  # fmt: skip
    floors_of = ("A/A floor, median", "A/A floor, worst")
    header = ("part", "processor", "cores", "settings", "rounds", "of them noisy", *floors_of, "lanes that failed")
    return table(header, rows)


def _bytes(value: float | None, missing: str = "n/a") -> str:
    if value is None:
        return missing
    return f"{value / 2**20:.1f} MiB" if value >= 2**20 else f"{value / 2**10:.0f} KiB"


Section = Callable[[], str]


def sections(parts: dict[str, list[Group]], reports: list[Group], elsewhere: list[Group]) -> dict[str, Section]:
    """Every table by the name that the document asks for it by."""
    every = {**parts, **({"passes elsewhere": elsewhere} if elsewhere else {})}
    return {
        "equality": lambda: equality(every),
        "block": lambda: passes(parts.get("passes", []), "block"),
        "vit": lambda: passes(parts.get("passes", []), "vit"),
        "elsewhere": lambda: passes(elsewhere, "vit"),
        "compilation": lambda: compilation(parts.get("passes", [])),
        "vmap-block": lambda: ways(parts.get("vmap", []), "block"),
        "vmap-vit": lambda: ways(parts.get("vmap", []), "vit"),
        "per-sample": lambda: ways(parts.get("per_sample", []), "block"),
        "layers": lambda: layers(parts.get("layers", [])),
        "gradients": lambda: own_gradients(parts.get("gradients", []), reports),
        "programs": lambda: programs(reports),
        "weather": lambda: weather(every),
    }
