"""Answers and errors that hosts of chat completions word in their own ways."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.testing import Answer, FaultUpstream, Reply
from tests.providers.rig import SECRETS, check_no_secrets, read_all
from tests.providers.text_rig import COMPATIBLE, a_host, check_last, failure, reported_usage


@pytest.mark.parametrize("reason", ["abort", "insufficient_system_resource", "network_error"])
async def test_an_answer_that_the_host_has_not_completed_fails(
    upstream: FaultUpstream, reason: str, stream: bool
) -> None:
    upstream.script(Answer("one two", finish_reason=reason))
    async with a_host(upstream) as provider:
        error, begun = await failure(provider, COMPATIBLE.job(stream=stream))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry) == ("provider_failed", RetryPolicy.NEVER)
    assert begun == ("one two" if stream else "")


@pytest.mark.parametrize(
    ("total", "output", "reasoning"),
    [(9 + 7 + 386, 7 + 386, 386), (9 + 7, 7, 0), (9 + 7 + 385, 7, 0), (None, 7, 0), (-1, 7, 0)],
)
async def test_reasoning_that_is_counted_beside_the_output_is_output(
    upstream: FaultUpstream, total: int | None, output: int, reasoning: int, stream: bool
) -> None:
    """As xAI does: its total of all tokens shows it."""
    details = {"total_tokens": total, "completion_tokens_details": {"reasoning_tokens": 386}}
    upstream.script(Answer("Hi", usage=COMPATIBLE.usage(9, 7) | details))
    async with a_host(upstream) as provider:
        answer = await read_all(provider, COMPATIBLE.job(stream=stream))
    check_last([answer[-1]], 9, output)
    assert reported_usage(answer).reasoning_tokens == reasoning


@pytest.mark.parametrize("choices", [{}, {"choices": None}, {"choices": []}], ids=str)
@pytest.mark.parametrize(
    ("theirs", "code", "retry"),
    [
        (429, "provider_unavailable", RetryPolicy.SAME_ROUTE),
        ("a_new_one", "provider_failed", RetryPolicy.NEVER),
    ],
)
async def test_an_error_in_place_of_choices_is_mapped_by_its_code(
    upstream: FaultUpstream, choices: dict[str, Any], theirs: Any, code: str, retry: RetryPolicy, stream: bool
) -> None:
    body = choices | {"error": {"code": theirs, "message": SECRETS}}
    upstream.script(Reply(steps=(json.dumps(body).encode(),)))
    async with a_host(upstream) as provider:
        error, _ = await failure(provider, COMPATIBLE.job(stream=stream))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry) == (code, retry)
    check_no_secrets(error)
