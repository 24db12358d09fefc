"""The end of a page of records as text: only what a page has returned is one."""

from __future__ import annotations

import pytest

from pomelo.stores.records import decode_position, encode_position


def test_a_position_is_exact() -> None:
    for at, row in ((1_800_000_000.123456, 7), (0.1 + 0.2, 2**40)):
        assert decode_position(encode_position(at, row)) == (at, row)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        encode_position(1.5, 300).upper(),
        encode_position(1.5, 300) + "00",
        encode_position(float("nan"), 1),
    ],
    ids=["empty", "no digits", "capitals", "too long", "no number"],
)
def test_another_text_is_no_position(text: str) -> None:
    with pytest.raises(ValueError, match="after must be"):
        decode_position(text)
