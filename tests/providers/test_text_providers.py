"""Requests, answers and failures of every text provider."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from pomelo.catalog.catalog import Catalog, Route
from pomelo.gen.v1.text_pb2 import Role, TextInput
from pomelo.providers.errors import RetryPolicy, UpstreamError
from pomelo.providers.http.sse import MAX_EVENT_BYTES
from pomelo.testing import FaultUpstream, Gate, Received, Reply, Stop, broken_json, openai_protocol, page
from pomelo.testing.text_answer import DONE, JSON
from tests.providers.rig import Rig, base_url, check_no_secrets, open_provider, read_all
from tests.providers.text_rig import (
    ANTHROPIC,
    COMPATIBLE,
    LONG,
    MISTRAL,
    OPENAI,
    STOP,
    USER,
    Vendor,
    check_last,
    check_no_usage,
    failure,
    finish_reason,
    largest_input,
    message,
    refusal_of,
    reported_usage,
    sent,
    text,
    texts,
)

CATALOGUE = [
    (vendor, route)
    for vendor in (OPENAI, ANTHROPIC, MISTRAL)
    for model in Catalog.load().models.values()
    for route in model.routes
    if route.provider == vendor.name
]
_STOP = openai_protocol.chunk({}, finish_reason="stop")
TEXT = "Grüße aus Zürich: 🍊 naïve, 日本語 and\nmore. "


async def test_a_unary_answer_is_one_delta_with_all_fields(vendor: Vendor, rig: Rig) -> None:
    rig.script(vendor.protocol.Answer(TEXT, usage=vendor.usage(9, 7)))
    answer = await read_all(rig.provider, vendor.job(stream=False))
    assert texts(answer) == [TEXT]
    check_last(answer, 9, 7, STOP)


async def test_a_stream_has_a_delta_for_each_event_with_text_and_a_final_delta(
    vendor: Vendor, rig: Rig
) -> None:
    rig.script(vendor.protocol.Answer("one two three", usage=vendor.usage(9, 7)))
    # OpenAI's protocol reports the token counts of a stream only on request, which the provider makes.
    answer = await read_all(rig.provider, vendor.job(stream=True))
    assert texts(answer) == ["one", " two", " three", ""]
    check_last(answer, 9, 7, STOP)


@pytest.mark.parametrize("packing", ["events", "together", "bytes"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("comments", [False, True])
async def test_a_stream_means_the_same_however_it_is_packed(
    vendor: Vendor, rig: Rig, packing: Any, line_end: bytes, comments: bool
) -> None:
    form = {"packing": packing, "line_end": line_end, "comments": comments}
    rig.script(vendor.protocol.Answer(TEXT, usage=vendor.usage(9, 7), **form))
    answer = await read_all(rig.provider, vendor.job(stream=True))
    assert text(answer) == TEXT
    check_last(answer, 9, 7, STOP)


async def test_text_arrives_while_the_vendor_still_sends(vendor: Vendor, rig: Rig) -> None:
    gate = Gate()
    rig.script(vendor.protocol.Answer("one two three", at={1: gate}))
    async with aclosing(rig.provider.text(vendor.job(stream=True))) as events:
        assert (await anext(events)).text_delta.text == "one"
        gate.open()
        assert texts([event async for event in events]) == [" two", " three", ""]


async def test_an_empty_answer_is_an_answer(vendor: Vendor, rig: Rig, stream: bool) -> None:
    rig.script(vendor.protocol.Answer("", usage=vendor.usage(9, 0)))
    answer = await read_all(rig.provider, vendor.job(stream=stream))
    assert texts(answer) == [""]
    check_last(answer, 9, 0, STOP)


@pytest.mark.parametrize(
    "counts",
    [None, {}, (-1, 2), (1, 10**9 + 1), (1.5, 2), (True, 2), ("1", 2), (1, None), (1,), [1, 2], 10**30],
)
async def test_without_a_credible_count_an_answer_ends_without_one(
    vendor: Vendor, rig: Rig, counts: Any
) -> None:
    usage = dict(zip(vendor.counts, counts, strict=False)) if isinstance(counts, tuple) else counts
    answer = vendor.protocol.Answer("one two three", usage=usage)
    rig.script(answer, answer)
    text_input = TextInput(messages=[message(Role.ROLE_USER, "count these four words")])
    answer_text = await read_all(rig.provider, vendor.job(text_input, stream=True))
    assert text(answer_text) == "one two three"
    check_no_usage(answer_text)
    answer_text = await read_all(rig.provider, vendor.job(text_input, stream=False))
    assert text(answer_text) == "one two three"
    check_no_usage(answer_text)


async def test_the_output_includes_the_tokens_of_reasoning(vendor: Vendor, rig: Rig, stream: bool) -> None:
    rig.script(vendor.protocol.Answer("one two", reasoning_tokens=3))
    answer = await read_all(rig.provider, vendor.job(stream=stream))
    check_last(answer, 3, 5)
    assert reported_usage(answer).reasoning_tokens == (0 if vendor is MISTRAL else 3)


async def test_a_connection_serves_one_answer_after_another(vendor: Vendor, rig: Rig, stream: bool) -> None:
    for _ in range(3):
        await read_all(rig.provider, vendor.job(stream=stream))
    assert len({received.connection for received in rig.requests}) == 1


NO_CHOICE = b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
NO_TEXT = b'{"choices":[{"delta":{"content":["x"]}}]}'
NO_ANSWER = [
    (page(403), "provider_failed"),
    (Reply(500, steps=(b"x" * 200_000,)), "provider_unavailable"),
    (Reply(400, steps=(b'{"error": "as text"}',)), "provider_failed"),
    (Reply(400, steps=(b'{"error": {"code": 7.5, "type": [], "param": ["stop"]}}',)), "provider_failed"),
    (Reply(204), "provider_failed"),
    *(
        (Reply(steps=(body,)), "provider_failed")
        for body in (b"{}", b"[]", b"null", b'"text"', b"[" * 9999, b"[" * 100_000, NO_CHOICE)
    ),
    *(
        (Reply(steps=(b"data: " + data + b"\n\n",)), "provider_failed")
        for data in (
            b"1",
            b"[]",
            b'"x"',
            b"{}",
            b"[DONE]",
            b'{"type":"message_stop"}',
            b'{"choices":[7]}',
            b'{"choices":{"a":1}}',
            NO_TEXT,
        )
    ),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(b"\x1f\x8b\x08\x00",)), "provider_failed"),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(gzip.compress(b"{}"),)), "provider_failed"),
]


@pytest.mark.parametrize(("reply", "code"), NO_ANSWER)
async def test_an_invalid_response_is_mapped_to_an_error(
    vendor: Vendor, rig: Rig, reply: Reply, code: str, stream: bool
) -> None:
    assert (await refusal_of(rig, reply, vendor.job(stream=stream))).code == code


@pytest.mark.parametrize(
    "change",
    [
        {"finish_reason": None},
        {"finish_reason": 7},
        *({"at": {0: stop}} for stop in (Stop.END, Stop.CLOSE, Stop.RESET)),
        {"at": {0: b"data: \xff\n\n"}},
        {"text": "x", "at": {0: Stop.END}},
    ],
)
async def test_an_answer_without_its_parts_is_refused(
    vendor: Vendor, rig: Rig, change: dict[str, Any], stream: bool
) -> None:
    rig.script(vendor.protocol.Answer(**{"text": ""} | change))
    error, answer_text = await failure(rig.provider, vendor.job(stream=stream))
    assert (error.code, answer_text) == ("provider_failed", "")
    check_no_secrets(error)


@pytest.mark.parametrize(
    "fault",
    [
        "CLOSE",
        "RESET",
        "END",
        "broken json",
        "half a character",
        "a huge line",
        "no end",
        "an error",
    ],
)
async def test_a_stream_that_breaks_keeps_its_text_and_never_looks_complete(
    vendor: Vendor, rig: Rig, fault: str
) -> None:
    step: Any = {
        "broken json": broken_json(),
        "half a character": vendor.protocol.huge_line(1).replace(b'"x"', b'"caf\xc3"'),
        "a huge line": vendor.protocol.huge_line(MAX_EVENT_BYTES),
        "no end": b"data: " + b"x" * MAX_EVENT_BYTES,
        "an error": vendor.protocol.error_event("upstream broke", message="upstream broke"),
    }.get(fault) or Stop[fault]
    gate = Gate()
    rig.script(vendor.protocol.Answer("one two three", at={2: (gate, step)}))
    answer_text = ""
    with pytest.raises(Exception) as raised:  # noqa: PT011, PT012
        async for event in rig.provider.text(vendor.job(stream=True)):
            assert event.WhichOneof("event") == "text_delta"
            answer_text += event.text_delta.text
            if answer_text == "one two":
                gate.open()
    assert answer_text == "one two"
    assert getattr(raised.value, "code", None) == "provider_failed"
    check_no_secrets(raised.value)


async def test_a_long_answer_may_be_one_event(vendor: Vendor, rig: Rig) -> None:
    rig.script(vendor.protocol.Answer("", at={0: vendor.protocol.huge_line(1_000_000)}))
    answer = await read_all(rig.provider, vendor.job(stream=True))
    assert text(answer) == "x" * 1_000_000
    assert finish_reason(answer)


async def test_concurrent_streams_do_not_mix(vendor: Vendor, rig: Rig) -> None:
    rig.default = lambda received: vendor.protocol.Answer(f"{received.prompt} " * 20)(received)

    async def ask(number: int) -> None:
        text_input = TextInput(messages=[message(Role.ROLE_USER, f"n{number}")])
        assert (
            text(await read_all(rig.provider, vendor.job(text_input, stream=number % 2 == 0)))
            == f"n{number} " * 20
        )

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(ask(number))


async def test_a_response_that_is_compressed_without_a_request_is_not_decompressed(
    vendor: Vendor, rig: Rig
) -> None:
    if vendor.max_output_tokens:
        pytest.skip("it asks for a stream")

    def reply(received: Received, headers: Mapping[str, str]) -> Reply:
        body = json.dumps(vendor.protocol.Answer("Hi").body(received)).encode()
        return Reply(headers=headers, steps=(gzip.compress(body) if headers else body,))

    rig.script(partial(reply, headers={}), partial(reply, headers={"Content-Encoding": "gzip"}))
    assert text(await read_all(rig.provider, vendor.job(stream=False))) == "Hi"
    error, _ = await failure(rig.provider, vendor.job(stream=False))
    assert error.code == "provider_failed"


async def test_the_input_is_not_changed(vendor: Vendor, upstream: FaultUpstream) -> None:
    text_input = largest_input()
    await sent(replace(vendor, max_output_tokens=5), upstream, text_input, user=USER)
    assert text_input == largest_input()


@pytest.mark.parametrize(
    ("vendor", "route"), CATALOGUE, ids=lambda part: part.name if isinstance(part, Vendor) else part.model
)
async def test_no_row_of_the_catalogue_makes_a_request_that_the_vendor_would_refuse(
    upstream: FaultUpstream, vendor: Vendor, route: Route, stream: bool
) -> None:
    received = await sent(vendor, upstream, largest_input(), stream=stream, route=route, user=USER)
    assert received.body["model"] == route.model


def busy(vendor: Vendor) -> bytes:
    """An event in which the vendor says that it is busy."""
    codes = {"anthropic": ("overloaded_error",), "mistral": ("rate_limited", "1300")}
    event: bytes = vendor.protocol.error_event(*codes.get(vendor.server, ("server_error",)))
    return event


async def test_a_busy_vendor_that_answers_with_200_may_be_asked_again(
    vendor: Vendor, rig: Rig, stream: bool
) -> None:
    data = busy(vendor).partition(b"data: ")[2].strip()
    sse = {"Content-Type": "text/event-stream"}
    for reply in (Reply(headers=sse, steps=(busy(vendor),)), Reply(headers=JSON, steps=(data,))):
        rig.script(reply)
        error, _ = await failure(rig.provider, vendor.job(stream=stream))
        assert isinstance(error, UpstreamError)
        whole = reply.headers is JSON or stream or vendor.max_output_tokens
        expected = ("provider_unavailable", RetryPolicy.SAME_ROUTE)
        assert (error.code, error.retry) == (expected if whole else ("provider_failed", RetryPolicy.NEVER))


async def test_a_vendor_that_becomes_busy_within_a_stream_is_not_asked_again(
    vendor: Vendor, rig: Rig
) -> None:
    rig.script(vendor.protocol.Answer("one", at={0: (busy(vendor), Stop.END)}))
    error, begun = await failure(rig.provider, vendor.job(stream=True))
    assert isinstance(error, UpstreamError)
    assert (error.code, error.retry, begun) == ("provider_unavailable", RetryPolicy.NEVER, "")


async def test_the_bytes_of_thinking_are_reported(vendor: Vendor, rig: Rig) -> None:
    thought = "hm, größe \U0001f34a"
    if vendor in (ANTHROPIC, LONG, MISTRAL):
        rig.script(vendor.protocol.Answer("one", thinking=thought))
    else:
        chunks = [{"reasoning": thought, "content": ""}, {"content": "one"}]
        rig.script(Reply(steps=(*map(openai_protocol.chunk, chunks), _STOP, DONE)))
    job = vendor.job(stream=True)
    assert text(await read_all(rig.provider, job)) == "one"
    assert job.report.thinking_bytes == len(thought.encode())


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("thought", ["hm", "HALF A PAIR", "", None, 7, ["hm"]])
async def test_a_hosts_thinking_has_two_names_and_may_have_any_shape(
    upstream: FaultUpstream, name: str, thought: Any
) -> None:
    thinking = openai_protocol.chunk({name: thought}).replace(b"HALF A PAIR", rb"\ud83d")
    upstream.script(Reply(steps=(thinking, openai_protocol.chunk({"content": "one"}), _STOP, DONE)))
    job = COMPATIBLE.job(stream=True)
    async with open_provider(COMPATIBLE.make, base_url(upstream, COMPATIBLE.server)) as provider:
        assert text(await read_all(provider, job)) == "one"
    assert job.report.thinking_bytes == {"hm": 2, "HALF A PAIR": 3}.get(str(thought), 0)
