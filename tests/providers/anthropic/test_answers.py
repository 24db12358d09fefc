"""Requests of the Anthropic provider, and the parts of its protocol that only Anthropic has."""

from __future__ import annotations

import json
from contextlib import aclosing
from hashlib import sha256
from typing import Any

import pytest

from pomelo.catalog.catalog import Route
from pomelo.gen.v1.text_pb2 import ContentPart, Message, Role, TextInput
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import fit_job
from pomelo.testing import FaultUpstream, Gate, Reply
from pomelo.testing.anthropic_protocol import PING, Answer, event, words
from tests.providers.rig import KEY, Rig, read_all, run
from tests.providers.text_rig import (
    ANTHROPIC,
    FILTERED,
    LENGTH,
    LONG,
    PNG,
    STOP,
    USER,
    check_last,
    check_no_usage,
    failure,
    finish_reason,
    hi,
    image,
    largest_input,
    message,
    reported_usage,
    sent,
    text,
    texts,
)

DATA = PNG.partition(",")[2]
START = event("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 1}})
END = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 7})
OVER = event("message_stop")


async def test_the_largest_request_is_exactly_this(rig: Rig) -> None:
    received = await sent(ANTHROPIC, rig, largest_input(), user=USER, stream=True)
    assert received.body == {
        "model": "claude-haiku-4-5",
        "max_tokens": 100,
        "system": "Be brief. Ünïcödé 🍊\n\nBe kind.\n\nBe quick.",
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
                ],
            },
            {
                "role": "assistant",
                "content": [{"type": "text", "text": "A dot."}, {"type": "text", "text": " Or two."}],
            },
            {"role": "user", "content": "Sure?"},
        ],
        "temperature": 1.0,
        "stop_sequences": ["END"],
        "metadata": {"user_id": sha256(b"alice@example.com").hexdigest()},
        "stream": True,
    }
    assert received.path == "/v1/messages"
    assert received.headers["x-api-key"] == KEY
    assert received.headers["anthropic-version"] == "2023-06-01"
    assert {name.lower() for name in received.headers} == {
        "accept", "accept-encoding", "anthropic-version", "content-length", "content-type", "host",
        "user-agent", "x-api-key",
    }  # fmt: skip


async def test_the_smallest_request_has_no_field_that_is_not_needed(rig: Rig) -> None:
    received = await sent(ANTHROPIC, rig, hi())
    assert received.body == {
        "model": "claude-haiku-4-5",
        "max_tokens": 4096,
        "messages": [{"role": "user", "content": "Hi"}],
    }


async def test_top_p_is_sent_without_a_temperature(rig: Rig) -> None:
    body = (await sent(ANTHROPIC, rig, hi(top_p=0.5))).body
    assert body["top_p"] == 0.5
    route = Route("anthropic", "claude-haiku-4-5", drop=frozenset(("temperature",)))
    body = (await sent(ANTHROPIC, rig, hi(top_p=0.5, temperature=0), route=route)).body
    assert "temperature" not in body
    assert body["top_p"] == 0.5


async def test_of_temperature_and_top_p_only_the_temperature_is_sent_unless_the_model_accepts_both(
    rig: Rig,
) -> None:
    text_input = hi(top_p=0.5, temperature=0)
    assert "top_p" not in (await sent(ANTHROPIC, rig, text_input)).body
    route = Route("anthropic", "claude-3-haiku-20240307", options={"sampling": "both"})
    body = (await sent(ANTHROPIC, rig, text_input, route=route)).body
    assert (body["temperature"], body["top_p"]) == (0, 0.5)


async def test_what_a_route_drops_is_not_sent_and_what_it_adds_is(rig: Rig) -> None:
    drop = frozenset(("temperature", "top_p", "stop", "user", "max_tokens"))
    extra = {"thinking": {"type": "disabled"}}
    route = Route("anthropic", "claude-opus-4-8", drop=drop, options={"extra": extra})
    body = (await sent(ANTHROPIC, rig, largest_input(), user=USER, route=route)).body
    assert body.keys() == {"model", "max_tokens", "system", "messages", "thinking"}
    assert body["max_tokens"] == 4096
    assert body["thinking"] == {"type": "disabled"}


