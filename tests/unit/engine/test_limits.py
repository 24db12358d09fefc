"""The headers that report limits and credits, and the errors for exceeded limits."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.accounts.plans import Plan
from pomelo.engine.limits import limit_headers, refusal
from pomelo.stores.ledger import LimitStatus, Refused, ReserveRequest
from pomelo.stores.usage import UsageRecord

PLAN = Plan("all", requests=20, concurrent=3, tokens=1_000)
NOW = 1_700_000_000.25


def reported(counts_tokens: bool = True, plan: Plan = PLAN, **status: Any) -> dict[str, str]:
    """The headers at NOW, without the prefix of the limit headers."""
    headers = limit_headers(
        plan, LimitStatus(**{"available": 5_000_000, **status}), NOW, tokens=counts_tokens
    )
    return {name.removeprefix("X-RateLimit-"): value for name, value in headers.items()}


def error(code: str, tokens: int = 0, **status: Any) -> tuple[str, int | None]:
    """The message and the proposed wait of a refusal at NOW."""
    record = UsageRecord("task_1", "req_1", "ann", True, "key", "rest", "gpt-4", "text")
    take = ReserveRequest(record, minimum=1, maximum=1, tokens=tokens, tokens_limit=PLAN.tokens)
    raised = refusal(Refused(LimitStatus(0, **status), code), take, NOW)
    assert raised.code == code
    return raised.message, raised.retry_after


def test_every_limit_has_its_own_count_and_its_own_reset() -> None:
    assert reported(requests=7, requests_reset=30.5, concurrency=1, tokens=400, tokens_reset=12.5) == {
        "Limit": "20",
        "Remaining": "13",
        "Reset": "1700000031",
        "Limit-Tokens": "1000",
        "Remaining-Tokens": "600",
        "Reset-Tokens": "1700000013",
        "Limit-Concurrent": "3",
        "Remaining-Concurrent": "2",
        "X-Credits-Remaining": "5",
    }


def test_a_limit_that_is_reached_or_was_lowered_has_zero_remaining() -> None:
    for above in (0, 1, 500):
        headers = reported(requests=20 + above, concurrency=3 + above, tokens=1_000 + above)
        assert [headers[f"Remaining{of}"] for of in ("", "-Concurrent", "-Tokens")] == ["0"] * 3


def test_a_reset_is_never_reported_before_the_window_ends() -> None:
    for left in (0.5, 0.75, 0.8, 59.75):
        headers = reported(requests_reset=left, tokens_reset=left)
        assert int(headers["Reset"]) == int(headers["Reset-Tokens"])
        assert NOW + left <= int(headers["Reset"]) < NOW + left + 1


def test_only_limits_that_apply_have_headers() -> None:
    assert reported(plan=Plan("unlimited")) == {"X-Credits-Remaining": "5"}
    assert not [name for name in reported(counts_tokens=False) if "Tokens" in name]
    assert set(reported(plan=Plan("few", concurrent=0))) == {
        "Limit-Concurrent",
        "Remaining-Concurrent",
        "X-Credits-Remaining",
    }


@pytest.mark.parametrize(
    ("left", "wait", "reset"),
    [
        (59.75, 60, "2023-11-14T22:14:20Z"),
        (30.0, 30, "2023-11-14T22:13:51Z"),
        (29.2, 30, "2023-11-14T22:13:50Z"),
        (0.2, 1, "2023-11-14T22:13:21Z"),
        (0.0, 1, "2023-11-14T22:13:21Z"),
    ],
)
def test_the_proposed_wait_and_the_reset_are_rounded_up(left: float, wait: int, reset: str) -> None:
    assert error("rate_limit_exceeded", requests_reset=left, tokens_reset=7) == (
        f"Rate limit exceeded. Reset at {reset}",
        wait,
    )
    assert error("token_limit_exceeded", tokens_reset=left, requests_reset=7) == (
        f"Token limit of the model exceeded. Reset at {reset}",
        wait,
    )


def test_only_a_task_that_exceeds_the_whole_limit_is_refused_as_too_long() -> None:
    message, wait = error("token_limit_exceeded", tokens=1_000, tokens_reset=10)
    assert (message[:30], wait) == ("Token limit of the model excee", 10)
    message, wait = error("token_limit_exceeded", tokens=1_001, tokens_reset=10)
    assert "Shorten messages" in message
    assert "1,001 tokens" in message
    assert "1,000 a minute" in message
    assert wait == 60


def test_a_full_plan_proposes_the_wait_of_its_own_error() -> None:
    assert error("concurrency_limit_exceeded", requests_reset=40)[1] == 1
    assert error("insufficient_credits", requests_reset=40)[1] is None
