"""The output of a task: complete, incomplete, and on stdout without a delay."""

from __future__ import annotations

import io
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pomelo.cli.output import Output
from pomelo.cli.sink import Sink
from pomelo.cli.terminal import FailureError, Progress
from pomelo.gen.v1.model_service_pb2 import Model
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskType
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.text_pb2 import TextDelta, ToolCallDelta


def flushed(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Returns what will have been flushed to stdout."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw)))
    return raw


@pytest.mark.parametrize(
    ("text", "shown"), [("one", b"one\n"), ("one\n", b"one\n"), ("", b"")], ids=["open", "ended", "empty"]
)
def test_text_is_shown_as_it_comes_and_its_last_line_is_ended(
    monkeypatch: pytest.MonkeyPatch, text: str, shown: bytes
) -> None:
    out = flushed(monkeypatch)
    with Sink(None, end_line=True) as sink:
        sink.write_text(text)
        assert out.getvalue() == text.encode()
    assert out.getvalue() == shown


def test_a_file_that_is_not_complete_does_not_get_its_name(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    sink = Sink(path)
    sink.write(b"half")
    sink.__exit__(KeyError, KeyError(), None)
    assert list(tmp_path.iterdir()) == []
    with Sink(path) as sink:
        sink.write(b"whole")
    assert path.read_bytes() == b"whole"


async def test_the_calls_of_tools_follow_the_text_on_lines_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = flushed(monkeypatch)

    async def events() -> AsyncIterator[TaskEvent]:
        yield TaskEvent(text_delta=TextDelta(text="Wait"))
        for index, name, piece in ((0, "a", "{"), (1, "b", ""), (0, "", "}"), (1, "", "[]")):
            yield TaskEvent(tool_call_delta=ToolCallDelta(index=index, name=name, arguments_json=piece))
        if complete:
            end = TaskEvent()
            end.completed.id = "task_1"
            yield end

    model = Model(id="gpt-4", task_type=TaskType.TASK_TYPE_TEXT)
    for complete in (True, False):
        with Output(model, TaskOptions(), None) as output:
            if complete:
                assert (await output.write_stream(events(), Progress())).id == "task_1"
            else:
                with pytest.raises(FailureError, match="before the task was complete"):
                    await output.write_stream(events(), Progress())
    first, *calls, last = out.getvalue().decode().splitlines()
    assert (first, last) == ("Wait", "Wait")
    assert calls == [
        '{"id": "", "name": "a", "arguments": "{}"}',
        '{"id": "", "name": "b", "arguments": "[]"}',
    ]