async def test_default_max_tokens_are_in_the_routes_range(rig: Rig) -> None:
    route = Route("anthropic", "claude-haiku-4-5", clamp={"max_tokens": (1, 1000, 0)})
    assert (await sent(ANTHROPIC, rig, hi(), route=route)).body["max_tokens"] == 1000


@pytest.mark.parametrize(
    ("text_input", "max_tokens"),
    [(None, 64_000), (100, 100), (21_000, 21_000), (21_001, 21_001), (10**9, 64_000)],
)
async def test_max_tokens_are_the_callers_within_the_models(
    rig: Rig, text_input: int | None, max_tokens: int
) -> None:
    text_job = hi() if text_input is None else hi(max_tokens=text_input)
    received = await sent(LONG, rig, text_job)
    assert received.body["max_tokens"] == max_tokens
    # What may take more than ten minutes is asked for as a stream.
    assert received.body.get("stream", False) == (max_tokens > 21_000)


async def test_a_prefilled_answer_is_the_callers_fault_if_the_model_does_not_support_it(
    rig: Rig, stream: bool
) -> None:
    begun = message(Role.ROLE_ASSISTANT, "The answer is")
    text_input = TextInput(messages=[*hi().messages, begun])
    assert finish_reason(await read_all(rig.provider, ANTHROPIC.job(text_input, stream=stream)))
    route = Route("anthropic", "claude-opus-4-6")
    error, _ = await failure(rig.provider, ANTHROPIC.job(text_input, stream=stream, route=route))
    assert (error.code, error.field) == ("invalid_parameter", "messages")


async def test_a_blank_system_message_is_not_sent(upstream: FaultUpstream) -> None:
    system = [message(Role.ROLE_SYSTEM, content) for content in (" \n", "Be brief.")]
    body = (await sent(ANTHROPIC, upstream, TextInput(messages=[*system, *hi().messages]))).body
    assert body["system"] == "Be brief."


async def test_parameters_that_the_api_lacks_are_reported_as_dropped(rig: Rig) -> None:
    text_job = ANTHROPIC.job(hi(seed=1, presence_penalty=1, frequency_penalty=1), stream=False)
    adjustments = fit_job(text_job, rig.provider.fit_text).adjustments
    assert [adjustment.field for adjustment in adjustments] == [
        "seed",
        "presence_penalty",
        "frequency_penalty",
    ]


async def test_a_link_to_an_image_is_sent_as_a_link(rig: Rig) -> None:
    url = "https://example.com/a.png"
    question = Message(role=Role.ROLE_USER, content=[image(url), ContentPart(text=" ")])
    text_input = TextInput(messages=[question])
    body = (await sent(ANTHROPIC, rig, text_input)).body
    assert body["messages"][0]["content"] == [{"type": "image", "source": {"type": "url", "url": url}}]


@pytest.mark.parametrize("blank", [[], [message(Role.ROLE_USER, " \n")]])
async def test_a_conversation_with_nothing_to_answer_is_refused_and_not_sent(
    rig: Rig, blank: list[Message], stream: bool
) -> None:
    text_input = TextInput(messages=[message(Role.ROLE_SYSTEM, "Be brief."), *blank])
    error, _ = await failure(rig.provider, ANTHROPIC.job(text_input, stream=stream))
    assert (error.code, error.field) == ("invalid_parameter", "messages")
    assert rig.requests == []


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("end_turn", STOP),
        ("stop_sequence", STOP),
        ("pause_turn", STOP),
        ("tool_use", STOP),
        ("a_new_one", STOP),
        ("max_tokens", LENGTH),
        ("model_context_window_exceeded", LENGTH),
        ("compaction", LENGTH),
        ("refusal", FILTERED),
    ],
)
async def test_stop_reasons_are_translated(rig: Rig, theirs: str, ours: int, stream: bool) -> None:
    rig.script(Answer(finish_reason=theirs))
    assert finish_reason(await read_all(rig.provider, ANTHROPIC.job(stream=stream))) == ours


