"""Network addresses as text."""

from __future__ import annotations

from pomelo.addresses import split_address


def test_addresses_are_split_at_the_port() -> None:
    assert split_address("localhost:80") == ("localhost", 80)
    assert split_address("[::1]:0") == ("::1", 0)
