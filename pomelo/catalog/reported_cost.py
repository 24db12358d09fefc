"""What a provider reports that a task cost, and whether the task is billed by it.

The adapter of a vendor that tells the cost of each request writes it into the `Report` of its job; when the
task ends, its hold bills that if the price of the model is by it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Any

from pomelo.catalog.pricing import Prices, Usage, cost
from pomelo.money import MAX_CREDITS, MICROS

log = logging.getLogger("pomelo.reported")


class Report:
    """What a provider tells of a task beside its events.

    `cost` is what the vendor says that the task cost, in US dollars: an int, a float or a Decimal. None and
    0: it has not said.
    """

    __slots__ = ("cost",)

    def __init__(self) -> None:
        self.cost: Any = None


def microdollars(amount: Any) -> int:
    """A reported cost in whole microdollars, rounded up.

    A float is what its shortest decimal form says, as in JSON: 0.0011 is 1,100, not 1,101.

    Raises:
        ValueError: it is not a number of dollars from 0 on.
    """
    if type(amount) not in (int, float, Decimal):  # a bool is an int by isinstance
        raise ValueError(f"{type(amount).__name__} is no number")
    try:
        dollars = Fraction(str(amount)) if type(amount) is float else Fraction(amount)
    except (OverflowError, ValueError):
        raise ValueError("it is not finite") from None
    if not 0 <= dollars <= MAX_CREDITS:
        raise ValueError("it is below 0 or beyond all bounds")
    return ceil(dollars * MICROS)


def billed(used: Usage, report: Report, prices: Prices, most: int, whose: str) -> Usage:
    """What a task used, with the reported cost where that is what it costs.

    A report that can't be true, or would cost more than `most` (the microcredits that the task holds), is
    logged once and forgotten: the task then costs what was counted. `whose` names the task in the log.
    """
    told = report.cost
    if told is None or not prices.by_report(used.input_tokens):
        return used
    try:
        with_cost = replace(used, provider_micros=microdollars(told))
        if cost(with_cost, prices) > most:
            raise ValueError("it is above the most that the task can cost")
    except ValueError as error:
        report.cost = None
        log.warning("%s reported an impossible cost, so its counts are billed: %s", whose, error)
        return used
    return with_cost
