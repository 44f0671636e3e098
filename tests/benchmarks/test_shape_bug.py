"""What is counted of an error, on errors made here, and one bug planted for real in each framework."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import shape_bug
from debugging import message
from debugging.bugs import BUGS, MODES

from triptych.core import contract

FLAX = 'For parameter "kernel" in "/layer2/0/conv1", expected to generate shape (3, 3, 16, 32), but the existing has shape (3, 3, 17, 32).'
TORCH = "Given groups=1, weight of size [32, 17, 3, 3], expected input[2, 16, 32, 32] to have 17 channels, but got 16 channels instead"


def raised(act: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:
        act()
    return caught.value


@pytest.mark.parametrize(
    ("text", "layer", "named"),
    [
        (FLAX, "layer2.0.conv1", True),
        (FLAX, "conv1", False),
        (FLAX, "layer1.0.conv1", False),
        ("Input 0 of layer 'fc' is incompatible", "fc", True),
        ("return self.fc(self.avgpool(x))", "fc", True),
        ('in "/fc", the given', "fc", True),
        (TORCH, "layer2.0.conv1", False),
        ("layer2.0.conv12 is wrong", "layer2.0.conv1", False),
        ("fcs and fc_1", "fc", False),
    ],
)
def test_a_layer_is_named_by_its_whole_path_only(text: str, layer: str, named: bool) -> None:
    assert message.names(text, layer) is named


@pytest.mark.parametrize(
    ("text", "number", "there"),
    [
        (TORCH, 17, True),
        (TORCH, 6, False),
        ("(2x64 and 65x10)", 64, True),
        ("(2x64 and 65x10)", 65, True),
        ('File "a.py", line 64, in f', 64, False),
        ("size (2, s27, 32)", 7, False),
        ("float64", 64, False),
        ("0.64", 64, False),
    ],
)
def test_a_size_is_a_number_of_its_own(text: str, number: int, there: bool) -> None:
    assert message.has_number(text, number) is there


def test_what_changes_from_machine_to_machine_is_left_out_of_a_message() -> None:
    assert message.plain('File "/home/me/.venv/lib/torch/nn/conv.py", line 3, at 0x7f16ab') == 'File "conv.py", line 3, at 0x...'


def test_the_cause_and_the_lines_told_in_the_message_count() -> None:
    here = Path(__file__)

    def chained() -> None:
        try:
            raise ValueError("inner")
        except ValueError as inner:
            raise RuntimeError(f'from user code: File "{here}", line 1, in forward') from inner

    told = message.told(raised(chained), BUGS["linear"], here.parent)
    assert told["exception"] == "RuntimeError"
    assert told["model_line"] == here.read_text().splitlines()[0]
    assert told["traceback_lines"] > 10
    assert (told["names_layer"], told["names_both_sizes"], told["shows_call"]) == (False, False, False)


@pytest.mark.parametrize("framework", list(contract.FRAMEWORKS))
def test_the_bug_is_planted_and_its_sizes_are_told(framework: str) -> None:
    contract.load(framework)
    program = importlib.import_module(f"debugging.{contract.framework(framework).package.rpartition('.')[2]}")
    row = shape_bug.measure(framework, program, BUGS["linear"], MODES[0])
    assert row["stage"] == ("building" if framework == "tensorflow" else "calling")
    assert row["names_both_sizes"] is True
    assert row["names_layer"] is (framework != "pytorch")
    assert row["shows_call"] is True
