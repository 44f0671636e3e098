"""What the chapter expects of the three frameworks, and what the records say: one table, whose verdicts are computed.

The expectations are told in our words, with the place in the chapter. A verdict compares figures of committed records and nothing else;
where none is recorded, it is `not measured`, and where the data names nobody, `undecided`.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from triptych.core.contract import FRAMEWORKS
from triptych.report.bars import fastest
from triptych.report.blocks import Block, Cell, Table, Text
from triptych.report.debugging import first_step, smallest
from triptych.report.evidence import Evidence
from triptych.report.measured import STOCK, Pair
from triptych.report.tables import code_cell, columns
from triptych.report.wording import brief, duration, memory, points, rate, times

AGREES, IN_PART, DIFFERS, UNDECIDED, NOT_MEASURED = "agrees", "in part", "differs", "undecided", "not measured"
TONES = {AGREES: "pass", DIFFERS: "fail"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What was measured, the verdict, and the record below `benchmarks/results` that it is read from."""

    measured: str
    verdict: str
    record: str | None = None


@dataclass(frozen=True, slots=True)
class Expectation:
    """One thing that the chapter expects, where it says so, and what the records say of it."""

    where: str
    text: str
    find: Callable[[Evidence], Finding]


def expected(evidence: Evidence) -> Iterator[Block]:
    """All of the section."""
    yield Text(
        "The chapter says how its comparison should end. Each row holds one of its expectations, in our words, against the committed "
        "records; the verdict is computed from them. All records are of a CPU, and the chapter mostly has GPUs in mind: where the two "
        "differ, both may be right."
    )
    rows = []
    for row in EXPECTED:
        found = row.find(evidence)
        verdict = Cell(found.verdict, TONES.get(found.verdict, "open"))
        rows.append((Cell(row.text), Cell(found.measured), Cell(row.where), verdict, code_cell(found.record)))
    titles = columns("the chapter expects", "measured", "where", "", "record")
    yield Table("What the chapter expects, and what was measured", titles, tuple(rows), cards=True)


def _verdict(agreeing: int, opposing: int) -> str:
    """From how many decided comparisons agree, and how many say the opposite."""
    if agreeing and opposing:
        return IN_PART
    return AGREES if agreeing else DIFFERS if opposing else UNDECIDED


def _absent(why: str) -> Callable[[Evidence], Finding]:
    return lambda evidence: Finding(why, NOT_MEASURED)


def _in_words(values: Mapping[str, str]) -> str:
    """`PyTorch 7.5, JAX 2.8`, in the order of the contract."""
    return ", ".join(f"{brief(name)} {values[name]}" for name in FRAMEWORKS if name in values)


def _throughput(evidence: Evidence) -> Finding:
    """JAX against the other two, each in its fastest lane of our own, in every group of every suite."""
    first = beaten = total = 0
    for suite in evidence.performance.suites:
        for group in suite.together():
            own = [row for row in group if row.framework in FRAMEWORKS and row.lane != STOCK]
            best = {name: lane for name in FRAMEWORKS if (lane := fastest([row for row in own if row.framework == name]))}
            if "jax" not in best or len(best) < 2:
                continue
            jax = best.pop("jax")
            winners = [suite.winner(jax, other) for other in best.values()]
            total += 1
            first += all(winner == jax.contestant for winner in winners)
            beaten += any(winner not in (None, jax.contestant) for winner in winners)
    if not total:
        return Finding("No suite with JAX and another framework is recorded", NOT_MEASURED)
    files = ", ".join(suite.file for suite in evidence.performance.suites)
    told = f"JAX's fastest lane against those of the others in {total} groups (model, mode, batch): faster than all in {first}"
    return Finding(f"{told}, beaten in {beaten}, undecided in {total - first - beaten}", _verdict(first, beaten), files)


def _training_step(evidence: Evidence) -> Finding:
    rows = [row for row in evidence.records.steps if row.model == "resnet50" and row.images_per_second]
    best = {name: max(row.images_per_second or 0.0 for row in rows if row.framework == name) for name in {row.framework for row in rows}}
    if "jax" not in best or len(best) < 2:
        return Finding("No training step of ResNet-50 is recorded in JAX and another framework", NOT_MEASURED)
    text = f"Images/s, batch {rows[0].batch_size}, fastest lane: {_in_words({name: rate(value) for name, value in best.items()})}"
    leads = max(best, key=lambda name: best[name]) == "jax"
    return Finding(f"{text} (each in turns with its stock one, not with each other)", _verdict(leads, not leads), "speed/step.json")