async def test_thinking_is_not_part_of_the_answer(rig: Rig, stream: bool) -> None:
    rig.script(Answer("one two", thinking="a canary thought"))
    answer = await read_all(rig.provider, ANTHROPIC.job(stream=stream))
    assert text(answer) == "one two"


@pytest.mark.parametrize(
    ("details", "reasoning"),
    [
        ({"thinking_tokens": 4}, 4),
        ({"thinking_tokens": 8}, 0),
        ({"thinking_tokens": -1}, 0),
        ([4], 0),
        (None, 0),
    ],
)
async def test_the_tokens_of_thinking_are_a_part_of_the_output(
    rig: Rig, details: Any, reasoning: int, stream: bool
) -> None:
    rig.script(Answer(usage=ANTHROPIC.usage(9, 7) | {"output_tokens_details": details}))
    answer = await read_all(rig.provider, ANTHROPIC.job(stream=stream))
    check_last(answer, 9, 7)
    assert reported_usage(answer).reasoning_tokens == reasoning


async def test_the_output_counts_without_a_credible_count_of_the_input(rig: Rig, stream: bool) -> None:
    rig.script(Answer(usage=ANTHROPIC.usage("9", 7) | {"output_tokens_details": {"thinking_tokens": 4}}))
    answer = await read_all(rig.provider, ANTHROPIC.job(stream=stream))
    assert reported_usage(answer) == Usage(output_tokens=7, reasoning_tokens=4)


async def test_the_output_is_not_counted_at_the_beginning_of_a_stream(rig: Rig) -> None:
    usage = {"input_tokens": 9, "output_tokens": 3, "output_tokens_details": {"thinking_tokens": 2}}
    rig.script(Reply(steps=(event("message_start", message={"usage": usage}), words("Hi"), END, OVER)))
    text_job = ANTHROPIC.job(stream=True)
    answer = await read_all(rig.provider, text_job)
    check_last(answer, 9, 7)
    assert reported_usage(answer).reasoning_tokens == 0
    assert text_job.report.usage == Usage(input_tokens=9)


async def test_the_input_is_counted_before_the_first_words(rig: Rig) -> None:
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage=None)
    rig.script(Reply(steps=(START, words("Hi"), end, OVER)))
    text_job = ANTHROPIC.job(stream=True)
    async with aclosing(run(rig.provider, text_job)) as events:
        answer = [await anext(events)]
        assert text_job.report.usage == Usage(input_tokens=9)
        answer += [event async for event in events]
    assert texts(answer) == ["Hi", ""]
    check_no_usage(answer)


async def test_a_long_unary_answer_without_a_count_has_none_and_yields_to_other_tasks(rig: Rig) -> None:
    rig.script(Answer("one two three", usage=None))
    answer = await read_all(rig.provider, LONG.job(stream=False))
    assert texts(answer) == ["one two three"]
    assert not answer[-1].completed.HasField("usage")
    assert rig.provider._http.turns.iteration > 0


async def test_a_long_unary_answer_keeps_the_count_of_the_input(rig: Rig) -> None:
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage=None)
    rig.script(Reply(steps=(START, words("Hi"), end, OVER)))
    text_job = LONG.job(stream=False)
    answer = await read_all(rig.provider, text_job)
    assert texts(answer) == ["Hi"]
    assert text_job.report.usage == Usage(input_tokens=9)


@pytest.mark.parametrize("bad", [-1, 1.5, "1", True, [1], 10**30])
async def test_a_count_of_the_cache_that_is_impossible_invalidates_the_count(
    rig: Rig, bad: Any, stream: bool
) -> None:
    rig.script(Answer("one two", usage=ANTHROPIC.usage(9, 7) | {"cache_read_input_tokens": bad}))
    check_no_usage(await read_all(rig.provider, ANTHROPIC.job(stream=stream)))


