"""How limits and credits are reported: the headers of every response, and the errors of refused tasks."""

from __future__ import annotations

from datetime import UTC, datetime
from math import ceil

from pomelo import money
from pomelo.accounts.plans import Plan
from pomelo.errors import PomeloError
from pomelo.stores.ledger import LimitStatus, Refused, ReserveRequest


def limit_headers(plan: Plan, status: LimitStatus, now: float, *, tokens: bool) -> dict[str, str]:
    """The headers of limits and credits at Unix time `now`. `tokens` is whether the model has a token
    limit."""
    headers = {}
    if plan.requests is not None:
        headers["X-RateLimit-Limit"] = str(plan.requests)
        headers["X-RateLimit-Remaining"] = str(max(0, plan.requests - status.requests))
        headers["X-RateLimit-Reset"] = str(ceil(now + status.requests_reset))
    if plan.tokens is not None and tokens:
        headers["X-RateLimit-Limit-Tokens"] = str(plan.tokens)
        headers["X-RateLimit-Remaining-Tokens"] = str(max(0, plan.tokens - status.tokens))
        headers["X-RateLimit-Reset-Tokens"] = str(ceil(now + status.tokens_reset))
    if plan.concurrent is not None:
        headers["X-RateLimit-Limit-Concurrent"] = str(plan.concurrent)
        headers["X-RateLimit-Remaining-Concurrent"] = str(max(0, plan.concurrent - status.concurrency))
    headers["X-Credits-Remaining"] = money.format_credits(status.available)
    return headers


def refusal(refused: Refused, request: ReserveRequest, now: float) -> PomeloError:
    """The error for a task that could not be reserved. Its times agree with the headers at the same `now`."""
    status = refused.limit_status
    match refused.code:
        case "rate_limit_exceeded":
            message = f"Rate limit exceeded. Reset at {_format_time(now + status.requests_reset)}"
            return PomeloError(refused.code, message, retry_after=max(1, ceil(status.requests_reset)))
        case "token_limit_exceeded":
            return _token_refusal(status, request, now)
        case _:
            return PomeloError(refused.code)


def _token_refusal(status: LimitStatus, request: ReserveRequest, now: float) -> PomeloError:
    limit = request.tokens_limit or 0
    if request.tokens > limit:
        return PomeloError(
            "token_limit_exceeded",
            f"About {request.tokens:,} tokens are asked for, and the plan has {limit:,} a minute for the "
            "model. Shorten messages, or lower max_tokens",
            retry_after=60,
        )
    return PomeloError(
        "token_limit_exceeded",
        f"Token limit of the model exceeded. Reset at {_format_time(now + status.tokens_reset)}",
        retry_after=max(1, ceil(status.tokens_reset)),
    )


def _format_time(moment: float) -> str:
    """RFC 3339 in UTC, rounded up to a second, so that the limit has been reset by then."""
    return datetime.fromtimestamp(ceil(moment), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
