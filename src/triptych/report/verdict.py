"""What the report claims, and whether the evidence shows it: the headline is computed here, never written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from triptych.core.contract import FRAMEWORKS
from triptych.core.tolerance import CUSTOMARY_FORWARD_CHECK
from triptych.report.evidence import Evidence, FaultTable

# What a ResNet-20 must reach on the digits, and how near the frameworks must be to each other. Rounding drives the full float32 runs apart,
# so that their accuracies scatter, and means over seeds are compared; in a short float64 run one image on the edge between two classes is
# all that may differ.
LEAST_ACCURACY = 0.97
FLOAT32_SPREAD = 0.005
FLOAT64_IMAGES = 1
COUNTS = {1: "One framework", 2: "Two frameworks", 3: "Three frameworks"}


@dataclass(frozen=True, slots=True)
class Claim:
    """One thing the report says: what was measured, what was asked, and whether it holds (None: not shown)."""

    text: str
    measured: str
    asked: str
    holds: bool | None
    command: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """PASS when every claim holds, FAIL when one does not, INCOMPLETE when one is not shown."""

    word: str
    headline: str
    claims: tuple[Claim, ...]

    @property
    def tone(self) -> str:
        """How it is colored: pass, fail or open; the word stands beside the color."""
        return {"PASS": "pass", "FAIL": "fail"}.get(self.word, "open")


def verdict(evidence: Evidence) -> Verdict:
    """The headline and the claims below it."""
    claims = tuple(_claims(evidence))
    failed, unshown = any(claim.holds is False for claim in claims), any(claim.holds is None for claim in claims)
    word = "FAIL" if failed else "INCOMPLETE" if unshown else "PASS"
    return Verdict(word, f"{COUNTS[max(1, len(frameworks(evidence)))]}, one model: {word}", claims)


def frameworks(evidence: Evidence) -> list[str]:
    """The frameworks of the evidence in the order of the contract."""
    trained = [run.framework for training in (evidence.training, evidence.short_training) if training for run in training.runs]
    compared = [rung.pair or "" for certificate in evidence.certificates for rung in certificate.rungs]
    return [name for name in FRAMEWORKS if name in trained or any(name in pair for pair in compared)]


def _claims(evidence: Evidence) -> Iterator[Claim]:
    yield from _parity(evidence)
    yield from _training(evidence)
    yield _short_training(evidence)
    yield from _faults(evidence)


def _parity(evidence: Evidence) -> Iterator[Claim]:
    text, command = "The same model: every rung of the ladder holds", evidence.commands.get("parity")
    if not evidence.certificates:
        yield Claim(text, evidence.why_missing("certificates"), "every rung", None, command)
    for certificate in evidence.certificates:
        passed, total = sum(rung.passed for rung in certificate.rungs), len(certificate.rungs)
        holds = certificate.verdict == "pass" and passed == total > 0
        idle = {rung["number"] for rung in certificate.not_applicable}
        shown = f"{passed} of {total} rungs" + "".join(f"; rung {number} does not apply" for number in sorted(idle))
        yield Claim(f"{text}, {certificate.model}", shown, "every rung", holds, command)


def _training(evidence: Evidence) -> Iterator[Claim]:
    training, command = evidence.training, evidence.commands.get("training")
    least, spread = f"≥ {LEAST_ACCURACY:.0%}", f"≤ {100 * FLOAT32_SPREAD:g} points"
    if training is None or not training.runs:
        yield Claim("The same training: test accuracy", evidence.why_missing("training"), least, None, command)
        return
    accuracies = [run.accuracy for run in training.runs]
    lowest = min(min(run.correct) / run.test_images for run in training.runs)
    gap = max(accuracies) - min(accuracies)
    name = f"{training.model} on {training.dataset}, {training.precision}"
    seeds = len(training.runs[0].correct)
    apart = f"{name}: accuracies apart" + (f", means of {seeds} seeds" if seeds > 1 else "")
    yield Claim(f"{name}: lowest test accuracy", f"{lowest:.2%}", least, lowest >= LEAST_ACCURACY, command)
    yield Claim(apart, f"{100 * gap:.2f} points", spread, gap <= FLOAT32_SPREAD + 1e-12, command)


def _short_training(evidence: Evidence) -> Claim:
    training, command = evidence.short_training, evidence.commands.get("short_training")
    asked = f"≤ {FLOAT64_IMAGES} image"
    if training is None or not training.runs:
        return Claim("A short float64 run: test images apart", evidence.why_missing("short_training"), asked, None, command)
    gap = max(max(correct) - min(correct) for correct in zip(*(run.correct for run in training.runs), strict=True))
    name = f"{training.model} on {training.dataset}, {training.precision}, short run"
    return Claim(f"{name}: test images apart", f"{gap} of {training.runs[0].test_images:,}", asked, gap <= FLOAT64_IMAGES, command)


def _faults(evidence: Evidence) -> Iterator[Claim]:
    text, command = "The proof can fail: every planted fault is caught", evidence.commands.get("faults")
    if not evidence.faults:
        yield Claim(text, evidence.why_missing("faults"), "all, and clean passes", None, command)
    for table in evidence.faults:
        caught, total = sum(fault.caught for fault in table.faults), len(table.faults)
        holds = caught == total > 0 and table.clean == "pass"
        yield Claim(f"{text}, {table.model}", f"{caught} of {total}, clean: {table.clean}", "all, and clean passes", holds, command)
        right = sum(fault.right_rung and fault.right_layer for fault in table.faults)
        yield Claim(f"The guilty rung and layer are named, {table.model}", f"{right} of {total}", "all", right == total > 0, command)


def missed_by_usual_check(table: FaultTable) -> list[str]:
    """Names of the faults that a float32 forward check at 1e-4 would not have seen in at least one framework."""
    quiet = [f.name for f in table.faults if f.float32_forward_error is not None and f.float32_forward_error <= CUSTOMARY_FORWARD_CHECK]
    return list(dict.fromkeys(quiet))