async def test_counts_at_the_end_of_a_stream_replace_those_at_its_beginning(rig: Rig) -> None:
    usage = {"input_tokens": 50, "cache_read_input_tokens": None, "output_tokens": 7}
    end = event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)
    rig.script(Reply(steps=(START, words("Hi"), end, OVER)))
    check_last(await read_all(rig.provider, ANTHROPIC.job(stream=True)), 50, 7)


async def test_pings_unknown_events_and_other_blocks_are_skipped(rig: Rig) -> None:
    steps = (
        PING,
        START,
        b"data: {}\n\n",
        event("content_block_start", index=0, content_block={"type": "server_tool_use", "name": "n"}),
        event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": "{}"}),
        event("content_block_delta", index=0, delta={"type": "a_new_delta", "text": "not this"}),
        event("content_block_start", index=1, content_block={"type": "text", "text": "Hi"}),
        PING,
        event("a_new_event", text="nor this"),
        words(" there", index=1),
        words("", index=1),
        event("content_block_delta", index=1, delta={"type": "citations_delta", "citation": {}}),
        event("message_delta", delta={"stop_reason": None}, usage={"output_tokens": 3}),
        END,
        OVER + words("too late"),
        Gate(),
    )
    rig.script(Reply(steps=steps))
    answer = await read_all(rig.provider, ANTHROPIC.job(stream=True))
    assert texts(answer) == ["Hi", " there", ""]
    check_last(answer, 9, 7)


@pytest.mark.parametrize(
    "broken",
    [
        b'data: {"type":"message_start"}\n\n',
        b'data: {"type":"content_block_delta"}\n\n',
        b'data: {"type":"content_block_delta","delta":{"type":"text_delta"}}\n\n',
        b'data: {"type":"content_block_delta","delta":{"type":"text_delta","text":7}}\n\n',
        b'data: {"type":"content_block_start","content_block":{"type":"text","text":["x"]}}\n\n',
        b'data: {"type":"message_delta","delta":{"stop_reason":7}}\n\n',
        b'data: {"type":"message_delta"}\n\n',
    ],
)
async def test_an_event_without_what_it_must_have_fails(rig: Rig, broken: bytes) -> None:
    rig.script(Reply(steps=(START, words("Hi"), broken, END, OVER)))
    error, answer_text = await failure(rig.provider, ANTHROPIC.job(stream=True))
    assert (error.code, answer_text) == ("provider_failed", "Hi")


async def test_a_stream_that_ends_after_its_stop_reason_alone_fails(rig: Rig) -> None:
    rig.script(Reply(steps=(START, words("Hi"), END)))
    assert (await failure(rig.provider, ANTHROPIC.job(stream=True)))[0].code == "provider_failed"


async def test_blocks_of_unknown_types_are_skipped(rig: Rig, stream: bool) -> None:
    def block(index: int, content: dict[str, Any], *deltas: dict[str, Any]) -> tuple[bytes, ...]:
        return (
            event("content_block_start", index=index, content_block=content),
            *[event("content_block_delta", index=index, delta=each) for each in deltas],
            event("content_block_stop", index=index),
        )

    searched = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}}
    noted = {"type": "note", "text": "not this"}
    if stream:
        steps = (
            START,
            *block(0, searched | {"input": {}}, {"type": "input_json_delta", "partial_json": "{"}),
            *block(1, {"type": "text", "text": ""}, {"type": "text_delta", "text": "Hi"}),
            *block(2, noted, {"type": "text_delta", "text": "nor this"}, {"type": "note_delta", "note": "x"}),
            *block(3, {"type": "text", "text": "!"}, {"type": "citations_delta", "citation": {}}),
            END + OVER,
        )
        rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=steps))
    else:
        content = [searched, {"type": "text", "text": "Hi"}, noted, {"type": "text", "text": "!"}]
        usage = {"input_tokens": 9, "output_tokens": 7}
        body = {"content": content, "stop_reason": "end_turn", "usage": usage}
        rig.script(Reply(steps=(json.dumps(body).encode(),)))
    answer = await read_all(rig.provider, ANTHROPIC.job(stream=stream))
    assert text(answer) == "Hi!"
    check_last(answer, 9, 7, STOP)