def _memory(evidence: Evidence) -> Finding:
    """Peak memory of the default lanes' training steps, each model at its largest batch."""
    least: Counter[str] = Counter()
    told, file = "", None
    for suite in evidence.performance.suites:
        rows = [
            r for r in suite.rows if r.mode == "training_step" and r.lane == "default" and r.peak_memory_bytes and r.framework in FRAMEWORKS
        ]
        for model in dict.fromkeys(row.subject for row in rows):
            largest = max(row.batch_size for row in rows if row.subject == model)
            mine = {r.framework: r.peak_memory_bytes or 0 for r in rows if (r.subject, r.batch_size) == (model, largest)}
            if "jax" in mine and len(mine) > 1:
                least[min(mine, key=lambda name: mine[name])] += 1
                told, file = f"{model}, batch {largest}: {_in_words({n: memory(b) for n, b in mine.items()})}", suite.file
    if not least:
        return Finding("No training step in JAX and another framework is recorded", NOT_MEASURED)
    models = f"least in JAX for {least['jax']} of {sum(least.values())} models"
    text = f"Peak memory of the process, libraries included, in training steps: {models}; {told}"
    return Finding(text, _verdict(least["jax"], sum(least.values()) - least["jax"]), file)


def _compared(pairs: Sequence[Pair], ours: str, other: str, words: str, file: str) -> Finding:
    """How often one lane is faster than another over all groups, and by how much in the extremes."""
    mine = [pair for pair in pairs if {pair.a, pair.b} == {ours, other}]
    if not mine:
        return Finding("Not recorded", NOT_MEASURED)
    speeds = [pair.ratio if pair.b == ours else 1 / pair.ratio for pair in mine]
    won, lost = (sum(pair.winner == name for pair in mine) for name in (ours, other))
    text = f"{words}: faster in {won} of {len(mine)} settings, slower in {lost}; {times(min(speeds))} to {times(max(speeds))} the speed"
    return Finding(text, _verdict(won, lost), file)


def _xla(evidence: Evidence) -> Finding:
    return _compared(
        evidence.performance.passes,
        "jax/jit",
        "pytorch/eager",
        "The transformer block and ViT-Tiny, jit over PyTorch eager",
        "transformer/passes.json",
    )


def _jit(evidence: Evidence) -> Finding:
    return _compared(evidence.performance.passes, "jax/jit", "jax/eager", "The same, jit over JAX op by op", "transformer/passes.json")


def _graph(evidence: Evidence) -> Finding:
    words = "The transformer block and ViT-Tiny, tf.function over eager"
    return _compared(evidence.performance.passes, "tensorflow/function", "tensorflow/eager", words, "transformer/passes.json")


def _vmap(evidence: Evidence) -> Finding:
    words = "Batches of the block under jit, vmap over the Python loop"
    several = [pair for pair in evidence.performance.vmaps if pair.batch_size > 1]
    return _compared(several, "jax/jit vmap", "jax/jit loop", words, "transformer/vmap.json")


def _pipelines(evidence: Evidence) -> Finding:
    ratios = {row.framework: row.ratio for row in evidence.records.pipelines if row.ratio is not None}
    if "tensorflow" not in ratios or len(ratios) < 2:
        return Finding("No input pipeline of TensorFlow and another framework is recorded", NOT_MEASURED)
    text = f"Images in memory, speed over a stock DataLoader: {_in_words({name: times(ratio) for name, ratio in ratios.items()})}"
    leads = max(ratios, key=lambda name: ratios[name]) == "tensorflow"
    return Finding(text, _verdict(leads, not leads), "speed/data.json")


def _debugging(evidence: Evidence) -> Finding:
    """In how many of the things that were counted PyTorch comes first, alone or with others."""
    kept = [each for each in _counted(evidence) if "pytorch" in each.values and len(each.values) > 1]
    if not kept:
        return Finding("Nothing of it is recorded", NOT_MEASURED)
    first = sum(each.values["pytorch"] == each.best for each in kept)
    told = "; ".join(f"{each.title}: {_in_words({name: each.word(value) for name, value in each.values.items()})}" for each in kept)
    text = f"PyTorch comes first, alone or not, in {first} of {len(kept)} things counted. {told}"
    return Finding(text, _verdict(first, len(kept) - first), "debugging/shape_bug.json")


@dataclass(frozen=True, slots=True)
class Counted:
    """One thing counted in several frameworks, how a value of it is written, and whether little of it is good."""

    title: str
    values: Mapping[str, float]
    word: Callable[[float], str]
    little: bool = False

    @property
    def best(self) -> float:
        """The value that comes first."""
        return min(self.values.values()) if self.little else max(self.values.values())


