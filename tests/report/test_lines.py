"""The size of code is a property of its syntax tree: formatting, comments and docstrings change nothing."""

from __future__ import annotations

import pytest

from triptych.report import lines

TERSE = "import a; x = 1\ndef f(y):\n    if y: return a.b(y, x)\n    return 0\n"
WORDY = '''"""A module."""

import a  # why

x = 1


def f(
    y,
):
    """Says what f does."""
    if y:
        # because
        return a.b(
            y,
            x,
        )
    return 0
'''


def test_formatting_and_documentation_do_not_count():
    assert lines.count(TERSE) == lines.count(WORDY) == (6, 6)


def test_a_statement_more_counts():
    assert lines.count(TERSE + "z = 2\n")[0] == 7


@pytest.mark.parametrize("source", ['class A:\n    """Only a docstring."""\n', 'def f():\n    """Only a docstring."""\n'])
def test_a_body_of_nothing_but_a_docstring(source):
    assert lines.count(source)[0] == 1


def test_rooms_are_counted_in_the_contracts_order_and_only_what_is_there(tmp_path):
    for room, file in (("in_jax", "resnet.py"), ("in_pytorch", "train.py"), ("in_pytorch", "layers.py"), ("core", "spec.py")):
        (tmp_path / room).mkdir(exist_ok=True)
        (tmp_path / room / file).write_text(TERSE)
    counts = lines.count_rooms(tmp_path)
    assert [(c.framework, c.file, c.statements) for c in counts] == [
        ("pytorch", "layers.py", 6),
        ("pytorch", "train.py", 6),
        ("jax", "resnet.py", 6),
    ]
