"""The delay of the first byte is compared with the vendor's own, however small it is."""

from __future__ import annotations

from bench.first_byte import measure, show


async def test_ways_are_compared_although_the_relay_adds_nothing() -> None:
    async def ask() -> float:
        return 1.5

    late = await measure(dict.fromkeys(("straight", "relay", "pomelo raw"), ask), calls=2, at_once=100)
    assert {len(values) for values in late.values()} == {100}
    assert "pomelo raw         1.50     1.50      0.00\n" in show(late)
