"""Lone surrogates, unusual ends of streams and unusual token counts in every text provider."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.testing import FaultUpstream, Gate, Received, Reply, Stop
from tests.providers.rig import Rig, base_url, open_provider, read_all
from tests.providers.text_rig import (
    ANTHROPIC,
    COMPATIBLE,
    LONG,
    MISTRAL,
    STOP,
    Vendor,
    check_last,
    failure,
    text,
    texts,
)

HIGH, LOW = b"\\ud83d", b"\\ude00"
"""The halves of 😀, as JSON escapes."""


def refusal(vendor: Vendor, escaped: bytes) -> bytes:
    """The event that adds a text, given as it is written in JSON."""
    event: bytes = vendor.protocol.huge_line(1)
    assert event.count(b'"x"') == 1
    return event.replace(b'"x"', b'"' + escaped + b'"')


PIECES: dict[str, tuple[list[bytes], list[str]]] = {
    "a pair in two chunks": ([b"a" + HIGH, LOW + b"b"], ["a", "😀b"]),
    "chunks of nothing but halves": ([HIGH, LOW], ["😀"]),
    "a pair in one chunk": ([b"a" + HIGH + LOW + b"b"], ["a😀b"]),
    "the end of one pair and the start of the next": ([HIGH, LOW + HIGH, LOW], ["😀", "😀"]),
    "a first half, then other text": ([b"a" + HIGH, b"b"], ["a", "\ufffdb"]),
    "two first halves": ([HIGH, HIGH, LOW], ["\ufffd", "😀"]),
    "a second half alone": ([b"a", LOW + b"b"], ["a", "\ufffdb"]),
    "a half within a chunk": ([b"a" + HIGH + b"b"], ["a\ufffdb"]),
    "a half at the end": ([b"a", HIGH], ["a", "\ufffd"]),
    "the end of a long text": ([b"x" * 5000 + HIGH, LOW], ["x" * 5000, "😀"]),
    "an escaped backslash": ([b"\\\\ud83d", b"\\\\ude00"], ["\\ud83d", "\\ude00"]),
}


@pytest.mark.parametrize("name", PIECES)
async def test_halves_of_a_surrogate_pair_in_a_stream_are_joined_or_replaced(
    vendor: Vendor, rig: Rig, name: str
) -> None:
    sent, expected = PIECES[name]
    steps = tuple(refusal(vendor, piece) for piece in sent)
    rig.script(vendor.protocol.Answer("", at={0: steps}, usage=vendor.usage(9, 7)))
    answer = await read_all(rig.provider, vendor.job(stream=True))
    assert texts(answer) == [*expected, ""]
    check_last(answer, 9, 7)


async def test_surrogate_pairs_are_joined_in_a_long_unary_answer_to_a_stream_request(
    upstream: FaultUpstream,
) -> None:
    steps = (refusal(LONG, b"a" + HIGH), refusal(LONG, LOW + b"b"), refusal(LONG, HIGH))
    upstream.script(LONG.protocol.Answer("", at={0: steps}))
    async with open_provider(LONG.make, base_url(upstream, LONG.server)) as provider:
        answer = await read_all(provider, LONG.job(stream=False))
    assert texts(answer) == ["a😀b\ufffd"]


async def test_a_half_waits_during_comments_and_empty_events(vendor: Vendor, rig: Rig) -> None:
    between = (
        b": keep-alive\n\n",
        b"data:\n\n",
        b"data: \n\n",
        refusal(vendor, b""),
        b"id: 7\nretry: 10\n\n",
    )
    steps = (refusal(vendor, HIGH), *between, refusal(vendor, LOW))
    rig.script(vendor.protocol.Answer("", at={0: steps}))
    assert text(await read_all(rig.provider, vendor.job(stream=True))) == "😀"


async def test_text_before_a_half_does_not_wait_for_the_other_half(vendor: Vendor, rig: Rig) -> None:
    gate = Gate()
    rig.script(
        vendor.protocol.Answer("", at={0: (refusal(vendor, b"one" + HIGH), gate, refusal(vendor, LOW))})
    )
    events = rig.provider.text(vendor.job(stream=True))
    assert (await anext(events)).text_delta.text == "one"
    gate.open()
    assert texts([event async for event in events]) == ["😀", ""]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hi \ud83d", "Hi \ufffd"),
        ("\ude00 Hi", "\ufffd Hi"),
        ("é\ud83dx", "é\ufffdx"),
        ("\ud83d\ude00", "😀"),
    ],
)
async def test_a_lone_surrogate_in_a_unary_answer_is_replaced(
    vendor: Vendor, rig: Rig, content: str, expected: str
) -> None:
    if vendor.max_output_tokens:
        pytest.skip("it asks for a stream")

    def reply(received: Received) -> Reply:
        body = vendor.protocol.Answer(content, usage=vendor.usage(9, 7)).body(received)
        return Reply(steps=(json.dumps(body).encode(),))

    rig.script(reply)
    answer = await read_all(rig.provider, vendor.job(stream=False))
    assert texts(answer) == [expected]
    check_last(answer, 9, 7)


async def test_a_surrogate_pair_in_two_parts_of_a_unary_answer_is_joined(upstream: FaultUpstream) -> None:
    parts = [{"type": "text", "text": "a\ud83d"}, {"type": "text", "text": "\ude00b\ud83d"}]

    def reply(received: Received) -> Reply:
        vendor = ANTHROPIC if "messages" in received.path else MISTRAL
        body = vendor.protocol.Answer("x").body(received)
        if vendor is ANTHROPIC:
            body["content"] = parts
        else:
            body["choices"][0]["message"]["content"] = parts
        return Reply(steps=(json.dumps(body).encode(),))

    for vendor in (ANTHROPIC, MISTRAL):
        upstream.script(reply)
        async with open_provider(vendor.make, base_url(upstream, vendor.server)) as provider:
            assert text(await read_all(provider, vendor.job(stream=False))) == "a😀b\ufffd"


async def test_lone_surrogates_are_replaced_in_parts_refusals_and_the_last_chunk(
    upstream: FaultUpstream,
) -> None:
    deltas_sent = [
        {"content": [{"type": "text", "text": "a\ud83d"}]},
        {"content": [{"type": "text", "text": "\ude00"}, {"type": "text", "text": "b\ud83d"}]},
        {"refusal": "\ude00\ud83d"},
    ]
    chunks = [{"choices": [{"delta": delta}]} for delta in deltas_sent]
    chunks.append({"choices": [{"delta": {"content": "\ude00!"}, "finish_reason": "stop"}]})
    steps = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    upstream.script(Reply(steps=(*steps, b"data: [DONE]\n\n")))
    async with open_provider(COMPATIBLE.make, base_url(upstream, COMPATIBLE.server)) as provider:
        assert text(await read_all(provider, COMPATIBLE.job(stream=True))) == "a😀b😀😀!"


async def test_a_half_in_an_error_body_does_not_hide_its_meaning(vendor: Vendor, rig: Rig) -> None:
    """Vendors quote the caller's text."""

    def reply(received: Received) -> Reply:
        error = {
            "error": {"type": "rate_limit_error", "code": "context_length_exceeded", "message": "\ud83d"}
        }
        if vendor.protocol is ANTHROPIC.protocol:
            error = {"error": {"type": "invalid_request_error", "message": "prompt is too long: \ud83d"}}
        return Reply(400, steps=(json.dumps(error).encode(),))

    rig.default = reply
    error, _ = await failure(rig.provider, vendor.job(stream=False))
    assert error.code == ("context_length_exceeded" if vendor is not MISTRAL else error.code)
    assert "\ud83d" not in error.message


