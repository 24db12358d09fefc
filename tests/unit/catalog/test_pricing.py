"""What tasks cost: exact, never less for more, never nothing for something, and the same when read again."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import (
    Prices,
    Usage,
    affordable_output_tokens,
    cost,
    decode_prices,
    encode_prices,
    max_cost,
)
from pomelo.gen.v1.model_service_pb2 import PriceUnit

INPUT = PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS
CACHED = PriceUnit.PRICE_UNIT_MILLION_CACHED_INPUT_TOKENS
WRITTEN = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_INPUT_TOKENS
WRITTEN_1H = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_1H_INPUT_TOKENS
OUTPUT = PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS
REPORTED = PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR

UNITS = [unit for unit in PriceUnit.values() if unit]
OF_CACHES = {
    CACHED: "cached_input_tokens",
    WRITTEN: "cache_write_input_tokens",
    WRITTEN_1H: "cache_write_1h_input_tokens",
}
MEASURES = {
    INPUT: ("input_tokens", 1_000_000),
    OUTPUT: ("output_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_IMAGE: ("images", 1),
    PriceUnit.PRICE_UNIT_MEGAPIXEL: ("pixels", 1_000_000),
    PriceUnit.PRICE_UNIT_THOUSAND_CHARACTERS: ("characters", 1_000),
    PriceUnit.PRICE_UNIT_AUDIO_MINUTE: ("audio_ms", 60_000),
}
FIELDS = [name for name, _ in MEASURES.values()]

counts = st.integers(0, 10**10)
a_price = st.integers(0, 10**9)
tables = st.dictionaries(st.sampled_from(UNITS), a_price, min_size=1)
tiers = st.dictionaries(st.integers(1, 10**10), tables, max_size=3)
prices = st.builds(lambda units, above: Prices(units, tuple(sorted(above.items()))), tables, tiers)
plain = st.builds(Usage, **dict.fromkeys(FIELDS, counts))


@st.composite
def used(draw: Any) -> Usage:
    """Counts of which those of the cache are parts of the input; of half of them the provider reports no cost."""
    base = draw(plain)
    cached = draw(st.integers(0, base.input_tokens))
    wrote = draw(st.integers(0, base.input_tokens - cached))
    an_hour = draw(st.integers(0, wrote))
    return replace(
        base,
        cached_input_tokens=cached,
        cache_write_input_tokens=wrote,
        cache_write_1h_input_tokens=an_hour,
        provider_micros=draw(st.just(0) | st.integers(1, 10**12)),
    )


def test_every_unit_of_the_contract_has_a_measure() -> None:
    assert set(UNITS) == set(MEASURES) | set(OF_CACHES) | {REPORTED}


@given(used(), prices)
def test_a_cost_is_the_exact_sum_rounded_up_once(given_used: Usage, given_prices: Prices) -> None:
    units = given_prices.units
    for least, tier in given_prices.tiers:
        if given_used.input_tokens >= least:
            units = tier
    ordinary = units.get(INPUT, 0)
    anew = units.get(WRITTEN, ordinary)
    tokens = [
        (given_used.cached_input_tokens, units.get(CACHED, ordinary)),
        (given_used.cache_write_input_tokens - given_used.cache_write_1h_input_tokens, anew),
        (given_used.cache_write_1h_input_tokens, units.get(WRITTEN_1H, anew)),
    ]
    rest = given_used.input_tokens - sum(count for count, _ in tokens)
    exact = sum(
        (Fraction(count * micros, 1_000_000) for count, micros in [*tokens, (rest, ordinary)]), Fraction(0)
    )
    for unit, (name, scale) in MEASURES.items():
        if unit != INPUT:
            exact += Fraction(getattr(given_used, name) * units.get(unit, 0), scale)
    if given_used.provider_micros and REPORTED in units:
        exact = Fraction(given_used.provider_micros * units[REPORTED], 1_000_000)
    assert cost(given_used, given_prices) == ceil(exact)


@given(plain, plain, tables)
def test_more_of_anything_never_costs_less(one: Usage, other: Usage, units: Any) -> None:
    given_prices = Prices(units)
    more = Usage(**{name: max(getattr(one, name), getattr(other, name)) for name in FIELDS})
    assert cost(more, given_prices) >= max(cost(one, given_prices), cost(other, given_prices))


@given(used(), plain, prices)
def test_the_worst_case_covers_every_split_of_the_input_and_every_tier(
    given_used: Usage, beyond: Usage, given_prices: Prices
) -> None:
    most = Usage(**{name: getattr(given_used, name) + getattr(beyond, name) for name in FIELDS})
    assert cost(replace(given_used, provider_micros=0), given_prices) <= max_cost(most, given_prices)


@pytest.mark.parametrize(("tokens", "price"), [(99, 1), (100, 3), (101, 3), (999, 3), (1_000, 2)])
def test_a_tier_begins_at_exactly_its_tokens(tokens: int, price: int) -> None:
    tiered = Prices(
        {INPUT: 10**6, OUTPUT: 10**6},
        ((100, {INPUT: 3 * 10**6, OUTPUT: 3 * 10**6}), (1_000, {INPUT: 2 * 10**6, OUTPUT: 2 * 10**6})),
    )
    assert cost(Usage(tokens, 5), tiered) == (tokens + 5) * price
    dearest = 1 if tokens < 100 else 3
    assert max_cost(Usage(tokens, 5), tiered) == (tokens + 5) * dearest
    assert affordable_output_tokens((tokens + 5) * dearest, tokens, tiered) == 5
    assert affordable_output_tokens(tokens * dearest, tokens, tiered) == 0
    assert affordable_output_tokens(tokens * dearest - 1, tokens, tiered) == -1


def without_reports(units: Any) -> Any:
    """A price table without that of a reported cost."""
    return {unit: micros for unit, micros in units.items() if unit != REPORTED}


@given(used(), prices, counts)
def test_a_price_of_reported_costs_changes_nothing_before_a_cost_is_reported(
    given_used: Usage, given_prices: Prices, micros: int
) -> None:
    counted = Prices(
        without_reports(given_prices.units),
        tuple((least, without_reports(tier)) for least, tier in given_prices.tiers),
    )
    assert max_cost(given_used, given_prices) == max_cost(given_used, counted)
    tokens = given_used.input_tokens
    assert affordable_output_tokens(micros, tokens, given_prices) == affordable_output_tokens(
        micros, tokens, counted
    )
    unreported = replace(given_used, provider_micros=0)
    assert cost(unreported, given_prices) == cost(unreported, counted)
    assert cost(given_used, counted) == cost(unreported, counted)


@given(used(), used(), tables, st.integers(1, 10**9))
def test_a_reported_cost_counts_alone(one: Usage, other: Usage, units: Any, micros: int) -> None:
    given_prices = Prices({**units, REPORTED: micros})
    costs = [cost(replace(each, provider_micros=7_000_000), given_prices) for each in (one, other)]
    assert costs == [7 * micros] * 2
    assert cost(Usage(provider_micros=1), given_prices) >= 1


@given(st.sampled_from(list(MEASURES)), st.integers(1, 10**9), st.integers(1, 10**9))
def test_what_was_used_at_a_price_is_never_free(unit: Any, micros: int, count: int) -> None:
    assert cost(Usage(**{MEASURES[unit][0]: count}), Prices({unit: micros})) >= 1


@pytest.mark.parametrize("unit", OF_CACHES)
def test_tokens_of_the_cache_are_never_free_at_a_price(unit: Any) -> None:
    an_hour = int(unit == WRITTEN_1H)
    given_used = Usage(
        input_tokens=1,
        cached_input_tokens=int(unit == CACHED),
        cache_write_input_tokens=int(unit != CACHED),
        cache_write_1h_input_tokens=an_hour,
    )
    assert cost(given_used, Prices({unit: 1})) == 1


@pytest.mark.parametrize(
    ("model", "given_used", "credits"),
    [
        ("gpt-4", Usage(10_000, 10, cached_input_tokens=9_000), "0.0078"),
        ("gpt-4", Usage(500_000, 1_000), "4.03"),
        ("gpt-4", Usage(272_000, 0), "1.088"),
        ("gpt-4", Usage(272_001, 0), "2.176008"),
        ("gpt-4", Usage(300_000, 0, cached_input_tokens=100_000, cache_write_input_tokens=100_000), "1.88"),
        ("gpt-3.5-turbo", Usage(1_000_000, 0), "0.2"),
        ("gpt-3.5-turbo", Usage(100_000, 1_000, cache_write_input_tokens=100_000), "0.013"),
        ("claude-3-sonnet", Usage(500_000, 1_000), "1.515"),
        (
            "claude-3-sonnet",
            Usage(3_000, 0, cached_input_tokens=1_000, cache_write_input_tokens=1_000),
            "0.00705",
        ),
        (
            "claude-3-opus",
            Usage(2_000, 0, cache_write_input_tokens=2_000, cache_write_1h_input_tokens=1_000),
            "0.01625",
        ),
        ("claude-3-haiku", Usage(1_000, 1_000, cached_input_tokens=1_000), "0.0051"),
        ("mixtral-8x7b", Usage(10_000, 0, cached_input_tokens=10_000), "0.00015"),
        ("mixtral-8x7b", Usage(10_000, 0, cache_write_input_tokens=10_000), "0.0015"),
    ],
)
def test_bills_are_those_of_the_price_lists(model: str, given_used: Usage, credits: str) -> None:  # noqa: A002
    entry = Catalog.load().resolve(model)
    assert cost(given_used, entry.priced(entry.routes[0])[0]) == Fraction(credits) * 1_000_000


@given(prices)
def test_nothing_costs_nothing(given_prices: Prices) -> None:
    assert cost(Usage(), given_prices) == 0


@given(
    micros=st.integers(0, 10**12),
    tokens=st.integers(0, 10**7),
    of_input=a_price,
    of_cache=a_price,
    of_output=st.integers(1, 10**9),
)
def test_affordable_is_the_greatest_output_that_can_be_paid(
    micros: int, tokens: int, of_input: int, of_cache: int, of_output: int
) -> None:
    given_prices = Prices({INPUT: of_input, WRITTEN: of_cache, OUTPUT: of_output})
    most = affordable_output_tokens(micros, tokens, given_prices)
    if most < 0:
        assert max_cost(Usage(input_tokens=tokens), given_prices) > micros
    else:
        assert max_cost(Usage(input_tokens=tokens, output_tokens=most), given_prices) <= micros
        assert max_cost(Usage(input_tokens=tokens, output_tokens=most + 1), given_prices) > micros


def test_any_output_can_be_paid_where_it_costs_nothing() -> None:
    given_prices = Prices({INPUT: 5})
    assert cost(Usage(1, affordable_output_tokens(1, 1, given_prices)), given_prices) == 1
    assert affordable_output_tokens(0, 1, given_prices) == -1


@given(prices)
def test_written_prices_are_read_as_they_were(given_prices: Prices) -> None:
    assert decode_prices(encode_prices(given_prices)) == given_prices


def test_prices_of_records_of_earlier_versions_are_read() -> None:
    assert decode_prices("million_input_tokens=4000000,million_output_tokens=20000000") == Prices(
        {INPUT: 4_000_000, OUTPUT: 20_000_000}
    )


@given(used(), prices)
def test_a_record_is_enough_to_count_again(given_used: Usage, given_prices: Prices) -> None:
    assert cost(given_used, decode_prices(encode_prices(given_prices))) == cost(given_used, given_prices)


@pytest.mark.parametrize(
    "text",
    [
        "image",
        "image=",
        "=4",
        "sausage=4",
        "image=4=5",
        "image=x",
        ",",
        "image=4;",
        "image=4;x:image=5",
        "image=4;5",
    ],
)
def test_what_nobody_wrote_is_no_price(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        decode_prices(text)


def test_every_model_of_the_catalogue_costs_something_for_what_it_does() -> None:
    for model in Catalog.load().models.values():
        for route in model.routes:
            given_prices, version = model.priced(route)
            assert version
            whole = Usage(**dict.fromkeys(FIELDS, 1))
            assert cost(whole, given_prices) >= 1, model.name
