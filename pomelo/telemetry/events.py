"""What Pomelo reports about its work: the end of each task and call, and each failed attempt at a vendor.

No report has content of a caller or a vendor. The `call` in it has the caller's key, which no observer may
show or keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pomelo.call import Call
from pomelo.stores.usage import UsageRecord
from pomelo.values import value_type

Outcome = Literal["completed", "failed", "refused", "cancelled"]
"""How a task ended. `refused`: before anything was reserved; `cancelled`: the caller left."""

NextStep = Literal["retry", "next route", "end"]
"""What follows a failed call to a vendor: the same route again, the next route, or the end of the task."""


@value_type(frozen=True, slots=True)
class TaskReport:
    """One task of a caller with a valid key, at its end. Text and numbers that are not known are "" and 0.

    `model` is the model's name, or the requested one, which may be any text, if `task_id` is empty: the task
    was refused before its model was known. `task_type` is the name of the input, such as text. `provider`,
    `provider_model` and `route` (from 1) are those that were called last; `attempts` counts all calls to
    providers. `code` is the error's; `http_status` belongs to it on REST, 0 if the caller has left.
    `upstream_status` and `vendor_request_id` are of the vendor's last response, `vendor_code` and `reason` of
    the error: the vendor's own code, and in Pomelo's words why the call failed.

    `elapsed_ms` begins when the caller's key is known, `first_byte_ms` when the task is reserved;
    `upstream_ms` is the time of all calls to vendors. `record` is its usage record, None if it left none.
    `replayed`: the answer to an Idempotency-Key was sent again.
    """

    call: Call
    account: str
    key_id: str
    live: bool
    model: str
    stream: bool
    outcome: Outcome
    code: str
    http_status: int
    elapsed_ms: float
    replayed: bool
    task_id: str
    task_type: str
    provider: str
    provider_model: str
    route: int
    attempts: int
    upstream_status: int
    vendor_code: str
    vendor_request_id: str
    reason: str
    upstream_ms: float
    first_byte_ms: int
    output_bytes: int
    record: UsageRecord | None


@value_type(frozen=True, slots=True)
class AttemptReport:
    """One call to a vendor that failed. Fields are as in TaskReport; `attempt` counts from 1 over all routes,
    `wait` is the time before a retry in seconds.
    """

    request_id: str
    task_id: str
    account: str
    model: str
    provider: str
    provider_model: str
    route: int
    attempt: int
    code: str
    upstream_status: int
    vendor_code: str
    vendor_request_id: str
    reason: str
    elapsed_ms: float
    next_step: NextStep
    wait: float


@value_type(frozen=True, slots=True)
class CallReport:
    """The end of a call that no TaskReport is about: of another method, or of a task that was refused before
    the engine got it, such as for its key or body.

    `method` is a service and RPC, such as TaskService/RunTask, or a method and the template of a path, such
    as GET /api/v1/models/{name}; "" if it is unknown. `code` and `http_status` are as in TaskReport.
    """

    call: Call
    method: str
    code: str
    http_status: int


class Observer:
    """Gets the reports, in the event loop, and ignores them. The methods of a subclass must be quick, and
    must not raise."""

    def task_ended(self, report: TaskReport) -> None:
        """A task has ended, before its caller gets the end of the response."""

    def attempt_failed(self, report: AttemptReport) -> None:
        """A call to a vendor has failed."""

    def call_ended(self, report: CallReport) -> None:
        """A call without a TaskReport has ended."""

    def charged(self, record: UsageRecord) -> None:
        """A usage record was written by this process, also of a failed task that cost nothing. Before or
        after `task_ended`."""


def report_call(observers: Sequence[Observer], call: Call, method: str, code: str, http_status: int) -> None:
    """Reports the end of a call, unless the engine has reported its task."""
    if not call.reported:
        report = CallReport(call, method, code, http_status)
        for observer in observers:
            observer.call_ended(report)
