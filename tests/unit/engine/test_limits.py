"""The headers that report limits and credits, and the errors for exceeded limits."""

from __future__ import annotations

import pytest

from pomelo.accounts.plans import Plan
from pomelo.call import Principal
from pomelo.catalog.catalog import Catalog
from pomelo.catalog.pricing import Usage
from pomelo.engine.limits import CallLimits, Limit, LimitedCall
from pomelo.stores.ledger import Count, Counter, LimitStatus, Refused
from tests.unit.engine.jobs import accepted_job

PLAN = Plan("all", requests=20, concurrent=3, tokens=1_000)
NOW = 1_700_000_000.25
CALLER = Principal("ann", "key", True)
MODELS = Catalog.load().models
UNUSED = Count()


def limits(plan: Plan = PLAN, model: str = "gpt-4", tokens: int | None = None) -> CallLimits:
    """The limits of a call; with `tokens`, a task that is likely to use so many."""
    job = None
    if tokens is not None:
        job = accepted_job("task_1", MODELS[model], Usage(), CALLER, tokens=tokens)
    return CallLimits(LimitedCall(plan, CALLER, MODELS[model], job))


def status(requests: Count, concurrency: int, tokens: Count, available: int = 5_000_000) -> LimitStatus:
    """The use of the limits of gpt-4."""
    counts = {"requests": requests, "concurrency": Count(concurrency), "tokens:gpt-4": tokens}
    return LimitStatus(available, counts)


def reported(
    requests: Count = UNUSED, concurrency: int = 0, tokens: Count = UNUSED, plan: Plan = PLAN
) -> dict[str, str]:
    """The headers at NOW, without the prefix of the limit headers."""
    headers = limits(plan).headers(status(requests, concurrency, tokens), NOW)
    return {name.removeprefix("X-RateLimit-"): value for name, value in headers.items()}


def error(
    counter: str, tokens: int = 0, requests_reset: float = 0.0, tokens_reset: float = 0.0
) -> tuple[str, str, int | None]:
    """The code, the message and the proposed wait of a refusal at NOW."""
    found = status(Count(20, requests_reset), 3, Count(990, tokens_reset), 0)
    raised = limits(tokens=tokens).refusal(Refused(found, "limit_exceeded", counter), 0, NOW)
    return raised.code, raised.message, raised.retry_after


def test_every_limit_has_its_own_count_and_its_own_reset() -> None:
    found = reported(Count(7, 30.5), 1, Count(400, 12.5))
    assert list(found.items()) == [
        ("Limit", "20"),
        ("Remaining", "13"),
        ("Reset", "1700000031"),
        ("Limit-Tokens", "1000"),
        ("Remaining-Tokens", "600"),
        ("Reset-Tokens", "1700000013"),
        ("Limit-Concurrent", "3"),
        ("Remaining-Concurrent", "2"),
        ("X-Credits-Remaining", "5"),
    ]


def test_a_limit_that_is_reached_or_was_lowered_has_zero_remaining() -> None:
    for above in (0, 1, 500):
        headers = reported(Count(20 + above), 3 + above, Count(1_000 + above))
        assert [headers[f"Remaining{of}"] for of in ("", "-Concurrent", "-Tokens")] == ["0"] * 3


def test_a_reset_is_never_reported_before_the_window_ends() -> None:
    for left in (0.5, 0.75, 0.8, 59.75):
        headers = reported(Count(1, left), 0, Count(1, left))
        assert int(headers["Reset"]) == int(headers["Reset-Tokens"])
        assert NOW + left <= int(headers["Reset"]) < NOW + left + 1


def test_only_limits_that_apply_have_headers() -> None:
    assert reported(plan=Plan("unlimited")) == {"X-Credits-Remaining": "5"}
    assert [counter.name for counter in limits(model="flux-1-pro").counters] == ["requests", "concurrency"]
    assert set(reported(plan=Plan("few", concurrent=0))) == {
        "Limit-Concurrent",
        "Remaining-Concurrent",
        "X-Credits-Remaining",
    }


def test_limits_are_checked_in_the_order_requests_concurrency_tokens() -> None:
    assert limits(tokens=7).counters == (
        Counter("requests", 1, 20, 60.0),
        Counter("concurrency", 1, 3),
        Counter("tokens:gpt-4", 7, 1_000, 60.0),
    )


