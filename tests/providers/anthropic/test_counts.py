"""How Anthropic's counts of tokens are added up: its input leaves out what its cache was read or written for."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic_core import to_json

from pomelo.catalog.reported_cost import Report
from pomelo.gen.v1.text_pb2 import FINISH_REASON_LENGTH
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.anthropic.responses import MessageStream, parse_message

PARTS = {"ephemeral_5m_input_tokens": 3, "ephemeral_1h_input_tokens": 4}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, Usage(input_tokens=10, output_tokens=1)),
        ({"cache_read_input_tokens": 5}, Usage(input_tokens=15, output_tokens=1, cached_input_tokens=5)),
        (
            {"cache_creation_input_tokens": 7},
            Usage(input_tokens=17, output_tokens=1, cache_write_input_tokens=7),
        ),
        *(
            (
                {"cache_creation": PARTS, **total},
                Usage(
                    input_tokens=17,
                    output_tokens=1,
                    cache_write_input_tokens=7,
                    cache_write_1h_input_tokens=4,
                ),
            )
            for total in ({}, {"cache_creation_input_tokens": 7})
        ),
    ],
    ids=["none", "read", "written", "parts", "parts and their sum"],
)
def test_the_input_includes_what_was_read_from_the_cache_and_written_to_it(
    counts: dict[str, Any], expected: Usage
) -> None:
    usage = {"input_tokens": 10, "output_tokens": 1, **counts}
    message = {"content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn", "usage": usage}
    assert parse_message(message).completed.usage == expected
    stream = MessageStream(Report())
    end = {"delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}}
    for event in ({"type": "message_start", "message": {"usage": usage}}, {"type": "message_delta", **end}):
        assert stream.parse_event(to_json(event)) == ""
    assert stream.usage == expected


def test_a_later_count_that_is_not_credible_leaves_the_one_before() -> None:
    stream = MessageStream(Report())
    for output in (5, "many"):
        usage = {"input_tokens": 9 if output == 5 else "few", "output_tokens": output}
        event = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
        assert stream.parse_event(to_json(event)) == ""
    assert stream.usage == Usage(input_tokens=9, output_tokens=5)


@pytest.mark.parametrize("later", [None, 0])
def test_a_later_count_that_is_missing_replaces_nothing(later: int | None) -> None:
    stream = MessageStream(Report())
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}
    counts = {"input_tokens": later, "cache_read_input_tokens": later, "output_tokens": 5}
    end = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": counts}
    for event in (start, end):
        assert stream.parse_event(to_json(event)) == ""
    assert stream.usage == Usage(input_tokens=9, output_tokens=5)


def test_an_answer_without_output_is_counted_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As that of a model that refuses."""
    stream = MessageStream(Report())
    start = {"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}
    end = {"type": "message_delta", "delta": {"stop_reason": "refusal"}, "usage": {"output_tokens": 0}}
    for event in (start, end):
        assert stream.parse_event(to_json(event)) == ""
    assert stream.usage == Usage(input_tokens=9)
    assert not caplog.records


@pytest.mark.parametrize("reason", ["", None])
def test_counts_without_a_stop_reason_keep_the_one_before(reason: str | None) -> None:
    stream = MessageStream(Report())
    ends = (
        ({"stop_reason": "max_tokens"}, {"output_tokens": 2}),
        ({"stop_reason": reason}, {"output_tokens": 5}),
    )
    for delta, usage in ends:
        counts = {"input_tokens": 9, **usage}
        stream.parse_event(to_json({"type": "message_delta", "delta": delta, "usage": counts}))
    result = stream.completed().completed
    assert result.text.finish_reason == FINISH_REASON_LENGTH
    assert result.usage == Usage(input_tokens=9, output_tokens=5)
