"""Tools, their calls and results, and output formats, at every text provider."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.gen.v1.text_pb2 import FinishReason, JsonSchema, TextFormat, TextInput, Tool, ToolChoice
from pomelo.providers.guard import MAX_TOOL_CALLS
from pomelo.testing import Call, FaultUpstream, Stop
from tests.providers.rig import Rig, read_all
from tests.providers.text_rig import (
    ANTHROPIC,
    LENGTH,
    LONG,
    OPENAI,
    STOP,
    TIME,
    WEATHER,
    Vendor,
    check_last,
    failure,
    hi,
    sent,
    text,
    tool_calls,
    tools_input,
)

SCHEMA = (
    '{"type":"object","required":["z","a"],"properties":{"z":{"type":"integer"},"a":{"type":"string"}},'
    '"additionalProperties":false}'
)


async def test_text_and_tool_calls_are_the_answer(vendor: Vendor, rig: Rig, stream: bool) -> None:
    calls = (Call("weather", '{"city":"Zürich 🍊","days":[1,2.5]}'), Call("time"))
    reason = "tool_use" if vendor.server == "anthropic" else "tool_calls"
    usage = vendor.usage(9, 7)
    rig.script(vendor.protocol.Answer("Let me see.", tool_calls=calls, finish_reason=reason, usage=usage))
    answer = await read_all(rig.provider, vendor.job(hi(tools=[WEATHER, TIME]), stream=stream))
    assert text(answer) == "Let me see."
    first, second = tool_calls(answer, stream=stream)
    assert first[1:] == ("weather", '{"city":"Zürich 🍊","days":[1,2.5]}')
    assert second[1] == "time"
    assert second[2] in ("{}", "")
    check_last([answer[-1]], 9, 7)


async def test_an_answer_may_be_a_tool_call_alone(vendor: Vendor, rig: Rig, stream: bool) -> None:
    answer = await read_all(rig.provider, vendor.job(hi(tools=[WEATHER]), stream=stream))
    assert text(answer) == ""
    ((call_id, name, arguments),) = tool_calls(answer, stream=stream)
    assert call_id
    assert (name, list(json.loads(arguments))) == ("weather", ["city"])


@pytest.mark.parametrize(
    ("choice", "called"),
    [
        (ToolChoice(mode=ToolChoice.MODE_AUTO), "weather"),
        (ToolChoice(mode=ToolChoice.MODE_REQUIRED), "weather"),
        (ToolChoice(tool="time"), "time"),
        (ToolChoice(mode=ToolChoice.MODE_NONE), None),
    ],
)
@pytest.mark.parametrize("parallel", [None, False, True])
async def test_the_vendor_gets_the_choice_between_tools(
    vendor: Vendor, upstream: FaultUpstream, rig: Rig, choice: ToolChoice, called: str | None, parallel: Any
) -> None:
    task = hi(tools=[WEATHER, TIME], tool_choice=choice, parallel_tool_calls=parallel)
    answer = await read_all(rig.provider, vendor.job(task, stream=False))
    assert [name for _, name, _ in tool_calls(answer, stream=False)] == ([called] if called else [])


async def test_the_vendor_takes_calls_and_results_of_earlier_answers(
    vendor: Vendor, upstream: FaultUpstream, stream: bool
) -> None:
    # Its checks are those of the vendor: the order of messages, the ids and the form of the arguments.
    await sent(vendor, upstream, tools_input(), stream=stream)
    await sent(vendor, upstream, without_tools(), stream=stream)


def without_tools() -> Any:
    """The conversation in a task that offers no tools any more."""
    task = tools_input()
    task.ClearField("tools")
    return task


async def test_a_schema_for_the_output_is_sent_in_its_own_order(
    vendor: Vendor, rig: Rig, stream: bool
) -> None:
    schema = JsonSchema(name="a_number", description="One", schema_json=SCHEMA, strict=True)
    task = hi(format=TextFormat(json_schema=schema))
    answer = await read_all(rig.provider, vendor.job(task, stream=stream))
    assert list(json.loads(text(answer))) == ["z", "a"]
    assert SCHEMA.encode() in rig.requests[0].raw
    await read_all(rig.provider, vendor.job(hi(tools=[WEATHER], format=task.format), stream=stream))
    assert WEATHER.parameters_json.encode() in rig.requests[1].raw
    assert SCHEMA.encode() in rig.requests[1].raw


@pytest.mark.parametrize("vendor", [OPENAI, ANTHROPIC], ids=lambda vendor: vendor.name, indirect=True)
@pytest.mark.parametrize(
    ("task", "field"),
    [
        (hi(tools=[Tool(name="x", parameters_json='{"type":"object"}', strict=True)]), "tools"),
        (hi(tools=[Tool(name="x", parameters_json='{"type":"string"}')]), "tools"),
        *(
            (
                hi(format=TextFormat(json_schema=JsonSchema(name="x", schema_json=schema, strict=True))),
                "response_format",
            )
            for schema in ("{}", '{"type":"object"}')
        ),
    ],
)
async def test_a_schema_that_the_vendor_refuses_is_the_callers_fault(
    vendor: Vendor, rig: Rig, task: TextInput, field: str, stream: bool
) -> None:
    error, _ = await failure(rig.provider, vendor.job(task, stream=stream))
    assert (error.code, error.field) == ("invalid_parameter", field)


@pytest.mark.parametrize("fault", [Stop.CLOSE, Stop.RESET, Stop.END])
async def test_a_stream_that_breaks_within_a_tool_call_is_not_complete(
    vendor: Vendor, rig: Rig, fault: Stop
) -> None:
    call = Call("weather", json.dumps({"city": "Llanfair" * 20}))
    # The third event is a piece of the arguments, or after the only one.
    rig.script(vendor.protocol.Answer("", tool_calls=(call,), at={1: fault}))
    error, _ = await failure(rig.provider, vendor.job(hi(tools=[WEATHER]), stream=True))
    assert error.code == "provider_failed"


@pytest.mark.parametrize("number", [MAX_TOOL_CALLS, MAX_TOOL_CALLS + 1, 200])
async def test_calls_that_a_caller_could_not_send_back_are_left_out_and_charged(
    vendor: Vendor, rig: Rig, number: int, stream: bool
) -> None:
    calls = tuple(Call("weather", json.dumps({"city": str(index)})) for index in range(number))
    rig.script(vendor.protocol.Answer("All of them.", tool_calls=calls, usage=vendor.usage(9, 2_000)))
    answer = await read_all(rig.provider, vendor.job(hi(tools=[WEATHER]), stream=stream))
    cities = [json.loads(arguments)["city"] for _, _, arguments in tool_calls(answer, stream=stream)]
    assert cities == [str(index) for index in range(min(number, MAX_TOOL_CALLS))]
    assert text(answer) == "All of them."
    check_last([answer[-1]], 9, 2_000, LENGTH if number > MAX_TOOL_CALLS else STOP)


async def test_calls_with_the_same_id_get_other_ids(vendor: Vendor, rig: Rig, stream: bool) -> None:
    calls = tuple(Call("time", "{}", "samesame1") for _ in range(3))
    rig.script(vendor.protocol.Answer("", tool_calls=calls))
    answer = await read_all(rig.provider, vendor.job(hi(tools=[TIME]), stream=stream))
    ids = [call_id for call_id, _, _ in tool_calls(answer, stream=stream)]
    assert ids[0] == "samesame1"
    assert len(set(ids)) == 3


async def test_what_does_not_stop_for_its_tool_calls_keeps_its_reason(
    vendor: Vendor, rig: Rig, stream: bool
) -> None:
    reason = "max_tokens" if vendor.server == "anthropic" else "length"
    rig.script(vendor.protocol.Answer("", tool_calls=(Call("time"),), finish_reason=reason))
    answer = await read_all(rig.provider, vendor.job(hi(tools=[TIME]), stream=stream))
    assert answer[-1].completed.text.finish_reason == FinishReason.FINISH_REASON_LENGTH


async def test_a_long_whole_answer_has_the_tool_calls_of_its_stream(upstream: FaultUpstream) -> None:
    assert LONG.max_output_tokens > 21_000
    for vendor in (ANTHROPIC, LONG):
        received = await sent(vendor, upstream, hi(tools=[WEATHER]))
        assert bool(received.body.get("stream")) == (vendor is LONG)
