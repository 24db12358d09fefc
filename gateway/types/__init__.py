"""The task types of the REST API, and what follows from all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gateway.types import image, speech, text, transcription
from gateway.types.base import Link, StreamObjects, TaskFormat
from pomelo.errors import invalid
from pomelo.gen.v1.task_pb2 import TaskResult, TaskType

TASK_FORMATS: Mapping[int, TaskFormat] = {
    TaskType.TASK_TYPE_TEXT: text.FORMAT,
    TaskType.TASK_TYPE_IMAGE: image.FORMAT,
    TaskType.TASK_TYPE_TEXT_TO_SPEECH: speech.TEXT_TO_SPEECH,
    TaskType.TASK_TYPE_SPEECH_TO_SPEECH: speech.SPEECH_TO_SPEECH,
    TaskType.TASK_TYPE_SPEECH_TO_TEXT: transcription.FORMAT,
}

COMMON_FIELDS = frozenset({"model", "stream"})
"""The fields of every task type."""

FIELD_NAMES = COMMON_FIELDS.union({"audio"}, *(each.fields for each in TASK_FORMATS.values()))
"""The fields of all task types."""

FIELD_PARTS = frozenset(part for each in TASK_FORMATS.values() for part in each.parts)
"""The members of fields that are objects, such as voice_settings.speed."""

JSON_FIELDS = frozenset(
    field.name for each in TASK_FORMATS.values() for field in each.fields.values() if field.is_json
)
"""The fields that a form has as JSON text."""

EVENT_RENDERERS: Mapping[str, Callable[[StreamObjects, Any], Iterable[bytes]]] = {
    event: render for each in TASK_FORMATS.values() for event, render in each.render_events.items()
}
"""Renders the events of streams, by type of event."""

_FORMATS_BY_OUTPUT = {each.output: each for each in TASK_FORMATS.values()}


def type_name(task_type: int) -> str:
    """Returns a task type's public name; `unknown` for one that is newer than this gateway."""
    task_format = TASK_FORMATS.get(task_type)
    return task_format.name if task_format is not None else "unknown"


def check_task_type(task_type: int, expected: int) -> None:
    """Refuses a model whose task type is not the `expected` one of a path.

    Raises:
        PomeloError: invalid_parameter.
    """
    if task_type != expected:
        raise invalid("model", f"one of the {type_name(expected)} models; this path runs no other tasks")


def render_result(result: TaskResult, link: Link) -> bytes:
    """Returns a result as the JSON object of its type."""
    return _FORMATS_BY_OUTPUT[result.WhichOneof("output") or ""].render_result(result, link)


def render_last(objects: StreamObjects, result: TaskResult, link: Link) -> bytes:
    """Returns the JSON object that ends a stream with `result`."""
    task_format = _FORMATS_BY_OUTPUT[result.WhichOneof("output") or ""]
    if task_format.render_last is not None:
        return task_format.render_last(objects, result)
    return task_format.render_result(result, link)
