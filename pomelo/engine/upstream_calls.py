"""The calls to providers that a task makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pomelo.catalog.catalog import Route
from pomelo.errors import PomeloError
from pomelo.providers.base import Job, VendorCall
from pomelo.providers.errors import UpstreamError
from pomelo.telemetry.events import AttemptReport, NextStep, Observer


class UpstreamCalls(VendorCall):
    """The calls to providers that a task has made, counted while it runs, and reported to `observers` if they
    fail. The `VendorCall` is the last of them. `account` owns the task."""

    __slots__ = ("_began", "_observers", "account", "attempts", "route", "route_number", "seconds", "unsent")

    def __init__(self, account: str = "", observers: Sequence[Observer] = ()) -> None:
        self.job = None
        self.status = 0
        self.sent = None
        self.waits = False
        self.fields = ()
        self.account = account
        self._observers = observers
        self.attempts = 0
        self.unsent = 0
        """Those that failed, or were cancelled, before a connection was free and anything was sent."""
        self.route: Route | None = None
        """The route that was called last, or skipped last if none was called."""
        self.route_number = 0
        """Its number in the order of the candidates, from 1."""
        self.seconds = 0.0
        """The time of all calls that have ended."""
        self._began = 0.0

    def begin(self, route: Route, number: int, now: float = 0.0) -> None:
        """Counts a call that begins now."""
        self.route = route
        self.route_number = number
        self.attempts += 1
        self.status = 0
        self.sent = None
        self.waits = False
        self._began = now

    def skip(self, route: Route, number: int) -> None:
        """Records a route that is not called, because its circuit is open."""
        self.route = route
        self.route_number = number

    def end(self, now: float) -> None:
        """Counts the time of the current call, which ends now."""
        self.seconds += now - self._began

    def report(self, job: Job[Any], error: PomeloError, now: float, next_step: NextStep, wait: float) -> None:
        """Reports the failure of the current call; `next_step` and `wait` are as in AttemptReport."""
        upstream = error if isinstance(error, UpstreamError) else None
        report = AttemptReport(
            request_id=job.request_id,
            task_id=job.task_id,
            account=self.account,
            model=job.model.name,
            provider=job.route.provider,
            provider_model=job.route.model,
            route=self.route_number,
            attempt=self.attempts,
            code=error.code,
            upstream_status=self.status,
            vendor_code="" if upstream is None else self.token(upstream.vendor_code),
            vendor_request_id=self.request_id,
            reason="" if upstream is None else upstream.reason,
            elapsed_ms=(now - self._began) * 1000,
            next_step=next_step,
            wait=wait,
        )
        for observer in self._observers:
            observer.attempt_failed(report)