def test_a_call_without_a_task_takes_a_request_and_nothing_else() -> None:
    assert [counter.amount for counter in limits().counters] == [1, 0, 0]
    assert [each.name for each in CallLimits(LimitedCall(PLAN, CALLER)).counters] == [
        "requests",
        "concurrency",
    ]


def test_usage_without_a_limit_is_counted() -> None:
    assert [(counter.amount, counter.limit) for counter in limits(Plan("unlimited"), tokens=7).counters] == [
        (1, None),
        (1, None),
        (7, None),
    ]


def test_at_the_end_the_real_number_of_tokens_counts() -> None:
    taken = limits(tokens=7)
    actual = taken.actual_counters(Usage(input_tokens=30, output_tokens=12, images=5))
    assert actual == (*taken.counters[:2], Counter("tokens:gpt-4", 42, 1_000, 60.0))


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
    assert error("requests", requests_reset=left, tokens_reset=7) == (
        "rate_limit_exceeded",
        f"Rate limit exceeded. Reset at {reset}",
        wait,
    )
    assert error("tokens:gpt-4", tokens_reset=left, requests_reset=7) == (
        "token_limit_exceeded",
        f"Token limit of the model exceeded. Reset at {reset}",
        wait,
    )


def test_only_a_task_that_exceeds_the_whole_limit_is_refused_as_too_long() -> None:
    code, message, wait = error("tokens:gpt-4", tokens=1_000, tokens_reset=10)
    assert (code, message[:30], wait) == ("token_limit_exceeded", "Token limit of the model excee", 10)
    assert error("tokens:gpt-4", tokens=1_001, tokens_reset=10) == (
        "token_limit_exceeded",
        "About 1,001 tokens are asked for, and the plan has 1,000 a minute for the model. "
        "Shorten messages, or lower max_tokens",
        60,
    )


@pytest.mark.parametrize(
    ("counter", "tokens", "values"),
    [
        ("requests", 0, {"quota": "requests_per_minute", "limit": "20", "resetTime": "2023-11-14T22:13:30Z"}),
        ("concurrency", 0, {"quota": "concurrent_requests", "limit": "3"}),
        (
            "tokens:gpt-4",
            1_000,
            {
                "quota": "tokens_per_minute",
                "limit": "1000",
                "model": "gpt-4",
                "resetTime": "2023-11-14T22:13:40Z",
            },
        ),
        (
            "tokens:gpt-4",
            1_001,
            {"quota": "tokens_per_minute", "limit": "1000", "model": "gpt-4", "requested": "1001"},
        ),
    ],
)
def test_a_refusal_has_the_limit_and_what_its_message_names(
    counter: str, tokens: int, values: dict[str, str]
) -> None:
    found = status(Count(20, 9.25), 3, Count(990, 19.25), 0)
    raised = limits(tokens=tokens).refusal(Refused(found, "limit_exceeded", counter), 0, NOW)
    assert raised.values == values


def test_a_limit_without_a_name_is_called_like_its_counter() -> None:
    extra = Limit(
        lambda call: Counter("images:ann", 1, 2, 86_400.0),
        "-Images",
        "rate_limit_exceeded",
        "Too many images",
    )
    found = LimitStatus(0, {"images:ann": Count(2, 9.25)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomelo.engine.limits.LIMITS", [extra])
        raised = limits().refusal(Refused(found, "limit_exceeded", "images:ann"), 0, NOW)
    assert raised.values == {"quota": "images", "limit": "2", "resetTime": "2023-11-14T22:13:30Z"}


def test_a_refusal_for_lack_of_credits_has_what_is_required_and_what_is_available() -> None:
    raised = limits().refusal(Refused(LimitStatus(1_500_000), "insufficient_credits"), 2_000_000, NOW)
    assert raised.values == {"requiredMicros": "2000000", "availableMicros": "1500000"}
    assert raised.message == "Insufficient credits for this operation"


def test_a_full_plan_proposes_the_wait_of_its_own_error() -> None:
    assert error("concurrency", requests_reset=40) == (
        "concurrency_limit_exceeded",
        "Too many concurrent requests. Wait for one to end",
        1,
    )


@pytest.mark.parametrize("code", ["insufficient_credits", "idempotency_conflict", "idempotency_mismatch"])
def test_another_refusal_has_its_own_error(code: str) -> None:
    raised = limits().refusal(Refused(LimitStatus(0), code), 0, NOW)
    assert raised.code == code
    assert raised.retry_after == (1 if code == "idempotency_conflict" else None)
