"""Reports with a value of its own in every field, and an observer that keeps what is reported to it."""

from __future__ import annotations

from typing import Any

from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import AttemptReport, CallReport, Observer, TaskReport
from tests.calls import call_of
from tests.unit.accounts.audited_store import draft


class Reports(Observer):
    """The reports in the order in which they came."""

    def __init__(self) -> None:
        self.tasks: list[TaskReport] = []
        self.attempts: list[AttemptReport] = []
        self.calls: list[CallReport] = []
        self.records: list[UsageRecord] = []

    def task_ended(self, report: TaskReport) -> None:
        self.tasks.append(report)

    def attempt_failed(self, report: AttemptReport) -> None:
        self.attempts.append(report)

    def call_ended(self, report: CallReport) -> None:
        self.calls.append(report)

    def charged(self, record: UsageRecord) -> None:
        self.records.append(record)


def record(**changes: Any) -> UsageRecord:
    counts = {"input_tokens": 11, "output_tokens": 12, "cached_input_tokens": 3}
    more = {"cache_write_input_tokens": 4, "reasoning_tokens": 5, "cost": 1_250_000, "uncollected": 7}
    return draft("task_1", **{**counts, **more, **changes})


def task(**changes: Any) -> TaskReport:
    """A streamed text task with a value of its own in every field."""
    call = call_of(None)
    call.request_id = "req_1"
    values: dict[str, Any] = {
        "call": call,
        "account": "acme",
        "key_id": "key1",
        "live": False,
        "model": "gpt-4",
        "stream": True,
        "outcome": "completed",
        "code": "",
        "http_status": 200,
        "elapsed_ms": 2500.04,
        "replayed": True,
        "task_id": "task_1",
        "task_type": "text",
        "provider": "mistral",
        "provider_model": "large",
        "route": 2,
        "attempts": 3,
        "upstream_status": 201,
        "vendor_code": "odd",
        "vendor_request_id": "vendor_1",
        "reason": "it\x1b is",
        "upstream_ms": 1500.06,
        "first_byte_ms": 300,
        "output_bytes": 77,
        "record": record(),
    }
    return TaskReport(**(values | changes))


def attempt(**changes: Any) -> AttemptReport:
    values: dict[str, Any] = {
        "request_id": "req_1",
        "task_id": "task_1",
        "account": "acme",
        "model": "gpt-4",
        "provider": "openai",
        "provider_model": "gpt-4.1",
        "route": 1,
        "attempt": 2,
        "code": "provider_failed",
        "upstream_status": 503,
        "vendor_code": "busy",
        "vendor_request_id": "vendor_2",
        "reason": "it\x1b was",
        "elapsed_ms": 250.06,
        "next_step": "retry",
        "wait": 0.25,
    }
    return AttemptReport(**(values | changes))
