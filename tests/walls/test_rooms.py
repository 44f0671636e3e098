"""Mirrored rooms: the three framework packages have the same files and fulfil one contract."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from triptych.core import contract

PACKAGE = Path(__file__).parents[2] / "src" / "triptych"
ROOMS = [row.package.rpartition(".")[2] for row in contract.FRAMEWORKS.values()]


def names(room: str) -> set[str]:
    """Python files of a room, relative to it."""
    return {str(file.relative_to(PACKAGE / room)) for file in (PACKAGE / room).rglob("*.py")}


def public(protocol: type) -> dict[str, inspect.Signature]:
    """The methods that a protocol of the contract asks for."""
    return {
        name: inspect.signature(value) for name, value in vars(protocol).items() if inspect.isfunction(value) and not name.startswith("_")
    }


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_have_the_same_files(room: str) -> None:
    assert names(room) == set.union(*map(names, ROOMS))
    assert {"__init__.py", "layers.py", "resnet.py", "mlp.py", "weights.py", "optim.py", "train.py", "data.py"} <= names(room)


@pytest.mark.parametrize("framework", contract.FRAMEWORKS)
def test_a_room_fulfils_the_contract(framework: str) -> None:
    if framework not in contract.installed():
        pytest.skip(f"{framework} is not installed")
    room = contract.load(framework)
    for name, wanted in public(contract.Room).items():
        given, asked = inspect.signature(getattr(room, name)).parameters, [one for one in wanted.parameters if one != "self"]
        assert list(given)[: len(asked)] == asked, name
        assert all(given[more].default is not inspect.Parameter.empty for more in list(given)[len(asked) :]), name
