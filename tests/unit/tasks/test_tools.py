"""Tools, their calls and results, and the form of the output: what is refused, and what counts as input."""

from __future__ import annotations

import time
from typing import Any, cast

import pytest

from pomelo.catalog.pricing import Usage
from pomelo.fields import MAX_SCHEMA_CHARACTERS, MAX_SCHEMAS_CHARACTERS
from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.text_pb2 import (
    ContentPart,
    ImagePart,
    JsonSchema,
    Message,
    Role,
    TextFormat,
    TextInput,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from tests.unit.tasks.collectors import PIXEL, estimate_of, refusal, task_input

USER, ASSISTANT, TOOL = Role.ROLE_USER, Role.ROLE_ASSISTANT, Role.ROLE_TOOL


def text(content: str = "Hi") -> ContentPart:
    return ContentPart(text=content)


def call(call_id: str = "a", name: str = "weather", arguments: str = "{}") -> ContentPart:
    return ContentPart(tool_call=ToolCall(id=call_id, name=name, arguments_json=arguments))


def result(call_id: str = "a", content: str = "") -> ContentPart:
    return ContentPart(tool_result=ToolResult(tool_call_id=call_id, content=content))


def message(role: Role.ValueType, *parts: ContentPart) -> Message:
    return Message(role=role, content=parts)


def given(*tools: Tool, **fields: Any) -> TextInput:
    made: TextInput = task_input("gpt-4")
    made.MergeFrom(TextInput(tools=tools, **fields))
    return made


def schema(text_of_schema: str, name: str = "x") -> TextFormat:
    return TextFormat(json_schema=JsonSchema(name=name, schema_json=text_of_schema))


WEATHER = Tool(name="weather", parameters_json='{"type":"object"}')
NAME = "tools[0].function.name"
PARAMETERS = "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("task", "found"),
    [
        (given(WEATHER), ""),
        (given(Tool(name="x" * 64)), ""),
        (given(*[Tool(name=f"f{index}") for index in range(128)]), ""),
        (given(*[Tool(name=f"f{index}") for index in range(129)]), "invalid_parameter tools"),
        (given(Tool()), f"missing_parameter {NAME}"),
        (given(Tool(name="x" * 65)), f"invalid_parameter {NAME}"),
        (given(Tool(name="a b")), f"invalid_parameter {NAME}"),
        (given(Tool(name="a\n")), f"invalid_parameter {NAME}"),
        (given(WEATHER, WEATHER), "invalid_parameter tools[1].function.name"),
        (given(tool_choice=ToolChoice(mode=ToolChoice.MODE_REQUIRED)), "invalid_parameter tool_choice"),
        (given(tool_choice=ToolChoice(tool="weather")), "invalid_parameter tool_choice"),
        (given(tool_choice=ToolChoice(mode=9)), "invalid_parameter tool_choice"),  # type: ignore[arg-type]
        (given(tool_choice=ToolChoice()), "missing_parameter tool_choice"),
        (given(WEATHER, parallel_tool_calls=False), ""),
        *[
            (given(WEATHER, tool_choice=ToolChoice(mode=mode)), found)
            for mode, found in cast(
                "list[tuple[ToolChoice.Mode.ValueType, str]]",
                [
                    (ToolChoice.MODE_NONE, ""),
                    (ToolChoice.MODE_AUTO, ""),
                    (ToolChoice.MODE_REQUIRED, ""),
                    (ToolChoice.MODE_UNSPECIFIED, "invalid_parameter tool_choice"),
                    (9, "invalid_parameter tool_choice"),
                ],
            )
        ],
        (given(WEATHER, tool_choice=ToolChoice()), "missing_parameter tool_choice"),
        (given(WEATHER, tool_choice=ToolChoice(tool="weather")), ""),
        (given(WEATHER, tool_choice=ToolChoice(tool="time")), "invalid_parameter tool_choice.function.name"),
        (given(format=TextFormat()), "missing_parameter response_format.type"),
        (given(format=TextFormat(json_object=TextFormat.JsonObject())), ""),
        (given(format=schema("{}")), ""),
        (given(format=schema("")), "missing_parameter response_format.json_schema.schema"),
        (given(format=schema("{}", "")), "missing_parameter response_format.json_schema.name"),
        (given(format=schema("{}", "a.b")), "invalid_parameter response_format.json_schema.name"),
        (given(format=schema("[]")), "invalid_parameter response_format.json_schema.schema"),
        (given(reasoning_effort=7), ""),
        (given(reasoning_effort=8), "invalid_parameter reasoning_effort"),
    ],
)
def test_tools_and_formats_are_checked_by_name(task: TextInput, found: str) -> None:
    assert refusal("gpt-4", task) == found


