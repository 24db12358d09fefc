"""Credits as text: exact, short, and any other text is refused."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.money import MAX_CREDITS, MAX_TOTAL_CREDITS, MICROS, format_credits, parse_credits


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0"),
        (1, "0.000001"),
        (10, "0.00001"),
        (100_000, "0.1"),
        (1_000_000, "1"),
        (12_500_000, "12.5"),
        (10_000_000, "10"),
        (-250_000, "-0.25"),
        (9_007_199_254_740_993, "9007199254.740993"),
    ],
)
def test_credits_are_formatted_as_the_shortest_exact_text(micros: int, text: str) -> None:
    assert format_credits(micros) == text


@given(st.integers(-(2**63), 2**63 - 1))
def test_the_text_is_the_same_number_in_json(micros: int) -> None:
    assert json.loads(format_credits(micros), parse_float=Decimal, parse_int=Decimal) * MICROS == micros


@given(st.integers(0, MAX_CREDITS * MICROS))
def test_formatted_credits_are_parsed_to_the_same_number(micros: int) -> None:
    assert parse_credits(format_credits(micros)) == micros


def test_the_total_of_an_account_is_exact_as_a_double() -> None:
    assert MAX_TOTAL_CREDITS == 9_000_000_000
    assert MAX_TOTAL_CREDITS * MICROS < 2**53


def test_up_to_six_decimal_places_are_accepted() -> None:
    assert parse_credits("1.000000") == 1_000_000
    assert parse_credits("007.5") == 7_500_000
    assert parse_credits("1000000000") == MAX_CREDITS * MICROS


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", "1e3", "1.", ".5", "1.0000001", "1,5", "1_000", " 1", "1\n", "٣", "nan", "1000000001"],
)
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"credits"):
        parse_credits(text)


def test_a_text_that_is_refused_is_quoted_up_to_40_characters() -> None:
    with pytest.raises(ValueError, match=f"^'{'x' * 40}' is not a number of credits"):
        parse_credits("x" * 41)
