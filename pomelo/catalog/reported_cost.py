"""Billing by the cost that a provider reports for a task, for models with such a price.

The adapter of a vendor that reports the cost of each request writes it into the `Report` of its job.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Any

from pomelo.catalog.pricing import Prices, Usage, cost
from pomelo.gen.v1.usage_pb2 import Usage as UsageCounts
from pomelo.money import MAX_CREDITS, MICROS

log = logging.getLogger("pomelo.catalog")


@dataclass(slots=True, eq=False)
class Report:
    """What a provider reports about a task in addition to its events.

    `cost` is the vendor's cost of the task in US dollars: an int, a float or a Decimal; None or 0 if it is
    not reported. `usage` is the vendor's count of the input of a stream, which is charged if the stream ends
    early; None until it is known. `thinking_bytes` are the bytes of the model's thinking that have arrived
    and that no event has; `thinks` is set if the model was asked to think: perhaps none of it arrives.
    """

    cost: Any = None
    usage: UsageCounts | None = None
    thinking_bytes: int = 0
    thinks: bool = False

    def reset(self) -> None:
        """Forgets what an earlier attempt reported."""
        self.cost = self.usage = None
        self.thinking_bytes = 0
        self.thinks = False


def microdollars(amount: Any) -> int:
    """A reported cost in whole microdollars, rounded up.

    A float has the value of its shortest decimal form, as in JSON: 0.0011 is 1,100, not 1,101.

    Raises:
        ValueError: it is not a number, or out of range.
    """
    if type(amount) not in (int, float, Decimal):  # a bool is an int by isinstance
        raise ValueError(f"{type(amount).__name__} is not a number")
    try:
        dollars = Fraction(str(amount)) if type(amount) is float else Fraction(amount)
    except (OverflowError, ValueError):
        raise ValueError("it is not finite") from None
    if not 0 <= dollars <= MAX_CREDITS:
        raise ValueError("it is below 0 or too large")
    return ceil(dollars * MICROS)


def with_reported_cost(usage: Usage, report: Report, prices: Prices, reserved: int, task: str) -> Usage:
    """A task's usage, with the reported cost if the task is billed by it.

    An impossible cost, or one above `reserved` (the task's reserved microcredits), is logged once and
    ignored; the task is then billed by its counts. `task` names it in the log.
    """
    if report.cost is None or not prices.bills_reported_cost(usage.input_tokens):
        return usage
    try:
        with_cost = replace(usage, provider_micros=microdollars(report.cost))
        if cost(with_cost, prices) > reserved:
            raise ValueError("it is above the maximum cost of the task")
    except ValueError as error:
        report.cost = None
        log.warning("%s reported an impossible cost, so its counts are billed: %s", task, error)
        return usage
    return with_cost