# --- ends of streams


def last_event(vendor: Vendor) -> bytes:
    """The end marker and its empty line."""
    return (
        b"data: [DONE]\n\n"
        if vendor.protocol is not ANTHROPIC.protocol
        else vendor.protocol.event("message_stop")
    )


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n"], ids=["none", "lf", "cr", "crlf"])
@pytest.mark.parametrize("stop", [Stop.END, Stop.CLOSE, Stop.RESET], ids=lambda stop: stop.name)
async def test_an_end_marker_without_its_empty_line_ends_the_stream(
    vendor: Vendor, rig: Rig, end: bytes, stop: Stop
) -> None:
    gate = Gate()
    marker = last_event(vendor).removesuffix(b"\n\n") + end
    steps: Any = {2: (marker[:3], marker[3:], stop)}
    if stop is not Stop.END:
        steps = {2: (marker[:3], marker[3:], gate, stop)}  # a reset may overtake what was sent before it

    def reply(received: Received) -> Reply:
        answer = vendor.protocol.Answer("one two", done=False, usage=vendor.usage(9, 7))
        whole = answer(received)
        return Reply(headers=whole.headers, steps=(*whole.steps, *steps[2]))

    rig.script(reply)
    answer = []
    async for event in rig.provider.text(vendor.job(stream=True)):
        answer.append(event)
        if text(answer) == "one two":
            gate.open()
    assert text(answer) == "one two"
    check_last(answer, 9, 7)


