"""Values are frozen dataclasses to everyone who asks, without the dataclasses module."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest

from pykvm.registers import DescriptorTable, Registers
from pykvm.values import Value, replace


class Point(Value):
    """A point."""

    x: int
    y: int = 0


def test_fields_are_given_by_position_or_name() -> None:
    assert Point(1, 2) == Point(x=1, y=2) == Point(1, y=2)


def test_default_fills_a_missing_field() -> None:
    assert Point(1).y == 0


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "lacks a value for 'x'"),
        ((1, 2, 3), {}, "takes 2 values but 3"),
        ((1,), {"x": 2}, "got two values for 'x'"),
        ((1,), {"z": 2}, "has no field 'z'"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[int, ...], kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Point(*args, **kwargs)


def test_value_cannot_be_changed() -> None:
    point = Point(1)

    with pytest.raises(dataclasses.FrozenInstanceError, match="'x'"):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError, match="'x'"):
        del point.x
    assert point == Point(1)


def test_value_has_no_other_attributes() -> None:
    assert not hasattr(Point(1), "__dict__")


def test_equality_asks_for_the_same_class() -> None:
    class Other(Value):
        x: int
        y: int = 0

    assert Point(1) != Other(1)
    assert Point(1) != (1, 0)


def test_equal_values_hash_alike() -> None:
    assert len({Point(1, 2), Point(1, 2), Point(2, 1)}) == 2


def test_repr_is_the_call_that_makes_it() -> None:
    assert repr(Point(1, 2)) == "Point(x=1, y=2)"


def test_match_takes_fields_by_position_and_name() -> None:
    match Point(1, 2):
        case Point(1, y=y):
            pass
    assert y == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copies_are_equal(duplicate: object) -> None:
    value = Registers(rax=1 << 63, rip=0xFFF0)
    assert duplicate(value) == value  # type: ignore[operator]


def test_replace_changes_some_fields() -> None:
    assert replace(Point(1, 2), y=3) == dataclasses.replace(Point(1, 2), y=3) == Point(1, 3)


def test_replace_refuses_an_unknown_field() -> None:
    with pytest.raises(TypeError, match="has no field 'z'"):
        replace(Point(1), z=1)


def test_dataclasses_module_knows_values() -> None:
    assert dataclasses.is_dataclass(Point)
    assert [field.name for field in dataclasses.fields(Point)] == ["x", "y"]
    assert dataclasses.fields(Point)[0].default is dataclasses.MISSING
    assert dataclasses.asdict(DescriptorTable(1, 2)) == {"base": 1, "limit": 2}
    assert dataclasses.astuple(Point(1, 2)) == (1, 2)


def test_defining_values_does_not_load_dataclasses() -> None:
    program = "import sys, pykvm.registers, pykvm.exits; sys.exit('dataclasses' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
