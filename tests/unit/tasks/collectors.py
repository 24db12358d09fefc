"""Inputs and collectors of small tasks with the models of the catalogue, and the events of providers."""

from __future__ import annotations

from typing import Any

from pomelo.catalog.catalog import Catalog, Model
from pomelo.catalog.reported_cost import Report
from pomelo.errors import PomeloError
from pomelo.gen.v1.media_pb2 import MediaDelivery
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP, ROLE_ASSISTANT
from pomelo.media.store import MediaStore
from pomelo.tasks import TASK_TYPES
from pomelo.tasks.base import AudioInfo, Collector, CollectorContext, Estimate, TaskDefinition
from tests.tasks import to_task

MODELS = Catalog.load().models
PIXEL = "data:image/png;base64,iVBORw0KGgo="
BODIES: dict[str, dict[str, Any]] = {
    "gpt-4": {"messages": [{"role": "user", "content": "one two three"}]},
    "flux-1-pro": {"prompt": "A kite"},
    "eleven-labs-tts": {"text": "Hi", "voice": "adam"},
    "eleven-labs-sts": {"audio": "AAAA", "voice": "adam"},
    "eleven-labs-stt": {"audio": "AAAA"},
}
"""Model -> the required fields of its REST body."""


def definition_of(model: str) -> TaskDefinition:
    return TASK_TYPES[MODELS[model].task_type]


def task_input(model: str, **fields: Any) -> Any:
    """The input of a task with its required fields, and others of the REST body."""
    return getattr(to_task({"model": model, **BODIES[model], **fields}), definition_of(model).name)


def estimate_of(model: str, given: Any, audio: AudioInfo | None = None) -> Estimate:
    """The estimate of a task on the model's first route."""
    found: Model = MODELS[model]
    return definition_of(model).estimate(given, found, found.routes[0], audio or AudioInfo())


def collector(
    model: str,
    store: MediaStore | None = None,
    *,
    stream: bool = False,
    keep: bool = False,
    delivery: MediaDelivery.ValueType = MediaDelivery.MEDIA_DELIVERY_UNSPECIFIED,
    estimate: Estimate | None = None,
    report: Report | None = None,
    given: Any = None,
    served: Model | None = None,
    **fields: Any,
) -> Collector:
    """The collector of a task with the input `given`, or with its required fields and others of the REST
    body; `served` replaces the model of the catalogue."""
    given = given or task_input(model, **fields)
    writer: Any = store and (lambda content_type: store.writer("ann/live", content_type))
    estimate = estimate or estimate_of(model, given)
    return definition_of(model).collector(
        CollectorContext(
            given, served or MODELS[model], estimate, stream, delivery, report or Report(), writer, keep
        )
    )


def delta(text: str = "") -> TaskEvent:
    event = TaskEvent()
    event.text_delta.text = text
    return event


def text_end(text: str = "", /, **counts: int) -> TaskEvent:
    """The last event of a text, with the text that no delta had, and the token counts that the provider
    reports."""
    event = TaskEvent()
    event.completed.text.finish_reason = FINISH_REASON_STOP
    if text:
        event.completed.text.message.role = ROLE_ASSISTANT
        event.completed.text.message.content.add(text=text)
    for name, count in counts.items():
        setattr(event.completed.usage, name, count)
    return event


def text_of(result: TaskResult) -> str:
    """The text of a result's message; empty without one."""
    return "".join(part.text for part in result.text.message.content)


def chunk(data: bytes, content_type: str = "audio/mpeg") -> TaskEvent:
    event = TaskEvent()
    event.audio_chunk.data, event.audio_chunk.content_type = data, content_type
    return event


def image(data: bytes, content_type: str = "image/png") -> TaskEvent:
    event = TaskEvent()
    event.completed.image.images.add(data=data, content_type=content_type)
    return event


def finish(collected: Collector) -> TaskResult:
    result = TaskResult()
    try:
        collected.finish(result)
    finally:
        collected.close()
    return result


def no_files(media_id: str, field: str) -> bytes:
    """Reads the file of a task that has none."""
    raise AssertionError(f"{field} is read from {media_id}")


def refusal(model: str, given: Any) -> str:
    """The code and the field of what an input is refused for; empty if it is accepted."""
    try:
        definition_of(model).check(given, MODELS[model], no_files)
    except PomeloError as error:
        return f"{error.code} {error.field}"
    return ""
