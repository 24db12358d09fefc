"""Tool calls as OpenAI and compatible hosts send them, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.providers import text as streams
from pomelo.providers.guard import MAX_TOOL_CALLS
from pomelo.testing import Reply, chunk
from pomelo.testing.text_answer import DONE
from tests.providers.rig import Rig, check_no_secrets, read_all
from tests.providers.text_rig import (
    FILTERED,
    LENGTH,
    OPENAI,
    TIME,
    WEATHER,
    failure,
    finish_reason,
    hi,
    text,
    tool_calls,
)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A whole tool call."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


BONN = '{"city":"Bonn"}'
CALLED = [("weather", BONN), ("time", "{}")]


def piece(index: Any = None, call_id: Any = None, name: Any = None, arguments: Any = None) -> dict[str, Any]:
    """A piece of a tool call, without what is None."""
    function = {"name": name, "arguments": arguments}
    fields = {"index": index, "id": call_id, "function": {k: v for k, v in function.items() if v is not None}}
    return {key: value for key, value in fields.items() if value is not None}


STREAMS: dict[str, list[list[dict[str, Any]]]] = {
    "pieces of two calls together": [
        [piece(0, "a", "weather", ""), piece(1, "b", "time", "")],
        [piece(1, arguments="{"), piece(0, arguments='{"city":')],
        [piece(0, arguments='"Bonn"}'), piece(1, arguments="}")],
    ],
    "indexes with gaps": [[piece(3, "a", "weather", BONN)], [piece(7, "b", "time", "{}")]],
    "whole calls in one chunk": [[piece(0, "a", "weather", BONN), piece(1, "b", "time", "{}")]],
    "whole calls without an index": [[piece(None, "a", "weather", BONN), piece(None, "b", "time", "{}")]],
    "whole calls, all with index 0": [[piece(0, "a", "weather", BONN)], [piece(0, "b", "time", "{}")]],
    "whole calls without ids, all with index 0": [
        [piece(0, None, "weather", BONN), piece(0, None, "time", "{}")]
    ],
    "whole calls with the id null": [[piece(0, "null", "weather", BONN)], [piece(0, "null", "time", "{}")]],
    "whole calls with nothing but names": [
        [piece(None, None, "weather", BONN)],
        [piece(None, "", "time", "{}")],
    ],
    "the same id twice": [[piece(0, "a", "weather", BONN), piece(1, "a", "time", "{}")]],
    "the same id twice, and again in a later piece": [
        [piece(0, "a", "weather", BONN)],
        [piece(1, "a", "time", "")],
        [piece(1, "a", "time", "{}")],
    ],
    "objects as arguments": [[piece(0, "a", "weather", {"city": "Bonn"}), piece(1, "b", "time", {})]],
    "no index and the id in the first piece": [
        [piece(None, "a", "weather", '{"city":')],
        [piece(None, None, None, '"Bonn"}')],
        [piece(None, "b", "time", "{}")],
    ],
    "an id for each piece": [
        [piece(0, "a", "weather", '{"city":')],
        [piece(0, "x", None, '"Bonn"}')],
        [piece(1, "b", "time", "")],
        [piece(1, "y", "", "{}")],
    ],
    "the id and the name in each piece": [
        [piece(0, "a", "weather", "")],
        [piece(0, "a", "weather", '{"city":')],
        [piece(0, "a", "weather", '"Bonn"}')],
        [piece(1, "b", "time", "{}")],
    ],
    "the name in each piece, and no id": [
        [piece(0, None, "weather", '{"city":')],
        [piece(0, None, "weather", '"Bonn"}')],
        [piece(1, None, "time", "{}")],
    ],
    "empty ids and names in later pieces": [
        [piece(0, "a", "weather", "")],
        [piece(0, "", "", BONN)],
        [piece(1, "b", "time", "{}"), piece(1, "", "", "")],
    ],
    "an id before the name": [
        [piece(0, "a")],
        [piece(0, None, "weather", "")],
        [piece(0, None, None, BONN)],
        [piece(1, "b", "time", "{}")],
    ],
    "an index as text": [[piece("0", "a", "weather", BONN)], [piece("1", "b", "time", "{}")]],
    "pieces without anything": [
        [piece(0)],
        [piece(0, "a", "weather", BONN), piece(1, "b", "time", "{}"), {}],
    ],
}


@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
async def test_pieces_of_tool_calls_of_any_host_are_the_same_calls(
    rig: Rig, chunks: list[list[dict[str, Any]]], reason: str
) -> None:
    rig.script(streamed(*chunks, reason=reason))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER, TIME]), stream=True))
    calls = tool_calls(answer, stream=True)
    assert [(name, arguments) for _, name, arguments in calls] == CALLED
    given = {one["id"] for pieces in chunks for one in pieces if "id" in one} & {"a", "b"}
    assert given <= {call_id for call_id, _, _ in calls}


def streamed(*chunks: Any, reason: str = "tool_calls") -> Reply:
    """A stream with these `tool_calls` in its chunks."""
    steps = [chunk({"tool_calls": pieces}) for pieces in chunks]
    return Reply(steps=(*steps, chunk({}, finish_reason=reason), DONE))


WHOLE: dict[str, Any] = {
    "as the vendor": [call("a", "weather", BONN), call("b", "time", "{}")],
    "without ids": [piece(None, None, "weather", BONN), piece(None, None, "time", "{}")],
    "with the id null": [piece(None, "null", "weather", BONN), piece(None, "null", "time", "{}")],
    "with the same id": [call("a", "weather", BONN), call("a", "time", "{}")],
    "objects as arguments": [call("a", "weather", {"city": "Bonn"}), call("b", "time", {})],  # type: ignore[arg-type]
    "beside one without anything": [
        call("a", "weather", BONN),
        call("", "", ""),
        call("b", "time", "{}"),
        {},
    ],
}


@pytest.mark.parametrize("calls", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("content", [None, "", []])
async def test_whole_tool_calls_of_any_host_are_the_same_calls(rig: Rig, calls: Any, content: Any) -> None:
    rig.script(whole({"content": content, "tool_calls": calls}))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER, TIME]), stream=False))
    assert [(name, arguments) for _, name, arguments in tool_calls(answer, stream=False)] == CALLED
    assert text(answer) == ""


def whole(message: dict[str, Any]) -> Reply:
    """A whole response with this message."""
    body = {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "tool_calls"}]}
    return Reply(steps=(json.dumps(body).encode(),))


@pytest.mark.parametrize(
    "broken",
    [
        [piece(0, "a", None, "{}")],
        [piece(0, "a", 7, "{}")],
        [piece(0, "a", "x" * 257, "{}")],
        [piece(0, "a", "time", ["x"])],
        [piece(0, "a", "time", 7)],
        [{"index": 0, "id": "a", "function": "time"}],
        ["time"],
        "time",
        7,
    ],
)
async def test_tool_calls_that_can_not_be_read_fail(rig: Rig, broken: Any, stream: bool) -> None:
    rig.script(streamed(broken) if stream else whole({"content": None, "tool_calls": broken}))
    error, _ = await failure(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=stream))
    assert error.code == "provider_failed"
    check_no_secrets(error)


@pytest.mark.parametrize(("limit", "fails"), [(29, True), (30, False)])
async def test_text_and_arguments_together_are_limited(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, limit: int, fails: bool
) -> None:
    monkeypatch.setattr(streams, "MAX_BODY_BYTES", limit)
    words = [chunk({"content": "x" * 5}) for _ in range(2)]
    pieces = [piece(0, "a", "time", "y" * 10), piece(0, None, None, "y" * 10)]
    steps = [
        *words,
        *(chunk({"tool_calls": [each]}) for each in pieces),
        chunk({}, finish_reason="stop"),
        DONE,
    ]
    rig.script(Reply(steps=tuple(steps)))
    job = OPENAI.job(hi(tools=[TIME]), stream=True)
    if not fails:
        assert tool_calls(await read_all(rig.provider, job), stream=True) == [("a", "time", "y" * 20)]
        return
    error, begun = await failure(rig.provider, job)
    assert (error.code, begun) == ("provider_failed", "x" * 10)


@pytest.mark.parametrize("indexed", ["each its own", "all 0", "none"])
@pytest.mark.parametrize(("reason", "ours"), [("tool_calls", LENGTH), ("content_filter", FILTERED)])
async def test_the_pieces_of_a_call_that_is_left_out_belong_to_no_other(
    rig: Rig, indexed: str, reason: str, ours: int
) -> None:
    steps = []
    for number in range(MAX_TOOL_CALLS + 2):
        index = {"each its own": number, "all 0": 0, "none": None}[indexed]
        steps += [[piece(index, f"c{number}", "weather", '{"city":')], [piece(index, None, None, '"Bonn"}')]]
    rig.script(streamed(*steps, reason=reason))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER]), stream=True))
    expected = [(f"c{number}", "weather", BONN) for number in range(MAX_TOOL_CALLS)]
    assert tool_calls(answer, stream=True) == expected
    assert finish_reason(answer) == ours


async def test_a_call_whose_name_never_comes_fails(rig: Rig) -> None:
    rig.script(streamed([piece(0, "a")]))
    error, _ = await failure(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=True))
    assert error.code == "provider_failed"


async def test_an_id_that_a_caller_could_not_send_back_is_replaced(rig: Rig, stream: bool) -> None:
    calls = [call("x" * 257, "time", "{}"), call("a\nb", "time", "{}")]
    rig.script(streamed(calls) if stream else whole({"content": None, "tool_calls": calls}))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=stream))
    ids = [call_id for call_id, _, _ in tool_calls(answer, stream=stream)]
    assert len(set(ids)) == 2
    assert all(len(call_id) <= 40 and call_id.isprintable() for call_id in ids)


async def test_the_longest_id_that_a_caller_can_send_back_is_kept(rig: Rig, stream: bool) -> None:
    calls = [call("x" * 256, "y" * 256, "{}")]
    rig.script(streamed(calls) if stream else whole({"content": None, "tool_calls": calls}))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[TIME]), stream=stream))
    assert tool_calls(answer, stream=stream) == [("x" * 256, "y" * 256, "{}")]


@pytest.mark.parametrize("arguments", [{"city": "Zürich", "days": [1, 2]}])
async def test_arguments_as_an_object_become_the_shortest_json(
    rig: Rig, arguments: dict[str, Any], stream: bool
) -> None:
    calls = [{"id": "a", "function": {"name": "weather", "arguments": arguments}}]
    rig.script(streamed(calls) if stream else whole({"content": None, "tool_calls": calls}))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER]), stream=stream))
    assert tool_calls(answer, stream=stream) == [("a", "weather", '{"city":"Zürich","days":[1,2]}')]


async def test_a_character_that_is_cut_in_two_is_joined(rig: Rig) -> None:
    first, second = json.dumps("🍊")[1:-1][:6], json.dumps("🍊")[1:-1][6:]
    steps = [
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"id":"a","function":{"name":"weather",'
        b'"arguments":"%b"}}]},"finish_reason":null}]}\n\n' % first.encode(),
        b'data: {"choices":[{"delta":{"tool_calls":[{"index":0,"function":{"arguments":"%b"}}]},'
        b'"finish_reason":"tool_calls"}]}\n\n' % second.encode(),
        DONE,
    ]
    rig.script(Reply(steps=tuple(steps)))
    answer = await read_all(rig.provider, OPENAI.job(hi(tools=[WEATHER]), stream=True))
    assert tool_calls(answer, stream=True) == [("a", "weather", "🍊")]
