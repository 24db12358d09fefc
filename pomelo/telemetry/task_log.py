"""Logs one line for each task, failed attempt and refused call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from pomelo import money
from pomelo.call import MODE_NAMES
from pomelo.runtime.repetitions import Repetitions
from pomelo.telemetry.events import AttemptReport, CallReport, Observer, TaskReport
from pomelo.telemetry.lines import Render, printable, timestamp

MAX_MODEL = 100
"""Characters of a model's name that are logged: a caller may send any."""

MAX_KINDS = 10_000
"""Accounts and codes whose lines are counted separately; the accounts beyond it are counted together."""

log = logging.getLogger("pomelo.calls")
"""For calls without a valid key, whose lines are limited."""


class TaskLog(Observer):
    """An `Observer` that writes lines: tasks and refused calls at level INFO, failed attempts at WARNING,
    other calls at DEBUG. A field that is not known is left out. Of calls that called no provider, an
    account has only a few lines for each code in a minute; then one more says how many there were.

    `write` gets each line, and whether it is urgent; `constant` are fields that every line has; `level` is
    that of `logging`. `lines_dropped` returns how many lines of the log were not written.
    """

    def __init__(
        self,
        write: Callable[..., None],
        render: Render,
        level: int,
        constant: Mapping[str, Any],
        lines_dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self.lines_dropped = lines_dropped
        self._write = write
        self._render = render
        self._level = level
        self._constant = constant
        self._repetitions = Repetitions(self._log_repetitions, MAX_KINDS, rest=lambda kind: ("", kind[1]))

    def task_ended(self, report: TaskReport) -> None:
        if self._level > logging.INFO:
            return
        if not report.attempts and report.outcome != "failed":  # failed: the limits of the plan count it
            code = report.code or ("ok" if report.outcome == "completed" else report.outcome)
            if not self._repetitions.admits((report.account, code)):
                return
        call, record = report.call, report.record
        fields = {
            "request_id": call.request_id,
            "task_id": report.task_id,
            "account": report.account,
            "key_id": report.key_id,
            "mode": MODE_NAMES[report.live],
            "protocol": call.protocol,
            "model": report.model if report.task_id else _name(report.model),
            "stream": report.stream,
            "outcome": report.outcome,
            "status": report.http_status,
            "code": report.code,
            "provider": report.provider,
            "provider_model": report.provider_model,
            "route": report.route,
            "attempts": report.attempts,
            "upstream_status": report.upstream_status,
            "vendor_code": report.vendor_code,
            "vendor_request_id": report.vendor_request_id,
            "reason": report.reason and printable(report.reason),
            "ms": round(report.elapsed_ms, 1),
            "first_byte_ms": report.first_byte_ms,
            "upstream_ms": round(report.upstream_ms, 1),
            "bytes": report.output_bytes,
            "cost": money.format_credits(record.cost) if record is not None and record.cost else "",
            "replayed": report.replayed,
        }
        self._log("info", "task", fields)

    def attempt_failed(self, report: AttemptReport) -> None:
        if self._level > logging.WARNING:
            return
        fields = {
            "request_id": report.request_id,
            "task_id": report.task_id,
            "account": report.account,
            "model": report.model,
            "provider": report.provider,
            "provider_model": report.provider_model,
            "route": report.route,
            "attempt": report.attempt,
            "code": report.code,
            "upstream_status": report.upstream_status,
            "vendor_code": report.vendor_code,
            "vendor_request_id": report.vendor_request_id,
            "reason": printable(report.reason),
            "ms": round(report.elapsed_ms, 1),
            "next": report.next_step,
            "wait_ms": round(report.wait * 1000),
        }
        self._log("warning", "attempt failed", fields, urgent=True)

    def call_ended(self, report: CallReport) -> None:
        if self._level > (logging.INFO if report.code else logging.DEBUG):
            return
        call = report.call
        principal = call.principal
        account = "" if principal is None else principal.account
        if report.code and account and not self._repetitions.admits((account, report.code)):
            return
        fields = {
            "request_id": call.request_id,
            "account": account,
            "key_id": "" if principal is None else principal.key_id,
            "mode": "" if principal is None else principal.mode,
            "protocol": call.protocol,
            "method": report.method,
            "status": report.http_status,
            "code": report.code,
            "address": call.address,
        }
        if not report.code:
            self._log("debug", "call", fields)
        elif principal is not None:
            self._log("info", "refused", fields)
        else:
            log.info(f"refused: {report.code}", extra={"fields": _known(fields)})  # a kind for each code

    def close(self) -> None:
        """Writes how many lines were not written since the last time. No report may follow."""
        self._repetitions.flush()

    def _log_repetitions(self, kind: tuple[str, str], count: int, _: str) -> None:
        account, code = kind
        fields = {"account": account, "code": code, "suppressed": count}
        self._log("info", "similar lines suppressed", fields)

    def _log(self, level: str, event: str, fields: Mapping[str, Any], *, urgent: bool = False) -> None:
        line = {"time": timestamp(time.time()), "level": level, "event": event}
        line |= _known(fields)
        line |= self._constant
        self._write(self._render(line), urgent=urgent)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value}


def _name(model: str) -> str:
    return printable(model[:MAX_MODEL]) + ("…" if len(model) > MAX_MODEL else "")
