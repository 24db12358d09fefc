"""What the contract suite finds in the events of a text."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.gen.v1.speech_pb2 import Transcription
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    ImagePart,
    Message,
    Role,
    TextDelta,
    TextOutput,
    ToolCallDelta,
)
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Event
from pomelo.providers.text import completed_text
from pomelo.testing.event_checker import EventChecker
from tests.providers.text_rig import STOP

USAGE = Usage(
    input_tokens=9,
    output_tokens=7,
    cached_input_tokens=6,
    cache_write_input_tokens=3,
    cache_write_1h_input_tokens=3,
    reasoning_tokens=7,
)
WORD = Event(text_delta=TextDelta(text="Hi"))
LAST = completed_text("", STOP, USAGE)


def problems(*events: Event, stream: bool = True, needs_usage: bool = True) -> list[str]:
    """The problems of a text of these events."""
    checker = EventChecker("text", stream=stream, needs_usage=needs_usage)
    for event in events:
        checker.add(event)
    checker.end()
    return checker.problems


def call_piece(index: int, **first: str) -> Event:
    """A piece of a tool call; `first` are the id and the name in its first piece."""
    return Event(tool_call_delta=ToolCallDelta(index=index, arguments_json="{", **first))


def message(part: ContentPart, role: Role.ValueType = Role.ROLE_ASSISTANT) -> Event:
    """A last event with a message."""
    output = TextOutput(message=Message(role=role, content=[part]), finish_reason=STOP)
    return Event(completed=TaskResult(text=output, usage=USAGE))


@pytest.mark.parametrize(
    ("events", "stream"),
    [
        ([WORD, LAST], True),
        ([LAST], True),
        ([WORD, completed_text("Hi", STOP, USAGE)], True),
        ([completed_text("Hi", STOP, USAGE)], False),
    ],
)
def test_a_valid_text_has_no_problem(events: list[Event], stream: bool) -> None:
    assert problems(*events, stream=stream) == []


def test_the_text_of_deltas_and_of_the_message_is_delivered() -> None:
    checker = EventChecker("text", stream=True)
    for event in (WORD, completed_text("é!", STOP, USAGE)):
        checker.add(event)
    assert checker.delivered == len("Hié!".encode())


@pytest.mark.parametrize(
    ("last", "problem"),
    [
        (completed_text("", STOP, None), "the result has no usage"),
        (
            Event(completed=TaskResult(text=TextOutput(), usage=USAGE)),
            "the result has no finish_reason",
        ),
        (
            message(ContentPart(text="Hi"), Role.ROLE_USER),
            "the message of the result must have the role assistant",
        ),
        (
            message(ContentPart(image=ImagePart())),
            "the message of the result must have nothing but text and tool calls",
        ),
        (
            Event(completed=TaskResult(transcription=Transcription())),
            "it yielded transcription instead of text",
        ),
        (Event(), "it yielded None instead of completed"),
    ],
)
def test_a_wrong_last_event_is_a_problem(last: Event, problem: str) -> None:
    assert problem in problems(WORD, last)


@pytest.mark.parametrize(
    ("pieces", "found"),
    [
        ([call_piece(0, id="a", name="x"), call_piece(0), call_piece(1, id="b", name="x")], []),
        ([call_piece(0, id="a")], ["the first piece of a tool call has no id or no name"]),
        ([call_piece(1, id="a", name="x")], ["tool calls are not numbered from 0 without gaps"]),
        (
            [call_piece(0, id="a", name="x")] * 2,
            ["a later piece of a tool call has an id or a name"],
        ),
    ],
)
def test_pieces_of_tool_calls_must_belong_together(pieces: list[Event], found: list[str]) -> None:
    assert problems(*pieces, completed_text("", STOP, USAGE)) == found


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({"input_tokens": -1}, "an impossible count of tokens is passed on"),
        ({"output_tokens": 10**9 + 1}, "an impossible count of tokens is passed on"),
        ({"reasoning_tokens": -1}, "an impossible count of tokens is passed on"),
        ({"cached_input_tokens": 7}, "the usage does not add up"),
        ({"cache_write_input_tokens": 4}, "the usage does not add up"),
        ({"cache_write_1h_input_tokens": 4}, "the usage does not add up"),
        ({"reasoning_tokens": 8}, "the usage does not add up"),
    ],
)
def test_impossible_counts_are_a_problem(counts: dict[str, Any], problem: str) -> None:
    usage = Usage()
    usage.CopyFrom(USAGE)
    usage.MergeFrom(Usage(**counts))
    assert problems(WORD, completed_text("", STOP, usage)) == [problem]
    checker = EventChecker("text", stream=True)
    checker.check_early_usage(usage)
    assert checker.problems == [problem]


def test_usage_may_be_missing_if_the_vendors_count_is_impossible() -> None:
    assert problems(WORD, completed_text("", STOP, None), needs_usage=False) == []


def test_a_stream_without_its_last_event_is_a_problem() -> None:
    assert problems(WORD) == ["the response ends without its last event, and without an error"]


def test_a_whole_response_with_a_delta_is_a_problem() -> None:
    assert problems(WORD, LAST, stream=False) == ["a whole response has more than one event"]
