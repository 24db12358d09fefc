"""Failures of the OpenAI protocol, in unary and streamed answers."""

from __future__ import annotations

import gzip
import json
import traceback
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pomelo.testing import (
    Answer,
    FaultUpstream,
    Gate,
    Reply,
    Script,
    Stop,
    broken_json,
    chunk,
    error_event,
    error_reply,
    half_character,
    huge_line,
    page,
    redirect,
)
from tests.providers.openai.rig import KEY, PROMPT, deltas, failure, job, open_provider

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
SECRETS = f"{KEY} {PROMPT} <b>body</b>"


@pytest.fixture(name="vendor")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="provider")
async def _provider(vendor: FaultUpstream) -> AsyncIterator[Any]:
    async with open_provider(vendor.openai_base_url) as provider:
        yield provider


def check_no_secrets(error: BaseException) -> None:
    """Nothing of the key, the prompt or the vendor's words is in the message or in a log of the error."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(error.__context__)
    for secret in (KEY, PROMPT, "canary", "<b>", "upstream broke"):
        assert secret not in shown


def refusal(status: int, **what: Any) -> Reply:
    """An error of the vendor whose message repeats secrets."""
    return error_reply(status, message=SECRETS, **what)


STATUSES = [
    (refusal(400), "provider_failed", None),
    (refusal(400, code="context_length_exceeded", param="messages"), "context_length_exceeded", None),
    (refusal(400, code="content_policy_violation"), "content_policy_violation", None),
    (refusal(400, code="content_filter"), "content_policy_violation", None),
    (refusal(400, code="invalid_prompt"), "content_policy_violation", None),
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
    (page(403), "provider_failed", None),
    (Reply(429, {"Retry-After": "3"}), "provider_unavailable", 3),
    (Reply(500, steps=(b"x" * 200_000,)), "provider_unavailable", 5),
    (Reply(429, {"Retry-After": "3"}, steps=(b'{"err', Stop.CLOSE)), "provider_unavailable", 3),
    (Reply(400, steps=(b'{"error": "as text"}',)), "provider_failed", None),
    (Reply(400, steps=(b'{"error": {"code": 7, "param": ["stop"]}}',)), "provider_failed", None),
    (redirect("/v1/chat/completions", 302), "provider_failed", None),
]


@BOTH
@pytest.mark.parametrize(("reply", "code", "wait"), STATUSES)
async def test_a_status_is_mapped_to_an_error(
    vendor: FaultUpstream, provider: Any, reply: Reply, code: str, wait: int | None, stream: bool
) -> None:
    vendor.script(reply)
    error, text = await failure(provider, job(stream=stream))
    assert (error.code, error.retry_after, text) == (code, wait, "")
    check_no_secrets(error)
    assert len(vendor.requests) == 1, "it was sent twice"


async def test_a_refused_parameter_is_named_as_in_the_contract(vendor: FaultUpstream, provider: Any) -> None:
    for theirs, ours in (
        ("max_completion_tokens", "max_tokens"),
        ("safety_identifier", "user"),
        ("messages.[2].content", "messages"),
        ("stop", "stop"),
    ):
        vendor.script(refusal(400, param=theirs))
        error, _ = await failure(provider, job(stream=False))
        assert error.field == ours
        assert ours in error.message


NO_ANSWER: list[tuple[Script, str]] = [
    (Reply(204), "provider_failed"),
    (Reply(steps=(b"[]",)), "provider_failed"),
    (Reply(steps=(b"null",)), "provider_failed"),
    (Reply(steps=(b'"text"',)), "provider_failed"),
    (Reply(steps=(b"data: 1\n\n",)), "provider_failed"),
    (Reply(steps=(b"data: []\n\n",)), "provider_failed"),
    (Reply(steps=(b'data: "x"\n\n',)), "provider_failed"),
    (Reply(steps=(b"data: [DONE]\n\n",)), "provider_failed"),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(b"\x1f\x8b\x08\x00",)), "provider_failed"),
    (Reply(steps=(b"[" * 100_000,)), "provider_failed"),
    (Reply(steps=(b'data: {"choices":[7]}\n\n',)), "provider_failed"),
    (Reply(steps=(b'data: {"choices":{"a":1}}\n\n',)), "provider_failed"),
    (Reply(steps=(b'data: {"choices":[{"delta":{"content":["x"]}}]}\n\n',)), "provider_failed"),
    (Reply(steps=(b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}',)), "provider_failed"),
    (Answer(at={0: Stop.END}, text="x"), "provider_failed"),
    (Answer(finish_reason=None, text=""), "provider_failed"),
    (Answer(finish_reason="error", text=""), "provider_failed"),
    (Answer(finish_reason=7, text=""), "provider_failed"),  # type: ignore[arg-type]
]


@BOTH
@pytest.mark.parametrize(("script", "code"), NO_ANSWER)
async def test_an_invalid_response_is_mapped_to_an_error(
    vendor: FaultUpstream, provider: Any, script: Script, code: str, stream: bool
) -> None:
    vendor.script(script)
    error, text = await failure(provider, job(stream=stream))
    assert (error.code, text) == (code, "")
    check_no_secrets(error)


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (Stop.CLOSE, "provider_failed"),
        (Stop.RESET, "provider_failed"),
        (Stop.END, "provider_failed"),
        (broken_json(), "provider_failed"),
        (half_character(), "provider_failed"),
        (huge_line(), "provider_failed"),
        (huge_line(300_000), "provider_failed"),
        (b"data: " + b"x" * 300_000, "provider_failed"),
        (error_event(), "provider_unavailable"),
        (error_event("upstream broke"), "provider_failed"),
        (error_event("requests", "rate_limit_exceeded"), "provider_unavailable"),
        (error_event("insufficient_quota", "credit_balance_exhausted"), "provider_failed"),
        (error_event("invalid_request_error", "content_filter"), "content_policy_violation"),
        (b'data: {"error":"upstream broke"}\n\n', "provider_failed"),
        (b'event: error\ndata: {"error":{"message":"upstream broke"}}\n\n', "provider_failed"),
    ],
)
async def test_a_stream_that_breaks_keeps_its_text_and_never_looks_complete(
    vendor: FaultUpstream, provider: Any, step: Any, code: str
) -> None:
    gate = Gate()
    vendor.script(Answer("one two three", at={2: (gate, step)}))
    text = ""
    with pytest.raises(Exception) as raised:  # noqa: PT011, PT012
        async for event in provider.text(job(stream=True)):
            assert not event.text_delta.finish_reason
            text += event.text_delta.content
            if text == "one two":
                gate.open()
    assert text == "one two"
    assert getattr(raised.value, "code", None) == code
    check_no_secrets(raised.value)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(done=False),
        Answer(finish_reason=None),
        Answer(finish_reason=None, usage=None, done=False),
        Answer(finish_reason="error"),
    ],
)
async def test_a_stream_without_a_proper_end_never_looks_complete(
    vendor: FaultUpstream, provider: Any, answer: Answer
) -> None:
    vendor.script(answer)
    error, text = await failure(provider, job(stream=True))
    assert error.code == "provider_failed"
    assert text == answer.text


async def test_an_error_instead_of_a_unary_answer_is_mapped_by_its_code(
    vendor: FaultUpstream, provider: Any
) -> None:
    vendor.script(Reply(steps=(b'{"error":{"type":"server_error","code":null,"message":"upstream broke"}}',)))
    error, _ = await failure(provider, job(stream=False))
    assert error.code == "provider_unavailable"
    check_no_secrets(error)


async def test_a_unary_answer_above_the_size_limit_fails_and_reading_stops(
    vendor: FaultUpstream, provider: Any
) -> None:
    for headers, packets in (({}, 90), ({"Content-Length": str(9_000_000)}, 1)):
        vendor.script(Reply(headers=headers, steps=(*[b"x" * 100_000] * packets, Gate())))
        error, _ = await failure(provider, job(stream=False))
        assert error.code == "provider_failed"
        await vendor.requests[-1].left.wait()


async def test_a_response_that_is_compressed_without_a_request_is_not_decompressed(
    vendor: FaultUpstream, provider: Any
) -> None:
    body = gzip.compress(
        b'{"choices":[{"message":{"content":"Hi"},"finish_reason":"stop"}],"usage":%s}'
        % json.dumps(USAGE).encode()
    )
    vendor.script(Reply(headers={"Content-Encoding": "gzip"}, steps=(body,)))
    error, _ = await failure(provider, job(stream=False))
    assert error.code == "provider_failed"


async def test_a_proxy_in_the_environment_is_not_used(
    vendor: FaultUpstream, provider: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert (await deltas(provider, job(stream=False)))[-1].finish_reason


async def test_a_cookie_is_not_sent_back(vendor: FaultUpstream, provider: Any) -> None:
    for _ in range(2):
        vendor.script(error_reply(500, headers={"Set-Cookie": "a=b; Path=/"}))
        await failure(provider, job(stream=False))
    assert "Cookie" not in vendor.requests[-1].headers


async def test_unary_answers_have_a_longer_timeout_than_the_silence_of_a_stream(
    vendor: FaultUpstream,
) -> None:
    vendor.script(Answer(before=(0.2,)))
    async with open_provider(vendor.openai_base_url, silence=0.05, whole=5) as provider:
        assert (await deltas(provider, job(stream=False)))[-1].finish_reason


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/v1", "nonsense"])
async def test_an_invalid_address_is_provider_failed(url: str) -> None:
    async with open_provider(url) as provider:
        error, _ = await failure(provider, job(stream=False))
    assert error.code == "provider_failed"


async def test_a_stream_of_only_comments_continues_until_it_is_closed(
    vendor: FaultUpstream, provider: Any
) -> None:
    vendor.script(Answer("one two", at={1: (b": wait\n\n",) * 100}))
    assert "".join(delta.content for delta in await deltas(provider, job(stream=True))) == "one two"


async def test_a_finished_chunk_that_is_never_marked_done_fails(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Reply(steps=(chunk({"content": "Hi"}, finish_reason="stop", usage=USAGE),)))
    error, text = await failure(provider, job(stream=True))
    assert (error.code, text) == ("provider_failed", "Hi")
