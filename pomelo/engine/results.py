"""What the engine writes into the results of all task types."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import Any

from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.gen.v1.usage_pb2 import Usage
from pomelo.providers.base import Job
from pomelo.stores.usage import UsageRecord

_RECORD_NAMES = {field.name for field in fields(UsageRecord)}
_COUNTS = tuple(field.name for field in Usage.DESCRIPTOR.fields if field.name in _RECORD_NAMES)
"""The counts that a usage record and a result have by the same name."""

_read_counts = attrgetter(*_COUNTS)


def new_result(job: Job[Any], create_time: int) -> TaskResult:
    """The result of a job, without its output; `create_time` is in Unix seconds."""
    result = TaskResult(id=job.task_id, model=job.model.name, adjustments=job.adjustments)
    result.create_time.seconds = create_time
    return result


def started_event(result: TaskResult) -> TaskEvent:
    """The first event of the stream that ends with `result`."""
    event = TaskEvent(sequence_number=1)
    started = event.started
    started.id = result.id
    started.create_time.CopyFrom(result.create_time)
    started.model = result.model
    started.adjustments.extend(result.adjustments)
    return event


def write_usage(result: TaskResult, record: UsageRecord) -> None:
    """Writes what a task used and cost into its result."""
    usage = result.usage
    usage.SetInParent()
    for name, count in zip(_COUNTS, _read_counts(record), strict=True):
        if count:
            setattr(usage, name, count)
    if record.audio_ms:
        usage.audio_seconds = record.audio_ms / 1000
    result.cost_micros = record.cost