@pytest.mark.parametrize("mode", [None, ToolChoice.MODE_NONE, ToolChoice.MODE_AUTO])
@pytest.mark.parametrize("parallel", [True, False, None])
def test_without_tools_a_choice_that_needs_none_is_removed(
    mode: ToolChoice.Mode.ValueType | None, parallel: bool | None
) -> None:
    choice = None if mode is None else ToolChoice(mode=mode)
    task = given(tool_choice=choice, parallel_tool_calls=parallel)
    assert refusal("gpt-4", task) == ""
    assert not task.HasField("tool_choice")
    assert not task.HasField("parallel_tool_calls")


@pytest.mark.parametrize(
    "parameters",
    [
        "[]",
        "null",
        '"{}"',
        "{",
        "{}x",
        '{"a":NaN}',
        '{"a":1e999}',
        '{"a":-1e999}',
        '{"a":1,"a":2}',
        "\ufeff{}",
    ],
)
def test_a_schema_that_is_no_json_object_is_refused(parameters: str) -> None:
    assert refusal("gpt-4", given(Tool(name="x", parameters_json=parameters))) == (
        f"invalid_parameter {PARAMETERS}"
    )


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ('{"a":' * 15_000 + "1" + "}" * 15_000, PARAMETERS),
        ('{"a":' + "[" * 90_000, PARAMETERS),
        ('{"a":' + "9" * 99_000 + "}", PARAMETERS),
        ('{"a":' + "9" * 5_000_000 + "}", "tools"),
        ('{"a":"' + "\\" * 5_000_000, "tools"),
    ],
)
def test_a_schema_that_is_too_deep_or_too_long_is_refused_at_little_cost(parameters: str, field: str) -> None:
    task = given(Tool(name="x", parameters_json=parameters))
    before = time.thread_time()
    assert refusal("gpt-4", task) == f"invalid_parameter {field}"
    assert time.thread_time() - before < 0.5


def test_the_schemas_of_all_tools_have_a_maximum_length_together() -> None:
    schema_of_the_longest = '{"a":"' + "x" * (MAX_SCHEMA_CHARACTERS - 8) + '"}'
    count = MAX_SCHEMAS_CHARACTERS // MAX_SCHEMA_CHARACTERS
    tools = [Tool(name=f"f{index}", parameters_json=schema_of_the_longest) for index in range(count + 1)]
    assert refusal("gpt-4", given(*tools[:count])) == ""
    assert refusal("gpt-4", given(*tools)) == "invalid_parameter tools"
    longer = Tool(name="x", parameters_json=schema_of_the_longest + " ")
    assert refusal("gpt-4", given(longer)) == f"invalid_parameter {PARAMETERS}"


def test_a_schema_keeps_the_order_of_its_members_and_loses_its_white_space() -> None:
    loose = '{ "z": [1, 2.50, {"b": null, "a": "\\u00e9Infinity"}],\n "a": 123456789012345678901234567890 }'
    compact = '{"z":[1,2.5,{"b":null,"a":"éInfinity"}],"a":123456789012345678901234567890}'
    task = given(Tool(name="x", parameters_json=loose), format=schema(loose))
    assert refusal("gpt-4", task) == ""
    assert task.tools[0].parameters_json == task.format.json_schema.schema_json == compact


# --- conversations


