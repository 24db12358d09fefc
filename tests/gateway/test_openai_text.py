"""Chat completions and responses, event by event, over a scripted provider."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomelo.errors import PomeloError
from pomelo.gen.v1 import text_pb2
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.text_pb2 import Role
from pomelo.gen.v1.usage_pb2 import Usage
from tests.gateway.gateway_app import GatewayApp
from tests.gateway.requests import HI
from tests.gateway.scripts import play, text_events, word

TOOLS = [{"type": "function", "name": name} for name in ("time", "weather")]
CHAT_TOOLS = [{"type": "function", "function": {"name": name}} for name in ("time", "weather")]
RESPONSE = {"model": "gpt-4", "input": "Hi"}


def piece(index: int, arguments: str, name: str = "") -> Event:
    """Returns a piece of a tool call; the first one has the name."""
    delta = text_pb2.ToolCallDelta(index=index, arguments_json=arguments, name=name)
    delta.id = f"call_{index}" if name else ""
    return Event(tool_call_delta=delta)


def end(finish_reason: text_pb2.FinishReason.ValueType) -> Event:
    output = text_pb2.TextOutput(finish_reason=finish_reason)
    return Event(completed=TaskResult(text=output, usage=Usage(input_tokens=3, output_tokens=9)))


CALLS = [
    word("Let me "),
    word("see"),
    piece(0, "", "time"),
    piece(0, '{"zone":'),
    piece(1, '{"city":"P', "weather"),
    piece(0, '"UTC"}'),
    piece(1, 'aris"}'),
    end(text_pb2.FinishReason.FINISH_REASON_TOOL_CALLS),
]


async def post(gateway: GatewayApp, path: str, body: Any) -> tuple[str, str | None]:
    """Returns the body of an answer, and its adjustments."""
    async with gateway.http.post(gateway.url + path, json=body, headers=gateway.headers) as response:
        assert response.status == 200
        return await response.text(), response.headers.get("X-Pomelo-Adjusted")


async def events_of(gateway: GatewayApp, path: str, body: Any) -> list[tuple[str, Any]]:
    """Returns the names of the events of a stream and their data."""
    text, _ = await post(gateway, path, {**body, "stream": True})
    found = []
    for block in text.split("\n\n")[:-1]:
        *names, data = block.split("\n")
        value = data.removeprefix("data: ")
        found.append(
            (
                names[0].removeprefix("event: ") if names else "",
                value if value == "[DONE]" else json.loads(value),
            )
        )
    return found


async def test_pieces_of_calls_in_any_order_make_the_items_of_a_response(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*CALLS)
    events = await events_of(gateway, "/v1/responses", {**RESPONSE, "tools": TOOLS})
    assert all(name == data["type"] for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert [name.removeprefix("response.") for name, _ in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta"),
        *("output_item.added", "function_call_arguments.delta"),
        *("function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done") * 2,
        "completed",
    ]
    message, time, weather = events[-1][1]["response"]["output"]
    assert message["content"][0]["text"] == "Let me see"
    assert (time["name"], time["call_id"], time["arguments"]) == ("time", "call_0", '{"zone":"UTC"}')
    assert (weather["name"], weather["arguments"]) == ("weather", '{"city":"Paris"}')
    assert len({message["id"], time["id"], weather["id"]}) == 3
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    assert done == [message, time, weather]
    deltas = [data["delta"] for _, data in events if data.get("item_id") == time["id"] and "delta" in data]
    assert "".join(deltas) == time["arguments"]


async def test_pieces_of_calls_are_chunks_of_a_chat_completion(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*CALLS)
    events = await events_of(gateway, "/v1/chat/completions", {**HI, "tools": CHAT_TOOLS})
    assert events.pop() == ("", "[DONE]")
    deltas = [data["choices"][0]["delta"] for _, data in events]
    assert deltas[0] == {"role": "assistant", "content": "Let me "}
    first = {"index": 0, "id": "call_0", "type": "function", "function": {"name": "time", "arguments": ""}}
    assert deltas[2] == {"tool_calls": [first]}
    assert deltas[3] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"zone":'}}]}
    assert deltas[-1] == {}
    assert [data["choices"][0]["finish_reason"] for _, data in events] == [None] * 7 + ["tool_calls"]
    assert not any("usage" in data for _, data in events)


async def test_every_chunk_has_a_usage_if_one_was_asked_for(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*CALLS)
    options = {"stream_options": {"include_usage": True}}
    events = await events_of(gateway, "/v1/chat/completions", {**HI, "tools": CHAT_TOOLS, **options})
    assert events.pop() == ("", "[DONE]")
    *chunks, last = [data for _, data in events]
    assert [chunk["usage"] for chunk in chunks] == [None] * 8
    assert (last["choices"], last["usage"]["total_tokens"]) == ([], 12)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_the_parts_of_a_usage_are_in_both_of_openais_shapes(gateway: GatewayApp, stream: bool) -> None:
    last = end(text_pb2.FinishReason.FINISH_REASON_STOP)
    last.completed.usage.CopyFrom(
        Usage(
            input_tokens=90,
            output_tokens=40,
            cached_input_tokens=30,
            cache_write_input_tokens=20,
            reasoning_tokens=10,
        )
    )
    gateway.provider.script = play(word("Hi"), last)
    read, written = {"cached_tokens": 30, "cache_write_tokens": 20}, {"reasoning_tokens": 10}
    if stream:
        chat = {**HI, "stream_options": {"include_usage": True}}
        in_chat = (await events_of(gateway, "/v1/chat/completions", chat))[-2][1]["usage"]
        in_response = (await events_of(gateway, "/v1/responses", RESPONSE))[-1][1]["response"]["usage"]
    else:
        in_chat = json.loads((await post(gateway, "/v1/chat/completions", HI))[0])["usage"]
        in_response = json.loads((await post(gateway, "/v1/responses", RESPONSE))[0])["usage"]
    assert in_chat == {
        **{"prompt_tokens": 90, "completion_tokens": 40, "total_tokens": 130},
        **{"prompt_tokens_details": read, "completion_tokens_details": written},
    }
    assert in_response == {
        **{"input_tokens": 90, "output_tokens": 40, "total_tokens": 130},
        **{"input_tokens_details": read, "output_tokens_details": written},
    }


async def test_an_empty_output_is_complete(gateway: GatewayApp) -> None:
    gateway.provider.script = play(end(text_pb2.FinishReason.FINISH_REASON_CONTENT_FILTER))
    *chunks, _ = await events_of(gateway, "/v1/chat/completions", HI)
    assert [data["choices"][0]["delta"] for _, data in chunks] == [{"role": "assistant", "content": ""}]
    events = await events_of(gateway, "/v1/responses", RESPONSE)
    assert [name for name, _ in events] == ["response.created", "response.in_progress", "response.incomplete"]
    last = events[-1][1]["response"]
    assert (last["output"], last["incomplete_details"]) == ([], {"reason": "content_filter"})


async def test_a_response_that_breaks_ends_with_an_error_in_both_of_openais_shapes(
    gateway: GatewayApp,
) -> None:
    gateway.provider.script = play(word("one"), PomeloError("provider_failed"))
    *events, (name, last) = await events_of(gateway, "/v1/responses", RESPONSE)
    assert events[-1][0] == "response.output_text.delta"
    assert (name, last["type"], last["sequence_number"]) == ("error", "error", len(events))
    assert (last["code"], last["param"]) == ("provider_failed", None)
    assert last["error"] == {
        "message": last["message"],
        "type": "provider_error",
        "param": None,
        "code": "provider_failed",
    }


async def test_adjusted_fields_have_the_names_that_the_caller_used(gateway: GatewayApp) -> None:
    chat = {**HI, "max_completion_tokens": 10**6, "stop": "x", "store": True}
    for stream in (False, True):
        _, adjusted = await post(gateway, "/v1/chat/completions", {**chat, "stream": stream})
        assert adjusted == "stop; max_completion_tokens=128000; store"
        response = {**RESPONSE, "max_output_tokens": 10**6, "stream": stream}
        _, adjusted = await post(gateway, "/v1/responses", response)
        assert adjusted == "max_output_tokens=128000"


async def test_a_text_after_calls_of_tools_belongs_to_their_message(gateway: GatewayApp) -> None:
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Let me "},
        {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "see."}]},
        {"type": "function_call", "call_id": "d", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
        {"type": "function_call_output", "call_id": "d", "output": "noon"},
    ]
    await post(gateway, "/v1/responses", {**RESPONSE, "input": items})
    messages = gateway.provider.jobs[-1].input.messages
    assert [message.role for message in messages] == [
        Role.ROLE_USER,
        Role.ROLE_ASSISTANT,
        *[Role.ROLE_TOOL] * 2,
    ]
    *texts, first, second = messages[1].content
    assert [part.text for part in texts] == ["Let me ", "see."]
    assert (first.tool_call.id, second.tool_call.id) == ("c", "d")


async def test_of_many_items_without_effect_only_the_first_is_in_the_header(gateway: GatewayApp) -> None:
    items = [{"role": "user", "content": "Hi"}, *[{"type": "reasoning"}] * 5000]
    _, adjusted = await post(gateway, "/v1/responses", {**RESPONSE, "input": items})
    assert adjusted == "input[1]"


async def test_a_large_request_is_answered_as_a_small_one(gateway: GatewayApp) -> None:
    text = "Hello there " * 10_000
    for path, body in (
        ("/v1/chat/completions", {**HI, "messages": [{"role": "user", "content": text}]}),
        ("/v1/responses", {**RESPONSE, "input": [{"role": "user", "content": text}]}),
    ):
        assert "wörld" in (await post(gateway, path, body))[0]
        assert gateway.provider.jobs[-1].input.messages[0].content[0].text == text


async def test_line_breaks_that_some_clients_know_are_escaped(gateway: GatewayApp) -> None:
    gateway.provider.script = play(*text_events("one\u2028two\u0085three"))
    for path, body in (("/v1/chat/completions", HI), ("/v1/responses", RESPONSE)):
        text, _ = await post(gateway, path, {**body, "stream": True})
        assert "one\\u2028two\\u0085three" in text
        assert "\u2028" not in text


async def test_a_call_after_a_question_belongs_to_an_answer_of_its_own(gateway: GatewayApp) -> None:
    items = [
        {"role": "user", "content": "What time is it?"},
        {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "noon"},
    ]
    await post(gateway, "/v1/responses", {"model": "gpt-4", "input": items, "tools": TOOLS})
    messages = gateway.provider.jobs[-1].input.messages
    assert [Role.Name(message.role) for message in messages] == ["ROLE_USER", "ROLE_ASSISTANT", "ROLE_TOOL"]
    assert messages[1].content[0].tool_call.name == "time"


async def test_options_of_a_stream_without_the_usage_add_no_chunk(gateway: GatewayApp) -> None:
    for options in ({"include_obfuscation": False}, {"include_usage": False}):
        events = await events_of(gateway, "/v1/chat/completions", {**HI, "stream_options": options})
        assert not any("usage" in data for _, data in events[:-1])


async def test_a_call_that_was_cut_off_is_incomplete_in_every_event(gateway: GatewayApp) -> None:
    gateway.provider.script = play(
        piece(0, '{"zone":', "time"), end(text_pb2.FinishReason.FINISH_REASON_LENGTH)
    )
    events = await events_of(gateway, "/v1/responses", {**RESPONSE, "tools": TOOLS})
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    name, last = events[-1]
    assert (name, last["response"]["output"]) == ("response.incomplete", done)
    assert [(item["status"], item["arguments"]) for item in done] == [("incomplete", '{"zone":')]