@pytest.mark.parametrize("stop", [Stop.END, Stop.CLOSE, Stop.RESET], ids=lambda stop: stop.name)
async def test_a_stream_that_ends_within_its_last_event_is_not_complete(
    vendor: Vendor, rig: Rig, stop: Stop
) -> None:
    marker = last_event(vendor).removesuffix(b"\n\n")

    def reply(received: Received) -> Reply:
        whole = vendor.protocol.Answer("one two", done=False)(received)
        return Reply(headers=whole.headers, steps=(*whole.steps, marker[:-1], stop))

    rig.script(reply)
    error, _ = await failure(rig.provider, vendor.job(stream=True))
    assert error.code == "provider_failed"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
async def test_unusual_but_valid_event_streams_are_parsed(vendor: Vendor, rig: Rig, line_end: bytes) -> None:
    """A byte order mark, ids, retry times, no space behind the colon, data in several lines, U+2028 in it."""

    def reply(received: Received) -> Reply:
        answer = vendor.protocol.Answer(
            "one two", usage=vendor.usage(9, 7), at={1: refusal(vendor, "\u2028".encode())}
        )
        stream = b"".join(step for step in answer(received).steps if isinstance(step, bytes))
        stream = stream.replace(b"data: ", b"id: 1\nretry: 5\ndata:").replace(b'{"', b'{\ndata: "')
        stream = b"\xef\xbb\xbf" + stream.replace(b"\n", line_end)
        return Reply(steps=tuple(stream[at : at + 7] for at in range(0, len(stream), 7)))

    rig.script(reply)
    answer = await read_all(rig.provider, vendor.job(stream=True))
    assert text(answer) == "one\u2028 two"
    check_last(answer, 9, 7)


# --- counts


async def test_counts_written_as_floats_are_counts(vendor: Vendor, rig: Rig, stream: bool) -> None:
    rig.script(vendor.protocol.Answer("one two", usage=vendor.usage(9.0, 7.0)))
    check_last(await read_all(rig.provider, vendor.job(stream=stream)), 9, 7, STOP)


@pytest.mark.parametrize("later", [None, {}, {"prompt_tokens": None, "output_tokens": None}])
async def test_an_empty_count_at_the_end_does_not_replace_the_previous_one(
    vendor: Vendor, rig: Rig, later: Any
) -> None:
    if vendor.protocol is ANTHROPIC.protocol:
        event = vendor.protocol.event("message_delta", delta={"stop_reason": None}, usage=later)
    else:
        event = (
            b"data: "
            + json.dumps({"choices": [], "usage": later, "x_groq": {"usage": later}}).encode()
            + b"\n\n"
        )

    def reply(received: Received) -> Reply:
        whole = vendor.protocol.Answer("one two", done=False, usage=vendor.usage(9, 7))(received)
        return Reply(headers=whole.headers, steps=(*whole.steps, event, last_event(vendor)))

    rig.script(reply)
    check_last(await read_all(rig.provider, vendor.job(stream=True)), 9, 7)
