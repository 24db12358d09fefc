"""What the engine writes into the results of all task types."""

from __future__ import annotations

from typing import Any

from pomelo.accounts.usage import write_counts
from pomelo.gen.v1.task_pb2 import TaskEvent, TaskResult
from pomelo.providers.base import Job
from pomelo.stores.usage import UsageRecord


def new_result(job: Job[Any], create_time: int) -> TaskResult:
    """The result of a job, without its output; `create_time` is in Unix seconds."""
    model = job.model
    result = TaskResult(id=job.task_id, model=model.alias or model.name, adjustments=job.adjustments)
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
    result.usage.SetInParent()
    write_counts(result.usage, record)
    result.cost_micros = record.cost
