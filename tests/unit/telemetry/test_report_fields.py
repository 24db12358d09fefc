"""Every field of a report is in the metrics and the lines, under its own name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from pomelo.call import Principal
from pomelo.runtime.repetitions import MAX_LINES
from pomelo.telemetry.events import CallReport, report_call
from pomelo.telemetry.lines import json_line
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.task_log import MAX_MODEL, TaskLog
from tests.calls import call_of
from tests.unit.telemetry.reports import Reports, attempt, record, task


def test_the_metrics_of_a_task_have_its_labels_and_times() -> None:
    metrics = Metrics()
    metrics.know_models({"gpt-4"})
    metrics.task_ended(task())
    assert metrics.tasks.values == {("rest", "test", "text", "gpt-4", "mistral", "ok"): 1}
    labels = ("text", "gpt-4", "mistral")
    for histogram, seconds in (
        (metrics.duration, 2.50004),
        (metrics.upstream, 1.50006),
        (metrics.first_byte, 0.3),
    ):
        found = histogram.values[labels]
        assert sum(found.counts) == 1
        assert found.sum == pytest.approx(seconds)
    metrics.task_ended(task(upstream_ms=0.0, first_byte_ms=0, attempts=1))
    assert [sum(each.values[labels].counts) for each in (metrics.duration, metrics.upstream)] == [2, 1]
    assert sum(metrics.first_byte.values[labels].counts) == 1
    metrics.task_ended(task(live=True, model="unknown", code="provider_failed", outcome="failed", attempts=0))
    assert metrics.tasks.values["rest", "live", "text", "", "mistral", "provider_failed"] == 1
    metrics.task_ended(task(outcome="cancelled", attempts=0))
    assert metrics.tasks.values["rest", "test", "text", "gpt-4", "mistral", "cancelled"] == 1
    assert metrics.duration.values.keys() == {labels}, "only tasks that called a provider have one"


def test_the_metrics_of_attempts_calls_and_charges_have_their_labels() -> None:
    metrics = Metrics()
    for status in (503, 504, 429, 0):
        metrics.attempt_failed(attempt(upstream_status=status))
    assert metrics.failed_attempts.values == {
        ("openai", "provider_failed", "5xx"): 2,
        ("openai", "provider_failed", "4xx"): 1,
        ("openai", "provider_failed", "none"): 1,
    }
    for code in ("", "", "model_not_found"):
        metrics.call_ended(CallReport(call_of(None), "x", code, 200))
    assert metrics.calls.values == {("rest", "ok"): 2, ("rest", "model_not_found"): 1}
    for live in (True, True, False):
        metrics.charged(record(live=live))
    metrics.charged(record(live=False, uncollected=0))
    both = {("gpt-4", "live"), ("gpt-4", "test")}
    assert metrics.input_tokens.values == dict.fromkeys(both, 22)
    assert metrics.output_tokens.values == dict.fromkeys(both, 24)
    assert metrics.cost.values == dict.fromkeys(both, 2_500_000)
    assert metrics.uncollected.values == {(): 21}


def test_connections_and_their_limit_are_read_by_protocol() -> None:
    metrics = Metrics()
    metrics.watch_connections("grpc", lambda: 3, 50)
    metrics.watch_connections("rest", lambda: 4, 60)
    assert dict(metrics.connections.readings()) == {("grpc",): 3, ("rest",): 4}
    assert dict(metrics.connections_limit.readings()) == {("grpc",): 50, ("rest",): 60}


def logged(level: int = logging.DEBUG) -> tuple[TaskLog, list[dict[str, Any]]]:
    """A log with the constant field `worker`, and its lines without their time."""
    lines: list[dict[str, Any]] = []

    def write(line: bytes, *, urgent: bool) -> None:
        fields = json.loads(line)
        assert fields.pop("time").endswith("+00:00")
        lines.append(fields | ({"urgent": True} if urgent else {}))

    return TaskLog(write, json_line, level, {"worker": 2}), lines


def test_the_line_of_a_task_has_its_fields() -> None:
    log, lines = logged()
    log.task_ended(task())
    expected: dict[str, Any] = {
        "level": "info",
        "event": "task",
        "request_id": "req_1",
        "task_id": "task_1",
        "account": "acme",
        "key_id": "key1",
        "mode": "test",
        "protocol": "rest",
        "model": "gpt-4",
        "stream": True,
        "outcome": "completed",
        "status": 200,
        "provider": "mistral",
        "provider_model": "large",
        "route": 2,
        "attempts": 3,
        "upstream_status": 201,
        "vendor_code": "odd",
        "vendor_request_id": "vendor_1",
        "reason": "it\\x1b is",
        "ms": 2500.0,
        "first_byte_ms": 300,
        "upstream_ms": 1500.1,
        "bytes": 77,
        "cost": "1.25",
        "replayed": True,
        "worker": 2,
    }
    assert lines == [expected]
    for without in (record(cost=0), None):
        log.task_ended(task(live=True, code="late", record=without, model="x" * 500))
        fields = lines[-1]
        assert (fields["mode"], fields["code"], fields["model"]) == ("live", "late", "x" * 500)
        assert "cost" not in fields


def test_the_line_of_a_failed_attempt_has_its_fields() -> None:
    log, lines = logged()
    log.attempt_failed(attempt())
    expected: dict[str, Any] = {
        "level": "warning",
        "event": "attempt failed",
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
        "reason": "it\\x1b was",
        "ms": 250.1,
        "next": "retry",
        "wait_ms": 250,
        "worker": 2,
        "urgent": True,
    }
    assert lines == [expected]


def test_the_line_of_a_call_has_its_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pomelo.calls")
    log, lines = logged()
    call = call_of(None)
    call.request_id, call.address = "req_2", "10.0.0.1"
    log.call_ended(CallReport(call, "POST /api", "invalid_api_key", 401))
    log.call_ended(CallReport(call, "POST /api", "", 200))
    call.principal = Principal("acme", "key1", live=False)
    log.call_ended(CallReport(call, "POST /api", "model_not_found", 404))
    common: dict[str, Any] = {"request_id": "req_2", "protocol": "rest", "method": "POST /api"}
    common["address"] = "10.0.0.1"
    assert lines == [
        common | {"level": "debug", "event": "call", "status": 200, "worker": 2},
        common
        | {"level": "info", "event": "refused", "status": 404, "code": "model_not_found", "worker": 2}
        | {"account": "acme", "key_id": "key1", "mode": "test"},
    ]
    (line,) = caplog.records  # its lines are limited, by the code
    assert line.getMessage() == "refused: invalid_api_key"
    assert line.__dict__["fields"] == common | {"status": 401, "code": "invalid_api_key"}


@pytest.mark.parametrize(
    ("level", "events"),
    [
        (logging.DEBUG, ["task", "attempt failed", "refused", "call"]),
        (logging.INFO, ["task", "attempt failed", "refused"]),
        (logging.WARNING, ["attempt failed"]),
        (logging.ERROR, []),
    ],
)
def test_lines_below_the_level_are_not_written(level: int, events: list[str]) -> None:
    log, lines = logged(level)
    call = call_of(None)
    call.principal = Principal("acme", "key1", live=False)
    log.task_ended(task())
    log.attempt_failed(attempt())
    for code in ("model_not_found", ""):
        log.call_ended(CallReport(call, "POST /api", code, 200))
    assert [line["event"] for line in lines] == events
    assert log.lines_dropped() == 0


def test_a_requested_model_is_logged_short_and_printable() -> None:
    log, lines = logged()
    for model in ("x" * MAX_MODEL, "\x1b[31m" + "x" * 500):
        log.task_ended(task(task_id="", model=model))
    assert [line["model"] for line in lines] == [
        "x" * MAX_MODEL,
        "\\x1b[31m" + "x" * (MAX_MODEL - 5) + "…",
    ]


def test_calls_that_no_provider_was_asked_for_have_few_lines_and_a_sum() -> None:
    log, lines = logged()
    call = call_of(None)
    call.principal = Principal("other", "k1", True)
    refused = task(task_id="", attempts=0, code="unsupported_model", outcome="refused")
    for _ in range(30):
        for report in (refused, task(attempts=0), task(attempts=0, outcome="cancelled")):
            log.task_ended(report)
        log.call_ended(CallReport(call, "GET /api/v1/models/{name}", "not_found", 404))
    assert len(lines) == 40
    log.close()
    assert [(line["event"], line["account"], line["code"], line["suppressed"]) for line in lines[40:]] == [
        ("similar lines suppressed", "acme", "unsupported_model", 20),
        ("similar lines suppressed", "acme", "ok", 20),
        ("similar lines suppressed", "acme", "cancelled", 20),
        ("similar lines suppressed", "other", "not_found", 20),
    ]


def test_the_sum_of_the_accounts_that_are_counted_together_names_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pomelo.telemetry.task_log.MAX_KINDS", 0)
    log, lines = logged()
    for number in range(MAX_LINES + 2):
        log.task_ended(task(attempts=0, code="not_found", outcome="refused", account=f"account {number}"))
    log.close()
    assert len(lines) == MAX_LINES + 1
    assert (lines[-1].get("account"), lines[-1]["code"], lines[-1]["suppressed"]) == (None, "not_found", 2)


def test_every_task_that_a_provider_was_asked_for_or_that_failed_has_a_line() -> None:
    log, lines = logged()
    for _ in range(30):
        log.task_ended(task())
        log.task_ended(task(attempts=0, code="provider_unavailable", outcome="failed"))
        log.task_ended(task(code="provider_failed", outcome="failed"))
    log.close()
    assert len(lines) == 90


def test_a_call_is_reported_unless_its_task_was() -> None:
    reports, call = Reports(), call_of(None)
    report_call([reports, reports], call, "POST /api", "late", 408)
    assert reports.calls == [CallReport(call, "POST /api", "late", 408)] * 2
    call.reported = True
    report_call([reports], call, "POST /api", "late", 408)
    assert len(reports.calls) == 2
