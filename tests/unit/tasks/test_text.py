"""Words of long conversations are counted as by str.split, and the number of parts is limited."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomelo.catalog.catalog import Limits, Model, Route
from pomelo.catalog.pricing import Prices
from pomelo.errors import PomeloError
from pomelo.gen.v1 import text_pb2
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.tasks import text
from pomelo.tasks.base import AudioInfo, CollectorContext

MODEL = Model("m", TaskType.TASK_TYPE_TEXT, (), Limits(max_input_tokens=10**6), Prices(), "")
ROUTE = Route("p", "m")
BLANKS = " \t\n\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"

contents = st.text(st.one_of(st.sampled_from(BLANKS), st.characters(exclude_categories=["Cs"])), max_size=60)


def conversation_of(*contents: str) -> text_pb2.TextInput:
    """A conversation."""
    return text_pb2.TextInput(
        messages=[text_pb2.Message(role=text_pb2.ROLE_USER, content=content) for content in contents]
    )


@given(st.lists(contents, min_size=1, max_size=3), st.integers(1, 7))
def test_words_are_counted_equally_in_one_text_and_in_slices(messages: list[str], size: int) -> None:
    conversation = conversation_of(*messages)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pomelo.tasks.text._SLICE", size)
        bound = text.estimate(conversation, MODEL, ROUTE, AudioInfo())
    words = sum(len(content.split()) for content in messages)
    assert bound.input_tokens == max(words, sum(len(content.encode()) for content in messages) // 8)


def test_partial_usage_does_not_count_a_long_prompt_again() -> None:
    conversation = conversation_of("word " * 500_000)
    estimate = text.estimate(conversation, MODEL, ROUTE, AudioInfo())
    store: Any = None
    collector = text.TextCollector(CollectorContext(conversation, MODEL, estimate, True, store))
    for piece in ("five ", "more."):
        event = StreamTaskResponse()
        event.text_delta.content = piece
        collector.add(event)
    tracemalloc.start()
    try:
        used = collector.partial_usage(conversation)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()
    assert (used.input_tokens, used.output_tokens) == (500_000, 2)


def test_the_number_of_parts_of_all_messages_is_limited() -> None:
    conversation = text_pb2.TextInput()
    for _ in range(100):
        message = conversation.messages.add(role=text_pb2.ROLE_USER)
        for _ in range(100):
            message.parts.parts.add(text="a")
    text.check(conversation, MODEL)
    conversation.messages.add(role=text_pb2.ROLE_USER).parts.parts.add(text="a")
    with pytest.raises(PomeloError) as error:
        text.check(conversation, MODEL)
    assert (error.value.code, error.value.field) == ("invalid_parameter", "messages")
    assert "10,000 parts" in error.value.message


@pytest.mark.parametrize("keep", [False, True])
def test_the_text_of_a_stream_is_kept_only_for_an_idempotency_key(keep: bool) -> None:
    conversation = conversation_of("Go")
    bound = text.estimate(conversation, MODEL, ROUTE, AudioInfo())
    collector = text.TextCollector(CollectorContext(conversation, MODEL, bound, True, None, keep))  # type: ignore[arg-type]
    tracemalloc.start()
    try:
        for _ in range(100_000):
            event = StreamTaskResponse()
            event.text_delta.content = "four"
            assert collector.add(event) is event
        memory = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    last = StreamTaskResponse()
    last.text_delta.finish_reason = text_pb2.FINISH_REASON_STOP
    collector.add(last)
    result = TaskResult()
    collector.finish(result)
    assert result.text.content == ("four" * 100_000 if keep else "")
    # A stored text takes about its own bytes, not those of 100,000 pieces.
    assert memory < (1_000_000 if keep else 20_000)
    assert collector.usage()[0].output_tokens == 100_000
