"""What `pomelo run` writes of text and the tool calls after it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.cli.output import Output
from pomelo.cli.terminal import Progress
from pomelo.gen.v1.media_pb2 import Media
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult, TaskType
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.text_pb2 import ContentPart, Message, TextDelta, TextOutput, ToolCall, ToolCallDelta

CALL = ToolCall(id="call_1", name="now", arguments_json="{}")


@pytest.mark.parametrize("text", ["", "Let me see."])
@pytest.mark.parametrize("stream", [False, True])
async def test_each_tool_call_is_a_line_of_its_own(tmp_path: Path, text: str, stream: bool) -> None:
    out = tmp_path / "out"

    async def events() -> AsyncIterator[TaskEvent]:
        if text:
            yield TaskEvent(text_delta=TextDelta(text=text))
        for index in range(2):
            first = ToolCallDelta(index=index, id=CALL.id, name=CALL.name, arguments_json="{")
            for piece in (first, ToolCallDelta(index=index, arguments_json="}")):
                yield TaskEvent(tool_call_delta=piece)
        yield TaskEvent(completed=TaskResult(text=TextOutput()))

    async def download(media: Media) -> AsyncIterator[bytes]:
        raise AssertionError
        yield b""

    with (
        Output(Model(task_type=TaskType.TASK_TYPE_TEXT), TaskOptions(), str(out)) as output,
        Progress() as progress,
    ):
        if stream:
            result = await output.write_stream(events(), progress)
        else:
            parts = [ContentPart(text=text)] if text else []
            parts += [ContentPart(tool_call=CALL)] * 2
            result = TaskResult(text=TextOutput(message=Message(content=parts)))
        await output.write_result(result, download)
    lines = out.read_text().splitlines()
    assert lines[:-2] == ([text] if text else [])
    assert list(map(json.loads, lines[-2:])) == [{"id": "call_1", "name": "now", "arguments": "{}"}] * 2
