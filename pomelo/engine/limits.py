"""What a caller is told of limits and credits: the headers of every answer, and the refusals."""

from __future__ import annotations

from datetime import UTC, datetime
from math import ceil

from pomelo import money
from pomelo.accounts.plans import Plan
from pomelo.errors import PomeloError
from pomelo.stores.ledger import LimitStatus, Refused, ReserveRequest


def limit_headers(plan: Plan, standing: LimitStatus, now: float, *, tokens: bool) -> dict[str, str]:
    """The headers of limits and credits at Unix time `now`; those of `tokens` where the model counts."""
    told = {}
    if plan.requests is not None:
        told["X-RateLimit-Limit"] = str(plan.requests)
        told["X-RateLimit-Remaining"] = str(max(0, plan.requests - standing.requests))
        told["X-RateLimit-Reset"] = str(ceil(now + standing.requests_reset))
    if plan.tokens is not None and tokens:
        told["X-RateLimit-Limit-Tokens"] = str(plan.tokens)
        told["X-RateLimit-Remaining-Tokens"] = str(max(0, plan.tokens - standing.tokens))
        told["X-RateLimit-Reset-Tokens"] = str(ceil(now + standing.tokens_reset))
    if plan.concurrent is not None:
        told["X-RateLimit-Limit-Concurrent"] = str(plan.concurrent)
        told["X-RateLimit-Remaining-Concurrent"] = str(max(0, plan.concurrent - standing.concurrency))
    told["X-Credits-Remaining"] = money.format_credits(standing.available)
    return told


def refusal(refused: Refused, take: ReserveRequest, now: float) -> PomeloError:
    """The error that says why nothing was taken, in the words of the headers of the same `now`."""
    standing = refused.limit_status
    match refused.code:
        case "rate_limit_exceeded":
            message = f"Rate limit exceeded. Reset at {_at(now + standing.requests_reset)}"
            return PomeloError(refused.code, message, retry_after=max(1, ceil(standing.requests_reset)))
        case "token_limit_exceeded":
            return _too_many_tokens(standing, take, now)
        case _:
            return PomeloError(refused.code)


def _too_many_tokens(standing: LimitStatus, take: ReserveRequest, now: float) -> PomeloError:
    limit = take.tokens_limit or 0
    if take.tokens > limit:
        return PomeloError(
            "token_limit_exceeded",
            f"About {take.tokens:,} tokens are asked for, and the plan has {limit:,} a minute for the "
            "model. Shorten messages, or lower max_tokens",
            retry_after=60,
        )
    return PomeloError(
        "token_limit_exceeded",
        f"Token limit of the model exceeded. Reset at {_at(now + standing.tokens_reset)}",
        retry_after=max(1, ceil(standing.tokens_reset)),
    )


def _at(moment: float) -> str:
    """A time, rounded up: then it is over for sure."""
    return datetime.fromtimestamp(ceil(moment), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
