"""What a gRPC message leaves unset is missing, as in a REST body; and what is wrong with a JSON text is said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from pomelo.gen.v1.media_pb2 import MediaSource
from pomelo.gen.v1.task_service_pb2 import RunTaskRequest, StreamTaskRequest
from pomelo.gen.v1.task_service_pb2_grpc import TaskServiceStub
from pomelo.gen.v1.text_pb2 import ImagePart, JsonSchema, TextFormat, Tool, ToolChoice
from tests.calls import bearer, failure, reason_of
from tests.conftest import Keys
from tests.driver import METHOD, TaskRequest
from tests.parity.comparison import Driver
from tests.tasks import text_body, text_task

TOOLS = [{"type": "function", "function": {"name": "now"}}]
IMAGE = "messages[0].content[0].image_url.url"


def with_image(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": "gpt-4", "messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("body", "unset", "field"),
    [
        (with_image(None), ImagePart(), IMAGE),
        (with_image(None), MediaSource(content_type="image/png"), IMAGE),
        (
            text_body(tools=TOOLS, tool_choice={"type": "function", "function": {}}),
            ToolChoice(tool=""),
            "tool_choice.function.name",
        ),
        (text_body(tools=[{"type": "function", "function": {}}]), Tool(), "tools[0].function.name"),
        (text_body(response_format={}), TextFormat(), "response_format.type"),
        (
            text_body(response_format={"type": "json_schema", "json_schema": {"name": "a"}}),
            JsonSchema(name="a"),
            "response_format.json_schema.schema",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, (dict, str)) else "",
)
@METHOD
async def test_an_unset_field_is_missing_over_both_protocols(
    clients: Mapping[str, Driver],
    channel: grpc.aio.Channel,
    keys: Keys,
    body: dict[str, Any],
    unset: Any,
    field: str,
    method: str,
) -> None:
    spec = text_task()
    match unset:
        case ImagePart():
            spec.text.messages[0].content[0].image.CopyFrom(unset)
        case MediaSource():
            spec.text.messages[0].content[0].image.source.CopyFrom(unset)
        case ToolChoice():
            spec.text.tools.add(name="now")
            spec.text.tool_choice.CopyFrom(unset)
        case Tool():
            spec.text.tools.append(unset)
        case TextFormat():
            spec.text.format.CopyFrom(unset)
        case _:
            spec.text.format.json_schema.CopyFrom(unset)
    refused = await failure(ask(channel, method, spec, keys.test))
    assert (reason_of(refused), refused.details()) == (
        "missing_parameter",
        f"Missing required field: {field}",
    )
    for name in ("rest", "remote"):
        outcome = await clients[name](TaskRequest(body, keys.test, method == "StreamTask"))
        assert (outcome.code, outcome.message) == ("missing_parameter", refused.details())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', 'Detected duplicate key "a" at line 1 column 14'),
        ('{"a": 1,\n"b": }', "expected value at line 2 column 6"),
        ('{"a":' * 300, "recursion limit exceeded at line 1 column 1006"),
        (f'{{"{"k" * 9000}": 1, "{"k" * 9000}": 2}}', f'Detected duplicate key "{"k" * 176}'),
    ],
    ids=["duplicate", "syntax", "levels", "long"],
)
@METHOD
async def test_the_error_of_a_json_schema_says_what_is_wrong_with_it(
    channel: grpc.aio.Channel, keys: Keys, text: str, reason: str, method: str
) -> None:
    spec = text_task()
    spec.text.tools.add(name="now", parameters_json=text)
    refused = await failure(ask(channel, method, spec, keys.test))
    expected = f"Invalid tools[0].function.parameters: must be a JSON object ({reason})"
    assert (reason_of(refused), refused.details()) == ("invalid_parameter", expected)


def ask(channel: grpc.aio.Channel, method: str, spec: Any, key: str) -> Any:
    request = RunTaskRequest if method == "RunTask" else StreamTaskRequest
    return getattr(TaskServiceStub(channel), method)(request(spec=spec), metadata=bearer(key))