def conversation(*messages: Message) -> TextInput:
    return TextInput(messages=messages)


HELLO = message(USER, text())


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([message(ASSISTANT, call()), message(TOOL, result())], ""),
        ([message(ASSISTANT, text(), text(), call()), message(TOOL, result())], ""),
        ([message(ASSISTANT, call(), call("b")), message(TOOL, result("b")), message(TOOL, result())], ""),
        ([message(ASSISTANT, call(), call("b")), message(TOOL, result("b"), result())], ""),
        ([message(ASSISTANT, call()), message(TOOL, result())] * 2, ""),
        ([message(ASSISTANT, call("a" * 256, "x" * 256)), message(TOOL, result("a" * 256))], ""),
        ([message(ASSISTANT, call(arguments="no JSON")), message(TOOL, result())], ""),
        ([message(ASSISTANT, call())], "invalid_parameter messages[1].tool_calls[0]"),
        ([message(ASSISTANT, call()), HELLO], "invalid_parameter messages[1].tool_calls[0]"),
        (
            [message(ASSISTANT, call(), call("b")), message(TOOL, result()), HELLO],
            "invalid_parameter messages[1].tool_calls[1]",
        ),
        ([message(TOOL, result())], "invalid_parameter messages[1].tool_call_id"),
        (
            [message(ASSISTANT, call()), message(TOOL, result("b"))],
            "invalid_parameter messages[2].tool_call_id",
        ),
        (
            [message(ASSISTANT, call()), message(TOOL, result()), message(TOOL, result())],
            "invalid_parameter messages[3].tool_call_id",
        ),
        (
            [message(ASSISTANT, call()), message(TOOL, result("")), HELLO],
            "missing_parameter messages[2].tool_call_id",
        ),
        ([message(ASSISTANT, call(""))], "missing_parameter messages[1].tool_calls[0].id"),
        ([message(ASSISTANT, call(name=""))], "missing_parameter messages[1].tool_calls[0].function.name"),
        ([message(ASSISTANT, text(), call("a" * 257))], "invalid_parameter messages[1].tool_calls[0].id"),
        (
            [message(ASSISTANT, call(name="x" * 257))],
            "invalid_parameter messages[1].tool_calls[0].function.name",
        ),
        ([message(ASSISTANT, call(), call())], "invalid_parameter messages[1].tool_calls[1].id"),
        ([message(ASSISTANT, call(), text())], "invalid_parameter messages[1].content[1]"),
        ([message(USER, call())], "invalid_parameter messages[1].content[0]"),
        ([message(Role.ROLE_SYSTEM, call())], "invalid_parameter messages[1].content[0]"),
        ([message(USER, result())], "invalid_parameter messages[1].content[0]"),
        ([message(ASSISTANT, result())], "invalid_parameter messages[1].content[0]"),
        ([message(ASSISTANT, call()), message(TOOL, text())], "invalid_parameter messages[2].content"),
        (
            [message(ASSISTANT, call()), message(TOOL, result(), text())],
            "invalid_parameter messages[2].content",
        ),
        ([message(ASSISTANT, call()), message(TOOL)], "missing_parameter messages[2].content"),
        ([message(ASSISTANT)], "missing_parameter messages[1].content"),
        ([Message(role=USER, content=[text()], name="a" * 64)], ""),
        ([Message(role=USER, content=[text()], name="a" * 65)], "invalid_parameter messages[1].name"),
        ([Message(role=USER, content=[text()], name="a b")], "invalid_parameter messages[1].name"),
        ([message(TOOL, text())], "invalid_parameter messages[1].content"),
    ],
)
def test_tool_calls_and_their_results_belong_together(messages: list[Message], found: str) -> None:
    assert refusal("gpt-4", conversation(HELLO, *messages)) == found


@pytest.mark.parametrize(("detail", "found"), [(0, ""), (1, ""), (3, ""), (4, "invalid_parameter")])
def test_the_detail_of_an_image_is_one_of_its_values(detail: Any, found: str) -> None:
    image = ContentPart(image=ImagePart(source=MediaSource(url=PIXEL), detail=detail))
    refused = refusal("gpt-4", conversation(message(USER, image)))
    assert refused == (f"{found} messages[0].content[0].image_url.detail" if found else "")


