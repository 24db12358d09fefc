"""Tool calls in the responses of Anthropic, and its refusals of tools and schemas."""

from __future__ import annotations

from typing import Any

import pytest

from pomelo.testing import Call, Reply
from pomelo.testing.anthropic_protocol import Answer, error_reply, event, words
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import (
    ANTHROPIC,
    FILTERED,
    TIME,
    WEATHER,
    failure,
    finish_reason,
    hi,
    reported_usage,
    text,
    tool_calls,
)


async def test_thinking_beside_tool_calls_is_skipped_and_counted(rig: Rig, stream: bool) -> None:
    rig.script(Answer("Hm.", thinking="hm", tool_calls=(Call("time"),), reasoning_tokens=5))
    answer = await read_all(rig.provider, ANTHROPIC.job(hi(tools=[TIME]), stream=stream))
    assert text(answer) == "Hm."
    assert [name for _, name, _ in tool_calls(answer, stream=stream)] == ["time"]
    assert reported_usage(answer).reasoning_tokens == 5


START = event("message_start", message={"usage": {"input_tokens": 9, "output_tokens": 1}})
END = event("message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 7})
OVER = event("message_stop")


def begun(index: int, **fields: Any) -> bytes:
    """The event that begins a block."""
    return event("content_block_start", index=index, content_block=fields)


def more(index: int, partial_json: Any) -> bytes:
    """The event with a piece of arguments."""
    delta = {"type": "input_json_delta", "partial_json": partial_json}
    return event("content_block_delta", index=index, delta=delta)


async def test_only_the_pieces_of_tools_of_the_caller_are_tool_calls(rig: Rig) -> None:
    steps = (
        START,
        begun(0, type="text", text="Hi"),
        begun(1, type="server_tool_use", id="s", name="web_search", input={}),
        more(1, '{"query":"x"}'),
        begun(2, type="tool_use", id="a", name="weather", input={}),
        more(2, ""),
        more(2, '{"city":'),
        more(2, '"Bonn"}'),
        begun(3, type="server_tool_use", id="t", name="web_search", input={}),
        more(3, '{"query":"y"}'),
        # Some proxies send the whole input in one event.
        begun(4, type="tool_use", id="b", name="time", input={"at": "noon"}),
        words("!", index=5),
        END,
        OVER,
    )
    rig.script(Reply(steps=steps))
    answer = await read_all(rig.provider, ANTHROPIC.job(hi(tools=[WEATHER, TIME]), stream=True))
    assert text(answer) == "Hi!"
    assert tool_calls(answer, stream=True) == [
        ("a", "weather", '{"city":"Bonn"}'),
        ("b", "time", '{"at":"noon"}'),
    ]


async def test_pieces_belong_to_the_block_at_their_index(rig: Rig) -> None:
    tool = {"type": "tool_use", "name": "weather", "input": {}}
    steps = (
        START,
        begun(0, id="a", **tool),
        begun(1, type="server_tool_use", id="s", name="web_search", input={}),
        begun(2, id="b", **tool),
        begun(3, type="text", text=""),
        *(more(index, '{"city":') for index in (0, 1, 2)),
        words("Hi", index=3),
        *(more(index, f'"{index}"}}') for index in (0, 1, 2)),
        END,
        OVER,
    )
    rig.script(Reply(steps=steps))
    answer = await read_all(rig.provider, ANTHROPIC.job(hi(tools=[WEATHER]), stream=True))
    assert text(answer) == "Hi"
    assert tool_calls(answer, stream=True) == [
        ("a", "weather", '{"city":"0"}'),
        ("b", "weather", '{"city":"2"}'),
    ]


@pytest.mark.parametrize(
    "broken",
    [
        begun(0, type="tool_use", id="a", input={}),
        begun(0, type="tool_use", id="a", name=7, input={}),
        begun(0, type="tool_use", id="a", name="time", input=[1]),
        begun(0, type="tool_use", id="a", name="time", input={}) + more(0, 7),
        begun(0, type="tool_use", id="a", name="time", input={})
        + more(0, None).replace(b', "partial_json": null', b""),
    ],
)
async def test_a_tool_call_that_can_not_be_read_fails(rig: Rig, broken: bytes) -> None:
    rig.script(Reply(steps=(START, broken, END, OVER)))
    error, _ = await failure(rig.provider, ANTHROPIC.job(hi(tools=[TIME]), stream=True))
    assert error.code == "provider_failed"


async def test_a_refusal_keeps_its_finish_reason(rig: Rig, stream: bool) -> None:
    rig.script(Answer("No.", finish_reason="refusal"))
    assert finish_reason(await read_all(rig.provider, ANTHROPIC.job(stream=stream))) == FILTERED


# --- refusals of the vendor


@pytest.mark.parametrize(
    ("wrong", "code", "field"),
    [
        ("tools.0.custom.input_schema: JSON schema is invalid", "invalid_parameter", "tools"),
        ("tool_choice: no tool is called x", "invalid_parameter", "tool_choice"),
        ("output_config.format.schema: too complex", "invalid_parameter", "response_format"),
        ("output_config.effort: not for this model", "provider_failed", None),
        ("messages.1: `tool_use` ids were found without", "invalid_parameter", "messages"),
    ],
)
async def test_the_field_at_fault_is_named_if_the_caller_set_it(
    rig: Rig, wrong: str, code: str, field: str | None
) -> None:
    rig.script(error_reply(400, message=wrong))
    error, _ = await failure(rig.provider, ANTHROPIC.job(stream=False))
    assert (error.code, error.field) == (code, field)
