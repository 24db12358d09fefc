"""Every field of a report is in the metrics, the lines and the spans, under its own name."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pomelo.call import Call, Principal
from pomelo.stores.usage import UsageRecord
from pomelo.telemetry.events import AttemptReport, CallReport, TaskReport, report_call
from pomelo.telemetry.lines import json_line
from pomelo.telemetry.metrics import Metrics
from pomelo.telemetry.spans import Spans
from pomelo.telemetry.task_log import MAX_MODEL, TaskLog
from tests.calls import call_of
from tests.unit.accounts.audited_store import draft
from tests.unit.telemetry.reports import Reports

NS = 1_000_000_000
NOW = 1_700_000_000


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


def test_a_requested_model_of_the_longest_length_is_logged_whole() -> None:
    log, lines = logged()
    log.task_ended(task(task_id="", model="x" * MAX_MODEL))
    assert lines[0]["model"] == "x" * MAX_MODEL


def test_a_call_is_reported_unless_its_task_was() -> None:
    reports, call = Reports(), call_of(None)
    report_call([reports, reports], call, "POST /api", "late", 408)
    assert reports.calls == [CallReport(call, "POST /api", "late", 408)] * 2
    call.reported = True
    report_call([reports], call, "POST /api", "late", 408)
    assert len(reports.calls) == 2


@pytest.fixture(name="exporter")
def _exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(name="spans")
def _spans(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Spans:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(time, "time_ns", lambda: NOW * NS)
    return Spans(provider.get_tracer("test"))


def times(span: ReadableSpan) -> tuple[float, float]:
    """The seconds before NOW at which a span began and ended."""
    assert span.start_time is not None
    assert span.end_time is not None
    return NOW - span.start_time / NS, NOW - span.end_time / NS


def test_the_span_of_a_task_has_its_fields(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.task_ended(task(attempts=0))
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind, span.status.status_code) == (
        "text gpt-4",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "gpt-4",
        "gen_ai.request.stream": True,
        "pomelo.request_id": "req_1",
        "pomelo.task_id": "task_1",
        "pomelo.account": "acme",
        "pomelo.key_id": "key1",
        "pomelo.mode": "test",
        "pomelo.protocol": "rest",
        "pomelo.outcome": "completed",
        "pomelo.attempts": 0,
        "pomelo.replayed": True,
        "http.response.status_code": 200,
        "pomelo.cost_micros": 1_250_000,
    }
    assert times(span) == pytest.approx((2.50004, 0), abs=1e-6)


def test_a_span_has_only_what_is_known(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.task_ended(
        task(attempts=0, http_status=0, code="cancelled", reason="", record=None, task_type="", live=True)
    )
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.status.status_code, span.status.description) == ("task", StatusCode.ERROR, None)
    attributes = span.attributes or {}
    assert (attributes["error.type"], attributes["pomelo.mode"]) == ("cancelled", "live")
    assert {"http.response.status_code", "pomelo.cost_micros"}.isdisjoint(attributes)


def test_the_spans_of_calls_have_their_fields(spans: Spans, exporter: InMemorySpanExporter) -> None:
    spans.attempt_failed(attempt())
    spans.task_ended(task(attempts=2, code="late", reason="it was late"))
    failed, answered, whole = exporter.get_finished_spans()
    common = {"gen_ai.operation.name": "chat", "gen_ai.request.stream": True, "gen_ai.output.type": "text"}
    assert (failed.name, failed.kind) == ("chat gpt-4.1", SpanKind.CLIENT)
    assert failed.attributes == common | {
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4.1",
        "pomelo.route": 1,
        "http.response.status_code": 503,
        "pomelo.vendor_request_id": "vendor_2",
        "pomelo.vendor_code": "busy",
        "error.type": "provider_failed",
    }
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "it\x1b was")
    assert times(failed) == pytest.approx((0.25006, 0), abs=1e-6)
    assert (answered.name, answered.kind, answered.status.status_code) == (
        *("chat large", SpanKind.CLIENT),
        StatusCode.UNSET,
    )
    assert answered.attributes == common | {
        "gen_ai.provider.name": "mistral_ai",
        "gen_ai.request.model": "large",
        "pomelo.route": 2,
        "http.response.status_code": 201,
        "pomelo.vendor_request_id": "vendor_1",
        "pomelo.vendor_code": "odd",
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 3,
        "gen_ai.usage.cache_creation.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 5,
    }
    assert times(answered) == pytest.approx((1.25, 0), abs=1e-6)  # of the task's 1.5 s of calls
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "it was late")
    assert whole.context is not None
    parents = [span.parent.span_id if span.parent else None for span in (failed, answered)]
    assert parents == [whole.context.span_id] * 2


@pytest.mark.parametrize(
    ("task_type", "operation", "output"),
    [
        ("image", "generate_content", "image"),
        ("text_to_speech", "generate_content", "speech"),
        ("speech_to_speech", "generate_content", "speech"),
        ("speech_to_text", "generate_content", "text"),
    ],
)
def test_the_span_of_a_call_names_its_operation(
    spans: Spans, exporter: InMemorySpanExporter, task_type: str, operation: str, output: str
) -> None:
    empty = record(
        input_tokens=0, output_tokens=9, cached_input_tokens=0, cache_write_input_tokens=0, reasoning_tokens=0
    )
    spans.task_ended(
        task(task_type=task_type, attempts=1, upstream_ms=0.0, record=empty, upstream_status=0)
        if task_type == "image"
        else task(task_type=task_type, attempts=1, record=None, vendor_code="", vendor_request_id="")
    )
    call, _ = exporter.get_finished_spans()
    attributes = dict(call.attributes or {})
    assert (attributes["gen_ai.operation.name"], attributes["gen_ai.output.type"]) == (operation, output)
    assert call.name == f"{operation} large"
    if task_type == "image":
        assert {name for name in attributes if "usage" in name} == {"gen_ai.usage.output_tokens"}
        assert "http.response.status_code" not in attributes
        assert times(call) == (0, 0)
    else:
        assert not {name for name in attributes if "usage" in name or "vendor" in name}


def test_no_call_has_a_span_beyond_the_failed_ones(spans: Spans, exporter: InMemorySpanExporter) -> None:
    for number in (1, 2):
        spans.attempt_failed(attempt(attempt=number))
    spans.attempt_failed(attempt(task_id="task_2"))
    spans.task_ended(task(attempts=2))
    assert [span.name for span in exporter.get_finished_spans()] == ["chat gpt-4.1"] * 2 + ["text gpt-4"]
    exporter.clear()
    spans.task_ended(task(attempts=2, upstream_ms=100.0))
    call, _ = exporter.get_finished_spans()  # the failed ones are forgotten
    assert times(call) == pytest.approx((0.1, 0), abs=1e-6)
    exporter.clear()
    spans.task_ended(replace(task(attempts=2, upstream_ms=100.0), task_id="task_2"))
    _, call, _ = exporter.get_finished_spans()
    assert times(call) == (0, 0)  # never longer than the task's calls


def test_a_span_continues_the_trace_of_the_call(spans: Spans, exporter: InMemorySpanExporter) -> None:
    call = Call.from_headers({"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}.get, protocol="rest")
    spans.task_ended(task(call=call, attempts=0))
    (span,) = exporter.get_finished_spans()
    assert span.parent is not None
    assert (f"{span.parent.trace_id:x}", f"{span.parent.span_id:x}") == ("a" * 32, "b" * 16)
