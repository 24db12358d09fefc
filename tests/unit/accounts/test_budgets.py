"""Budgets of keys: their text, the calendar of their periods, and the error of one that is used up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from pomelo.accounts import budgets
from pomelo.call import KeyBudget
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.stores.accounts import Wallet
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import Budget, BudgetUse
from tests.unit.refusals import refused

NOON = datetime(2028, 2, 29, 12, tzinfo=UTC).timestamp()
"""A Tuesday."""


@pytest.mark.parametrize(
    ("period", "begin", "end"),
    [
        ("day", "2028-02-29", "2028-03-01"),
        ("week", "2028-02-28", "2028-03-06"),
        ("month", "2028-02-01", "2028-03-01"),
    ],
)
def test_periods_follow_the_calendar_in_utc(period: str, begin: str, end: str) -> None:
    budget = KeyBudget("budget:k", 5_000_000, period)
    start = budgets.current(budget, NOON).start
    assert datetime.fromtimestamp(start, UTC).isoformat() == f"{begin}T00:00:00+00:00"
    assert budgets.current(budget, start) == budgets.current(budget, NOON)
    assert budgets.current(budget, start - 0.001).start < start
    after = datetime.fromisoformat(f"{end}T00:00:00Z").timestamp()
    assert budgets.current(budget, after - 0.001).start == start
    assert budgets.current(budget, after).start == after
    error = budgets.exceeded(budget, 7, NOON)
    assert error.message == (
        "Insufficient credits for this operation: it needs more than is left of this API key's budget of "
        f"5 credits a {period}. Reset at {end}T00:00:00Z"
    )
    assert error.values == {
        "requiredMicros": "7",
        "budgetMicros": "5000000",
        "period": period,
        "resetTime": f"{end}T00:00:00Z",
    }


def test_a_total_budget_is_never_reset() -> None:
    budget = KeyBudget("budget:k", 2_500_000, "total")
    assert budgets.current(budget, NOON) == budgets.current(budget, NOON + 1e9)
    error = budgets.exceeded(budget, 7, NOON)
    assert error.message.endswith("left of this API key's budget of 2.5 credits in total")
    assert "resetTime" not in error.values


def test_the_end_of_december_is_a_new_year() -> None:
    error = budgets.exceeded(KeyBudget("b", 1, "month"), 1, datetime(2028, 12, 31, tzinfo=UTC).timestamp())
    assert error.values["resetTime"] == "2029-01-01T00:00:00Z"


@pytest.mark.parametrize("period", budgets.PERIODS)
def test_a_budget_is_read_from_its_text(period: str) -> None:
    message = pb.Budget(limit_micros=5_500_000, period=budgets.PERIODS[period])
    text = budgets.read_budget(message)
    assert budgets.to_message(text) == message
    assert budgets.format_budget(text) == f"5.5/{period}"
    key = KeyRecord("k2", "acme", True, b"", (), 1.0, budget=text, origin="k1")
    assert budgets.budget_of(key) == KeyBudget(f"budget:k1.{period}", 5_500_000, period)


def test_a_key_has_no_budget_by_default() -> None:
    assert budgets.to_message("") is None
    assert budgets.format_budget("") == "none"
    assert budgets.budget_of(KeyRecord("k2", "acme", True, b"", (), 1.0)) is None


@pytest.mark.parametrize(
    ("budget", "field"),
    [
        (pb.Budget(period=pb.BUDGET_PERIOD_DAY), "budget.limit_micros"),
        (pb.Budget(limit_micros=-1, period=pb.BUDGET_PERIOD_DAY), "budget.limit_micros"),
        (pb.Budget(limit_micros=10**15 + 1, period=pb.BUDGET_PERIOD_DAY), "budget.limit_micros"),
        (pb.Budget(limit_micros=1), "budget.period"),
    ],
)
def test_an_invalid_budget_is_refused(budget: pb.Budget, field: str) -> None:
    with refused("invalid_parameter", field):
        budgets.read_budget(budget)


def test_a_budget_is_a_microcredit_to_a_billion_credits() -> None:
    for limit in (1, 10**15):
        budget = pb.Budget(limit_micros=limit, period=pb.BUDGET_PERIOD_DAY)
        assert budgets.read_budget(budget) == f"{limit}/day"


async def test_what_is_used_of_a_budget_is_that_of_the_wallet_of_its_key() -> None:
    class Uses:
        """A store in which budgets of live keys have used seven microcredits, and those of test keys five."""

        async def budget_use(self, wallet: Wallet, asked: Sequence[Budget]) -> list[BudgetUse]:
            return [BudgetUse(7 if wallet.live else 5, budget.start) for budget in asked]

    records = [
        KeyRecord(name, "acme", live, b"", (), 0.0, budget=budget)
        for name, live, budget in (("live", True, "9/day"), ("test", False, "9/day"), ("none", True, ""))
    ]
    assert await budgets.used(cast(Any, Uses()), records, NOON) == {"live": 7, "test": 5}