# --- what counts


TOOLS_TOKENS = 1_000 + 32


def test_the_bound_counts_the_bytes_of_tools_calls_results_names_and_formats() -> None:
    asked = Message(role=USER, content=[text("four")], name="ann")
    messages = [asked, message(ASSISTANT, call("id", "wea", '{"ö":1}')), message(TOOL, result("id", "größe"))]
    tool = Tool(name="wea", description="Wetter für", parameters_json='{"a":1}')
    task = TextInput(messages=messages, tools=[tool], format=schema('{"b":2}', "out"))
    size = len("four" + "ann") + len("wea") + len('{"ö":1}'.encode()) + len("größe".encode())
    size += len("wea") + len("Wetter für".encode()) + len('{"a":1}') + len("out") + len('{"b":2}')
    found = estimate_of("gpt-4", task)
    assert found.maximum == Usage(size + 16 * 4 + TOOLS_TOKENS + 64 * 2, 128_000)
    assert found.tokens == size // 4
    assert found.count_input() == max(10, size // 8)


def test_the_bound_counts_the_bytes_of_a_format_without_tools() -> None:
    asked = message(USER, text("four"))
    found = estimate_of("gpt-4", TextInput(messages=[asked], format=schema('{"b":2}', "out")))
    size = len("four" + "out" + '{"b":2}')
    assert found.maximum.input_tokens == size + 16 * 2 + 1_000


def test_many_small_calls_and_results_reserve_what_a_vendor_adds_to_each() -> None:
    ids = [f"call_{n}" for n in range(99)]
    messages = [
        HELLO,
        Message(role=ASSISTANT, content=[call(each, "f", "") for each in ids]),
        Message(role=TOOL, content=[result(each, "") for each in ids]),
    ]
    found = estimate_of("gpt-4", TextInput(messages=messages))
    assert found.minimum.input_tokens == found.maximum.input_tokens
    assert found.maximum.input_tokens > 99 * (len("f") + 2 * 64)


def test_the_words_of_a_result_count_as_input() -> None:
    messages = [HELLO, message(ASSISTANT, call()), message(TOOL, result(content="word " * 1_000))]
    assert estimate_of("gpt-4", TextInput(messages=messages)).count_input() == 1_000 + 3


def test_a_task_without_tools_is_estimated_without_them() -> None:
    for content in ("", "Hi"):
        found = estimate_of("gpt-4", TextInput(messages=[message(USER, text(content))]))
        assert found.maximum.input_tokens == len(content) + 16 * 2


@pytest.mark.parametrize("part", ["tool", "format", "call", "result"])
def test_a_prompt_that_its_tools_make_too_long_is_refused(part: str) -> None:
    words = "word " * 200_001
    task = conversation(HELLO, message(ASSISTANT, call()), message(TOOL, result()))
    match part:
        case "tool":
            task.tools.add(name="x", description=words)
        case "format":
            task.format.json_schema.name = "x"
            task.format.json_schema.schema_json = "{}"
            task.format.json_schema.description = words
        case "call":
            task.messages[1].content[0].tool_call.arguments_json = words
        case "result":
            task.messages[2].content[0].tool_result.content = words
    assert refusal("claude-3-haiku", task) == "context_length_exceeded messages"


@pytest.mark.parametrize(
    "between", [message(USER, text()), message(ASSISTANT, text())], ids=["user", "assistant"]
)
def test_a_call_is_answered_before_any_other_message(between: Message) -> None:
    before = [message(USER, text()), message(ASSISTANT, call())]
    answer = message(TOOL, result())
    assert refusal("gpt-4", TextInput(messages=[*before, answer, between])) == ""
    late = TextInput(messages=[*before, between, answer])
    assert refusal("gpt-4", late) == "invalid_parameter messages[1].tool_calls[0]"
