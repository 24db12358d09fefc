"""What the observers make of single reports: metrics, log lines and spans."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.trace import NoOpTracer

from pomelo.call import Call, Principal
from pomelo.telemetry import spans
from pomelo.telemetry.events import AttemptReport, CallReport, TaskReport
from pomelo.telemetry.lines import json_line
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.spans import Spans
from pomelo.telemetry.task_log import MAX_MODEL, TaskLog
from tests.calls import call_of


def task(task_id: str = "task_1", *, model: str = "gpt-4", attempts: int = 1, code: str = "") -> TaskReport:
    """A text task of 250 ms."""
    outcome = "failed" if code else "completed"
    values: Any = (
        *(call_of(None), "acme", "k1", True, model, False, outcome, code, 200, 250.0, False),
        *(task_id, "text", "acme", "large", 1, attempts, 0, "", "", "", 0.0, 0, 0, None),
    )
    return TaskReport(*values)


def attempt(task_id: str) -> AttemptReport:
    return AttemptReport(
        *("req_1", task_id, "acme", "gpt-4", "acme", "large", 1, 1, "provider_failed", 500, "", "", "", 1.0),
        "end",
        0.0,
    )


def logged(level: int = logging.INFO) -> tuple[TaskLog, list[dict[str, Any]]]:
    """A log of that level, and its lines."""
    lines: list[dict[str, Any]] = []
    log = TaskLog(lambda line, urgent=False: lines.append(json.loads(line)), json_line, level, {})
    return log, lines


def call(account: str | None) -> Call:
    made = call_of(None)
    made.principal = None if account is None else Principal(account, "k1", True)
    return made


def test_only_tasks_that_called_a_provider_have_a_duration() -> None:
    metrics = Metrics()
    metrics.task_ended(task(attempts=0, code="rate_limit_exceeded"))
    assert not metrics.duration.values
    metrics.task_ended(task())
    (found,) = metrics.duration.values.values()
    assert (sum(found.counts), found.sum) == (1, 0.25)
    assert sum(metrics.tasks.values.values()) == 2


def test_a_cancelled_task_does_not_count_as_completed() -> None:
    metrics = Metrics()
    metrics.task_ended(replace(task(), outcome="cancelled"))
    metrics.task_ended(task())
    assert sorted(labels[-1] for labels in metrics.tasks.values) == ["cancelled", "ok"]


def test_the_line_of_a_failed_attempt_does_not_wait() -> None:
    urgent_lines: list[bool] = []
    log = TaskLog(lambda line, urgent: urgent_lines.append(urgent), json_line, logging.INFO, {})
    log.attempt_failed(attempt("task_1"))
    log.task_ended(task())
    assert urgent_lines == [True, False]


def test_a_refused_call_of_an_account_is_logged_and_a_successful_one_only_for_debugging() -> None:
    log, lines = logged()
    log.call_ended(CallReport(call("acme"), "ModelService/GetModel", "model_not_found", 404))
    log.call_ended(CallReport(call("acme"), "ModelService/GetModel", "", 200))
    assert [(line["event"], line["code"], line["account"]) for line in lines] == [
        ("refused", "model_not_found", "acme")
    ]
    debug, lines = logged(logging.DEBUG)
    debug.call_ended(CallReport(call("acme"), "ModelService/GetModel", "", 200))
    assert [(line["level"], line["event"]) for line in lines] == [("debug", "call")]


def test_calls_that_no_provider_was_asked_for_have_few_lines_and_a_sum() -> None:
    log, lines = logged()
    refused = replace(task("", attempts=0, code="unsupported_model"), outcome="refused")
    replayed = replace(task(attempts=0), replayed=True)
    gone = replace(task(attempts=0), outcome="cancelled")
    for _ in range(30):
        for report in (refused, replayed, gone):
            log.task_ended(report)
        log.call_ended(CallReport(call("acme"), "GET /api/v1/models/{name}", "not_found", 404))
    assert len(lines) == 40
    log.close()
    account = refused.account
    assert [(line["event"], line["account"], line["code"], line["suppressed"]) for line in lines[40:]] == [
        ("similar lines suppressed", account, "unsupported_model", 20),
        ("similar lines suppressed", account, "ok", 20),
        ("similar lines suppressed", account, "cancelled", 20),
        ("similar lines suppressed", "acme", "not_found", 20),
    ]


def test_every_task_that_a_provider_was_asked_for_or_that_failed_has_a_line() -> None:
    log, lines = logged()
    for _ in range(30):
        log.task_ended(task())
        log.task_ended(replace(task(attempts=0, code="provider_unavailable"), outcome="failed"))
        log.task_ended(replace(task(code="provider_failed"), outcome="failed"))
    log.close()
    assert len(lines) == 90


def test_a_model_that_does_not_exist_is_logged_short_and_printable() -> None:
    log, lines = logged()
    log.task_ended(task("", model="\x1b[31m" + "x" * 500, code="unsupported_model"))
    assert lines[0]["model"] == "\\x1b[31m" + "x" * (MAX_MODEL - 5) + "…"


def test_the_failed_calls_of_a_task_are_kept_until_it_ends_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans, "MAX_FAILED", 3)
    observer = Spans(NoOpTracer())
    for number in range(5):
        observer.attempt_failed(attempt(f"task_{number}"))
    assert set(observer._failed) == {"task_0", "task_1", "task_2"}
    for number in range(5):
        observer.task_ended(task(f"task_{number}"))
    assert not observer._failed
