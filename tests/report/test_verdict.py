"""The headline follows from the claims, and each claim can fail."""

from __future__ import annotations

import dataclasses

import pytest

from triptych.report.verdict import frameworks, missed_by_usual_check, verdict


def with_correct(training, *correct):
    """`training` with other numbers of correct test images: a tuple a framework, one number a seed."""
    runs = tuple(dataclasses.replace(run, correct=n) for run, n in zip(training.runs, correct, strict=True))
    return dataclasses.replace(training, runs=runs)


def test_everything_holds(evidence):
    outcome = verdict(evidence)
    assert (outcome.word, outcome.tone, outcome.headline) == ("PASS", "pass", "Three frameworks, one model: PASS")
    assert [claim.holds for claim in outcome.claims] == [True] * 6


def test_two_frameworks_are_called_two(evidence):
    training = dataclasses.replace(evidence.training, runs=evidence.training.runs[:2])
    rungs = tuple(dataclasses.replace(rung, pair="pytorch / tensorflow") for rung in evidence.certificates[0].rungs)
    certificate = dataclasses.replace(evidence.certificates[0], rungs=rungs)
    two = dataclasses.replace(evidence, training=training, short_training=None, certificates=(certificate,))
    assert frameworks(two) == ["pytorch", "tensorflow"]
    assert verdict(two).headline.startswith("Two frameworks")


@pytest.mark.parametrize(
    ("correct", "word"),
    [
        (((887,), (883,), (886,)), "PASS"),
        (((871,), (872,), (872,)), "FAIL"),
        (((887,), (882,), (886,)), "FAIL"),
        (((890, 884), (884, 888), (887, 886)), "PASS"),
        (((890, 870), (882, 878), (880, 880)), "FAIL"),
        (((890, 887, 885), (883, 884, 881), (886, 886, 886)), "FAIL"),
    ],
    ids=["four images apart", "below 97%", "0.56 points apart", "one seed apart, not the mean", "one seed below 97%", "means apart"],
)
def test_float32_accuracies(evidence, correct, word):
    assert verdict(dataclasses.replace(evidence, training=with_correct(evidence.training, *correct))).word == word


@pytest.mark.parametrize(("correct", "word"), [(((300,), (301,), (300,)), "PASS"), (((300,), (302,), (300,)), "FAIL")])
def test_float64_accuracies_within_one_image(evidence, correct, word):
    assert verdict(dataclasses.replace(evidence, short_training=with_correct(evidence.short_training, *correct))).word == word


def test_one_failed_rung_fails_the_report_even_if_the_certificate_says_pass(evidence):
    certificate = evidence.certificates[0]
    rungs = (dataclasses.replace(certificate.rungs[0], passed=False), *certificate.rungs[1:])
    assert verdict(dataclasses.replace(evidence, certificates=(dataclasses.replace(certificate, rungs=rungs),))).word == "FAIL"
    assert verdict(dataclasses.replace(evidence, certificates=(dataclasses.replace(certificate, rungs=()),))).word == "FAIL"


def test_an_uncaught_fault_or_an_unclean_model_fails(evidence):
    table = evidence.faults[0]
    uncaught = dataclasses.replace(table, faults=(dataclasses.replace(table.faults[0], caught=False, rung=None), *table.faults[1:]))
    elsewhere = dataclasses.replace(table, faults=(dataclasses.replace(table.faults[0], right_layer=False), *table.faults[1:]))
    for bad in (uncaught, elsewhere, dataclasses.replace(table, clean="fail"), dataclasses.replace(table, faults=())):
        assert verdict(dataclasses.replace(evidence, faults=(bad,))).word == "FAIL"


def test_a_failure_outweighs_what_is_not_shown(evidence):
    partial = dataclasses.replace(evidence, training=None, faults=(dataclasses.replace(evidence.faults[0], clean="fail"),))
    assert verdict(partial).word == "FAIL"


def test_what_the_usual_check_misses(evidence):
    missed = missed_by_usual_check(evidence.faults[0])
    assert "batch_norm_momentum" in missed
    assert "batch_norm_epsilon" in missed
    assert "conv_same_padding" not in missed
    assert "resize_uint8" not in missed
    assert len(missed) == len(set(missed))
