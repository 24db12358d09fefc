"""Follows a task through the engine, and reports its end to the observers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from pomelo.call import Call, Principal
from pomelo.engine.routing import is_late
from pomelo.engine.upstream_calls import UpstreamCalls
from pomelo.errors import TABLE, PomeloError
from pomelo.providers.errors import UpstreamError
from pomelo.telemetry.events import Observer, Outcome, TaskReport

if TYPE_CHECKING:
    from pomelo.engine.job import AcceptedJob
    from pomelo.engine.reservation import Reservation


_MAX_MODEL = 200
"""Characters of a requested model that are reported: any text may be requested."""


class ObservedTask:
    """One task, from its valid key to its end. A context manager around all that the engine does for it; the
    engine sets `accepted`, `reservation` and `replayed` as the task proceeds.

    `model` is the requested name. `clock` is monotonic, in seconds.
    """

    __slots__ = (
        "_call", "_clock", "_model", "_observers", "_principal", "_started", "_stream", "accepted", "calls",
        "failure", "replayed", "reservation",
    )  # fmt: skip

    def __init__(
        self,
        observers: Sequence[Observer],
        clock: Callable[[], float],
        call: Call,
        principal: Principal,
        model: str,
        *,
        stream: bool,
    ) -> None:
        self._observers = observers
        self._call = call
        self._principal = principal
        self._model = model[:_MAX_MODEL]
        self._stream = stream
        self._clock = clock
        self._started = clock()
        self.calls = UpstreamCalls(principal.account, observers)
        self.accepted: AcceptedJob | None = None
        self.reservation: Reservation | None = None
        self.replayed = False
        self.failure: Exception | None = None
        """The error that ended a stream's events."""

    def __enter__(self) -> Self:
        return self

    def left_with(self, error: BaseException) -> bool:
        """Whether the front end raised `error` while it sent a stream, because the caller has left."""
        if isinstance(error, PomeloError | asyncio.CancelledError):
            return False
        return self._stream and error is not self.failure

    def is_late(self, error: BaseException | None) -> bool:
        """Whether the caller left at the task's deadline: `error` is what ended the task."""
        return isinstance(error, asyncio.CancelledError) and is_late(self._clock(), self._call.deadline)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Reports the end of the task; `error` ended it, if it is not None."""
        call, principal = self._call, self._principal
        if call.reported:
            return
        call.reported = True
        accepted, reservation, calls = self.accepted, self.reservation, self.calls
        now = self._clock()
        record = None if reservation is None else reservation.record
        outcome: Outcome
        if error is None and record is not None and record.complete:
            outcome, code = "completed", ""
        else:
            outcome, code = self._outcome(error)
        reason = vendor_code = ""
        if isinstance(error, UpstreamError):
            reason, vendor_code = error.reason, calls.token(error.vendor_code)
        route = calls.route
        report = TaskReport(
            call,
            principal.account,
            principal.key_id,
            principal.live,
            self._model if accepted is None else accepted.job.model.name,
            self._stream,
            outcome,
            code,
            TABLE[code].http if code else 0 if outcome == "cancelled" else 200,
            (now - self._started) * 1000,
            self.replayed,
            "" if accepted is None else accepted.job.task_id,
            "" if accepted is None else accepted.definition.name,
            "" if route is None else route.provider,
            "" if route is None else route.model,
            calls.route_number,
            calls.attempts,
            calls.status,
            vendor_code,
            calls.request_id,
            reason,
            calls.seconds * 1000,
            0 if reservation is None else reservation.first_byte_ms,
            0 if reservation is None else reservation.output_bytes,
            record,
        )
        for observer in self._observers:
            observer.task_ended(report)
        # The error refers to the frames that it passed, and they to this: a reference cycle, which keeps the
        # whole task in memory until garbage is collected.
        self.failure = None

    def _outcome(self, error: BaseException | None) -> tuple[Outcome, str]:
        """How a task ended that was not charged as a whole, and the code of its error."""
        if error is None:  # a caller may stop reading a stream without an error
            return ("completed" if self.replayed else "cancelled"), ""
        if isinstance(error, PomeloError):
            code = error.code
        elif self.is_late(error):
            code = "deadline_exceeded"
        elif isinstance(error, asyncio.CancelledError | GeneratorExit) or self.left_with(error):
            return "cancelled", ""
        else:
            code = "internal_error"
        return ("refused" if self.reservation is None else "failed"), code
