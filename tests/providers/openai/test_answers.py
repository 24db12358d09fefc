"""Answers of the OpenAI provider: unary and streamed, split into packets in every way."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from pomelo.testing import Answer, Gate, Reply, Stop, chunk, error_event
from pomelo.testing.text_answer import DONE
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import (
    FILTERED,
    LENGTH,
    OPENAI,
    STOP,
    check_last,
    failure,
    finish_reason,
    reported_usage,
    text,
    texts,
)

USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}
CACHED = {"prompt_tokens_details": {"cached_tokens": 6, "cache_write_tokens": 2}}
REASONING = {"completion_tokens_details": {"reasoning_tokens": 5}}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stop", STOP),
        ("length", LENGTH),
        ("model_length", LENGTH),
        ("content_filter", FILTERED),
        ("tool_calls", STOP),
        ("function_call", STOP),
        ("end_turn", STOP),
        ("max_tokens", LENGTH),
        ("model_context_window_exceeded", LENGTH),
        ("refusal", FILTERED),
        ("sensitive", FILTERED),
        ("a_new_one", STOP),
        ("STOP", STOP),
        ("MAX_TOKENS", LENGTH),
        ("content_filter: RECITATION", FILTERED),
        *((name, FILTERED) for name in ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII")),
    ],
)
async def test_finish_reasons_are_translated(rig: Rig, theirs: str, ours: int, stream: bool) -> None:
    for content in ("one two", ""):
        rig.script(Answer(content, finish_reason=theirs))
        answer = await read_all(rig.provider, OPENAI.job(stream=stream))
        assert (text(answer), finish_reason(answer)) == (content, ours)


async def test_a_refusal_is_the_text(rig: Rig, stream: bool) -> None:
    rig.script(Answer(refusal="I can't help with that."))
    answer = await read_all(rig.provider, OPENAI.job(stream=stream))
    assert text(answer) == "I can't help with that."
    assert finish_reason(answer) == FILTERED


async def test_a_refusal_that_is_cut_off_keeps_its_finish_reason(rig: Rig, stream: bool) -> None:
    rig.script(Answer(refusal="I can't help with", finish_reason="length"))
    answer = await read_all(rig.provider, OPENAI.job(stream=stream))
    assert text(answer) == "I can't help with"
    assert finish_reason(answer) == LENGTH


@pytest.mark.parametrize("content", ["", [], None])
async def test_a_refusal_with_empty_content_is_the_text(rig: Rig, content: Any, stream: bool) -> None:
    answer_text = {"role": "assistant", "content": content, "refusal": "I can't help with that."}
    if stream:
        kind = "text/event-stream"
        body = chunk(answer_text, finish_reason="stop") + DONE
    else:
        kind = "application/json"
        body = json.dumps({"choices": [{"message": answer_text, "finish_reason": "stop"}]}).encode()
    rig.script(Reply(headers={"Content-Type": kind}, steps=(body,)))
    assert text(await read_all(rig.provider, OPENAI.job(stream=stream))) == "I can't help with that."


@pytest.mark.parametrize(
    ("content", "more"), [(None, {}), ("Hi", {"error": {"code": "server_error"}})], ids=["null", "an error"]
)
async def test_null_content_is_empty_and_an_error_beside_an_answer_is_ignored(
    rig: Rig, content: str | None, more: dict[str, Any]
) -> None:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    rig.script(Reply(steps=(json.dumps({"choices": [choice], "usage": USAGE, **more}).encode(),)))
    answer = await read_all(rig.provider, OPENAI.job(stream=False))
    assert text(answer) == (content or "")
    check_last(answer, 9, 7, STOP)


async def test_unknown_fields_empty_choices_and_odd_chunks_are_skipped(rig: Rig) -> None:
    odd = (
        chunk(None, novelty={"a": [1]}),
        b'data: {"choices":null}\n\n',
        b"data: {}\n\n",
        b'data: {"choices":[{"delta":null,"finish_reason":null}],"error":null}\n\n',
        b'event: novelty\ndata: {"choices":[]}\n\n',
        chunk({"content": None, "tool_calls": [{"index": 0}]}, obfuscation="xxxx"),
    )
    rig.script(Answer("one two", usage=USAGE, at={1: odd}))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert texts(answer) == ["one", " two", ""]
    check_last(answer, 9, 7, STOP)


async def test_an_empty_finish_reason_does_not_replace_a_real_one(rig: Rig) -> None:
    for last, ours in (("length", LENGTH), ("", STOP)):
        begun = chunk({"content": "Hi"}, finish_reason="")
        ended = chunk({}, finish_reason=last) + chunk({"content": ""}, finish_reason="", usage=USAGE)
        rig.script(Reply(steps=(begun, ended, DONE)))
        answer = await read_all(rig.provider, OPENAI.job(stream=True))
        assert (text(answer), finish_reason(answer)) == ("Hi", ours)


async def test_usage_in_the_chunk_of_the_finish_reason_is_used(rig: Rig) -> None:
    steps = (chunk({"content": "Hi"}), chunk({"content": "!"}, finish_reason="stop", usage=USAGE))
    rig.script(Reply(steps=(*steps, DONE)))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert texts(answer) == ["Hi", "!", ""]
    check_last(answer, 9, 7, STOP)


async def test_what_follows_the_end_marker_is_ignored(rig: Rig) -> None:
    rig.script(
        Reply(
            steps=(
                chunk({"content": "Hi"}) + chunk({}, finish_reason="stop", usage=USAGE),
                DONE + chunk({"content": "more"}),
                Gate(),
            )
        )
    )
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert text(answer) == "Hi"
    check_last(answer, 9, 7, STOP)


@pytest.mark.parametrize(
    ("details", "cached", "written"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 6}}, 6, 0),
        ({"prompt_tokens_details": {"cached_tokens": 6.0, "cache_write_tokens": 3}}, 6, 3),
        ({"prompt_tokens_details": {"cache_write_tokens": 9}}, 0, 9),
        ({"num_cached_tokens": 4}, 4, 0),
        ({"cached_tokens": 4}, 4, 0),
        ({"prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 5}, 4, 0),
        ({"prompt_tokens_details": {"cached_tokens": 10}}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 5}}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": -1}}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": "6"}}, 0, 0),
        ({"prompt_tokens_details": {"cached_tokens": True}}, 0, 0),
        ({"prompt_tokens_details": [6]}, 0, 0),
        ({"prompt_tokens_details": None, "num_cached_tokens": None}, 0, 0),
    ],
)
async def test_cached_tokens_are_a_part_of_the_prompt(
    rig: Rig, details: dict[str, Any], cached: int, written: int, stream: bool
) -> None:
    rig.script(Answer("one two", usage=USAGE | details))
    answer = await read_all(rig.provider, OPENAI.job(stream=stream))
    check_last(answer, 9, 7, STOP)
    counts = reported_usage(answer)
    assert (counts.cached_input_tokens, counts.cache_write_input_tokens) == (cached, written)


@pytest.mark.parametrize(
    ("details", "reasoning"),
    [
        ({"reasoning_tokens": 5}, 5),
        ({"reasoning_tokens": 7.0}, 7),
        ({"reasoning_tokens": 0}, 0),
        ({"reasoning_tokens": 8}, 0),
        ({"reasoning_tokens": -1}, 0),
        ({"reasoning_tokens": 1.5}, 0),
        ({"reasoning_tokens": "5"}, 0),
        ({"reasoning_tokens": True}, 0),
        ({"reasoning_tokens": None}, 0),
        ({"reasoning_tokens": 10**30}, 0),
        ([5], 0),
        (None, 0),
    ],
)
async def test_reasoning_tokens_are_a_part_of_the_output(
    rig: Rig, details: Any, reasoning: int, stream: bool
) -> None:
    rig.script(Answer("one two", usage=USAGE | CACHED | {"completion_tokens_details": details}))
    answer = await read_all(rig.provider, OPENAI.job(stream=stream))
    check_last(answer, 9, 7, STOP)
    received = reported_usage(answer)
    assert received.reasoning_tokens == reasoning
    assert (received.cached_input_tokens, received.cache_write_input_tokens) == (6, 2)


async def test_the_input_is_reported_as_soon_as_it_is_counted(rig: Rig) -> None:
    """A stream that ends early is billed for it."""
    steps = (chunk({"content": "Hi"}, usage=USAGE), error_event())
    rig.script(Reply(steps=steps))
    text_job = OPENAI.job(stream=True)
    await failure(rig.provider, text_job)
    assert text_job.report.usage is not None
    assert text_job.report.usage.input_tokens == 9


@pytest.mark.parametrize(
    ("first", "last", "counts"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 0}, {"completion_tokens": 7}, (7, 0, 0, 0)),
        ({"prompt_tokens": 9}, {"prompt_tokens": 0, "completion_tokens": 7}, (7, 0, 0, 0)),
        ({"completion_tokens": 7}, {"prompt_tokens": 9, "completion_tokens": 0}, (7, 0, 0, 0)),
        (USAGE | CACHED, {"prompt_tokens": 0, "completion_tokens": 0}, (7, 6, 2, 0)),
        ({"prompt_tokens": 9} | CACHED, USAGE, (7, 6, 2, 0)),
        ({"prompt_tokens": 9}, USAGE | CACHED, (7, 6, 2, 0)),
        (USAGE | CACHED, {"prompt_tokens": 8, "completion_tokens": 5}, (7, 6, 2, 0)),
        ({"prompt_tokens": 8, "completion_tokens": 5}, USAGE | CACHED, (7, 6, 2, 0)),
        (USAGE | REASONING, USAGE, (7, 0, 0, 5)),
        (USAGE | REASONING, {"completion_tokens": 9}, (9, 0, 0, 5)),
        (USAGE | REASONING, {"completion_tokens": 3}, (3, 0, 0, 0)),
        ({"prompt_tokens": 9}, {"completion_tokens": 7} | REASONING, (7, 0, 0, 5)),
    ],
)
async def test_the_counts_of_a_stream_may_come_in_several_chunks(
    rig: Rig, first: dict[str, Any], last: dict[str, Any], counts: tuple[int, int, int, int]
) -> None:
    steps = (chunk({"content": "Hi"}, usage=first), chunk({}, finish_reason="stop", usage=last), DONE)
    rig.script(Reply(steps=steps))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    completion, cached, written, reasoning = counts
    check_last(answer, 9, completion, STOP)
    received = reported_usage(answer)
    assert (received.cached_input_tokens, received.cache_write_input_tokens) == (cached, written)
    assert received.reasoning_tokens == reasoning


async def test_the_sum_is_our_own(rig: Rig) -> None:
    rig.script(Answer(usage=USAGE | {"total_tokens": 99}))
    check_last(await read_all(rig.provider, OPENAI.job(stream=False)), 9, 7, STOP)


async def test_a_vendor_that_does_not_close_a_finished_stream_delays_no_caller(rig: Rig) -> None:
    steps = (chunk({"content": "Hi"}), chunk({}, finish_reason="stop", usage=USAGE), DONE)
    rig.script(Reply(steps=(*steps, Gate())))
    async with asyncio.timeout(20):
        check_last(await read_all(rig.provider, OPENAI.job(stream=True)), 9, 7, STOP)
        await rig.requests[0].left.wait()


async def test_a_stream_cut_after_its_end_marker_is_complete(rig: Rig) -> None:
    steps = (chunk({"content": "Hi"}), chunk({}, finish_reason="stop", usage=USAGE), DONE)
    rig.script(Reply(steps=(b"".join(steps), Stop.CLOSE)))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert text(answer) == "Hi"
    check_last(answer, 9, 7, STOP)


def choice_chunk(*choices: dict[str, Any], **fields: Any) -> bytes:
    """Returns the event of a chunk with these choices."""
    return b"data: " + json.dumps({"choices": choices, **fields}).encode() + b"\n\n"


def delta(index: Any, content: str, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": {"content": content}, "finish_reason": None, **fields}


@pytest.mark.parametrize("index", [0, "0", None])
async def test_only_the_requested_choice_of_a_stream_is_delivered(rig: Rig, index: Any) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "weather", "arguments": "{}"}}
    ended = {"index": 1, "delta": {"tool_calls": [call]}, "finish_reason": "length"}
    steps = (
        choice_chunk(delta(1, "not ")),
        choice_chunk(delta(index, "one")),
        choice_chunk(delta(2, "this ")),
        choice_chunk(delta(1, "nor "), delta(index, " two")),
        choice_chunk(delta(index, " three"), delta(1, "that")),
        choice_chunk(ended, delta(index, "", finish_reason="stop")),
        choice_chunk({"index": 2, "delta": {}, "finish_reason": "length"}),
        choice_chunk(usage=USAGE),
        DONE,
    )
    rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=steps))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert texts(answer) == ["one", " two", " three", ""]
    check_last(answer, 9, 7, STOP)


@pytest.mark.parametrize("index", [0, "0", None])
async def test_only_the_requested_choice_of_a_whole_answer_is_delivered(rig: Rig, index: Any) -> None:
    choices = [
        {"index": number, "message": {"content": content}, "finish_reason": reason}
        for number, content, reason in (
            (1, "not this", "length"),
            (index, "this", "stop"),
            (2, "nor that", "stop"),
        )
    ]
    rig.script(Reply(steps=(json.dumps({"choices": choices, "usage": USAGE}).encode(),)))
    answer = await read_all(rig.provider, OPENAI.job(stream=False))
    assert text(answer) == "this"
    check_last(answer, 9, 7, STOP)


async def test_an_answer_without_the_requested_choice_is_a_failure(rig: Rig, stream: bool) -> None:
    part = delta(1, "not this", message={"content": "not this"}) | {"finish_reason": "stop"}
    if stream:
        rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=(choice_chunk(part), DONE)))
    else:
        rig.script(Reply(steps=(json.dumps({"choices": [part]}).encode(),)))
    error, _ = await failure(rig.provider, OPENAI.job(stream=stream))
    assert error.code == "provider_failed"


def completion(message: dict[str, Any], finish_reason: str = "stop") -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return json.dumps({"object": "chat.completion", "choices": [choice], "usage": USAGE}).encode()


@pytest.mark.parametrize("stop", [Stop.END, Stop.CLOSE], ids=lambda stop: stop.name)
@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize(
    "content", ["Hi you", "", "long " * 100_000, "😀"], ids=["short", "empty", "long", "a pair"]
)
async def test_a_host_may_answer_a_request_for_a_stream_with_a_whole_completion(
    rig: Rig, content: str, end: bytes, stop: Stop
) -> None:
    """The connection may be cut after the last byte of it."""
    rig.script(Reply(steps=(completion({"role": "assistant", "content": content}) + end, stop)))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert text(answer) == content
    check_last(answer, 9, 7, STOP)


async def test_the_calls_of_a_whole_completion_are_not_pieces_of_one(rig: Rig) -> None:
    calls = [{"id": "same", "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    rig.script(Reply(steps=(completion({"content": None, "tool_calls": calls}, "tool_calls"),)))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    pieces = [event.tool_call_delta for event in answer[:-1]]
    assert [(each.index, each.name, each.arguments_json) for each in pieces if each.name] == [
        (0, "a", "{}"),
        (1, "b", "{}"),
    ]


async def test_a_completion_that_repeats_a_stream_at_its_end_is_not_delivered_again(rig: Rig) -> None:
    whole = b"data: " + completion({"content": "one two"}) + b"\n\n"
    steps = (choice_chunk(delta(0, "one")), choice_chunk(delta(0, " two")), whole)
    rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=steps))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert texts(answer) == ["one", " two", ""]
    check_last(answer, 9, 7, STOP)


async def test_the_chunks_of_a_host_may_have_a_message_in_place_of_a_delta(rig: Rig) -> None:
    parts = [{"index": 0, "message": {"content": word}} for word in ("one", " two")]
    last = {"index": 0, "message": {"content": ""}, "finish_reason": "stop"}
    steps = (*map(choice_chunk, parts), choice_chunk(last, usage=USAGE), DONE)
    rig.script(Reply(headers={"Content-Type": "text/event-stream"}, steps=steps))
    answer = await read_all(rig.provider, OPENAI.job(stream=True))
    assert texts(answer) == ["one", " two", ""]
    check_last(answer, 9, 7, STOP)
