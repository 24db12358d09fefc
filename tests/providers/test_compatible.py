"""Hosts that speak chat completions with habits of their own, each of them a row of data."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.catalog.rows import Row, wrong_values
from pomelo.errors import PomeloError
from pomelo.providers import Credentials
from pomelo.providers.anthropic.anthropic import AnthropicOptions
from pomelo.providers.base import fit_job
from pomelo.providers.chat.chat import ChatOptions
from pomelo.providers.chat.compatible import Compatible, HostRow, host
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.client import Http
from pomelo.testing import Answer, FaultUpstream, Reply, chunk
from pomelo.testing.text_answer import DONE
from tests.providers.rig import KEY, SECRETS, check_no_secrets, read_all
from tests.providers.text_rig import (
    COMPATIBLE,
    PNG,
    USER,
    a_host,
    check_last,
    check_no_usage,
    failure,
    hi,
    largest_input,
    text,
)

FIELDS = {"model", "messages", "max_tokens", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "stop", "user"}  # fmt: skip


async def body(
    upstream: FaultUpstream, *, stream: bool = False, route: Route | None = None, **row: Any
) -> Any:
    """Sends a job with every field to a host; returns the body of the request."""
    async with a_host(upstream, **row) as provider:
        asked = COMPATIBLE.job(largest_input(), stream=stream, route=route, user=USER)
        # The protocol that plays the host is OpenAI's, which has no such names as some of the rows.
        with contextlib.suppress(PomeloError):
            await read_all(provider, asked)
    return (await upstream.received()).body


async def test_the_largest_request_by_default_has_every_field_under_its_common_name(
    upstream: FaultUpstream,
) -> None:
    sent = await body(upstream, stream=True)
    assert sent.keys() == FIELDS | {"stream", "stream_options"}
    assert (sent["seed"], sent["user"]) == (2**53 - 1, "alice@example.com")
    assert sent["stream_options"] == {"include_usage": True}


async def test_the_texts_of_a_message_are_one(upstream: FaultUpstream) -> None:
    """Some hosts take a list only if it has an image."""
    sent = await body(upstream)
    assert [(each["role"], each["content"]) for each in sent["messages"]] == [
        ("system", "Be brief. Ünïcödé 🍊"),
        (
            "user",
            [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PNG}}],
        ),
        ("assistant", ""),
        ("assistant", "A dot. Or two."),
        ("system", "Be kind.\nBe quick."),
        ("user", "Sure?"),
    ]


@pytest.mark.parametrize(
    ("row", "gone", "new"),
    [
        ({"max_tokens_field": "max_completion_tokens"}, "max_tokens", {"max_completion_tokens": 100}),
        ({"seed_field": "random_seed"}, "seed", {"random_seed": 2**53 - 1}),
        ({"seed_field": "none"}, "seed", {}),
        ({"user_field": "safety_identifier"}, "user", {"safety_identifier": "alice@example.com"}),
        ({"user_field": "none"}, "user", {}),
        ({"drop": ["stop"]}, "stop", {}),
        ({"allow": [*(FIELDS - {"model", "messages", "top_p"})]}, "top_p", {}),
        ({"extra": {"store": False}}, "", {"store": False}),
    ],
)
async def test_a_row_renames_drops_and_adds(
    upstream: FaultUpstream, row: dict[str, Any], gone: str, new: dict[str, Any]
) -> None:
    sent = await body(upstream, **row)
    assert sent.keys() == (FIELDS - {gone}) | new.keys()
    assert new.items() <= sent.items()


async def test_what_is_dropped_and_what_is_not_allowed_are_both_left_out(upstream: FaultUpstream) -> None:
    sent = await body(upstream, allow=[*(FIELDS - {"model", "messages", "top_p"})], drop=["stop"])
    assert sent.keys() == FIELDS - {"top_p", "stop"}


async def test_the_shortest_allow_list_leaves_the_messages(upstream: FaultUpstream) -> None:
    assert (await body(upstream, allow=["max_tokens"])).keys() == {"model", "messages", "max_tokens"}


@pytest.mark.parametrize(
    "row", [{"allow": []}, {"allow": ["seed"]}, {"drop": ["max_tokens"]}, {"max_tokens_field": "none"}]
)
def test_a_host_without_max_tokens_is_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nothing bounds what a task costs"):
        host("ahost", row)


@pytest.mark.parametrize("schema", [HostRow, ChatOptions, AnthropicOptions])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
def test_what_limits_the_cost_of_a_task_is_not_fixed_for_every_request(schema: type[Row], name: str) -> None:
    [(keys, message)] = wrong_values(schema, {"extra": {"top_k": 40, name: 4}})
    assert keys == ("extra",)
    assert f"must not have {name}: a task could cost more than it reserves" in message
    assert wrong_values(schema, {"extra": {"top_k": 40}}) == []


@pytest.mark.parametrize("fixed_by", ["host", "route"])
async def test_a_hosts_own_name_of_max_tokens_is_not_fixed_either(
    upstream: FaultUpstream, fixed_by: str
) -> None:
    extra = {"max_new_tokens": 4_000, "store": True}
    route = Route("ahost", "m", options={"extra": extra} if fixed_by == "route" else {})
    row: dict[str, Any] = {"extra": extra} if fixed_by == "host" else {}
    sent = await body(upstream, route=route, max_tokens_field="max_new_tokens", **row)
    assert (sent["max_new_tokens"], sent["store"]) == (100, True)


async def test_a_route_overrules_the_row_of_its_host(upstream: FaultUpstream) -> None:
    options = {"seed_field": "seed", "user_field": "none", "stream_usage": "none", "extra": {"store": True}}
    route = Route("ahost", "m", drop=frozenset(("stop",)), options=options)
    sent = await body(upstream, stream=True, route=route, seed_field="none", extra={"store": False})
    assert sent.keys() == (FIELDS - {"user", "stop"}) | {"stream", "store"}
    assert sent["store"] is True


async def test_what_a_host_or_a_route_fixes_is_reported_as_adjusted() -> None:
    fixed = host("ahost", {"extra": {"temperature": 1, "top_p": 0.5}})
    route = Route("ahost", "m", options={"extra": {"top_p": 0.25}})
    text_job = COMPATIBLE.job(hi(temperature=0, top_p=1), stream=False, route=route)
    async with Http() as http:
        provider = Compatible(Credentials("", "http://ahost"), http, profile=fixed)
        fitted = fit_job(text_job, provider.fit_text)
    assert [(change.field, change.used) for change in fitted.adjustments] == [
        ("temperature", "1"),
        ("top_p", "0.25"),
    ]


async def test_an_end_user_id_that_is_too_long_is_sent_as_a_digest(upstream: FaultUpstream) -> None:
    sent = await body(upstream, user_most=5)
    assert len(sent["user"]) == 64
    assert "alice" not in sent["user"]


@pytest.mark.parametrize("usage", ["always", "none"])
async def test_a_host_without_a_request_for_token_counts_can_omit_them(
    upstream: FaultUpstream, usage: str
) -> None:
    async with a_host(upstream, stream_usage=usage) as provider:
        answer = await read_all(provider, COMPATIBLE.job(hi(), stream=True))
    assert "stream_options" not in (await upstream.received()).body
    check_no_usage(answer)


async def test_a_host_that_needs_no_key_is_configured_without_one(upstream: FaultUpstream) -> None:
    async with a_host(upstream, key=None, key_needed=False) as provider:
        assert provider.configured
        await failure(provider, COMPATIBLE.job(stream=False))
    assert "Authorization" not in (await upstream.received()).headers


async def test_a_host_without_an_address_is_not_configured() -> None:
    async with Http() as http:
        assert not Compatible(Credentials(KEY, ""), http, host("ahost", {"key_needed": False})).configured


async def test_a_host_can_require_its_own_headers(upstream: FaultUpstream) -> None:
    async with a_host(upstream, headers={"X-Title": "Pomelo"}) as provider:
        await read_all(provider, COMPATIBLE.job(stream=False))
    headers = (await upstream.received()).headers
    assert (headers["X-Title"], headers["Authorization"]) == ("Pomelo", f"Bearer {KEY}")


@pytest.mark.parametrize("name", ["Authorization", "authorization"])
async def test_no_header_of_a_host_replaces_the_key(upstream: FaultUpstream, name: str) -> None:
    async with a_host(upstream, headers={name: "Bearer another"}) as provider:
        await read_all(provider, COMPATIBLE.job(stream=False))
    headers = (await upstream.received()).headers
    assert [value for each, value in headers.items() if each.lower() == "authorization"] == [f"Bearer {KEY}"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"speed": 1}, "speed"),
        ({"seed_field": 7}, "seed_field"),
        ({"drop": "stop"}, "drop"),
        ({"drop": ["stops"]}, "stops"),
        ({"allow": ["model"]}, "model"),
        ({"stream_usage": "often"}, "stream_usage"),
        ({"key_needed": "no"}, "key_needed"),
        ({"reports_cost": "yes"}, "reports_cost"),
        ({"base_url": "ftp://acme.example"}, "base_url"),
        ({"base_url": "http://acme.example/ x"}, "base_url"),
        ({"headers": {"X-Title": "Pomelo\nX-Evil: 1"}}, "headers"),
        ({"headers": {"X Title": "Pomelo"}}, "headers"),
        ({"meanings": {"busy": "unheard_of"}}, "meanings.busy"),
        ({"user_most": 0}, "user_most"),
    ],
)
def test_a_row_that_is_wrong_is_refused_by_name(row: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"ahost.*{named}"):
        host("ahost", row)


@pytest.mark.parametrize("place", ["x_groq", "usage"])
async def test_a_count_in_the_object_of_groq_is_used_unless_it_is_beside_it(
    upstream: FaultUpstream, place: str
) -> None:
    usage = COMPATIBLE.usage(9, 7)
    last = (
        chunk({}, finish_reason="stop", x_groq={"id": "req", "usage": usage})
        if place == "x_groq"
        else chunk({}, finish_reason="stop", x_groq={"id": "req"}, usage=usage)
    )
    first = chunk({"content": "Hi"}, x_groq={"id": "req"})
    upstream.script(Reply(steps=(first, last, DONE)))
    async with a_host(upstream) as provider:
        answer = await read_all(provider, COMPATIBLE.job(stream=True))
    assert text(answer) == "Hi"
    check_last(answer, 9, 7)


COSTS = [
    (COMPATIBLE.usage(9, 7) | {"cost": 0.00125}, 0.00125),
    (COMPATIBLE.usage(9, 7) | {"cost": 0}, 0),
    (COMPATIBLE.usage(9, 7) | {"cost": 0.001, "is_byok": True}, None),
    (COMPATIBLE.usage(9, 7), None),
    (None, None),
]


@pytest.mark.parametrize(("usage", "cost"), COSTS)
@pytest.mark.parametrize("knob", [{}, {"reports_cost": False}, {"reports_cost": True}], ids=str)
async def test_a_cost_is_reported_if_the_row_declares_it_in_dollars(
    upstream: FaultUpstream, knob: dict[str, Any], usage: Any, cost: float | None, stream: bool
) -> None:
    upstream.script(Answer("one two", usage=usage))
    job = COMPATIBLE.job(stream=stream)
    async with a_host(upstream, **knob) as provider:
        await read_all(provider, job)
    assert job.report.cost == (cost if knob.get("reports_cost") else None)


async def test_a_cost_in_an_earlier_chunk_is_kept_if_a_later_chunk_has_no_cost(
    upstream: FaultUpstream,
) -> None:
    usage = COMPATIBLE.usage(9, 7)
    upstream.script(Answer("one two", at={1: chunk(None, usage=usage | {"cost": 0.5})}, usage=usage))
    job = COMPATIBLE.job(stream=True)
    async with a_host(upstream, reports_cost=True) as provider:
        await read_all(provider, job)
    assert job.report.cost == 0.5


async def test_keep_alive_comments_are_skipped(upstream: FaultUpstream) -> None:
    upstream.script(Answer("one two", at={0: (b": OPENROUTER PROCESSING\n\n",) * 50}))
    async with a_host(upstream) as provider:
        assert text(await read_all(provider, COMPATIBLE.job(stream=True))) == "one two"


def routed(code: int, **more: Any) -> dict[str, Any]:
    """An error as OpenRouter words it."""
    return {"error": {"code": code, "message": SECRETS, **more}}


MODERATED = routed(403, metadata={"reasons": ["violence"], "flagged_input": SECRETS})


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (chunk({"content": ""}, finish_reason="error", **routed(502)), "provider_unavailable"),
        (chunk({"content": ""}, finish_reason="error", **routed(429)), "provider_unavailable"),
        (chunk({"content": ""}, finish_reason="error", **routed(408)), "provider_unavailable"),
        (chunk({"content": ""}, finish_reason="error", **routed(402)), "provider_failed"),
        (chunk({"content": ""}, finish_reason="error", **MODERATED), "content_policy_violation"),
        (chunk({"content": ""}, finish_reason="error"), "provider_failed"),
        (chunk({"content": ""}, x_groq={"error": SECRETS}), "provider_failed"),
        (chunk({}, x_groq={"error": {"type": "server_error"}}), "provider_unavailable"),
        (b'event: error\ndata: {"error":{"message":"<b>","type":"server_error"}}\n\n', "provider_unavailable"),
        (b'data: {"object":"error","message":"<b>","type":"BadRequestError","code":400}\n\n', "provider_failed"),
        (b'data: {"object":"error","message":"<b>","type":"x","code":503}\n\n', "provider_unavailable"),
    ],
)  # fmt: skip
async def test_an_error_within_a_stream_is_mapped_by_its_code(
    upstream: FaultUpstream, step: bytes, code: str
) -> None:
    upstream.script(Answer("one two", at={1: step}))
    async with a_host(upstream) as provider:
        error, begun = await failure(provider, COMPATIBLE.job(stream=True))
    assert (error.code, begun) == (code, "one")
    check_no_secrets(error)


LONG = f"This model's maximum context length is 4096 tokens. However, {SECRETS}" + " your messages" * 200


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (400, {"object": "error", "message": LONG, "type": "BadRequestError", "code": 400}, "context_length_exceeded"),
        (400, {"error": {"message": LONG, "type": "invalid_request_error"}}, "context_length_exceeded"),
        (400, {"object": "error", "message": SECRETS, "param": "top_p", "code": 400}, "invalid_parameter"),
        (401, {"error": "unauthorized"}, "provider_failed"),
        (402, routed(402), "provider_failed"),
        (403, routed(403), "provider_failed"),
        (403, MODERATED, "content_policy_violation"),
        (404, {"error": {"message": SECRETS, "type": "not_found_error", "code": None}}, "provider_failed"),
        (429, routed(429), "provider_unavailable"),
        (502, routed(502, metadata={"provider_name": SECRETS}), "provider_unavailable"),
        (503, {"message": SECRETS}, "provider_unavailable"),
    ],
)  # fmt: skip
async def test_a_status_is_mapped_to_an_error(
    upstream: FaultUpstream, status: int, body: Any, code: str, stream: bool
) -> None:
    upstream.script(Reply(status, steps=(json.dumps(body).encode(),)))
    async with a_host(upstream) as provider:
        error, _ = await failure(provider, COMPATIBLE.job(stream=stream))
    assert error.code == code
    check_no_secrets(error)


async def test_a_hosts_own_error_code_is_mapped_by_its_catalogue_row(upstream: FaultUpstream) -> None:
    upstream.script(Reply(400, steps=(b'{"error":{"type":"input_refused"}}',)))
    async with a_host(upstream, meanings={"input_refused": "content_policy_violation"}) as provider:
        error, _ = await failure(provider, COMPATIBLE.job(stream=False))
    assert error.code == "content_policy_violation"


async def test_a_hosts_own_meaning_of_a_code_counts_before_the_common_one(upstream: FaultUpstream) -> None:
    upstream.script(Reply(429, steps=(b'{"error":{"code":"rate_limit_exceeded"}}',)))
    async with a_host(upstream, meanings={"rate_limit_exceeded": "provider_failed"}) as provider:
        error, _ = await failure(provider, COMPATIBLE.job(stream=False))
    assert error.code == "provider_failed"


@pytest.mark.parametrize(
    ("row", "theirs", "ours"),
    [
        ({"max_tokens_field": "maxTokens"}, "maxTokens", "max_tokens"),
        ({"seed_field": "noise"}, "noise", "seed"),
        ({"user_field": "endUser"}, "endUser", "user"),
        ({"user_field": "none"}, "none", None),
        ({}, "endUser", None),
    ],
)
async def test_a_refused_field_of_a_hosts_own_name_is_named_as_in_the_contract(
    upstream: FaultUpstream, row: dict[str, Any], theirs: str, ours: str | None
) -> None:
    upstream.script(Reply(400, steps=(json.dumps({"error": {"param": theirs}}).encode(),)))
    async with a_host(upstream, **row) as provider:
        error, _ = await failure(provider, COMPATIBLE.job(stream=False))
    assert (error.code, error.field) == ("invalid_parameter" if ours else "provider_failed", ours)


async def test_a_choice_that_ends_with_an_error_is_mapped_to_that_error(upstream: FaultUpstream) -> None:
    choice = {"message": {"content": ""}, "finish_reason": "error", "error": {"code": 502, "message": "<b>"}}
    upstream.script(Reply(steps=(json.dumps({"choices": [choice]}).encode(),)))
    async with a_host(upstream) as provider:
        error, _ = await failure(provider, COMPATIBLE.job(stream=False))
    assert isinstance(error, UpstreamError)
    # It may have cost something: an answer has begun.
    assert (error.code, error.retry) == ("provider_unavailable", RetryPolicy.NEVER)
