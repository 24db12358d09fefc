"""Answers and failures of every text provider except OpenAI's, which has its own tests."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from pomelo.gen.v1.text_pb2 import Message, Role, TextInput
from pomelo.testing import FaultUpstream, Gate, Reply, Stop, broken_json, page
from tests.providers.text_rig import (
    ANTHROPIC,
    VENDORS,
    Vendor,
    check_last,
    check_no_secrets,
    check_no_usage,
    deltas,
    failure,
    open_provider,
    text,
)

BOTH = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
TEXT = "Grüße aus Zürich: 🍊 naïve, 日本語 and\nmore. "


@pytest.fixture(name="upstream")
async def _upstream() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="vendor", params=VENDORS, ids=lambda vendor: vendor.name)
def _vendor(request: pytest.FixtureRequest) -> Vendor:
    vendor: Vendor = request.param
    return vendor


@pytest.fixture(name="provider")
async def _provider(vendor: Vendor, upstream: FaultUpstream) -> AsyncIterator[Any]:
    async with open_provider(vendor, vendor.base_url(upstream)) as provider:
        yield provider


async def test_a_unary_answer_is_one_delta_with_all_fields(
    vendor: Vendor, upstream: FaultUpstream, provider: Any
) -> None:
    upstream.script(vendor.protocol.Answer(TEXT, usage=vendor.usage(9, 7)))
    answer = await deltas(provider, vendor.job(stream=False))
    assert [delta.content for delta in answer] == [TEXT]
    check_last(answer, 9, 7)


async def test_a_stream_has_a_delta_for_each_event_with_text_and_a_final_delta(
    vendor: Vendor, upstream: FaultUpstream, provider: Any
) -> None:
    upstream.script(vendor.protocol.Answer("one two three", usage=vendor.usage(9, 7)))
    # OpenAI's protocol reports the token counts of a stream only on request, which the provider makes.
    answer = await deltas(provider, vendor.job(stream=True))
    assert [delta.content for delta in answer] == ["one", " two", " three", ""]
    check_last(answer, 9, 7)


@pytest.mark.parametrize("packing", ["events", "together", "bytes"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("comments", [False, True])
async def test_a_stream_means_the_same_however_it_is_packed(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, packing: Any, line_end: bytes, comments: bool
) -> None:
    form = {"packing": packing, "line_end": line_end, "comments": comments}
    upstream.script(vendor.protocol.Answer(TEXT, usage=vendor.usage(9, 7), **form))
    answer = await deltas(provider, vendor.job(stream=True))
    assert text(answer) == TEXT
    check_last(answer, 9, 7)


async def test_text_arrives_while_the_vendor_still_sends(
    vendor: Vendor, upstream: FaultUpstream, provider: Any
) -> None:
    gate = Gate()
    upstream.script(vendor.protocol.Answer("one two three", at={1: gate}))
    async with aclosing(provider.text(vendor.job(stream=True))) as events:
        assert (await anext(events)).text_delta.content == "one"
        gate.open()
        assert [event.text_delta.content async for event in events] == [" two", " three", ""]


@BOTH
async def test_an_empty_answer_is_an_answer(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, stream: bool
) -> None:
    upstream.script(vendor.protocol.Answer("", usage=vendor.usage(9, 0)))
    answer = await deltas(provider, vendor.job(stream=stream))
    assert [delta.content for delta in answer] == [""]
    check_last(answer, 9, 0)


@pytest.mark.parametrize(
    "counts", [None, {}, (-1, 2), (1, 10**9 + 1), (1.5, 2), (True, 2), ("1", 2), (1, None), [1, 2], 10**30]
)
async def test_without_a_credible_count_an_answer_ends_without_one(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, counts: Any
) -> None:
    usage = vendor.usage(*counts) if isinstance(counts, tuple) else counts
    answer = vendor.protocol.Answer("one two three", usage=usage)
    upstream.script(answer, answer)
    text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content="count these four words")])
    answer_text = await deltas(provider, vendor.job(text_input, stream=True))
    assert text(answer_text) == "one two three"
    check_no_usage(answer_text)
    answer_text = await deltas(provider, vendor.job(text_input, stream=False))
    assert text(answer_text) == "one two three"
    check_no_usage(answer_text)


@BOTH
async def test_a_connection_serves_one_answer_after_another(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, stream: bool
) -> None:
    for _ in range(3):
        await deltas(provider, vendor.job(stream=stream))
    assert len({received.connection for received in upstream.requests}) == 1


NO_ANSWER = [
    (page(403), "provider_failed"),
    (Reply(500, steps=(b"x" * 200_000,)), "provider_unavailable"),
    (Reply(400, steps=(b'{"error": "as text"}',)), "provider_failed"),
    (Reply(400, steps=(b'{"error": {"code": 7.5, "type": [], "param": ["stop"]}}',)), "provider_failed"),
    (Reply(204), "provider_failed"),
    *((Reply(steps=(body,)), "provider_failed") for body in (b"{}", b"[]", b"null", b'"text"', b"[" * 9999)),
    *(
        (Reply(steps=(b"data: " + data + b"\n\n",)), "provider_failed")
        for data in (b"1", b"[]", b'"x"', b"{}", b"[DONE]", b'{"type":"message_stop"}', b'{"choices":[7]}')
    ),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(b"\x1f\x8b\x08\x00",)), "provider_failed"),
    (Reply(headers={"Content-Encoding": "gzip"}, steps=(gzip.compress(b"{}"),)), "provider_failed"),
]


@BOTH
@pytest.mark.parametrize(("reply", "code"), NO_ANSWER)
async def test_an_invalid_response_is_mapped_to_an_error(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, reply: Reply, code: str, stream: bool
) -> None:
    upstream.script(reply)
    error, answer_text = await failure(provider, vendor.job(stream=stream))
    assert (error.code, answer_text) == (code, "")
    check_no_secrets(error)
    assert len(upstream.requests) == 1, "it was sent twice"


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {"finish_reason": None},
        {"finish_reason": 7},
        *({"at": {0: stop}} for stop in (Stop.END, Stop.CLOSE, Stop.RESET)),
        {"at": {0: b"data: \xff\n\n"}},
    ],
)
async def test_an_answer_without_its_parts_is_refused(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, change: dict[str, Any], stream: bool
) -> None:
    upstream.script(vendor.protocol.Answer("", **change))
    error, answer_text = await failure(provider, vendor.job(stream=stream))
    assert (error.code, answer_text) == ("provider_failed", "")
    check_no_secrets(error)


@pytest.mark.parametrize(
    "fault", ["CLOSE", "RESET", "END", "broken json", "half a character", "a huge line", "an error"]
)
async def test_a_stream_that_breaks_keeps_its_text_and_never_looks_complete(
    vendor: Vendor, upstream: FaultUpstream, provider: Any, fault: str
) -> None:
    step: Any = {
        "broken json": broken_json(),
        "half a character": vendor.protocol.half_character(),
        "a huge line": vendor.protocol.huge_line(),
        "an error": vendor.protocol.error_event("upstream broke", message="upstream broke"),
    }.get(fault) or Stop[fault]
    gate = Gate()
    upstream.script(vendor.protocol.Answer("one two three", at={2: (gate, step)}))
    answer_text = ""
    with pytest.raises(Exception) as raised:  # noqa: PT011, PT012
        async for event in provider.text(vendor.job(stream=True)):
            assert not event.text_delta.finish_reason
            answer_text += event.text_delta.content
            if answer_text == "one two":
                gate.open()
    assert answer_text == "one two"
    assert getattr(raised.value, "code", None) == "provider_failed"
    check_no_secrets(raised.value)


@pytest.mark.parametrize("key", ["sk\r\nX-Evil: 1", "sk\x00"])
async def test_a_key_that_is_not_a_valid_header_fails_and_is_not_shown(
    vendor: Vendor, upstream: FaultUpstream, key: str
) -> None:
    async with open_provider(vendor, vendor.base_url(upstream), key=key) as provider:
        error, _ = await failure(provider, vendor.job(stream=False))
    assert error.code == "provider_failed"
    assert upstream.requests == []


@pytest.mark.parametrize("key", [None, "", "  "])
async def test_without_a_key_it_is_not_configured(
    vendor: Vendor, upstream: FaultUpstream, key: str | None
) -> None:
    async with open_provider(vendor, vendor.base_url(upstream), key=key) as provider:
        assert not provider.configured
    async with open_provider(vendor, vendor.base_url(upstream)) as provider:
        assert provider.configured


async def test_a_base_url_may_end_with_a_slash(vendor: Vendor, upstream: FaultUpstream) -> None:
    async with open_provider(vendor, vendor.base_url(upstream) + "/") as provider:
        assert (await deltas(provider, vendor.job(stream=False)))[-1].finish_reason
    assert "//" not in (await upstream.received()).path


async def test_concurrent_streams_do_not_mix(vendor: Vendor, upstream: FaultUpstream, provider: Any) -> None:
    upstream.default = lambda received: vendor.protocol.Answer(f"{received.prompt} " * 20)(received)

    async def ask(number: int) -> None:
        text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content=f"n{number}")])
        assert (
            text(await deltas(provider, vendor.job(text_input, stream=number % 2 == 0))) == f"n{number} " * 20
        )

    async with asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(ask(number))


async def test_a_response_that_is_compressed_without_a_request_is_not_decompressed(
    upstream: FaultUpstream,
) -> None:
    answer = {"content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn"}
    body = json.dumps(answer | {"usage": ANTHROPIC.usage(1, 1)}).encode()
    async with open_provider(ANTHROPIC, upstream.anthropic_base_url) as provider:
        upstream.script(Reply(steps=(body,)))
        assert text(await deltas(provider, ANTHROPIC.job(stream=False))) == "Hi"
        upstream.script(Reply(headers={"Content-Encoding": "gzip"}, steps=(gzip.compress(body),)))
        error, _ = await failure(provider, ANTHROPIC.job(stream=False))
    assert error.code == "provider_failed"
