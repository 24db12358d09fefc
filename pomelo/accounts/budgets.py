"""Budgets of keys: their text in a store, the calendar of their periods, and the error of a used one.

Periods begin at midnight UTC; a week begins on Monday.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from pomelo.call import KeyBudget
from pomelo.errors import PomeloError, invalid
from pomelo.gen.admin.v1 import admin_service_pb2 as pb
from pomelo.money import MAX_CREDITS, MICROS, format_credits
from pomelo.protobuf.enums import enum_names
from pomelo.stores.accounts import Wallet
from pomelo.stores.keys import KeyRecord
from pomelo.stores.ledger import Budget, LedgerStore

_NAMES = enum_names(pb.BudgetPeriod.DESCRIPTOR)
PERIODS = {name: period for period, name in _NAMES.items()}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_MICROS = MAX_CREDITS * MICROS


def check_amount(field: str, micros: int, *, minimum: int) -> None:
    """Checks an amount of microcredits in a request: no more than MAX_CREDITS at a time.

    Raises:
        PomeloError: invalid_parameter.
    """
    if not minimum <= micros <= MAX_MICROS:
        raise invalid(field, f"{minimum:,} to {MAX_MICROS:,}", minimum=minimum, maximum=MAX_MICROS)


def read_budget(budget: pb.Budget) -> str:
    """The text of a budget in a request, as stores keep it.

    Raises:
        PomeloError: invalid_parameter.
    """
    check_amount("budget.limit_micros", budget.limit_micros, minimum=1)
    if budget.period not in _NAMES:
        raise invalid("budget.period", f"one of {', '.join(PERIODS)}")
    return f"{budget.limit_micros}/{_NAMES[budget.period]}"


def to_message(text: str) -> pb.Budget | None:
    """The message of a budget's text; None if that is empty."""
    if not text:
        return None
    limit, period = _parse(text)
    return pb.Budget(limit_micros=limit, period=PERIODS[period])


def format_budget(text: str) -> str:
    """A budget's text for people, such as 5/day; none if it is empty."""
    if not text:
        return "none"
    limit, period = _parse(text)
    return f"{format_credits(limit)}/{period}"


def budget_of(record: KeyRecord) -> KeyBudget | None:
    if not record.budget:
        return None
    limit, period = _parse(record.budget)
    return KeyBudget(f"budget:{record.origin or record.key_id}.{period}", limit, period)


def _parse(text: str) -> tuple[int, str]:
    """The limit in microcredits and the period of a budget's text."""
    limit, _, period = text.partition("/")
    return int(limit), period


def current(budget: KeyBudget, now: float) -> Budget:
    """The budget in the period of Unix time `now`."""
    return Budget(budget.name, budget.limit, _begin(budget.period, now).timestamp())


async def used(store: LedgerStore, records: Iterable[KeyRecord], now: float) -> dict[str, int]:
    """How many microcredits of its budget each key has used in the period of Unix time `now`, by id. Keys
    without a budget are left out.

    Raises:
        PomeloError: store_unavailable.
    """
    wallets: dict[Wallet, dict[str, Budget]] = {}
    for record in records:
        if (budget := budget_of(record)) is not None:
            wallets.setdefault(Wallet(record.account, record.live), {})[record.key_id] = current(budget, now)
    found: dict[str, int] = {}
    for wallet, budgets in wallets.items():
        uses = await store.budget_use(wallet, list(budgets.values()))
        found |= {key_id: use.used for key_id, use in zip(budgets, uses, strict=True)}
    return found


def exceeded(budget: KeyBudget, required: int, now: float) -> PomeloError:
    """The error for a task that needs `required` microcredits, more than the budget has left."""
    values: dict[str, object] = {
        "requiredMicros": required,
        "budgetMicros": budget.limit,
        "period": budget.period,
    }
    end = _end(budget.period, now)
    span, reset = "in total", ""
    if end is not None:
        values["resetTime"] = end.strftime("%Y-%m-%dT%H:%M:%SZ")
        span, reset = f"a {budget.period}", f". Reset at {values['resetTime']}"
    message = (
        "Insufficient credits for this operation: it needs more than is left of this API key's budget of "
        f"{format_credits(budget.limit)} credits {span}{reset}"
    )
    return PomeloError("insufficient_credits", message, values=values)


def _begin(period: str, now: float) -> datetime:
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    match period:
        case "day":
            return day
        case "week":
            return day - timedelta(days=day.weekday())
        case "month":
            return day.replace(day=1)
    return _EPOCH


def _end(period: str, now: float) -> datetime | None:
    """When the period ends, None if it never does."""
    begin = _begin(period, now)
    match period:
        case "day":
            return begin + timedelta(days=1)
        case "week":
            return begin + timedelta(weeks=1)
        case "month":
            return (begin + timedelta(days=31)).replace(day=1)
    return None
