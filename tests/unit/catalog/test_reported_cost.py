"""Costs that providers report are exact to the microdollar, and billed only if they are possible."""

from __future__ import annotations

import logging
from decimal import Decimal
from fractions import Fraction
from math import ceil, inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.catalog.pricing import Prices, Usage, cost
from pomelo.catalog.reported_cost import Report, microdollars, with_reported_cost
from pomelo.gen.v1.model_service_pb2 import PriceUnit
from pomelo.gen.v1.usage_pb2 import Usage as UsageCounts

IMAGE = PriceUnit.PRICE_UNIT_IMAGE
REPORTED = PriceUnit.PRICE_UNIT_PROVIDER_DOLLAR
ONE = Usage(images=1)
PRICES = Prices({IMAGE: 40_000, REPORTED: 1_100_000})

anything = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.decimals()),
    *(st.text(), st.lists(st.integers())),
)


def report_of(amount: Any) -> Report:
    report = Report()
    report.cost = amount
    return report


@pytest.mark.parametrize(
    ("amount", "micros"),
    [
        *[(0, 0), (-0.0, 0), (1, 1_000_000), (0.0011, 1_100), (1.1e-05, 11)],
        (0.00014850000000000003, 149),
        (5e-324, 1),
        (Decimal("0.04"), 40_000),
        (Decimal("0.0400001"), 40_001),
        (10**9, 10**15),
    ],
)
def test_dollars_are_rounded_up_to_whole_microdollars(amount: Any, micros: int) -> None:
    assert microdollars(amount) == micros


@given(st.integers(0, 10**15))
def test_every_microdollar_survives_json(micros: int) -> None:
    if micros < 10**14:  # a double has no more digits
        assert microdollars(micros / 10**6) == micros
    assert microdollars(Decimal(micros) / 10**6) == micros


@pytest.mark.parametrize(
    "amount",
    [None, True, "0.04", b"1", [1], {}, 1j, Fraction(1, 2), nan, inf, -inf, -1, -1e-9, 1e300, 10**9 + 1, 10**5_000,
     Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), Decimal("-0.01")],
    ids=lambda amount: type(amount).__name__,
)  # fmt: skip
def test_an_invalid_cost_is_refused(amount: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        microdollars(amount)


@given(anything, st.integers(0, 10**9), st.integers(1, 10**9))
def test_a_report_never_bills_more_than_the_reservation_and_never_nothing(
    amount: Any, image: int, dollar: int
) -> None:
    prices = Prices({IMAGE: image, REPORTED: dollar})
    usage = with_reported_cost(ONE, report_of(amount), prices, image, "it")
    assert cost(usage, prices) <= image
    if usage.provider_micros:
        assert cost(usage, prices) == ceil(Fraction(microdollars(amount) * dollar, 1_000_000)) > 0
    else:
        assert usage == ONE


def test_a_reset_report_has_nothing_of_an_earlier_attempt() -> None:
    report = Report(0.03, UsageCounts(input_tokens=7))
    report.reset()
    assert (report.cost, report.usage) == (None, None)


def test_a_price_may_have_a_markup() -> None:
    usage = with_reported_cost(ONE, report_of(0.03), PRICES, 40_000, "it")
    assert (usage.provider_micros, cost(usage, PRICES)) == (30_000, 33_000)


@pytest.mark.parametrize("amount", [None, 0, 0.0])
def test_a_missing_cost_and_a_cost_of_zero_are_ignored_without_a_warning(
    amount: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert with_reported_cost(ONE, report_of(amount), PRICES, 40_000, "it") == ONE
    assert not caplog.records


@pytest.mark.parametrize("amount", [-1, nan, "0.01", 0.04])  # the last with its markup
def test_an_impossible_cost_is_logged_once(amount: Any, caplog: pytest.LogCaptureFixture) -> None:
    report = report_of(amount)
    with caplog.at_level(logging.WARNING, "pomelo"):
        assert [
            with_reported_cost(ONE, report, PRICES, 40_000, "request r: the provider p") for _ in range(3)
        ] == [ONE] * 3
    (line,) = caplog.messages
    assert line.startswith("request r: the provider p reported an impossible cost")


def test_a_model_without_a_price_of_reported_costs_ignores_them(caplog: pytest.LogCaptureFixture) -> None:
    prices = Prices({IMAGE: 40_000}, ((5, {IMAGE: 40_000, REPORTED: 10**6}),))
    assert with_reported_cost(ONE, report_of("any"), prices, 40_000, "it") == ONE
    assert not caplog.records
    long = Usage(images=1, input_tokens=5)
    assert with_reported_cost(long, report_of(0.01), prices, 40_000, "it").provider_micros == 10_000


def test_an_attempt_that_is_repeated_reports_nothing_of_the_one_before() -> None:
    report = Report(cost=0.01, usage=UsageCounts(input_tokens=5), thinking_bytes=9, thinks=True)
    report.reset()
    assert repr(report) == repr(Report())
