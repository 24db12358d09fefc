"""Failures of the OpenAI protocol, in unary and streamed answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.providers.http.client import Timeouts
from pomelo.testing import Answer, Gate, Reply, Stop, error_event, error_reply, redirect
from pomelo.testing.text_answer import JSON
from tests.providers.rig import SECRETS, Rig, check_no_secrets, open_provider, read_all
from tests.providers.text_rig import OPENAI, failure, finish_reason, refusal_of

USAGE = OPENAI.usage(9, 7)


def refusal(status: int, **what: Any) -> Reply:
    """An error of the vendor whose message repeats secrets."""
    return error_reply(status, message=SECRETS, **what)


STATUSES = [
    (refusal(400), "provider_failed", None),
    (refusal(400, code="context_length_exceeded", param="messages"), "context_length_exceeded", None),
    (refusal(400, code="content_policy_violation"), "content_policy_violation", None),
    (refusal(400, code="content_filter"), "content_policy_violation", None),
    (refusal(400, code="invalid_prompt"), "content_policy_violation", None),
    (refusal(400, error_type="invalid_request", code="cyber_policy"), "content_policy_violation", None),
    (refusal(400, code="bio_policy"), "content_policy_violation", None),
    (refusal(400, code="invalid_base64_image"), "invalid_parameter", None),
    (refusal(400, param="temperature", code="unsupported_value"), "invalid_parameter", None),
    (refusal(400, param="messages[3].content", code="string_above_max_length"), "invalid_parameter", None),
    (refusal(400, param="reasoning_effort", code="unsupported_value"), "provider_failed", None),
    (refusal(400, param="stream_options", code="unknown_parameter"), "provider_failed", None),
    (refusal(401, code="invalid_api_key"), "provider_failed", None),
    (refusal(403, code="unsupported_country_region_territory"), "provider_failed", None),
    (refusal(404, param="model", code="model_not_found"), "provider_failed", None),
    (refusal(422, param="max_completion_tokens"), "invalid_parameter", None),
    (refusal(429, error_type="requests", code="rate_limit_exceeded"), "provider_unavailable", 5),
    (
        refusal(429, error_type="tokens", code="rate_limit_exceeded", headers={"Retry-After": "17"}),
        "provider_unavailable",
        17,
    ),
    (refusal(429, code="slow_down", headers={"retry-after-ms": "1200"}), "provider_unavailable", 2),
    (refusal(429, headers={"Retry-After": "9999"}), "provider_unavailable", 60),
    (refusal(429, error_type="insufficient_quota", code="credit_balance_exhausted"), "provider_failed", None),
    (refusal(429, error_type="insufficient_quota", headers={"Retry-After": "9"}), "provider_failed", None),
    (refusal(429, code="organization_spend_limit_exceeded"), "provider_failed", None),
    (refusal(429, code="project_spend_limit_exceeded"), "provider_failed", None),
    (refusal(429, code="organization_usage_limit_exceeded"), "provider_failed", None),
    (refusal(500, error_type="server_error"), "provider_unavailable", 5),
    (
        refusal(503, error_type="service_unavailable_error", code="server_is_overloaded"),
        "provider_unavailable",
        5,
    ),
    (Reply(429, {"Retry-After": "3"}), "provider_unavailable", 3),
    (Reply(429, {"Retry-After": "3"}, steps=(b'{"err', Stop.CLOSE)), "provider_unavailable", 3),
    (redirect("/v1/chat/completions", 302), "provider_failed", None),
]


@pytest.mark.parametrize(("reply", "code", "wait"), STATUSES)
async def test_a_status_is_mapped_to_an_error(
    rig: Rig, reply: Reply, code: str, wait: int | None, stream: bool
) -> None:
    error = await refusal_of(rig, reply, OPENAI.job(stream=stream))
    assert (error.code, error.retry_after) == (code, wait)


async def test_an_error_body_in_many_packets_is_read_to_its_end(rig: Rig) -> None:
    body = refusal(400, code="context_length_exceeded", error_type="x" * 10_000).steps[0]
    assert isinstance(body, bytes)
    rig.script(Reply(400, steps=tuple(body[at : at + 1000] for at in range(0, len(body), 1000))))
    assert (await failure(rig.provider, OPENAI.job(stream=False)))[0].code == "context_length_exceeded"


async def test_a_refused_parameter_is_named_as_in_the_contract(rig: Rig) -> None:
    for theirs, ours in (
        ("max_completion_tokens", "max_tokens"),
        ("safety_identifier", "user"),
        ("user", "user"),
        ("messages.[2].content", "messages"),
        ("stop", "stop"),
    ):
        rig.script(refusal(400, param=theirs))
        error, _ = await failure(rig.provider, OPENAI.job(stream=False))
        assert error.field == ours
        assert ours in error.message


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (error_event(), "provider_unavailable"),
        (error_event("upstream broke"), "provider_failed"),
        (error_event("requests", "rate_limit_exceeded"), "provider_unavailable"),
        (error_event("insufficient_quota", "credit_balance_exhausted"), "provider_failed"),
        (error_event("invalid_request_error", "content_filter"), "content_policy_violation"),
        (error_event("invalid_request", "cyber_policy"), "content_policy_violation"),
        (b'data: {"error":"upstream broke"}\n\n', "provider_failed"),
        (b'event: error\ndata: {"error":{"message":"upstream broke"}}\n\n', "provider_failed"),
        (b'{"error":{"message":"upstream broke","code":429}}\n', "provider_unavailable"),
    ],
)
async def test_an_error_within_a_stream_is_mapped_by_its_code(rig: Rig, step: bytes, code: str) -> None:
    rig.script(Answer("one two three", at={2: step}))
    error, begun = await failure(rig.provider, OPENAI.job(stream=True))
    assert (error.code, begun) == (code, "one two")
    check_no_secrets(error)


async def test_an_error_object_in_place_of_a_stream_is_mapped_by_its_code(rig: Rig) -> None:
    for code, ours in ((503, "provider_unavailable"), ("content_filter", "content_policy_violation")):
        body = json.dumps({"error": {"message": SECRETS, "code": code}}).encode()
        rig.script(Reply(200, JSON, steps=(body,)))
        error, _ = await failure(rig.provider, OPENAI.job(stream=True))
        assert error.code == ours
        check_no_secrets(error)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(done=False),
        Answer(finish_reason=None),
        Answer(finish_reason=None, usage=None, done=False),
        Answer(finish_reason="error"),
    ],
)
async def test_a_stream_without_a_proper_end_never_looks_complete(rig: Rig, answer: Answer) -> None:
    rig.script(answer)
    error, begun = await failure(rig.provider, OPENAI.job(stream=True))
    assert error.code == "provider_failed"
    assert begun == answer.text


async def test_a_unary_answer_above_the_size_limit_fails_and_reading_stops(rig: Rig) -> None:
    for headers, packets in (({}, 90), ({"Content-Length": str(9_000_000)}, 1)):
        rig.script(Reply(headers=headers, steps=(*[b"x" * 100_000] * packets, Gate())))
        error, _ = await failure(rig.provider, OPENAI.job(stream=False))
        assert error.code == "provider_failed"
        await rig.requests[-1].left.wait()


async def test_a_proxy_in_the_environment_is_not_used(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert finish_reason(await read_all(rig.provider, OPENAI.job(stream=False)))


async def test_a_cookie_is_not_sent_back(rig: Rig) -> None:
    for _ in range(2):
        rig.script(error_reply(500, headers={"Set-Cookie": "a=b; Path=/"}))
        await failure(rig.provider, OPENAI.job(stream=False))
    assert "Cookie" not in rig.requests[-1].headers


async def test_unary_answers_have_a_longer_timeout_than_the_silence_of_a_stream(rig: Rig) -> None:
    rig.script(Answer(before=(0.2,)))
    async with open_provider(
        OPENAI.make, rig.openai_base_url, timeouts=Timeouts(silence=0.05, whole=5)
    ) as provider:
        assert finish_reason(await read_all(provider, OPENAI.job(stream=False)))


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "nonsense"])
async def test_an_invalid_address_is_provider_failed(url: str) -> None:
    async with open_provider(OPENAI.make, url) as provider:
        error, _ = await failure(provider, OPENAI.job(stream=False))
    assert error.code == "provider_failed"
