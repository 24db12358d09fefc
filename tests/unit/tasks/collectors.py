"""Inputs and collectors of small tasks with the models of the catalogue, and the events of providers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pomelo.catalog.catalog import Catalog, Model
from pomelo.errors import PomeloError
from pomelo.gen.v1.task_pb2 import TaskResult
from pomelo.gen.v1.task_service_pb2 import StreamTaskResponse
from pomelo.gen.v1.text_pb2 import FINISH_REASON_STOP
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
    body = {"model": model, "response_format": "unspecified", **BODIES[model], **fields}
    return getattr(to_task(body), definition_of(model).name)


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
    estimate: Estimate | None = None,
    given: Any = None,
    **fields: Any,
) -> Collector:
    """The collector of a task with the input `given`, or with its required fields and others of the REST
    body."""
    given = given or task_input(model, **fields)
    writer: Any = store and (lambda content_type: store.writer("ann/live", content_type))
    estimate = estimate or estimate_of(model, given)
    return definition_of(model).collector(
        CollectorContext(given, MODELS[model], estimate, stream, writer, keep)
    )


def delta(
    content: str = "", *, last: bool = False, usage: Mapping[str, int] | None = None
) -> StreamTaskResponse:
    """An event of a text, with the token counts that the provider reports."""
    event = StreamTaskResponse()
    event.text_delta.content = content
    if last:
        event.text_delta.finish_reason = FINISH_REASON_STOP
    for name, count in (usage or {}).items():
        setattr(event.text_delta.usage, name, count)
    return event


def chunk(data: bytes, content_type: str = "audio/mpeg") -> StreamTaskResponse:
    event = StreamTaskResponse()
    event.audio_chunk.data, event.audio_chunk.content_type = data, content_type
    return event


def image(data: bytes, content_type: str = "image/png") -> StreamTaskResponse:
    event = StreamTaskResponse()
    event.result.image.images.add(data=data, content_type=content_type)
    return event


def finish(collected: Collector) -> TaskResult:
    result = TaskResult()
    try:
        collected.finish(result)
    finally:
        collected.close()
    return result


def refusal(model: str, given: Any) -> str:
    """The code and the field of what an input is refused for; empty if it is accepted."""
    try:
        definition_of(model).check(given, MODELS[model])
    except PomeloError as error:
        return f"{error.code} {error.field}"
    return ""
