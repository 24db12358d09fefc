"""What tasks cost: exact, never less for more, never nothing for something, and the same when read again."""

from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.catalog import Catalog
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.pricing import Used, affordable, cost, read, written

UNITS = [unit for unit in PriceUnit.values() if unit]
MEASURES = {
    PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS: ("input_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: ("output_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_IMAGE: ("images", 1),
    PriceUnit.PRICE_UNIT_MEGAPIXEL: ("pixels", 1_000_000),
    PriceUnit.PRICE_UNIT_THOUSAND_CHARACTERS: ("characters", 1_000),
    PriceUnit.PRICE_UNIT_AUDIO_MINUTE: ("audio_ms", 60_000),
}
FIELDS = [name for name, _ in MEASURES.values()]

counts = st.integers(0, 10**10)
a_price = st.integers(0, 10**9)
prices = st.dictionaries(st.sampled_from(UNITS), a_price, min_size=1)
used = st.builds(Used, **dict.fromkeys(FIELDS, counts))


def test_every_unit_of_the_contract_has_a_measure() -> None:
    assert set(UNITS) == set(MEASURES)


@given(used, prices)
def test_a_cost_is_the_exact_sum_rounded_up_once(given_used: Used, given_prices: Any) -> None:
    exact = sum(
        (
            Fraction(getattr(given_used, MEASURES[u][0])) * micros / MEASURES[u][1]
            for u, micros in given_prices.items()
        ),
        Fraction(0),
    )
    assert cost(given_used, given_prices) == ceil(exact)


@given(used, used, prices)
def test_more_of_anything_never_costs_less(one: Used, other: Used, given_prices: Any) -> None:
    more = Used(**{name: max(getattr(one, name), getattr(other, name)) for name in FIELDS})
    assert cost(more, given_prices) >= max(cost(one, given_prices), cost(other, given_prices))


@given(st.sampled_from(UNITS), st.integers(1, 10**9), st.integers(1, 10**9))
def test_what_was_used_at_a_price_is_never_free(unit: Any, micros: int, count: int) -> None:
    assert cost(Used(**{MEASURES[unit][0]: count}), {unit: micros}) >= 1


@given(prices)
def test_nothing_costs_nothing(given_prices: Any) -> None:
    assert cost(Used(), given_prices) == 0


@given(
    micros=st.integers(0, 10**12),
    tokens=st.integers(0, 10**7),
    of_input=a_price,
    of_output=st.integers(1, 10**9),
)
def test_affordable_is_the_greatest_output_that_can_be_paid(
    micros: int, tokens: int, of_input: int, of_output: int
) -> None:
    given_prices = {
        PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS: of_input,
        PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS: of_output,
    }
    most = affordable(micros, tokens, given_prices)
    if most < 0:
        assert cost(Used(input_tokens=tokens), given_prices) > micros
    else:
        assert cost(Used(input_tokens=tokens, output_tokens=most), given_prices) <= micros
        assert cost(Used(input_tokens=tokens, output_tokens=most + 1), given_prices) > micros


def test_any_output_can_be_paid_where_it_costs_nothing() -> None:
    given_prices = {PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS: 5}
    assert cost(Used(1, affordable(1, 1, given_prices)), given_prices) == 1
    assert affordable(0, 1, given_prices) == -1


@given(st.dictionaries(st.sampled_from(UNITS), a_price))
def test_written_prices_are_read_as_they_were(given_prices: Any) -> None:
    assert read(written(given_prices)) == given_prices


@given(used, prices)
def test_a_record_is_enough_to_count_again(given_used: Used, given_prices: Any) -> None:
    assert cost(given_used, read(written(given_prices))) == cost(given_used, given_prices)


@pytest.mark.parametrize("text", ["image", "image=", "=4", "sausage=4", "image=4=5", "image=x", ","])
def test_what_nobody_wrote_is_no_price(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        read(text)


def test_every_model_of_the_catalogue_costs_something_for_what_it_does() -> None:
    for model in Catalog.load().models.values():
        for route in model.routes:
            given_prices, version = model.priced(route)
            assert version
            whole = Used(**dict.fromkeys(FIELDS, 1))
            assert cost(whole, given_prices) >= 1, model.name
