"""Costs are exact, monotonic, above zero for any usage, and the same when computed from a record."""

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
    cost_at,
    decode_prices,
)
from pomelo.gen.v1.model_service_pb2 import PriceUnit

INPUT = PriceUnit.PRICE_UNIT_MILLION_INPUT_TOKENS
CACHED = PriceUnit.PRICE_UNIT_MILLION_CACHED_INPUT_TOKENS
CACHE_WRITE = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_INPUT_TOKENS
CACHE_WRITE_1H = PriceUnit.PRICE_UNIT_MILLION_CACHE_WRITE_1H_INPUT_TOKENS
OUTPUT = PriceUnit.PRICE_UNIT_MILLION_OUTPUT_TOKENS
REPORTED = PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR

UNITS = [unit for unit in PriceUnit.values() if unit]
CACHE_UNITS = {
    CACHED: "cached_input_tokens",
    CACHE_WRITE: "cache_write_input_tokens",
    CACHE_WRITE_1H: "cache_write_1h_input_tokens",
}
MEASURES = {
    INPUT: ("input_tokens", 1_000_000),
    OUTPUT: ("output_tokens", 1_000_000),
    PriceUnit.PRICE_UNIT_IMAGE: ("images", 1),
    PriceUnit.PRICE_UNIT_MEGAPIXEL: ("pixels", 1_000_000),
    PriceUnit.PRICE_UNIT_THOUSAND_CHARACTERS: ("characters", 1_000),
    PriceUnit.PRICE_UNIT_AUDIO_MINUTE: ("audio_ms", 60_000),
    PriceUnit.PRICE_UNIT_AUDIO_HOUR: ("audio_ms", 3_600_000),
}
FIELDS = [name for name, _ in MEASURES.values()]

counts = st.integers(0, 10**10)
one_price = st.integers(0, 10**9)
tables = st.dictionaries(st.sampled_from(UNITS), one_price, min_size=1)
tiers = st.dictionaries(st.integers(1, 10**10), tables, max_size=3)
prices = st.builds(lambda units, above: Prices(units, tuple(sorted(above.items()))), tables, tiers)
plain = st.builds(Usage, **dict.fromkeys(FIELDS, counts))


@st.composite
def usages(draw: Any) -> Usage:
    """Usage whose cached tokens are part of the input; half of the examples have no reported cost."""
    base: Usage = draw(plain)
    cached = draw(st.integers(0, base.input_tokens))
    written = draw(st.integers(0, base.input_tokens - cached))
    written_1h = draw(st.integers(0, written))
    return replace(
        base,
        cached_input_tokens=cached,
        cache_write_input_tokens=written,
        cache_write_1h_input_tokens=written_1h,
        provider_micros=draw(st.just(0) | st.integers(1, 10**12)),
    )


def test_every_unit_of_the_contract_has_a_measure() -> None:
    assert set(UNITS) == set(MEASURES) | set(CACHE_UNITS) | {REPORTED}


def max_cost(usage: Usage, price_table: Prices) -> int:
    """Returns what a task reserves that uses at most `usage`."""
    return cost_at(usage, price_table.max_prices(usage.input_tokens))


@given(usages(), prices)
def test_a_cost_is_the_exact_sum_rounded_up_once(usage: Usage, price_table: Prices) -> None:
    units = price_table.units
    for from_tokens, tier in price_table.tiers:
        if usage.input_tokens >= from_tokens:
            units = tier
    ordinary = units.get(INPUT, 0)
    cache_write = units.get(CACHE_WRITE, ordinary)
    tokens = [
        (usage.cached_input_tokens, units.get(CACHED, ordinary)),
        (usage.cache_write_input_tokens - usage.cache_write_1h_input_tokens, cache_write),
        (usage.cache_write_1h_input_tokens, units.get(CACHE_WRITE_1H, cache_write)),
    ]
    rest = usage.input_tokens - sum(count for count, _ in tokens)
    exact = sum(
        (Fraction(count * micros, 1_000_000) for count, micros in [*tokens, (rest, ordinary)]), Fraction(0)
    )
    for unit, (name, scale) in MEASURES.items():
        if unit != INPUT:
            exact += Fraction(getattr(usage, name) * units.get(unit, 0), scale)
    if usage.provider_micros and REPORTED in units:
        exact = Fraction(usage.provider_micros * units[REPORTED], 1_000_000)
    assert cost(usage, price_table) == ceil(exact)


@given(plain, plain, tables)
def test_more_usage_never_costs_less(one: Usage, other: Usage, units: Any) -> None:
    price_table = Prices(units)
    more = Usage(**{name: max(getattr(one, name), getattr(other, name)) for name in FIELDS})
    assert cost(more, price_table) >= max(cost(one, price_table), cost(other, price_table))


@given(usages(), plain, prices)
def test_the_maximum_cost_covers_every_split_of_the_input_and_every_tier(
    usage: Usage, extra: Usage, price_table: Prices
) -> None:
    maximum = Usage(**{name: getattr(usage, name) + getattr(extra, name) for name in FIELDS})
    assert cost(replace(usage, provider_micros=0), price_table) <= max_cost(maximum, price_table)


@pytest.mark.parametrize("dearest", CACHE_UNITS)
def test_a_task_reserves_the_dearest_price_of_input_for_all_of_it(dearest: Any) -> None:
    price_table = Prices({INPUT: 2 * 10**6, **dict.fromkeys(CACHE_UNITS, 10**6), dearest: 3 * 10**6})
    assert max_cost(Usage(input_tokens=10), price_table) == 30


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
    return {unit: micros for unit, micros in units.items() if unit != REPORTED}


