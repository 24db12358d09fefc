"""OpenAI's Python SDK makes responses: in the sandbox and with played vendors, whole and streamed."""

from __future__ import annotations

from typing import Any, get_args

import openai
import pytest
from openai.types.responses import ResponseIncludable

from pomelo.testing import Answer, Stop
from tests.app import Account, RunningApp, app_fixture
from tests.sdk.sdk import CALLERS, PNG, sdk

app = app_fixture()


@CALLERS
async def test_a_response_is_the_same_whole_and_streamed(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    asked: dict[str, Any] = {
        "model": "gpt-4",
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hello there"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
            {"role": "user", "content": "And again"},
        ],
        "max_output_tokens": 60,
        "metadata": {"team": "a"},
    }
    async with sdk(app, account, protocol, mode) as client:
        whole = await client.responses.create(**asked)
        async with client.responses.stream(**asked) as stream:
            events = [event async for event in stream]
            last = await stream.get_final_response()
        if mode == "live":
            sent = app.upstream.requests[0].body["messages"]
            assert [each["role"] for each in sent] == ["system", "user", "assistant", "user"]
    assert whole.output_text == last.output_text != ""
    assert (whole.status, whole.usage, whole.metadata) == (last.status, last.usage, last.metadata)
    assert (whole.status, whole.instructions) == ("completed", "Be brief.")
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(
        range(len(events))
    )
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert set(types[4:-4]) == {"response.output_text.delta"}


@CALLERS
async def test_an_output_that_reaches_its_limit_is_incomplete(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        app.upstream.default = Answer("one two three", finish_reason="length")
        try:
            whole = await client.responses.create(model="gpt-4", input="[[words:9]]", max_output_tokens=3)
            stream = await client.responses.create(
                model="gpt-4", input="[[words:9]]", max_output_tokens=3, stream=True
            )
            events = [event async for event in stream]
        finally:
            app.upstream.default = None
    assert (whole.status, whole.output[0].status) == ("incomplete", "incomplete")
    assert whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


async def test_an_image_reaches_the_model(app: RunningApp, account: Account) -> None:
    url = f"data:image/png;base64,{PNG}"
    content: Any = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": url, "detail": "auto"},
    ]
    async with sdk(app, account) as client:
        answer = await client.responses.create(model="gpt-4", input=[{"role": "user", "content": content}])
        assert answer.output_text
        (received,) = app.upstream.requests
    assert received.body["messages"][0]["content"][1]["image_url"]["url"] == url


async def test_what_has_no_effect_is_taken_and_reported(app: RunningApp, account: Account) -> None:
    reasoning: Any = [{"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}]
    async with sdk(app, account) as client:
        raw = client.responses.with_raw_response
        response = await raw.create(
            model="gpt-4",
            input=[*reasoning, {"role": "user", "content": "Hi"}],
            store=True,
            include=[part for part in get_args(ResponseIncludable) if part != "message.output_text.logprobs"],
            text={"verbosity": "low"},
            truncation="disabled",
            background=False,
            service_tier="default",
        )
    assert response.headers["X-Pomelo-Adjusted"] == "store; include; text.verbosity; input[0]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_output_tokens"),
        ({"messages": []}, "input"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"effort": "immense"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "no spaces", "parameters": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_image", "image_url": "x", "detail": "x"}]}
                ]
            },
            "input[0].content[0].detail",
        ),
        ({"input": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "input[0].content[0].refusal"),
        (
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice.name",
        ),
        ({"stream_options": []}, "stream_options"),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user"}]}, "input[1].content"),
        ({"instructions": "x", "input": [{"role": "robot", "content": "a"}]}, "input[0].role"),
        ({"input": None}, "input"),
    ],
)
async def test_what_can_not_be_met_is_refused_by_its_name(
    app: RunningApp, account: Account, fields: dict[str, Any], param: str
) -> None:
    async with sdk(app, account) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.responses.create(**{"model": "gpt-4", "input": "Hi"}, extra_body=fields)
    assert caught.value.param == param


@CALLERS
async def test_a_stream_that_breaks_raises(
    app: RunningApp, account: Account, protocol: str, mode: str
) -> None:
    async with sdk(app, account, protocol, mode) as client:
        app.upstream.script(Answer("one two three four", at={2: Stop.CLOSE}))
        stream = await client.responses.create(model="gpt-4", input="[[words:40]] [[cut]]", stream=True)
        with pytest.raises(openai.APIError) as caught:
            [event async for event in stream]
    assert caught.value.code == "provider_failed"
