"""Network addresses as text."""

from __future__ import annotations

import pytest

from pomelo.addresses import join_address, split_address


@pytest.mark.parametrize("text", ["h:65536", "h:-1", "h:", ":80", "h", "::1:80", "h:٣"])
def test_text_without_a_host_or_a_port_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="must be host:port"):
        split_address(text)


@pytest.mark.parametrize("text", ["localhost:80", "[::1]:0", "192.0.2.1:65535"])
def test_a_joined_address_is_the_text_that_was_split(text: str) -> None:
    assert join_address(*split_address(text)) == text


def test_addresses_are_split_at_the_port() -> None:
    assert split_address("localhost:80") == ("localhost", 80)
    assert split_address("[::1]:0") == ("::1", 0)