@given(usages(), prices, counts)
def test_a_price_of_reported_costs_has_no_effect_until_a_cost_is_reported(
    usage: Usage, price_table: Prices, micros: int
) -> None:
    counted = Prices(
        without_reports(price_table.units),
        tuple((from_tokens, without_reports(tier)) for from_tokens, tier in price_table.tiers),
    )
    assert max_cost(usage, price_table) == max_cost(usage, counted)
    tokens = usage.input_tokens
    assert affordable_output_tokens(micros, tokens, price_table) == affordable_output_tokens(
        micros, tokens, counted
    )
    unreported = replace(usage, provider_micros=0)
    assert cost(unreported, price_table) == cost(unreported, counted)
    assert cost(usage, counted) == cost(unreported, counted)


@given(usages(), usages(), tables, st.integers(1, 10**9))
def test_a_reported_cost_replaces_all_counts(one: Usage, other: Usage, units: Any, micros: int) -> None:
    price_table = Prices({**units, REPORTED: micros})
    costs = [cost(replace(each, provider_micros=7_000_000), price_table) for each in (one, other)]
    assert costs == [7 * micros] * 2
    assert cost(Usage(provider_micros=1), price_table) >= 1


@given(st.sampled_from(list(MEASURES)), st.integers(1, 10**9), st.integers(1, 10**9))
def test_usage_with_a_price_is_never_free(unit: Any, micros: int, count: int) -> None:
    assert cost(Usage(**{MEASURES[unit][0]: count}), Prices({unit: micros})) >= 1


@pytest.mark.parametrize("unit", CACHE_UNITS)
def test_cached_tokens_with_a_price_are_never_free(unit: Any) -> None:
    written_1h = int(unit == CACHE_WRITE_1H)
    usage = Usage(
        input_tokens=1,
        cached_input_tokens=int(unit == CACHED),
        cache_write_input_tokens=int(unit != CACHED),
        cache_write_1h_input_tokens=written_1h,
    )
    assert cost(usage, Prices({unit: 1})) == 1


@pytest.mark.parametrize(
    ("model", "usage", "credits"),
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
def test_costs_match_the_vendors_price_lists(model: str, usage: Usage, credits: str) -> None:  # noqa: A002
    entry = Catalog.load().by_any_name[model]
    assert cost(usage, entry.prices_for(entry.routes[0])[0]) == Fraction(credits) * 1_000_000


def test_counts_of_a_cache_that_exceed_the_input_do_not_lower_the_cost() -> None:
    dear = Prices({INPUT: 10_000_000, CACHED: 1_000_000})
    assert cost(Usage(input_tokens=5, cached_input_tokens=10), dear) == 10


@given(prices)
def test_no_usage_costs_nothing(price_table: Prices) -> None:
    assert cost(Usage(), price_table) == 0


@given(
    micros=st.integers(0, 10**12),
    tokens=st.integers(0, 10**7),
    input_price=one_price,
    cache_price=one_price,
    output_price=st.integers(1, 10**9),
)
def test_the_affordable_output_is_the_largest_that_can_be_paid(
    micros: int, tokens: int, input_price: int, cache_price: int, output_price: int
) -> None:
    price_table = Prices({INPUT: input_price, CACHE_WRITE: cache_price, OUTPUT: output_price})
    affordable = affordable_output_tokens(micros, tokens, price_table)
    if affordable < 0:
        assert max_cost(Usage(input_tokens=tokens), price_table) > micros
    else:
        assert max_cost(Usage(input_tokens=tokens, output_tokens=affordable), price_table) <= micros
        assert max_cost(Usage(input_tokens=tokens, output_tokens=affordable + 1), price_table) > micros


def test_any_output_is_affordable_without_a_price_of_output() -> None:
    price_table = Prices({INPUT: 5})
    assert cost(Usage(1, affordable_output_tokens(1, 1, price_table)), price_table) == 1
    assert affordable_output_tokens(0, 1, price_table) == -1


@given(prices)
def test_encoded_prices_are_decoded_unchanged(price_table: Prices) -> None:
    assert decode_prices(price_table.encoded) == price_table


def test_prices_in_records_of_earlier_versions_are_decoded() -> None:
    assert decode_prices("million_input_tokens=4000000,million_output_tokens=20000000") == Prices(
        {INPUT: 4_000_000, OUTPUT: 20_000_000}
    )


@given(usages(), prices)
def test_a_cost_can_be_computed_from_a_record(usage: Usage, price_table: Prices) -> None:
    assert cost(usage, decode_prices(price_table.encoded)) == cost(usage, price_table)


@pytest.mark.parametrize(
    "text",
    [
        *("image", "image=", "=4", "sausage=4", "image=4=5", "image=x", ","),
        *("image=4;", "image=4;x:image=5", "image=4;5"),
    ],
)
def test_an_invalid_price_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        decode_prices(text)


def test_every_model_of_the_catalogue_has_a_cost_for_its_usage() -> None:
    for model in Catalog.load().models.values():
        for route in model.routes:
            price_table, version = model.prices_for(route)
            assert version
            whole = Usage(**dict.fromkeys(FIELDS, 1))
            assert cost(whole, price_table) >= 1, model.name


@pytest.mark.parametrize(
    ("milliseconds", "micros"), [(1, 1), (1_000, 62), (60_000, 3_667), (3_600_000, 220_000)]
)
def test_a_transcript_costs_the_published_price_of_an_hour(milliseconds: int, micros: int) -> None:
    model = Catalog.load().models["eleven-labs-stt"]
    price_table, _ = model.prices_for(model.routes[0])
    assert cost(Usage(audio_ms=milliseconds), price_table) == micros
