"""Messages and tools of a text task in the shapes that OpenAI's SDKs send, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.parsing.json import parse_json
from gateway.parsing.task import build_task
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskType
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    ImageDetail,
    Message,
    Role,
    TextFormat,
    TextInput,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from tests.gateway.requests import code_of_field

TEXT = TaskType.TASK_TYPE_TEXT
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}
CALL_PART = ContentPart(tool_call=ToolCall(id="a", name="f", arguments_json='{"b": 1}'))
RESULT = {"role": "tool", "tool_call_id": "a"}
NO_OBJECTS: list[Any] = [[], "{}", 1]


def build(form: bool = False, **values: Any) -> TextInput:
    return build_task("m", TEXT, values, form=form).spec.text


def message(**item: Any) -> Message:
    """The message that an item of a body is."""
    (built,) = build(messages=[item]).messages
    return built


def refusal(**values: Any) -> PomeloError:
    with pytest.raises(PomeloError) as caught:
        build(**values)
    return caught.value


def test_a_developer_is_the_system() -> None:
    for content in ("Be brief.", [{"type": "text", "text": "Be brief."}]):
        assert message(role="developer", content=content) == message(role="system", content=content)


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_message_may_have_a_name(role: str) -> None:
    built = message(role=role, content="Hi", name="ann")
    assert (built.name, built.content[0].text) == ("ann", "Hi")


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_an_answer_of_nothing_but_tool_calls_can_be_sent_back(content: dict[str, Any]) -> None:
    built = message(role="assistant", tool_calls=[CALL], **content)
    assert built == Message(role=Role.ROLE_ASSISTANT, content=[CALL_PART])


def test_all_members_that_an_sdk_sends_back_are_accepted() -> None:
    empty: dict[str, Any] = {
        "refusal": None,
        "audio": None,
        "function_call": None,
        "annotations": [],
        "name": None,
    }
    built = message(role="assistant", content="Hm", tool_calls=[CALL], **empty)
    assert list(built.content) == [ContentPart(text="Hm"), CALL_PART]
    assert message(role="assistant", content="Hm", tool_calls=None, **empty).content[0].text == "Hm"
    assert message(role="assistant", content="Hm", tool_calls=[]).content[0].text == "Hm"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("18 degrees", "18 degrees"),
        ("", ""),
        ([{"type": "text", "text": "18 "}, {"type": "text", "text": "degrees"}], "18 degrees"),
        ([], ""),
    ],
)
def test_a_result_is_a_text_or_a_list_of_texts(content: Any, text: str) -> None:
    result = ToolResult(tool_call_id="a", content=text)
    assert message(**RESULT, content=content, name="f") == Message(
        role=Role.ROLE_TOOL, content=[ContentPart(tool_result=result)], name="f"
    )


@pytest.mark.parametrize(
    ("detail", "value"),
    [
        (None, ImageDetail.IMAGE_DETAIL_UNSPECIFIED),
        ("auto", ImageDetail.IMAGE_DETAIL_AUTO),
        ("low", ImageDetail.IMAGE_DETAIL_LOW),
        ("high", ImageDetail.IMAGE_DETAIL_HIGH),
    ],
)
def test_an_image_may_have_a_detail(detail: str | None, value: ImageDetail.ValueType) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:", "detail": detail}}
    assert message(role="user", content=[part]).content[0].image.detail == value


def test_schemas_keep_the_order_of_their_members_and_their_numbers() -> None:
    schema = '{"z":1,"a":[0.5,12345678901234567890123],"m":{"é":null,"b":1e2}}'
    body = f'{{"tools":[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}]}}'
    (tool,) = build(**parse_json(body.encode())).tools
    assert tool.parameters_json == schema.replace("1e2", "100.0")


def test_a_tool_has_the_members_that_it_is_given() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": False}
    bare = {"name": "g", "description": None, "parameters": None, "strict": None}
    full, empty = build(tools=[{"type": "function", "function": each} for each in (function, bare)]).tools
    assert (full.name, full.description, full.parameters_json) == ("f", "d", '{"type":"object"}')
    assert full.HasField("strict")
    assert [field.name for field, _ in empty.ListFields()] == ["name"]


def test_the_choice_of_a_tool_is_a_mode_or_a_name() -> None:
    for name in ("none", "auto", "required"):
        mode = ToolChoice.Mode.Value(f"MODE_{name.upper()}")
        assert build(tool_choice=name).tool_choice == ToolChoice(mode=mode)
        assert build(form=True, tool_choice=name).tool_choice == ToolChoice(mode=mode)
    chosen = {"type": "function", "function": {"name": "f"}}
    assert build(tool_choice=chosen).tool_choice == ToolChoice(tool="f")
    assert build(form=True, tool_choice=json.dumps(chosen)).tool_choice == ToolChoice(tool="f")


def test_the_form_of_the_output_is_text_json_or_a_schema() -> None:
    assert not build(response_format={"type": "text"}).HasField("format")
    json_object = build(response_format={"type": "json_object", "json_schema": None}).format
    assert json_object == TextFormat(json_object=TextFormat.JsonObject())
    definition = {"name": "n", "description": "d", "schema": {"b": 1, "a": 2}, "strict": True}
    schema = build(response_format={"type": "json_schema", "json_schema": definition}).format.json_schema
    assert (schema.name, schema.description, schema.schema_json) == ("n", "d", '{"b":1,"a":2}')
    assert schema.strict


def test_fields_without_effect_are_accepted_if_they_ask_for_nothing() -> None:
    values: dict[str, Any] = {"n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}}
    nulls: dict[str, Any] = dict.fromkeys(values)
    assert build(**values) == build(**nulls) == build(n=1.0) == TextInput()
    assert build(form=True, n="1", logprobs="false", logit_bias="{}") == TextInput()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[({"n": n}, "Invalid n: must be 1: send a request for each answer") for n in (2, True, 1.5, "1")],
        ({"logprobs": True}, "Invalid logprobs: must be false: there are no log probabilities"),
        ({"logprobs": 0}, "Invalid logprobs: must be false: there are no log probabilities"),
        ({"top_logprobs": 1}, "Invalid top_logprobs: must be 0: there are no log probabilities"),
        ({"logit_bias": {"1": 5}}, "Invalid logit_bias: must be left out: it is not supported"),
    ],
)
def test_fields_without_effect_are_refused_with_what_to_do(values: dict[str, Any], message: str) -> None:
    error = refusal(**values)
    assert (error.code, error.field, error.message) == ("invalid_parameter", *values, message)


def tool(**function: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": function}]}


def form(**schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, **schema}}}


def call(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{**CALL, **more}]}]}


def function(**more: Any) -> dict[str, Any]:
    return call(function={"name": "f", "arguments": "{}", **more})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": ["f"]}, "tools[0]"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "function": {}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": "f"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}, "x": 1}]}, "tools[0].x"),
        (tool(name=1), "tools[0].function.name"),
        (tool(name="f", description=1), "tools[0].function.description"),
        (tool(name="f", strict="yes"), "tools[0].function.strict"),
        (tool(name="f", x=1), "tools[0].function.x"),
        *[(tool(name="f", parameters=each), "tools[0].function.parameters") for each in NO_OBJECTS],
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"tool_choice": {"type": "allowed_tools", "function": {}}}, "tool_choice.type"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": []}}, "response_format.type"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format.json_schema"),
        (form(schema=[]), "response_format.json_schema.schema"),
        (form(strict=1), "response_format.json_schema.strict"),
        (form(x=1), "response_format.json_schema.x"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"messages": [{**RESULT, "tool_call_id": None, "content": ""}]}, "messages[0].tool_call_id"),
        ({"messages": [{**RESULT, "tool_call_id": 1, "content": ""}]}, "messages[0].tool_call_id"),
        ({"messages": [RESULT]}, "messages[0].content"),
        ({"messages": [{**RESULT, "content": 1}]}, "messages[0].content"),
        (
            {"messages": [{**RESULT, "content": [{"type": "image_url", "image_url": ""}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{**RESULT, "content": "", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "refusal": 1}]}, "messages[0].refusal"),
        ({"messages": [{"role": "user", "content": "x", "refusal": "no"}]}, "messages[0].refusal"),
        ({"messages": [{"role": "user", "content": [{"type": "refusal"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages[0].content[0].refusal"),
        ({"messages": [{"role": "assistant", "content": "x", "annotations": [1]}]}, "messages[0].annotations"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": {}}]}, "messages[0].tool_calls"),
        (call(id=None), "messages[0].tool_calls[0].id"),
        (call(id=1), "messages[0].tool_calls[0].id"),
        (call(index="0"), "messages[0].tool_calls[0].index"),
        (call(index=True), "messages[0].tool_calls[0].index"),
        (call(position=0), "messages[0].tool_calls[0].position"),
        (call(type="custom"), "messages[0].tool_calls[0].type"),
        (function(arguments=None), "messages[0].tool_calls[0].function.arguments"),
        (function(arguments={}), "messages[0].tool_calls[0].function.arguments"),
        (function(name=None), "messages[0].tool_calls[0].function.name"),
        (function(x=1), "messages[0].tool_calls[0].function.x"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "", "detail": 1}}]}]},
            "messages[0].content[0].image_url.detail",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_and_named(values: dict[str, Any], field: str) -> None:
    error = refusal(**values)
    assert (error.code, error.field) == (code_of_field(values, field), field)
    assert field in error.message


def test_null_is_no_text_of_the_metadata() -> None:
    error = refusal(metadata={"a": None})
    assert (error.code, error.field) == ("invalid_parameter", "metadata.a")


@pytest.mark.parametrize("content", [None, ""])
def test_a_refusal_is_the_only_text_of_its_message(content: str | None) -> None:
    message = {"role": "assistant", "content": content, "refusal": "No."}
    spec = build_task("gpt-4", TEXT, {"messages": [message]}).spec
    assert list(spec.text.messages[0].content) == [ContentPart(text="No.")]