def _counted(evidence: Evidence) -> list[Counted]:
    """What can be counted of ease of debugging; shares in whole percent, as traces are no more exact."""
    found = evidence.performance
    errors = {name: [e for e in found.shape_errors if e.framework == name and e.stage] for name in FRAMEWORKS}
    told = {name: sum(e.names_layer and e.names_both_sizes for e in mine) for name, mine in errors.items() if mine}
    length = {name: statistics.median(e.traceback_lines or 0 for e in mine) for name, mine in errors.items() if mine}
    most = max(map(len, errors.values()), default=0)
    return [
        Counted(f"Errors, of {most}, that name the layer and both sizes", told, "{:g}".format),
        Counted("lines of a traceback, median", length, "{:g}".format, little=True),
        Counted("share of a profiled step told apart", {p.framework: round(p.told_apart, 2) for p in found.profiles}, "{:.0%}".format),
        Counted("time to the first training step", _first_steps(evidence), duration, little=True),
    ]


def _first_steps(evidence: Evidence) -> dict[str, float]:
    """Seconds to the first training step of the last model of the first suite that has some, by framework."""
    for suite in evidence.performance.suites:
        rows = [row for row in smallest(suite) if row.mode == "training_step" and first_step(suite, row) is not None]
        if rows:
            return {row.framework: first_step(suite, row) or 0.0 for row in rows if row.subject == rows[-1].subject}
    return {}


def _deployment(evidence: Evidence) -> Finding:
    """Formats whose artefact gave the outputs of its source, and whose programs take JPEG files."""
    rows = [row for row in evidence.performance.exports if row.passed]
    kinds = {name: len({row.format for row in rows if row.source == name}) for name in FRAMEWORKS}
    if not rows:
        return Finding("No export is recorded", NOT_MEASURED)
    raw = [name for name in FRAMEWORKS if any(row.source == name and row.serve_images for row in rows)]
    most = max(kinds.values())
    leads = [name for name, count in kinds.items() if count == most]
    told = f"Formats exported and shown equal in a runtime of their own: {_in_words({n: str(c) for n, c in kinds.items()})}"
    signature = f"; a program that takes JPEG files: {', '.join(brief(name) for name in raw) or 'none'}"
    return Finding(
        told + signature, _verdict(leads == ["tensorflow"] and raw == ["tensorflow"], "tensorflow" not in leads), "export/matrix.json"
    )


def _accuracies(evidence: Evidence) -> Finding:
    runs = [run for run in evidence.records.runs if run.model == "resnet20"]
    groups = {name: [run.test_accuracy for run in runs if run.framework == name] for name in {run.framework for run in runs}}
    means = [sum(group) / len(group) for group in groups.values()]
    if len(means) < 2:
        return Finding("No training in several frameworks is recorded", NOT_MEASURED)
    apart = max(means) - min(means)
    text = f"ResNet-20 on {runs[0].data}, {len(means)} frameworks: {points(apart)} apart; ImageNet was not trained"
    return Finding(text, _verdict(apart <= 0.05, apart > 0.05), "cifar10")


def _cifar(evidence: Evidence) -> Finding:
    runs = [run for run in evidence.records.runs if run.model == "resnet18_cifar"]
    if not runs:
        return Finding("No run is recorded", NOT_MEASURED)
    lowest = min(run.test_accuracy for run in runs)
    return Finding(f"{lowest:.2%} on {runs[0].data}", _verdict(lowest > 0.85, lowest <= 0.85), "cifar10")


EXPECTED: Sequence[Expectation] = (
    Expectation("§11.10, success", "JAX has the highest throughput, thanks to XLA", _throughput),
    Expectation("§11.10, success", "The same, of a training step of ResNet-50", _training_step),
    Expectation("§11.6, lab 3", "A transformer block shows what XLA gains over PyTorch", _xla),
    Expectation("§11.3.1", "JAX is faster under jit", _jit),
    Expectation("§11.3.2", "A loop over the batch gives way to vmap", _vmap),
    Expectation("§11.8, question 2", "XLA needs less memory, as it does without intermediate results", _memory),
    Expectation("§11.2.2", "TensorFlow is faster under tf.function", _graph),
    Expectation("§11.2, §11.2.3", "For input pipelines of high throughput there is tf.data", _pipelines),
    Expectation("§11.10, success", "PyTorch is the easiest to debug, being dynamic", _debugging),
    Expectation("§11.10, success", "TensorFlow has the best features for deployment", _deployment),
    Expectation("§11.10, success", "The frameworks' ImageNet accuracies are within 5 %", _accuracies),
    Expectation("§11.6, lab 1", "ResNet-18 from scratch passes 85 % on CIFAR-10", _cifar),
    Expectation("§11.1.5", "Mixed precision makes training 2 to 3 times as fast on a GPU", _absent("No GPU was there")),
    Expectation("§11.6, lab 4; §11.10", "Four devices are at least 3.2 times as fast as one", _absent("Distribution is not there yet")),
)  # fmt: skip
"""All that the chapter says of speed, memory, debugging and deployment and that a record can speak to, in the order of the subject."""
