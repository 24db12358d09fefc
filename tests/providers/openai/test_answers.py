"""Answers of the OpenAI provider: unary and streamed, split into packets in every way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from pomelo.gen.v1.text_pb2 import FinishReason, Message, Role, TextDelta, TextInput
from pomelo.testing import Answer, FaultUpstream, Gate, Reply, Stop, chunk
from tests.providers.openai.rig import deltas, job, open_provider

STOP = FinishReason.FINISH_REASON_STOP
TEXT = "Grüße aus Zürich: 🍊 naïve, 日本語 and\nmore. "
USAGE = {"prompt_tokens": 9, "completion_tokens": 7, "total_tokens": 16}


@pytest.fixture(name="vendor")
async def _vendor() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as server:
        yield server


@pytest.fixture(name="provider")
async def _provider(vendor: FaultUpstream) -> AsyncIterator[Any]:
    async with open_provider(vendor.openai_base_url) as provider:
        yield provider


def text(answer: list[TextDelta]) -> str:
    """The joined text."""
    return "".join(delta.content for delta in answer)


def check_last(answer: list[TextDelta], prompt: int = 9, completion: int = 7) -> None:
    """Only the last delta is a last one, and it has the count."""
    *earlier, last = answer
    assert not any(delta.finish_reason for delta in earlier)
    assert not any(delta.HasField("usage") for delta in earlier if not delta.content)
    assert last.finish_reason == STOP
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (prompt, completion)
    assert last.usage.total_tokens == prompt + completion


def check_no_usage(answer: list[TextDelta]) -> None:
    """Only the last delta is a last one, and it has no count."""
    *earlier, last = answer
    assert not any(delta.finish_reason for delta in earlier)
    assert last.finish_reason
    assert not (last.usage.prompt_tokens and last.usage.completion_tokens)


async def test_a_unary_answer_is_one_delta_with_all_fields(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Answer(TEXT, usage=USAGE))
    answer = await deltas(provider, job(stream=False))
    assert len(answer) == 1
    assert answer[0].content == TEXT
    check_last(answer)


async def test_a_stream_has_a_delta_for_each_chunk_with_text_and_a_final_delta(
    vendor: FaultUpstream, provider: Any
) -> None:
    vendor.script(Answer("one two three", usage=USAGE))
    answer = await deltas(provider, job(stream=True))
    assert [delta.content for delta in answer] == ["one", " two", " three", ""]
    check_last(answer)


@pytest.mark.parametrize("packing", ["events", "together", "bytes"])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("comments", [False, True])
async def test_a_stream_means_the_same_however_it_is_packed(
    vendor: FaultUpstream, provider: Any, packing: Any, line_end: bytes, comments: bool
) -> None:
    vendor.script(Answer(TEXT, usage=USAGE, packing=packing, line_end=line_end, comments=comments))
    answer = await deltas(provider, job(stream=True))
    assert text(answer) == TEXT
    check_last(answer)


async def test_text_arrives_while_the_vendor_still_sends(vendor: FaultUpstream, provider: Any) -> None:
    gate = Gate()
    vendor.script(Answer("one two three", at={1: gate}))
    async with aclosing(provider.text(job(stream=True))) as events:
        assert (await anext(events)).text_delta.content == "one"
        gate.open()
        assert [event.text_delta.content async for event in events] == [" two", " three", ""]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("stop", STOP),
        ("length", FinishReason.FINISH_REASON_LENGTH),
        ("content_filter", FinishReason.FINISH_REASON_CONTENT_FILTER),
        ("tool_calls", STOP),
        ("function_call", STOP),
        ("a_new_one", STOP),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_finish_reasons_are_translated(
    vendor: FaultUpstream, provider: Any, theirs: str, ours: int, stream: bool
) -> None:
    vendor.script(Answer(finish_reason=theirs))
    assert (await deltas(provider, job(stream=stream)))[-1].finish_reason == ours


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_the_text(vendor: FaultUpstream, provider: Any, stream: bool) -> None:
    vendor.script(Answer(refusal="I can't help with that."))
    answer = await deltas(provider, job(stream=stream))
    assert text(answer) == "I can't help with that."
    assert answer[-1].finish_reason == STOP


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content", ["", [], None])
async def test_a_refusal_with_empty_content_is_the_text(
    vendor: FaultUpstream, provider: Any, content: Any, stream: bool
) -> None:
    answer_text = {"role": "assistant", "content": content, "refusal": "I can't help with that."}
    if stream:
        kind = "text/event-stream"
        body = chunk(answer_text, finish_reason="stop") + b"data: [DONE]\n\n"
    else:
        kind = "application/json"
        body = json.dumps({"choices": [{"message": answer_text, "finish_reason": "stop"}]}).encode()
    vendor.script(Reply(headers={"Content-Type": kind}, steps=(body,)))
    assert text(await deltas(provider, job(stream=stream))) == "I can't help with that."


@pytest.mark.parametrize("stream", [False, True])
async def test_an_empty_answer_is_an_answer(vendor: FaultUpstream, provider: Any, stream: bool) -> None:
    vendor.script(Answer("", finish_reason="length", usage=USAGE | {"completion_tokens": 0}))
    answer = await deltas(provider, job(stream=stream))
    assert text(answer) == ""
    assert len(answer) == 1
    assert answer[-1].finish_reason == FinishReason.FINISH_REASON_LENGTH


async def test_null_content_is_empty(vendor: FaultUpstream, provider: Any) -> None:
    body = {
        "choices": [{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    vendor.script(Reply(steps=(json.dumps(body).encode(),)))
    answer = await deltas(provider, job(stream=False))
    assert text(answer) == ""
    check_last(answer)


async def test_unknown_fields_empty_choices_and_odd_chunks_are_skipped(
    vendor: FaultUpstream, provider: Any
) -> None:
    odd = (
        chunk(None, novelty={"a": [1]}),
        b'data: {"choices":null}\n\n',
        b"data: {}\n\n",
        b'data: {"choices":[{"delta":null,"finish_reason":null}],"error":null}\n\n',
        b'event: novelty\ndata: {"choices":[]}\n\n',
        chunk({"content": None, "tool_calls": [{"index": 0}]}, obfuscation="xxxx"),
    )
    vendor.script(Answer("one two", usage=USAGE, at={1: odd}))
    answer = await deltas(provider, job(stream=True))
    assert [delta.content for delta in answer] == ["one", " two", ""]
    check_last(answer)


async def test_usage_in_the_chunk_of_the_finish_reason_is_used(vendor: FaultUpstream, provider: Any) -> None:
    steps = (chunk({"content": "Hi"}), chunk({"content": "!"}, finish_reason="stop", usage=USAGE))
    vendor.script(Reply(steps=(*steps, b"data: [DONE]\n\n")))
    answer = await deltas(provider, job(stream=True))
    assert [delta.content for delta in answer] == ["Hi", "!", ""]
    check_last(answer)


async def test_what_follows_the_end_marker_is_ignored(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(
        Reply(
            steps=(
                chunk({"content": "Hi"}) + chunk({}, finish_reason="stop", usage=USAGE),
                b"data: [DONE]\n\n" + chunk({"content": "more"}),
                Gate(),
            )
        )
    )
    answer = await deltas(provider, job(stream=True))
    assert text(answer) == "Hi"
    check_last(answer)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": -1, "completion_tokens": 2},
        {"prompt_tokens": 1, "completion_tokens": 10**9 + 1},
        {"prompt_tokens": 1.5, "completion_tokens": 2},
        {"prompt_tokens": True, "completion_tokens": 2},
        {"prompt_tokens": "1", "completion_tokens": 2},
        {"prompt_tokens": 1},
        [1, 2],
        10**30,
    ],
)
async def test_without_a_credible_count_an_answer_ends_without_one(
    vendor: FaultUpstream, provider: Any, usage: Any
) -> None:
    vendor.script(Answer("one two three", usage=usage), Answer("one two three", usage=usage))
    text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content="count these four words")])
    answer = await deltas(provider, job(text_input, stream=True))
    assert text(answer) == "one two three"
    check_no_usage(answer)
    answer = await deltas(provider, job(text_input, stream=False))
    assert text(answer) == "one two three"
    check_no_usage(answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("details", "cached", "written"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 6}}, 6, 0),
        ({"prompt_tokens_details": {"cached_tokens": 6.0, "cache_write_tokens": 3}}, 6, 3),
        ({"prompt_tokens_details": {"cache_write_tokens": 9}}, 0, 9),
        ({"num_cached_tokens": 4}, 4, 0),
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
    vendor: FaultUpstream, provider: Any, details: dict[str, Any], cached: int, written: int, stream: bool
) -> None:
    vendor.script(Answer("one two", usage=USAGE | details))
    answer = await deltas(provider, job(stream=stream))
    check_last(answer)
    usage = answer[-1].usage
    assert (usage.cached_prompt_tokens, usage.cache_write_prompt_tokens) == (cached, written)


@pytest.mark.parametrize("stream", [False, True])
async def test_counts_that_are_written_as_floats_are_counts(
    vendor: FaultUpstream, provider: Any, stream: bool
) -> None:
    vendor.script(Answer("one two", usage={"prompt_tokens": 9.0, "completion_tokens": 7.0}))
    check_last(await deltas(provider, job(stream=stream)))


async def test_the_sum_is_our_own(vendor: FaultUpstream, provider: Any) -> None:
    vendor.script(Answer(usage=USAGE | {"total_tokens": 99}))
    check_last(await deltas(provider, job(stream=False)))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_serves_one_answer_after_another(
    vendor: FaultUpstream, provider: Any, stream: bool
) -> None:
    for _ in range(3):
        await deltas(provider, job(stream=stream))
    assert len({received.connection for received in vendor.requests}) == 1


async def test_a_vendor_that_does_not_close_a_finished_stream_delays_no_caller(
    vendor: FaultUpstream, provider: Any
) -> None:
    steps = (chunk({"content": "Hi"}), chunk({}, finish_reason="stop", usage=USAGE), b"data: [DONE]\n\n")
    vendor.script(Reply(steps=(*steps, Gate())))
    async with asyncio.timeout(1):
        check_last(await deltas(provider, job(stream=True)))
        await vendor.requests[0].left.wait()


async def test_concurrent_streams_do_not_mix(vendor: FaultUpstream, provider: Any) -> None:
    vendor.default = lambda received: Answer(f"{received.prompt} " * 20)(received)

    async def ask(number: int) -> None:
        text_input = TextInput(messages=[Message(role=Role.ROLE_USER, content=f"n{number}")])
        assert text(await deltas(provider, job(text_input, stream=number % 2 == 0))) == f"n{number} " * 20

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(ask(number))


async def test_a_stream_cut_after_its_end_marker_is_complete(vendor: FaultUpstream, provider: Any) -> None:
    steps = (chunk({"content": "Hi"}), chunk({}, finish_reason="stop", usage=USAGE), b"data: [DONE]\n\n")
    vendor.script(Reply(steps=(b"".join(steps), Stop.CLOSE)))
    answer = await deltas(provider, job(stream=True))
    assert text(answer) == "Hi"
    check_last(answer)
