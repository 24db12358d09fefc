"""What a provider or a task service does in a test, step by step."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from pomelo.call import Call
from pomelo.gen.v1 import image_pb2, speech_pb2, text_pb2
from pomelo.gen.v1.task_pb2 import Task
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse as Event
from pomelo.gen.v1.task_service_pb2 import TaskStarted
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
        self.tasks: list[Task] = []

    @asynccontextmanager
    async def stream_task(self, task: Task, call: Call) -> AsyncIterator[AsyncIterator[Event]]:
        self.tasks.append(task)
        yield _play(self.steps)


def text_events(*texts: str) -> list[Event]:
    """Returns the events of a text response; the last one ends it."""
    usage = text_pb2.TokenUsage(prompt_tokens=3, completion_tokens=len(texts), total_tokens=3 + len(texts))
    last = text_pb2.TextDelta(finish_reason=text_pb2.FinishReason.FINISH_REASON_STOP, usage=usage)
    return [*map(word, texts), Event(text_delta=last)]


def word(text: str = "one") -> Event:
    return Event(text_delta=text_pb2.TextDelta(content=text))


def audio(data: bytes) -> Event:
    return Event(audio_chunk=speech_pb2.AudioChunk(data=data, content_type="audio/mpeg"))


def progress(share: float) -> Event:
    return Event(image_progress=image_pb2.ImageProgress(progress=share))
