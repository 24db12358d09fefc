"""Bringing parameters into what a route's model takes."""

import pytest

from pomelo.catalog import Route
from pomelo.providers.fit import fitted

ROUTE = Route(
    "acme",
    "acme-1",
    drop=frozenset(("seed",)),
    clamp={"temperature": (0, 1, 0), "width": (256, 1440, 32), "max_tokens": (1.0, 4096.0, 0)},
)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", 7, None),
        ("top_p", 0.3, 0.3),
        ("temperature", 1.7, 1.0),
        ("temperature", 0.5, 0.5),
        ("width", 1000, 992),
        ("width", 1010, 1024),
        ("width", 10, 256),
        ("width", 9000, 1440),
        ("max_tokens", 9000, 4096),
    ],
)
def test_a_value_is_dropped_or_brought_into_range_and_keeps_its_type(
    name: str, value: float, expected: float | None
) -> None:
    got = fitted(ROUTE, name, value)
    assert got == expected
    assert expected is None or type(got) is type(value)
