"""An observer that keeps what is reported to it."""

from __future__ import annotations

from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import AttemptReport, CallReport, Observer, TaskReport


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
