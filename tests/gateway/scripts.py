"""What a provider or a task service does in a test, step by step."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pomelo.call import Call
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import TaskEvent as Event
from pomelo.gen.v1.task_pb2 import TaskResult, TaskSpec, TaskStarted
from pomelo.gen.v1.task_service_pb2 import TaskOptions
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Job

Script = Callable[[Job[Any]], AsyncIterator[Event]]
Step = Event | Exception | Callable[[], object]

STARTED = Event(started=TaskStarted(id="task_7", model="gpt-4"))
"""The first event of a task service; providers do not send it."""


async def _play(steps: tuple[Step, ...]) -> AsyncIterator[Event]:
    for step in steps:
        if isinstance(step, Event):
            yield step
        elif isinstance(step, Exception):
            raise step
        elif inspect.isawaitable(result := step()):
            await result


def play(*steps: Step) -> Script:
    """Returns a script for a provider: it yields the events, raises the errors, and calls and awaits the
    functions among its steps, in order."""
    return lambda job: _play(steps)


class ScriptedTasks:
    """A task service whose streams play `steps`, as a script does."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps
        self.tasks: list[TaskSpec] = []
        self.options: list[TaskOptions] = []

    @asynccontextmanager
    async def stream_task(
        self, spec: TaskSpec, options: TaskOptions, call: Call
    ) -> AsyncIterator[AsyncIterator[Event]]:
        self.tasks.append(spec)
        self.options.append(options)
        yield _play(self.steps)


def text_events(*texts: str) -> list[Event]:
    """Returns the events of a text response; the last one ends it."""
    output = text_pb2.TextOutput(finish_reason=text_pb2.FinishReason.FINISH_REASON_STOP)
    usage = Usage(input_tokens=3, output_tokens=len(texts))
    return [*map(word, texts), Event(completed=TaskResult(text=output, usage=usage))]


def word(text: str = "one") -> Event:
    return Event(text_delta=text_pb2.TextDelta(text=text))


def audio(data: bytes) -> Event:
    return Event(audio_chunk=speech_pb2.AudioChunk(data=data, content_type="audio/mpeg"))


def progress(share: float) -> Event:
    return Event(image_progress=image_pb2.ImageProgress(progress=share))
