"""The limits of an account: what a call counts toward each, its headers, and the error of a refused task.

A new limit is one function and one row of LIMITS; the store counts whatever the functions return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from math import ceil
from typing import NamedTuple

from pomelo import money
from pomelo.accounts.plans import Plan
from pomelo.call import Principal
from pomelo.catalog.catalog import Model
from pomelo.catalog.pricing import Usage
from pomelo.engine.job import AcceptedJob
from pomelo.errors import REQUESTED, TABLE, PomeloError
from pomelo.stores.ledger import Counter, LimitStatus, Refused
from pomelo.tasks import TASK_TYPES

WINDOW = 60.0
"""The length of the windows of requests and tokens in seconds."""

SHARES = "concurrency"
"""The limit that says for how many tasks an account's credits are."""


class LimitedCall(NamedTuple):
    """What limits can depend on. `model` and `accepted` are None for a call that is about no model and runs
    no task; such a call counts as one request if its body was large or unreadable."""

    plan: Plan
    principal: Principal
    model: Model | None = None
    accepted: AcceptedJob | None = None


_counter = cache(Counter)
"""Counters whose amounts and limits are few, so that they are made once."""


def _requests(call: LimitedCall) -> Counter:
    return _counter("requests", 1, call.plan.requests, WINDOW)


def _concurrency(call: LimitedCall) -> Counter:
    return _counter("concurrency", 0 if call.accepted is None else 1, call.plan.concurrent)


def _tokens(call: LimitedCall) -> Counter | None:
    if call.model is None or not TASK_TYPES[call.model.task_type].counts_tokens:
        return None
    likely = 0 if call.accepted is None else call.accepted.estimate.tokens
    return Counter(f"tokens:{call.model.name}", likely, call.plan.tokens, WINDOW)


@dataclass(frozen=True, slots=True)
class Limit:
    """One kind of limit.

    `counter` returns what a call counts, None if the limit does not concern it; at the end of the task,
    `actual` returns what it has used instead, if that is set. `suffix` ends the names of the X-RateLimit
    headers. `error` is the code of the refusal, `message` replaces the code's own; `too_large` is the message
    for a task that exceeds even an unused limit, with {amount} and {limit}. Errors name the limit `quota`, by
    default like its counter; for a limit of a plan it is the field of PlanLimits. `scope` is what a counter
    with a scope is of, such as model.
    """

    counter: Callable[[LimitedCall], Counter | None]
    suffix: str
    error: str
    message: str = ""
    too_large: str = ""
    quota: str = ""
    scope: str = ""
    actual: Callable[[Usage], int] | None = None


LIMITS: list[Limit] = [
    Limit(_requests, "", "rate_limit_exceeded", quota="requests_per_minute"),
    Limit(_concurrency, "-Concurrent", "concurrency_limit_exceeded", quota="concurrent_requests"),
    Limit(
        _tokens,
        "-Tokens",
        "token_limit_exceeded",
        too_large="About {amount:,} tokens are asked for, and the plan has {limit:,} a minute for the model. "
        "Shorten messages, or lower max_tokens",
        quota="tokens_per_minute",
        scope="model",
        actual=lambda usage: usage.input_tokens + usage.output_tokens,
    ),
]
"""The first limit that a task would exceed refuses it."""


class CallLimits:
    """The limits that concern a call. `counters` are what it counts, in the order of the limits."""

    __slots__ = ("_limits", "counters")

    def __init__(self, call: LimitedCall) -> None:
        limits: list[Limit] = []
        counters: list[Counter] = []
        for limit in LIMITS:
            counter = limit.counter(call)
            if counter is not None:
                limits.append(limit)
                counters.append(counter)
        self._limits = limits
        self.counters = tuple(counters)

    def actual_counters(self, usage: Usage, *, at_least: bool = False) -> tuple[Counter, ...]:
        """The counters of a task, with what it has really used; with `at_least`, it may have used more, so
        none falls below its estimate."""
        counters: list[Counter] = []
        for limit, counter in zip(self._limits, self.counters, strict=True):
            if limit.actual is not None:
                amount = max(limit.actual(usage), counter.amount if at_least else 0)
                counter = Counter(counter.name, amount, counter.limit, counter.window)
            counters.append(counter)
        return tuple(counters)

    def headers(self, status: LimitStatus, now: float) -> dict[str, str]:
        """The headers of the limits and of the credits at Unix time `now`."""
        headers: dict[str, str] = {}
        concurrent: dict[str, str] = {}
        for limit, (name, _, most, window) in zip(self._limits, self.counters, strict=True):
            if most is not None:
                used, reset = status.counts[name]
                limit_header, remaining_header, reset_header = _header_names(limit.suffix)
                own = concurrent if window is None else headers
                own[limit_header] = str(most)
                own[remaining_header] = str(max(0, most - used))
                if window is not None:
                    own[reset_header] = str(ceil(now + reset))
        headers |= concurrent
        headers["X-Credits-Remaining"] = money.format_credits(status.available)
        return headers

    def refusal(self, refused: Refused, required: int, now: float) -> PomeloError:
        """The error for a task that could not be reserved; `required` are the microcredits that must be
        available. Its times agree with the headers at the same `now`."""
        for limit, counter in zip(self._limits, self.counters, strict=True):
            if counter.name == refused.counter:
                return _limit_refusal(limit, counter, refused.limit_status, now)
        if refused.code == "insufficient_credits":
            available = refused.limit_status.available
            return PomeloError(
                "insufficient_credits", values={"requiredMicros": required, "availableMicros": available}
            )
        return PomeloError(refused.code)


@cache
def _header_names(suffix: str) -> tuple[str, str, str]:
    return (
        f"X-RateLimit-Limit{suffix}",
        f"X-RateLimit-Remaining{suffix}",
        f"X-RateLimit-Reset{suffix}",
    )


def _limit_refusal(limit: Limit, counter: Counter, status: LimitStatus, now: float) -> PomeloError:
    name, _, scope = counter.name.partition(":")
    values: dict[str, object] = {"quota": limit.quota or name, "limit": counter.limit}
    if limit.scope:
        values[limit.scope] = scope
    if counter.window is None:
        return PomeloError(limit.error, limit.message, values=values)
    if limit.too_large and counter.amount > (counter.limit or 0):
        message = limit.too_large.format(amount=counter.amount, limit=counter.limit)
        values[REQUESTED] = counter.amount
        return PomeloError(limit.error, message, retry_after=ceil(counter.window), values=values)
    reset = status.counts[counter.name].reset
    # RFC 3339 in UTC, rounded up to a second, so that the limit has been reset by then.
    at = datetime.fromtimestamp(ceil(now + reset), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    message = f"{limit.message or TABLE[limit.error].message}. Reset at {at}"
    values["resetTime"] = at
    return PomeloError(limit.error, message, retry_after=max(1, ceil(reset)), values=values)
