"""Values that are frozen for the type checker alone."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from pomelo.values import value_type


@value_type(frozen=True, slots=True)
class Point:
    x: int
    y: int = 0


def test_a_value_is_compared_hashed_and_replaced_as_a_frozen_dataclass() -> None:
    assert Point(1) == Point(1, 0) != Point(1, 2)
    assert {Point(1), Point(1, 0), Point(2)} == {Point(1), Point(2)}
    assert replace(Point(1), y=3) == Point(1, 3)
    assert [field.name for field in fields(Point)] == ["x", "y"]
    assert repr(Point(1)) == "Point(x=1, y=0)"


def test_a_value_has_no_other_attributes_and_the_type_checker_refuses_assignments() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.z = 1  # type: ignore[attr-defined]
    point.x = 2  # type: ignore[misc]  # mypy reports an unused comment if it is allowed
